// Sums of squares of each feature of x [rows, features], nearly as exact as in float64.
//
// Rows go in parts of `part`; a thread takes a part of one feature in order. A number is cut into two of 12 bits, whose
// products are exact; sums are pairs of float32, of which the second holds what the first lost (Knuth's two-sum).
// out [parts, 2, features].

struct Parameters {
    x_at: u32,
    out_at: u32,
    count: u32,
    features: u32,
    rows: u32,
    part: u32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;

fn added(sum: vec2<f32>, value: f32) -> vec2<f32> {
    let next = opaque(sum.x + value, p.zero);
    let there = opaque(next - sum.x, p.zero);
    let lost = opaque(sum.x - opaque(next - there, p.zero), p.zero) + opaque(value - there, p.zero);
    return vec2<f32>(next, sum.y + lost);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let feature = at % p.features;
    let part = at / p.features;
    var sum = vec2<f32>();
    for (var row = part * p.part; row < min((part + 1u) * p.part, p.rows); row += 1u) {
        let x = xs[p.x_at + row * p.features + feature];
        let high = bitcast<f32>(bitcast<u32>(x) & 0xfffff000u);
        let low = x - high;
        sum = added(sum, high * high);
        sum = added(sum, 2.0 * high * low);
        sum = added(sum, low * low);
    }
    outs[p.out_at + part * 2u * p.features + feature] = sum.x;
    outs[p.out_at + (part * 2u + 1u) * p.features + feature] = sum.y;
}
