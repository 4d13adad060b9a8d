// Sums of pairs of float32: parts [parts, 2, features] added up to sums [2, features], with KEEP onto what is there. One
// thread a feature, parts in order.

struct Parameters {
    x_at: u32,
    sum_at: u32,
    features: u32,
    parts: u32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read_write> sums: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let feature = thread_of(group, groups, own, 256u);
    if (feature >= p.features) {
        return;
    }
    var sum = vec2<f32>();
#if KEEP
    sum = vec2<f32>(sums[p.sum_at + feature], sums[p.sum_at + p.features + feature]);
#end
    for (var part = 0u; part < p.parts; part += 1u) {
        let at = p.x_at + part * 2u * p.features + feature;
        sum = added(sum, xs[at], p.zero);
        sum = added(sum, xs[at + p.features], p.zero);
    }
    sums[p.sum_at + feature] = sum.x;
    sums[p.sum_at + p.features + feature] = sum.y;
}
