// What turns the scores of a tile of queries into probabilities, and gradients of probabilities into those of scores: a
// workgroup of 256 threads a row.
//
// Rows [batch, heads, length], row i of a head being token first + i; a row has a score for each of `keys` keys, the
// first of which is token first_key. A token sees itself and window - 1 tokens before it. Scores are scale * score, or
// cap * tanh(that / cap) with CAP; with SINK a head's sink takes part in the sum.
//
// Forward: scores become probabilities (0 where a token sees nothing); the largest score and the sum of exponentials
// are kept in `stats`. With BACK scores become the same probabilities by `stats`, slopes (gradients with respect to
// probabilities) become P * (slope - sum of P * slope), times scale and the cap's slope, and the sink's gradient of
// each row goes to `for_sinks` (Dao 2023, arXiv 2307.08691, section 3.1).
//
// Sums and the largest: thread i takes keys i, i + 256, .. of those between the first one that is seen and the token,
// counted from first_key, in order; then threads are joined as a binary tree.

struct Parameters {
    sinks_at: u32,
    scores_at: u32,
    slopes_at: u32,
    stats_at: u32,
    for_sinks_at: u32,
    rows: u32,
    heads: u32,
    length: u32,
    keys: u32,
    first: u32,
    first_key: u32,
    window: u32,
    scale: f32,
    cap: f32,
    lowest: f32,
}

const LANES = 256u;

@group(0) @binding(0) var<storage, read> sinks: array<f32>;
@group(0) @binding(1) var<storage, read_write> scores: array<f32>;
@group(0) @binding(2) var<storage, read_write> slopes: array<f32>;
@group(0) @binding(3) var<storage, read_write> stats: array<f32>;
@group(0) @binding(4) var<storage, read_write> for_sinks: array<f32>;
var<immediate> p: Parameters;

fn scored(x: f32) -> f32 {
#if CAP
    return p.cap * hyperbolic_tangent(p.scale * x / p.cap);
#else
    return p.scale * x;
#end
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let row = group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
    let token = p.first + row % p.length;
    let end = token + 1u - p.first_key;
    let begin = select(0u, token + 1u - p.window - p.first_key, token + 1u > p.window + p.first_key);
    let at = p.scores_at + row * p.keys;
#if SINK
    let sink = sinks[p.sinks_at + (row / p.length) % p.heads];
#end
#if BACK
    let most = stats[p.stats_at + 2u * row];
    let factor = 1.0 / stats[p.stats_at + 2u * row + 1u];
    let slope_at = p.slopes_at + row * p.keys;
    var sum = 0.0;
    for (var i = own; i < p.keys; i += 256u) {
        if (i >= begin && i < end) {
            sum += exponential(scored(scores[at + i]) - most) * factor * slopes[slope_at + i];
        }
    }
    let mean = total(own, sum);
    for (var i = own; i < p.keys; i += 256u) {
        var probability = 0.0;
        var slope = 0.0;
        if (i >= begin && i < end) {
            let score = scored(scores[at + i]);
            probability = exponential(score - most) * factor;
            slope = p.scale * probability * (slopes[slope_at + i] - mean);
#if CAP
            slope *= 1.0 - (score / p.cap) * (score / p.cap);
#end
        }
        scores[at + i] = probability;
        slopes[slope_at + i] = slope;
    }
#if SINK
    if (own == 0u) {
        for_sinks[p.for_sinks_at + row] = -exponential(sink - most) * factor * mean;
    }
#end
#else
    var most = p.lowest;
    for (var i = own; i < p.keys; i += 256u) {
        if (i >= begin && i < end) {
            let score = scored(scores[at + i]);
            scores[at + i] = score;
            most = select(most, score, score > most);
        }
    }
    most = largest(own, most);
    var held = 0.0;
#if SINK
    most = select(most, sink, sink > most);
    held = exponential(sink - most);
#end
    var sum = 0.0;
    for (var i = own; i < p.keys; i += 256u) {
        var value = 0.0;
        if (i >= begin && i < end) {
            value = exponential(scores[at + i] - most);
        }
        scores[at + i] = value;
        sum += value;
    }
    sum = total(own, sum) + held;
    let factor = 1.0 / sum;
    for (var i = own; i < p.keys; i += 256u) {
        scores[at + i] *= factor;
    }
    if (own == 0u) {
        stats[p.stats_at + 2u * row] = most;
        stats[p.stats_at + 2u * row + 1u] = sum;
    }
#end
}
