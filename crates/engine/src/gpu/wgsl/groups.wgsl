// Gradients with respect to scale and center of each group, from that with respect to the weight: the sums of
// gradient * (code - middle) and of gradient over a group.
//
// Gradients [rows, columns], codes as bytes in words, both in order; groups are neighbours. A workgroup takes 8 groups,
// 32 threads each: thread i adds elements i, i + 32, .. in order, then threads are added as a binary tree.

struct Parameters {
    grads_at: u32,
    codes_at: u32,
    scales_at: u32,
    centers_at: u32,
    groups: u32,
    size: u32,
    middle: f32,
}

@group(0) @binding(0) var<storage, read> grads: array<f32>;
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read_write> scales: array<f32>;
@group(0) @binding(3) var<storage, read_write> centers: array<f32>;
var<immediate> p: Parameters;
var<workgroup> lanes: array<vec2<f32>, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = (group.y * groups.x + group.x) * 8u + own / 32u;
    let lane = own % 32u;
    var sum = vec2<f32>();
    if (at < p.groups) {
        for (var i = lane; i < p.size; i += 32u) {
            let element = at * p.size + i;
            let grad = grads[p.grads_at + element];
            let code = (codes[p.codes_at + element / 4u] >> (8u * (element % 4u))) & 255u;
            sum += vec2<f32>(grad * (f32(code) - p.middle), grad);
        }
    }
    lanes[own] = sum;
    for (var width = 16u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if (lane < width) {
            lanes[own] += lanes[own + width];
        }
    }
    if (lane == 0u && at < p.groups) {
        scales[p.scales_at + at] = lanes[own].x;
        centers[p.centers_at + at] = lanes[own].y;
    }
}
