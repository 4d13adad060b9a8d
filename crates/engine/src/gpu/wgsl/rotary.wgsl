// Heads x [batch, tokens, heads, d] whose first 2 * r features are rotated in pairs by angles [tokens, r], forwards
// (turn is 1) or back (-1). One thread a feature. No sums.

struct Parameters {
    x_at: u32,
    cos_at: u32,
    sin_at: u32,
    out_at: u32,
    count: u32,
    first: u32,
    tokens: u32,
    heads: u32,
    d: u32,
    r: u32,
    turn: f32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> cosines: array<f32>;
@group(0) @binding(2) var<storage, read> sines: array<f32>;
@group(0) @binding(3) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let feature = at % p.d;
    // `first` is the number of the first token of this launch.
    let token = (p.first + at / (p.d * p.heads)) % p.tokens;
    let x = xs[p.x_at + at];
    var y = x;
    if (feature < 2u * p.r) {
#if HALVES
        let second = feature >= p.r;
        let pair = select(feature, feature - p.r, second);
        let other = select(at + p.r, at - p.r, second);
#else
        let second = feature % 2u == 1u;
        let pair = feature / 2u;
        let other = select(at + 1u, at - 1u, second);
#end
        let angle = token * p.r + pair;
        let sine = sines[p.sin_at + angle] * p.turn;
        y = x * cosines[p.cos_at + angle] + xs[p.x_at + other] * select(-sine, sine, second);
    }
    outs[p.out_at + at] = y;
}
