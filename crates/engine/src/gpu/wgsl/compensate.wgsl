// GPTQ within one group (Frantar et al. 2022, arXiv 2210.17323): a column is rounded, and the columns after it make up
// for its error.
//
// values, codes [columns, rows]; this group's are in reach; upper holds the group's rows of U, whose columns begin at
// `start`; errors [group, rows] are what later groups make up for. A workgroup takes 32 rows, 8 threads each: all of
// them round a column, and each corrects every eighth column after it. Each value loses errors in the order of columns.

struct Parameters {
    upper_at: u32,
    scales_at: u32,
    biases_at: u32,
    values_at: u32,
    codes_at: u32,
    errors_at: u32,
    rows: u32,
    group: u32,
    line: u32,
    start: u32,
    // Rows of a member, and elements from one member's matrix to the next one's.
    own: u32,
    apart: u32,
    most: f32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> upper: array<f32>;
@group(0) @binding(1) var<storage, read> scales: array<f32>;
@group(0) @binding(2) var<storage, read> biases: array<f32>;
@group(0) @binding(3) var<storage, read_write> values: array<f32>;
@group(0) @binding(4) var<storage, read_write> codes: array<f32>;
@group(0) @binding(5) var<storage, read_write> errors: array<f32>;
var<immediate> p: Parameters;
// [group, 32]
var<workgroup> x: array<f32, 4096>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) own: u32) {
    let lane = own / 32u;
    let place = own % 32u;
    let row = group.x * 32u + place;
    let there = row < p.rows;
    let upper_at = p.upper_at + (group.x * 32u / p.own) * p.apart;
    var scale = 1.0;
    var bias = 0.0;
    if (there) {
        scale = scales[p.scales_at + row];
        bias = biases[p.biases_at + row];
    }
    for (var at = lane; at < p.group; at += 8u) {
        var value = 0.0;
        if (there) {
            value = values[p.values_at + at * p.rows + row];
        }
        x[at * 32u + place] = value;
    }
    let inverse = inverse_of(scale);
    for (var at = 0u; at < p.group; at += 1u) {
        workgroupBarrier();
        let value = x[at * 32u + place];
        let code = code_of(value, inverse, bias, p.most);
        let now = decoded(code, scale, bias, p.zero);
        let line = upper_at + at * p.line + p.start;
        let error = (value - now) * (1.0 / upper[line + at]);
        for (var i = at + 1u + lane; i < p.group; i += 8u) {
            x[i * 32u + place] = fma(-upper[line + i], error, x[i * 32u + place]);
        }
        if (lane == 0u && there) {
            codes[p.codes_at + at * p.rows + row] = code;
            values[p.values_at + at * p.rows + row] = now;
            errors[p.errors_at + at * p.rows + row] = error;
        }
    }
}
