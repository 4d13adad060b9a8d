// Scales and biases as a file holds them: round(scale), and round(center - round(scale) * middle), a product that is
// rounded and then a difference.
//
// One thread a group. No sums.

struct Parameters {
    scales_at: u32,
    centers_at: u32,
    to_scales_at: u32,
    to_biases_at: u32,
    count: u32,
    middle: f32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> scales: array<f32>;
@group(0) @binding(1) var<storage, read> centers: array<f32>;
@group(0) @binding(2) var<storage, read_write> to_scales: array<f32>;
@group(0) @binding(3) var<storage, read_write> to_biases: array<f32>;
var<immediate> p: Parameters;

fn rounded(x: f32) -> f32 {
    return $STORED;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let scale = rounded(scales[p.scales_at + at]);
    to_scales[p.to_scales_at + at] = scale;
    to_biases[p.to_biases_at + at] = rounded(centers[p.centers_at + at] - opaque(scale * p.middle, p.zero));
}
