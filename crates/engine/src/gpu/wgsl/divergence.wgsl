// The gradient of KL(reference || model) with respect to a tile of the model's logits [rows, width], and each row's part
// of the divergence: a workgroup of 256 threads a row.
//
// With p = exp(factor * y - its log-sum-exp) of the reference's logits y and q likewise of the model's x: (q - p) *
// scale, and the sum of p * (log p - log q). A row has five numbers: both log-sum-exps as pairs of float32, the model's
// first, and the reference's less the model's.
//
// Sums: thread i takes elements i, i + 256, .. in order, then threads are added as a binary tree.

struct Parameters {
    x_at: u32,
    y_at: u32,
    tokens_at: u32,
    out_at: u32,
    sum_at: u32,
    rows: u32,
    width: u32,
    factor: f32,
    scale: f32,
}

const LANES = 256u;

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> ys: array<f32>;
@group(0) @binding(2) var<storage, read> tokens: array<f32>;
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
    let token = p.tokens_at + 5u * row;
    let lse = vec2<f32>(tokens[token], tokens[token + 1u]);
    let their_lse = vec2<f32>(tokens[token + 2u], tokens[token + 3u]);
    let apart = tokens[token + 4u];
    var sum = 0.0;
    for (var i = own; i < p.width; i += 256u) {
        let x = xs[p.x_at + at + i];
        let y = ys[p.y_at + at + i];
        let theirs = exponential((y * p.factor - their_lse.x) - their_lse.y);
        let ours = exponential((x * p.factor - lse.x) - lse.y);
        outs[p.out_at + at + i] = (ours - theirs) * p.scale;
        // What has no probability adds nothing, even where its logarithm is infinite.
        if (theirs != 0.0) {
            sum += theirs * ((y - x) * p.factor - apart);
        }
    }
    sum = total(own, sum);
    if (own == 0u) {
        sums[p.sum_at + row] = sum;
    }
}
