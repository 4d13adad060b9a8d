// The nearest code of each value on its group's grid; values become what the codes decode to.
//
// values and codes [columns, rows], scales and biases [groups, rows]. One thread an element, no sums.

struct Parameters {
    scales_at: u32,
    biases_at: u32,
    values_at: u32,
    codes_at: u32,
    count: u32,
    rows: u32,
    group: u32,
    most: f32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> scales: array<f32>;
@group(0) @binding(1) var<storage, read> biases: array<f32>;
@group(0) @binding(2) var<storage, read_write> values: array<f32>;
@group(0) @binding(3) var<storage, read_write> codes: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let grid = (at / p.rows / p.group) * p.rows + at % p.rows;
    let scale = scales[p.scales_at + grid];
    let bias = biases[p.biases_at + grid];
    let code = code_of(values[p.values_at + at], inverse_of(scale), bias, p.most);
    codes[p.codes_at + at] = code;
    values[p.values_at + at] = decoded(code, scale, bias, p.zero);
}
