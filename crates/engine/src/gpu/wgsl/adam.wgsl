// A step of Adam: moments of the gradient, and the numbers that it moves. With UNIT a number goes so far as a part of
// |scale| * factor / divisor.
//
// One thread a number. No sums.

struct Parameters {
    values_at: u32,
    first_at: u32,
    second_at: u32,
    slopes_at: u32,
    scales_at: u32,
    to_values_at: u32,
    to_first_at: u32,
    to_second_at: u32,
    count: u32,
    keep_first: f32,
    keep_second: f32,
    correct_first: f32,
    correct_second: f32,
    clip: f32,
    rate: f32,
    epsilon: f32,
    factor: f32,
    divisor: f32,
}

@group(0) @binding(0) var<storage, read> values: array<f32>;
@group(0) @binding(1) var<storage, read> firsts: array<f32>;
@group(0) @binding(2) var<storage, read> seconds: array<f32>;
@group(0) @binding(3) var<storage, read> slopes: array<f32>;
@group(0) @binding(4) var<storage, read> scales: array<f32>;
@group(0) @binding(5) var<storage, read_write> to_values: array<f32>;
@group(0) @binding(6) var<storage, read_write> to_firsts: array<f32>;
@group(0) @binding(7) var<storage, read_write> to_seconds: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let slope = slopes[p.slopes_at + at] * p.clip;
    let first = p.keep_first * firsts[p.first_at + at] + (1.0 - p.keep_first) * slope;
    let second = p.keep_second * seconds[p.second_at + at] + (1.0 - p.keep_second) * slope * slope;
#if UNIT
    let rate = abs(scales[p.scales_at + at]) * p.factor / p.divisor * p.rate;
#else
    let rate = p.rate;
#end
    let change = rate * (first / p.correct_first) / (sqrt(second / p.correct_second) + p.epsilon);
    to_values[p.to_values_at + at] = values[p.values_at + at] - change;
    to_firsts[p.to_first_at + at] = first;
    to_seconds[p.to_second_at + at] = second;
}
