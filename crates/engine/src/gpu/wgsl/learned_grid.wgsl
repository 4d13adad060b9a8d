// Scales and biases of groups that learn, as a file holds them: with low and high what the ends of a range have gained,
// end * (factor - 1), these are round(scale + (high - low) / most) and round(lowest + low), one operation after the
// other.
//
// One thread a group. No sums.

struct Parameters {
    scales_at: u32,
    bottoms_at: u32,
    tops_at: u32,
    lows_at: u32,
    highs_at: u32,
    to_scales_at: u32,
    to_biases_at: u32,
    count: u32,
    most: u32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> scales: array<f32>;
@group(0) @binding(1) var<storage, read> bottoms: array<f32>;
@group(0) @binding(2) var<storage, read> tops: array<f32>;
@group(0) @binding(3) var<storage, read> lows: array<f32>;
@group(0) @binding(4) var<storage, read> highs: array<f32>;
@group(0) @binding(5) var<storage, read_write> to_scales: array<f32>;
@group(0) @binding(6) var<storage, read_write> to_biases: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let bottom = bottoms[p.bottoms_at + at];
    let low = opaque(bottom * opaque(lows[p.lows_at + at] - 1.0, p.zero), p.zero);
    let high = opaque(tops[p.tops_at + at] * opaque(highs[p.highs_at + at] - 1.0, p.zero), p.zero);
    let wider = opaque(quotient(opaque(high - low, p.zero), p.most), p.zero);
    to_scales[p.to_scales_at + at] = stored(scales[p.scales_at + at] + wider);
    to_biases[p.to_biases_at + at] = stored(bottom + low);
}
