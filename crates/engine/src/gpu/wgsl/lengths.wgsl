// Sums of squares of a grid's gradients, of scales and of centers, each times its unit |scale| * factor / divisor.
//
// A workgroup of 256 threads takes `part` groups: thread i its groups i, i + 256, .. in order, then threads are added as a
// binary tree. Sums are pairs of float32, of which the second holds what the first lost. outs [parts, 2].

struct Parameters {
    scales_at: u32,
    of_scales_at: u32,
    of_centers_at: u32,
    out_at: u32,
    count: u32,
    part: u32,
    parts: u32,
    zero: u32,
    scale_factor: f32,
    scale_divisor: f32,
    center_factor: f32,
    center_divisor: f32,
}

@group(0) @binding(0) var<storage, read> scales: array<f32>;
@group(0) @binding(1) var<storage, read> of_scales: array<f32>;
@group(0) @binding(2) var<storage, read> of_centers: array<f32>;
@group(0) @binding(3) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;

var<workgroup> lanes: array<vec2<f32>, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let part = group.y * groups.x + group.x;
    if (part >= p.parts) {
        return;
    }
    var sum = vec2<f32>();
    for (var at = part * p.part + own; at < min((part + 1u) * p.part, p.count); at += 256u) {
        let size = abs(scales[p.scales_at + at]);
        let of_scale = of_scales[p.of_scales_at + at] * (size * p.scale_factor / p.scale_divisor);
        let of_center = of_centers[p.of_centers_at + at] * (size * p.center_factor / p.center_divisor);
        sum = added(sum, of_scale * of_scale, p.zero);
        sum = added(sum, of_center * of_center, p.zero);
    }
    lanes[own] = sum;
    for (var width = 128u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if (own < width) {
            let other = lanes[own + width];
            lanes[own] = added(added(lanes[own], other.x, p.zero), other.y, p.zero);
        }
    }
    if (own == 0u) {
        outs[p.out_at + 2u * part] = lanes[0].x;
        outs[p.out_at + 2u * part + 1u] = lanes[0].y;
    }
}
