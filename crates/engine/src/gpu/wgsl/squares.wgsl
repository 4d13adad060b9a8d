// Sums of squares of each feature of x [rows, features], nearly as exact as in float64.
//
// Rows go in parts of `part`; a thread takes a part of one feature in order. A number is cut into two of 12 bits, whose
// products are exact; sums are pairs of float32, of which the second holds what the first lost. out [parts, 2,
// features].
//
// With SLOPES features are tokens of a vocabulary, x their logits behind a softcap, cap * tanh(x / cap), and what is
// squared is the gradient of the negative log probability of a drawn token, expected: p (1 - p) times the squared slope
// of the cap. `inverse` is 1 / cap or 0; the log-sum-exp of a row is a pair of float32, the first of its five numbers.

struct Parameters {
    x_at: u32,
    tokens_at: u32,
    out_at: u32,
    count: u32,
    features: u32,
    rows: u32,
    part: u32,
    zero: u32,
    inverse: f32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> tokens: array<f32>;
@group(0) @binding(2) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;

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
#if SLOPES
        let token = p.tokens_at + 5u * row;
        let probability = exponential((x - tokens[token]) - tokens[token + 1u]);
        let slope = 1.0 - (x * p.inverse) * (x * p.inverse);
        sum = added(sum, probability * (1.0 - probability) * slope * slope, p.zero);
#else
        let high = bitcast<f32>(bitcast<u32>(x) & 0xfffff000u);
        let low = x - high;
        sum = added(sum, high * high, p.zero);
        sum = added(sum, 2.0 * high * low, p.zero);
        sum = added(sum, low * low, p.zero);
#end
    }
    outs[p.out_at + part * 2u * p.features + feature] = sum.x;
    outs[p.out_at + (part * 2u + 1u) * p.features + feature] = sum.y;
}
