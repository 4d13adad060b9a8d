// A step of learned rounding. Positions of a group move by rate on the mean, each in proportion to its gradient, by
// `longest` at most and no farther than one from the code that they began with; the factors of a range's ends by rate
// against the sign of their gradient.
//
// Gradients, codes as bytes in words and positions [rows, columns], the others [rows, groups]. A thread takes a group
// and adds its elements in order, as the processor does.

struct Parameters {
    grads_at: u32,
    begun_at: u32,
    scales_at: u32,
    bottoms_at: u32,
    tops_at: u32,
    positions_at: u32,
    lows_at: u32,
    highs_at: u32,
    groups: u32,
    // Words of a group.
    words: u32,
    most: u32,
    // 1 / size of a group, which is a power of two.
    share: f32,
    rate: f32,
    longest: f32,
    // The smallest mean.
    least: f32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> grads: array<f32>;
@group(0) @binding(1) var<storage, read> begun: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<f32>;
@group(0) @binding(3) var<storage, read> bottoms: array<f32>;
@group(0) @binding(4) var<storage, read> tops: array<f32>;
@group(0) @binding(5) var<storage, read_write> positions: array<f32>;
@group(0) @binding(6) var<storage, read_write> lows: array<f32>;
@group(0) @binding(7) var<storage, read_write> highs: array<f32>;
var<immediate> p: Parameters;

// Of each code, what part of the range lies below it.
var<workgroup> parts: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    parts[own] = quotient(f32(own), p.most);
    workgroupBarrier();
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.groups) {
        return;
    }
    let most = f32(p.most);
    let first = 4u * at * p.words;
    var sum = 0.0;
    for (var i = 0u; i < 4u * p.words; i += 1u) {
        sum += abs(grads[p.grads_at + first + i]);
    }
    let mean = sum * p.share;
    let unit = p.rate * sign_of(scales[p.scales_at + at]) / select(p.least, mean, mean > p.least);
    var to_low = 0.0;
    var to_high = 0.0;
    for (var word = 0u; word < p.words; word += 1u) {
        let four = begun[p.begun_at + at * p.words + word];
        for (var i = 0u; i < 4u; i += 1u) {
            let place = first + 4u * word + i;
            let grad = grads[p.grads_at + place];
            let position = positions[p.positions_at + place];
            let part = parts[u32(code_at(position, most))];
            to_high += opaque(grad * part, p.zero);
            to_low += opaque(grad * (1.0 - part), p.zero);
            let code = f32((four >> (8u * i)) & 255u);
            let moved = position - clamped(opaque(unit * grad, p.zero), -p.longest, p.longest);
            positions[p.positions_at + place] = clamped(clamped(moved, code - 1.0, code + 1.0), -0.5, most + 0.5);
        }
    }
    lows[p.lows_at + at] -= p.rate * sign_of(to_low * bottoms[p.bottoms_at + at]);
    highs[p.highs_at + at] -= p.rate * sign_of(to_high * tops[p.tops_at + at]);
}
