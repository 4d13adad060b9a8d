// Gradients of the gated delta rule (delta.wgsl), with respect to the gradient of what it gave.
//
// A workgroup takes 16 columns of one head's state, which thread i of a column holds as there. It goes through all
// tokens and keeps the state at each 32nd, then from the last 32 tokens to the first through each 32 once more, keeping
// the state in front of every token, and back over them with the state's gradient G. With S the state behind a token,
// `faded` = decay * the state in front of it, m = v - faded^T k and d the gradient of o: G += q d^T; for m e = beta *
// G^T k, so for v e, for beta m . G^T k; for q S d; for k beta * G m - faded e; then G -= k e^T, for decay the sum of
// G * the state in front, and G = decay * G.
//
// For v to `for_vs`, of its shape. What is summed over columns goes to `parts`: for each block of 16 columns those for q
// and k [2, rows, keys], and those for decay and beta [16, 2, rows] (the threads of a column for the one, the columns
// for the other); rows are [tokens, heads]. With EACH there is a decay for each row of the state: [3, rows, keys] for
// q, k and decay, [16, 1, rows] for beta. `fades` has decays, then betas. A window a launch; `states` is room for each
// of its workgroups. Sums: as in delta.wgsl; over 16 columns in order.

struct Parameters {
    q_at: u32,
    k_at: u32,
    v_at: u32,
    grad_at: u32,
    fades_at: u32,
    for_vs_at: u32,
    parts_at: u32,
    states_at: u32,
    first: u32,
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
@group(0) @binding(3) var<storage, read> grads: array<f32>;
@group(0) @binding(4) var<storage, read> fades: array<f32>;
@group(0) @binding(5) var<storage, read_write> for_vs: array<f32>;
@group(0) @binding(6) var<storage, read_write> parts: array<f32>;
@group(0) @binding(7) var<storage, read_write> states: array<f32>;
var<immediate> p: Parameters;
var<workgroup> along: array<f32, 256>;
var<workgroup> missed: array<f32, 512>;
var<workgroup> for_q: array<f32, 1024>;
var<workgroup> for_k: array<f32, 1024>;
#if EACH
var<workgroup> for_decay: array<f32, 1024>;
#else
var<workgroup> for_decay: array<f32, 256>;
#end

// The sum of what the 16 threads of this thread's column have.
fn down(own: u32, value: f32) -> f32 {
    workgroupBarrier();
    along[own] = value;
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < 16u; i += 1u) {
        sum += along[i * 16u + own % 16u];
    }
    return sum;
}

// A feature of a key, 0 beyond the last.
fn key_of(at: u32, feature: u32) -> f32 {
    if (feature < p.keys) {
        return ks[p.k_at + at * p.keys + feature];
    }
    return 0.0;
}

#if EACH
// The decay of a feature's row of the state, 1 beyond the last.
fn decay_of(at: u32, feature: u32) -> f32 {
    if (feature < p.keys) {
        return fades[p.fades_at + at * p.keys + feature];
    }
    return 1.0;
}

#end
fn beta_of(rows: u32, at: u32) -> f32 {
#if EACH
    return fades[p.fades_at + rows * p.keys + at];
#else
    return fades[p.fades_at + rows + at];
#end
}

fn value_of(at: u32, column: u32) -> f32 {
    if (column < p.values) {
        return vs[p.v_at + at * p.values + column];
    }
    return 0.0;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let item = group.y * groups.x + group.x;
    if (item >= p.total) {
        return;
    }
    let head = item / p.blocks;
    let block = item % p.blocks;
    let lane = own / 16u;
    let column = (p.first + block) * 16u + own % 16u;
    let rows = p.tokens * p.heads;
    let segments = (p.tokens + 31u) / 32u;
    // A state is the registers of all threads, one after the other.
    let size = $CHUNKSu * 1024u;
    let kept = p.states_at + item * (segments + 32u) * size + own;
    let each = kept + segments * size;
    let parts_at = p.parts_at + block * rows * ($WIDEu * p.keys + $NARROWu * 16u);
    let small_at = parts_at + rows * $WIDEu * p.keys;
#repeat c CHUNKS
#repeat f 4
    var s$c_$f = 0.0;
    var g$c_$f = 0.0;
#end
#end
    for (var token = 0u; token < p.tokens; token += 1u) {
        if (token % 32u == 0u) {
#repeat c CHUNKS
#repeat f 4
            states[kept + (token / 32u) * size + ($cu * 4u + $fu) * 256u] = s$c_$f;
#end
#end
        }
        let at = token * p.heads + head;
#if EACH
#else
        let decay = fades[p.fades_at + at];
#end
        var sum = 0.0;
#repeat c CHUNKS
#repeat f 4
        let k$c_$f = key_of(at, lane + ($cu * 4u + $fu) * 16u);
#if EACH
        s$c_$f *= decay_of(at, lane + ($cu * 4u + $fu) * 16u);
#else
        s$c_$f *= decay;
#end
        sum = fma(s$c_$f, k$c_$f, sum);
#end
#end
        let change = (value_of(at, column) - down(own, sum)) * beta_of(rows, at);
#repeat c CHUNKS
#repeat f 4
        s$c_$f = fma(k$c_$f, change, s$c_$f);
#end
#end
    }
    for (var segment = segments; segment > 0u; segment -= 1u) {
        let begin = (segment - 1u) * 32u;
        let length = min(32u, p.tokens - begin);
#repeat c CHUNKS
#repeat f 4
        s$c_$f = states[kept + (segment - 1u) * size + ($cu * 4u + $fu) * 256u];
#end
#end
        for (var i = 0u; i < length; i += 1u) {
            let at = (begin + i) * p.heads + head;
#if EACH
#else
            let decay = fades[p.fades_at + at];
#end
            var sum = 0.0;
#repeat c CHUNKS
#repeat f 4
            let k$c_$f = key_of(at, lane + ($cu * 4u + $fu) * 16u);
            states[each + i * size + ($cu * 4u + $fu) * 256u] = s$c_$f;
#if EACH
            s$c_$f *= decay_of(at, lane + ($cu * 4u + $fu) * 16u);
#else
            s$c_$f *= decay;
#end
            sum = fma(s$c_$f, k$c_$f, sum);
#end
#end
            let miss = value_of(at, column) - down(own, sum);
            if (lane == 0u) {
                missed[i * 16u + own] = miss;
            }
            let change = miss * beta_of(rows, at);
#repeat c CHUNKS
#repeat f 4
            s$c_$f = fma(k$c_$f, change, s$c_$f);
#end
#end
        }
        workgroupBarrier();
        for (var i = length; i > 0u; i -= 1u) {
            let at = (begin + i - 1u) * p.heads + head;
#if EACH
#else
            let decay = fades[p.fades_at + at];
#end
            let beta = beta_of(rows, at);
            let miss = missed[(i - 1u) * 16u + own % 16u];
            var grad = 0.0;
            if (column < p.values) {
                grad = grads[p.grad_at + at * p.values + column];
            }
            var sum = 0.0;
#repeat c CHUNKS
#repeat f 4
            let k$c_$f = key_of(at, lane + ($cu * 4u + $fu) * 16u);
            if (lane + ($cu * 4u + $fu) * 16u < p.keys) {
                g$c_$f = fma(qs[p.q_at + at * p.keys + lane + ($cu * 4u + $fu) * 16u], grad, g$c_$f);
            }
            sum = fma(g$c_$f, k$c_$f, sum);
#end
#end
            let along_k = down(own, sum);
            let for_v = beta * along_k;
            if (lane == 0u) {
                if (column < p.values) {
                    for_vs[p.for_vs_at + at * p.values + column] = for_v;
                }
                parts[small_at + ($NARROWu * (own + 1u) - 1u) * rows + at] = along_k * miss;
            }
#if EACH
#else
            var fade = 0.0;
#end
#repeat c CHUNKS
#repeat f 4
#if EACH
            let decay$c_$f = decay_of(at, lane + ($cu * 4u + $fu) * 16u);
#end
            let front$c_$f = states[each + (i - 1u) * size + ($cu * 4u + $fu) * 256u];
            for_q[$fu * 256u + own] = s$c_$f * grad;
#if EACH
            for_k[$fu * 256u + own] = g$c_$f * (beta * miss) - decay$c_$f * front$c_$f * for_v;
            g$c_$f -= k$c_$f * for_v;
            for_decay[$fu * 256u + own] = g$c_$f * front$c_$f;
            g$c_$f *= decay$c_$f;
#else
            for_k[$fu * 256u + own] = g$c_$f * (beta * miss) - decay * front$c_$f * for_v;
            g$c_$f -= k$c_$f * for_v;
            fade = fma(g$c_$f, front$c_$f, fade);
            g$c_$f *= decay;
#end
            s$c_$f = front$c_$f;
#end
            workgroupBarrier();
            // 64 rows for q, and as many for k (and for decay).
            if (own < $WIDEu * 64u) {
                let feature = own % 64u;
                var across = 0.0;
                for (var j = 0u; j < 16u; j += 1u) {
                    let place = (feature / 16u) * 256u + (feature % 16u) * 16u + j;
#if EACH
                    across += select(select(for_q[place], for_k[place], own >= 64u), for_decay[place], own >= 128u);
#else
                    across += select(for_q[place], for_k[place], own >= 64u);
#end
                }
                if ($cu * 64u + feature < p.keys) {
                    parts[parts_at + ((own / 64u) * rows + at) * p.keys + $cu * 64u + feature] = across;
                }
            }
            workgroupBarrier();
#end
#if EACH
#else
            for_decay[own] = fade;
            workgroupBarrier();
            if (own < 16u) {
                var across = 0.0;
                for (var j = 0u; j < 16u; j += 1u) {
                    across += for_decay[own * 16u + j];
                }
                parts[small_at + 2u * own * rows + at] = across;
            }
#end
        }
    }
}
