// What a tile of logits [rows, width], of tokens first .. of the vocabulary, adds to the score of each row's token: a
// workgroup of 256 threads a row.
//
// Logits 0 are the model's; with BOTH logits 1 are the reference's. For each of them: the largest logit, the sum of
// exponentials relative to it, where in the tile it is first, and the logit of the row's target if that lies here. With
// BOTH last the sum of exp(reference) * (reference - model), relative to the reference's largest. out [rows, NUMBERS],
// floats as their bits.
//
// Sums and the largest: thread i takes elements i, i + 256, .. in order, then threads are joined as a binary tree.

struct Parameters {
    x0_at: u32,
    x1_at: u32,
    targets_at: u32,
    out_at: u32,
    rows: u32,
    width: u32,
    first: u32,
    lowest: f32,
}

const LANES = 256u;

@group(0) @binding(0) var<storage, read> xs0: array<f32>;
@group(0) @binding(1) var<storage, read> xs1: array<f32>;
@group(0) @binding(2) var<storage, read> targets: array<u32>;
@group(0) @binding(3) var<storage, read_write> outs: array<u32>;
var<immediate> p: Parameters;
var<workgroup> place: atomic<u32>;

fn least(own: u32, value: u32) -> u32 {
    workgroupBarrier();
    if (own == 0u) {
        atomicStore(&place, value);
    }
    workgroupBarrier();
    atomicMin(&place, value);
    workgroupBarrier();
    return atomicLoad(&place);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let row = group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
    let out_at = p.out_at + row * $NUMBERSu;
#repeat s MODELS
    let at$s = p.x$s_at + row * p.width;
    var most$s = p.lowest;
    var best$s = own;
    for (var i = own; i < p.width; i += 256u) {
        let x = xs$s[at$s + i];
        if (x > most$s) {
            most$s = x;
            best$s = i;
        }
    }
    let top$s = largest(own, most$s);
    let first$s = least(own, select(0xffffffffu, best$s, most$s == top$s));
    // Where nothing has any probability: exponentials of these themselves, which are zeros.
    let shift$s = select(top$s, 0.0, top$s == p.lowest);
    var sum$s = 0.0;
    for (var i = own; i < p.width; i += 256u) {
        sum$s += exponential(xs$s[at$s + i] - shift$s);
    }
    sum$s = total(own, sum$s);
    if (own == 0u) {
        outs[out_at + 4u * $su] = bitcast<u32>(top$s);
        outs[out_at + 4u * $su + 1u] = bitcast<u32>(sum$s);
        outs[out_at + 4u * $su + 2u] = first$s;
#if TARGETS
        let target$s = targets[p.targets_at + row] - p.first;
        if (target$s < p.width) {
            outs[out_at + 4u * $su + 3u] = bitcast<u32>(xs$s[at$s + target$s]);
        }
#end
    }
#end
#if BOTH
    var weighted = 0.0;
    for (var i = own; i < p.width; i += 256u) {
        let x = xs1[at1 + i];
        let weight = exponential(x - shift1);
        // What has no probability adds nothing, even where its logarithm is infinite.
        if (weight != 0.0) {
            weighted += weight * (x - xs0[at0 + i]);
        }
    }
    weighted = total(own, weighted);
    if (own == 0u) {
        outs[out_at + 8u] = bitcast<u32>(weighted);
    }
#end
}
