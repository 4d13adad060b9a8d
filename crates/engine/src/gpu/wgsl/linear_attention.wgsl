// Linear attention with a decay (arXiv 2405.21060) over the tokens of each head: S = decay * S + k v^T, o = S^T q.
// With BACK from the last token to the first, with the decay of the token behind: gradients are such ways.
//
// q, k [batch, tokens, heads / served, keys], v [batch, tokens, heads / served, values], decay [batch, tokens, heads],
// o [batch, tokens, heads, values]; of each of q, k and v so many heads as its `served` share a vector. A workgroup takes
// 16 columns of one head's state through all tokens; of a column thread i of 16 holds rows i, i + 16, .. in registers,
// PART of them. What they find waits for 16 tokens, which the threads then add up together. Sums: a thread's rows in
// order, then the 16 threads in order.

struct Parameters {
    q_at: u32,
    k_at: u32,
    v_at: u32,
    decay_at: u32,
    out_at: u32,
    blocks: u32,
    tokens: u32,
    heads: u32,
    keys: u32,
    values: u32,
    q_served: u32,
    k_served: u32,
    v_served: u32,
    total: u32,
}

@group(0) @binding(0) var<storage, read> qs: array<f32>;
@group(0) @binding(1) var<storage, read> ks: array<f32>;
@group(0) @binding(2) var<storage, read> vs: array<f32>;
@group(0) @binding(3) var<storage, read> decays: array<f32>;
@group(0) @binding(4) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;
var<workgroup> found: array<f32, 4096>;

// The token of a step.
fn token_of(step: u32) -> u32 {
#if BACK
    return p.tokens - 1u - step;
#else
    return step;
#end
}

// The first number of a head's vector, where `served` heads share one of `width`.
fn place(row: u32, head: u32, served: u32, width: u32) -> u32 {
    return (row * (p.heads / served) + head / served) * width;
}

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
    for (var first = 0u; first < p.tokens; first += 16u) {
        let end = min(first + 16u, p.tokens);
        for (var step = first; step < end; step += 1u) {
            let row = window * p.tokens + token_of(step);
            var decay = 1.0;
            // In front of the first step the state is zero.
            if (step > 0u) {
#if BACK
                decay = decays[p.decay_at + (row + 1u) * p.heads + head];
#else
                decay = decays[p.decay_at + row * p.heads + head];
#end
            }
            var value = 0.0;
            if (column < p.values) {
                value = vs[p.v_at + place(row, head, p.v_served, p.values) + column];
            }
            let q_at = p.q_at + place(row, head, p.q_served, p.keys);
            let k_at = p.k_at + place(row, head, p.k_served, p.keys);
            var sum = 0.0;
#repeat e PART
            if (lane + $eu * 16u < p.keys) {
                s$e = fma(s$e, decay, ks[k_at + lane + $eu * 16u] * value);
                sum = fma(s$e, qs[q_at + lane + $eu * 16u], sum);
            }
#end
            found[(step - first) * 256u + own] = sum;
        }
        workgroupBarrier();
        if (first + lane < end && column < p.values) {
            var sum = 0.0;
            for (var i = 0u; i < 16u; i += 1u) {
                sum += found[lane * 256u + i * 16u + own % 16u];
            }
            let row = window * p.tokens + token_of(first + lane);
            outs[p.out_at + (row * p.heads + head) * p.values + column] = sum;
        }
        workgroupBarrier();
    }
}
