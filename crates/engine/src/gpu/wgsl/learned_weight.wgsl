// What positions decode to, with numbers of their groups: code * scale + bias.
//
// Positions and values [rows, columns], scales and biases [rows, groups]. A thread takes an element. No sums.

struct Parameters {
    positions_at: u32,
    scales_at: u32,
    biases_at: u32,
    values_at: u32,
    count: u32,
    size: u32,
    most: f32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> positions: array<f32>;
@group(0) @binding(1) var<storage, read> scales: array<f32>;
@group(0) @binding(2) var<storage, read> biases: array<f32>;
@group(0) @binding(3) var<storage, read_write> values: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let grid = at / p.size;
    let code = code_at(positions[p.positions_at + at], p.most);
    values[p.values_at + at] = decoded(code, scales[p.scales_at + grid], biases[p.biases_at + grid], p.zero);
}
