// Sums, or largest elements, along the middle axis of [outer, count, inner].
//
// The axis goes in parts of `part` elements; a part is one row of the result [outer * parts, inner], and a later launch
// goes over those. With LANES a workgroup of 256 threads takes a part: thread i its elements i, i + 256, .. in order,
// then threads are added as a binary tree (inner is 1). Without, one thread takes a part of one column in order.

struct Parameters {
    x_at: u32,
    out_at: u32,
    // Results of this launch, the row of the first one, and rows of x in front of the binding.
    count: u32,
    first: u32,
    axis: u32,
    part: u32,
    parts: u32,
    inner: u32,
    start: f32,
    before: u32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;

fn joined(sum: f32, value: f32) -> f32 {
    return $JOINED;
}

#if LANES
var<workgroup> lanes: array<f32, 256>;
#end

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
#if LANES
    let result = group.y * groups.x + group.x;
    if (result >= p.count) {
        return;
    }
    let row = p.first + result;
    let begin = (row % p.parts) * p.part;
    let end = min(begin + p.part, p.axis);
    let at = p.x_at + (row / p.parts) * p.axis - p.before;
    var sum = p.start;
    for (var i = begin + own; i < end; i += 256u) {
        sum = joined(sum, xs[at + i]);
    }
    lanes[own] = sum;
    for (var width = 128u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if (own < width) {
            lanes[own] = joined(lanes[own], lanes[own + width]);
        }
    }
    if (own == 0u) {
        outs[p.out_at + result] = lanes[0];
    }
#else
    let result = thread_of(group, groups, own, 256u);
    if (result >= p.count) {
        return;
    }
    let row = p.first + result / p.inner;
    let column = result % p.inner;
    let begin = (row % p.parts) * p.part;
    let end = min(begin + p.part, p.axis);
    let at = p.x_at + (row / p.parts) * p.axis * p.inner + column - p.before;
    var sum = p.start;
    for (var i = begin; i < end; i += 1u) {
        sum = joined(sum, xs[at + i * p.inner]);
    }
    outs[p.out_at + result] = sum;
#end
}
