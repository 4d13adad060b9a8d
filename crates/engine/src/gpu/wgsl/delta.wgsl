// The gated delta rule (arXiv 2412.06464) over the tokens of each head: S = decay * S, S += k (beta * (v - S^T k))^T,
// o = S^T q.
//
// q, k [batch, tokens, heads, keys], v, o [batch, tokens, heads, values], beta and decay [batch, tokens, heads]; with
// EACH there is a decay for each row of the state, [batch, tokens, heads, keys]. A workgroup takes 16 columns of one head's state through all tokens; of a column thread i of 16 holds rows i, i + 16,
// .. in registers, PART of them. Sums: a thread's rows in order, then the 16 threads in order.

struct Parameters {
    q_at: u32,
    k_at: u32,
    v_at: u32,
    decay_at: u32,
    beta_at: u32,
    out_at: u32,
    blocks: u32,
    tokens: u32,
    heads: u32,
    keys: u32,
    values: u32,
    total: u32,
}

@group(0) @binding(0) var<storage, read> qs: array<f32>;
@group(0) @binding(1) var<storage, read> ks: array<f32>;
@group(0) @binding(2) var<storage, read> vs: array<f32>;
@group(0) @binding(3) var<storage, read> decays: array<f32>;
@group(0) @binding(4) var<storage, read> betas: array<f32>;
@group(0) @binding(5) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;
var<workgroup> remembered: array<f32, 256>;
var<workgroup> answered: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let block = group.y * groups.x + group.x;
    if (block >= p.total) {
        return;
    }
    let head = (block / p.blocks) % p.heads;
    let window = block / p.blocks / p.heads;
    // Threads of a row of the state lie side by side in columns.
    let lane = own / 16u;
    let column = (block % p.blocks) * 16u + own % 16u;
#repeat e PART
    var s$e = 0.0;
#end
    for (var token = 0u; token < p.tokens; token += 1u) {
        let at = (window * p.tokens + token) * p.heads + head;
#if EACH
#else
        let decay = decays[p.decay_at + at];
#end
        var sum = 0.0;
#repeat e PART
        var k$e = 0.0;
        if (lane + $eu * 16u < p.keys) {
            k$e = ks[p.k_at + at * p.keys + lane + $eu * 16u];
#if EACH
            s$e *= decays[p.decay_at + at * p.keys + lane + $eu * 16u];
#end
        }
#if EACH
#else
        s$e *= decay;
#end
        sum = fma(s$e, k$e, sum);
#end
        remembered[own] = sum;
        workgroupBarrier();
        sum = 0.0;
        for (var i = 0u; i < 16u; i += 1u) {
            sum += remembered[i * 16u + own % 16u];
        }
        var value = 0.0;
        if (column < p.values) {
            value = vs[p.v_at + at * p.values + column];
        }
        let change = (value - sum) * betas[p.beta_at + at];
        sum = 0.0;
#repeat e PART
        s$e = fma(k$e, change, s$e);
        if (lane + $eu * 16u < p.keys) {
            sum = fma(s$e, qs[p.q_at + at * p.keys + lane + $eu * 16u], sum);
        }
#end
        answered[own] = sum;
        workgroupBarrier();
        if (lane == 0u && column < p.values) {
            sum = 0.0;
            for (var i = 0u; i < 16u; i += 1u) {
                sum += answered[i * 16u + own];
            }
            outs[p.out_at + at * p.values + column] = sum;
        }
    }
}
