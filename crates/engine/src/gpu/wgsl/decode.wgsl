// What codes decode to, with numbers of their groups: code * scale + bias.
//
// Codes [rows, columns] as bytes in words, four of a word in one group; scales and biases [rows, groups]; values
// [rows, columns]. A thread takes a word. No sums.

struct Parameters {
    codes_at: u32,
    scales_at: u32,
    biases_at: u32,
    values_at: u32,
    words: u32,
    group: u32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> codes: array<u32>;
@group(0) @binding(1) var<storage, read> scales: array<f32>;
@group(0) @binding(2) var<storage, read> biases: array<f32>;
@group(0) @binding(3) var<storage, read_write> values: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.words) {
        return;
    }
    let four = codes[p.codes_at + at];
    let grid = 4u * at / p.group;
    let scale = scales[p.scales_at + grid];
    let bias = biases[p.biases_at + grid];
    for (var i = 0u; i < 4u; i += 1u) {
        let code = f32((four >> (8u * i)) & 255u);
        values[p.values_at + 4u * at + i] = decoded(code, scale, bias, p.zero);
    }
}
