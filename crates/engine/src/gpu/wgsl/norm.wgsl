// A norm of each row of x [rows, d] and its gradient: a workgroup of LANES threads a row.
//
// y = (x - mean) * f with f = 1 / sqrt(mean((x - mean)^2) + eps), the mean being 0 without CENTRED. Forward: y * weight
// (+ bias). With BACK: f * (v - mean(v) - y * mean(v * y)) for v = grad * weight (mean(v) only with CENTRED), and with
// EACH also grad * y, whose sum over rows is the weight's gradient. Row i has row i modulo `parameters` of weight and
// bias.
//
// Sums: thread i adds elements i, i + LANES, .. in order, then threads are added as a binary tree.

struct Parameters {
    x_at: u32,
    weight_at: u32,
    other_at: u32,
    out_at: u32,
    each_at: u32,
    rows: u32,
    first: u32,
    d: u32,
    parameters: u32,
    eps: f32,
}

const LANES = $LANESu;

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> weights: array<f32>;
// Biases, or gradients.
@group(0) @binding(2) var<storage, read> others: array<f32>;
@group(0) @binding(3) var<storage, read_write> outs: array<f32>;
@group(0) @binding(4) var<storage, read_write> each: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size($LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let row = group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
    let x_at = p.x_at + row * p.d;
    let parameter = ((p.first + row) % p.parameters) * p.d;
    var mean = 0.0;
    var sum = 0.0;
#if CENTRED
    for (var i = own; i < p.d; i += LANES) {
        sum += xs[x_at + i];
    }
    mean = total(own, sum) / f32(p.d);
    sum = 0.0;
#end
    for (var i = own; i < p.d; i += LANES) {
        let x = xs[x_at + i] - mean;
        sum += x * x;
    }
    let factor = 1.0 / sqrt(total(own, sum) / f32(p.d) + p.eps);
    let out_at = p.out_at + row * p.d;
#if BACK
    let grad_at = p.other_at + row * p.d;
    var middle = 0.0;
    var along = 0.0;
    for (var i = own; i < p.d; i += LANES) {
        let y = (xs[x_at + i] - mean) * factor;
        var v = others[grad_at + i];
#if WEIGHT
        v *= weights[p.weight_at + parameter + i];
#end
        middle += v;
        along += v * y;
    }
    along = total(own, along) / f32(p.d);
#if CENTRED
    middle = total(own, middle) / f32(p.d);
#else
    middle = 0.0;
#end
    for (var i = own; i < p.d; i += LANES) {
        let y = (xs[x_at + i] - mean) * factor;
        let grad = others[grad_at + i];
        var v = grad;
#if WEIGHT
        v *= weights[p.weight_at + parameter + i];
#end
        outs[out_at + i] = factor * (v - middle - y * along);
#if EACH
        each[p.each_at + row * p.d + i] = grad * y;
#end
    }
#else
    for (var i = own; i < p.d; i += LANES) {
        var y = (xs[x_at + i] - mean) * factor;
#if WEIGHT
        y *= weights[p.weight_at + parameter + i];
#end
#if BIAS
        y += others[p.other_at + parameter + i];
#end
        outs[out_at + i] = y;
    }
#end
}
