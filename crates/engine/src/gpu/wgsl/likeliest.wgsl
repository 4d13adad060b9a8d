// What a teacher's likeliest tokens are to a tile of a student's logits [rows, width], of tokens first .. of the
// vocabulary: a workgroup of 256 threads a row.
//
// `list` has for each row where its tokens begin and where they end, then all tokens, then their log probabilities by
// the teacher; a row has three numbers: the student's log-sum-exp as a pair of float32, and the factor of the gradients
// of all other tokens. With q = exp(factor * logit - log-sum-exp) and p the teacher's probability: the sum of q over the
// row's tokens; or, with SLOPES, (q - p) * scale for these, q * scale * rest for all others, and the sum of p * (log p -
// log q).
//
// Sums: thread i takes the row's tokens i, i + 256, .. in order, then threads are added as a binary tree.

struct Parameters {
    x_at: u32,
    tokens_at: u32,
    list_at: u32,
    out_at: u32,
    sum_at: u32,
    rows: u32,
    width: u32,
    first: u32,
    row: u32,
    ids: u32,
    logs: u32,
    factor: f32,
    scale: f32,
}

const LANES = 256u;

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> tokens: array<f32>;
@group(0) @binding(2) var<storage, read> list: array<u32>;
@group(0) @binding(3) var<storage, read_write> outs: array<f32>;
@group(0) @binding(4) var<storage, read_write> sums: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let row = group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
    let at = row * p.width;
    let token = p.tokens_at + 3u * row;
    let lse = vec2<f32>(tokens[token], tokens[token + 1u]);
#if SLOPES
    let rest = p.scale * tokens[token + 2u];
    for (var i = own; i < p.width; i += 256u) {
        outs[p.out_at + at + i] = exponential((xs[p.x_at + at + i] * p.factor - lse.x) - lse.y) * rest;
    }
    // What follows goes over some of these, in other threads.
    storageBarrier();
#end
    let begin = list[p.list_at + p.row + row];
    let end = list[p.list_at + p.row + row + 1u];
    var sum = 0.0;
    for (var i = begin + own; i < end; i += 256u) {
        let place = at + list[p.list_at + p.ids + i] - p.first;
        let log_q = (xs[p.x_at + place] * p.factor - lse.x) - lse.y;
        let q = exponential(log_q);
#if SLOPES
        let log_p = bitcast<f32>(list[p.list_at + p.logs + i]);
        let probability = exponential(log_p);
        outs[p.out_at + place] = (q - probability) * p.scale;
        sum += probability * (log_p - log_q);
#else
        sum += q;
#end
    }
    sum = total(own, sum);
    if (own == 0u) {
        sums[p.sum_at + row] = sum;
    }
}
