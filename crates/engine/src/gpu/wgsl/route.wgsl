// The experts that each token goes to, the best of its row of scores [rows, experts], best first; of equal ones the
// first: a workgroup of 256 threads a row.
//
// An expert's place is the number of those before it. With GROUPS only experts of the `keep` best groups of `size`
// neighbours have their scores, others the lowest; a group is judged by its best score, or with `best_two` by the sum of
// its two best. `groups` has what groups are judged by, then whether they are kept. No sums but that.

struct Parameters {
    x_at: u32,
    groups_at: u32,
    out_at: u32,
    rows: u32,
    experts: u32,
    top_k: u32,
    size: u32,
    count: u32,
    keep: u32,
    best_two: u32,
    lowest: f32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read_write> judged: array<u32>;
@group(0) @binding(2) var<storage, read_write> outs: array<u32>;
var<immediate> p: Parameters;

// The key of an expert's score.
fn standing(row: u32, expert: u32) -> u32 {
    let x = xs[p.x_at + row * p.experts + expert];
#if GROUPS
    let home = expert / p.size;
    if (home >= p.count || judged[p.groups_at + (2u * row + 1u) * p.count + home] == 0u) {
        return key(p.lowest);
    }
#end
    return key(x);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let row = group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
#if GROUPS
    let judged_at = p.groups_at + 2u * row * p.count;
    for (var i = own; i < p.count; i += 256u) {
        let at = p.x_at + row * p.experts + i * p.size;
        var best = xs[at];
        var second = p.lowest;
        for (var j = 1u; j < p.size; j += 1u) {
            let x = xs[at + j];
            if (key(x) > key(best)) {
                second = best;
                best = x;
            } else if (j == 1u || key(x) > key(second)) {
                second = x;
            }
        }
        if (p.best_two != 0u && p.size > 1u) {
            best += second;
        }
        judged[judged_at + i] = key(best);
    }
    storageBarrier();
    for (var i = own; i < p.count; i += 256u) {
        let own_key = judged[judged_at + i];
        var before = 0u;
        for (var j = 0u; j < p.count; j += 1u) {
            let other = judged[judged_at + j];
            before += select(0u, 1u, other > own_key || (other == own_key && j < i));
        }
        judged[judged_at + p.count + i] = select(0u, 1u, before < p.keep);
    }
    storageBarrier();
#end
    for (var i = own; i < p.experts; i += 256u) {
        let own_key = standing(row, i);
        var before = 0u;
        for (var j = 0u; j < p.experts; j += 1u) {
            let other = standing(row, j);
            before += select(0u, 1u, other > own_key || (other == own_key && j < i));
        }
        if (before < p.top_k) {
            outs[p.out_at + row * p.top_k + before] = i;
        }
    }
}
