// Probabilities of a tile of logits [rows, width], less one where a label is drawn: a workgroup of 256 threads a row.
//
// A row has five numbers: its log-sum-exp and what is left of its draw, both as pairs of float32, and whether no label
// was drawn yet. The label is the first token at which the sum of the probabilities so far exceeds what is left; with
// `last` the last token if there is none. To `sums` [rows, 3] the sum of the probabilities as a pair, and whether a
// label was drawn.
//
// Sums: a thread takes neighbouring elements in order, then threads are added as a tree of neighbours (Hillis and
// Steele 1986), in pairs of float32.

struct Parameters {
    x_at: u32,
    tokens_at: u32,
    out_at: u32,
    sum_at: u32,
    rows: u32,
    width: u32,
    last: u32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> tokens: array<f32>;
@group(0) @binding(2) var<storage, read_write> outs: array<f32>;
@group(0) @binding(3) var<storage, read_write> sums: array<f32>;
var<immediate> p: Parameters;
var<workgroup> before: array<vec2<f32>, 256>;
var<workgroup> drawn: atomic<u32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let row = group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
    let x_at = p.x_at + row * p.width;
    let out_at = p.out_at + row * p.width;
    let token = p.tokens_at + 5u * row;
    let lse = vec2<f32>(tokens[token], tokens[token + 1u]);
    let left = vec2<f32>(tokens[token + 2u], tokens[token + 3u]);
    let part = (p.width + 255u) / 256u;
    let begin = min(own * part, p.width);
    let end = min(begin + part, p.width);
    var sum = vec2<f32>();
    for (var i = begin; i < end; i += 1u) {
        let probability = exponential((xs[x_at + i] - lse.x) - lse.y);
        outs[out_at + i] = probability;
        sum = added(sum, probability, p.zero);
    }
    before[own] = sum;
    if (own == 0u) {
        atomicStore(&drawn, p.width);
    }
    for (var reach = 1u; reach < 256u; reach *= 2u) {
        workgroupBarrier();
        if (own >= reach) {
            let other = before[own - reach];
            sum = added(added(other, sum.x, p.zero), sum.y, p.zero);
        }
        workgroupBarrier();
        before[own] = sum;
    }
    workgroupBarrier();
    if (own == 255u) {
        sums[p.sum_at + 3u * row] = sum.x;
        sums[p.sum_at + 3u * row + 1u] = sum.y;
    }
    sum = vec2<f32>();
    if (own > 0u) {
        sum = before[own - 1u];
    }
    for (var i = begin; i < end; i += 1u) {
        sum = added(sum, outs[out_at + i], p.zero);
        if (opaque(sum.x - left.x, p.zero) + (sum.y - left.y) > 0.0) {
            atomicMin(&drawn, i);
            break;
        }
    }
    workgroupBarrier();
    var label = atomicLoad(&drawn);
    if (p.last != 0u && label == p.width) {
        label = p.width - 1u;
    }
    let draws = tokens[token + 4u] != 0.0 && label < p.width;
    if (draws && label >= begin && label < end) {
        outs[out_at + label] -= 1.0;
    }
    if (own == 0u) {
        sums[p.sum_at + 3u * row + 2u] = select(0.0, 1.0, draws);
    }
}
