// The likeliest tokens of a tile of logits [rows, width], of tokens first .. of the vocabulary: a workgroup of 256
// threads a row.
//
// Those whose key (a number whose order is that of all float32, NaN included) is at least the row's `leasts`; with
// SELECT also at least that of the `kept` likeliest of the row, by bits from the first. To `outs` first the number of
// all rows' tokens, then where each row's begin and how many they are, then pairs of a logit's bits and a token. Where
// a row's tokens lie, and their order, is chance; which they are is not. No sums but of whole numbers.

struct Parameters {
    x_at: u32,
    leasts_at: u32,
    out_at: u32,
    rows: u32,
    width: u32,
    first: u32,
    kept: u32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> leasts: array<u32>;
@group(0) @binding(2) var<storage, read_write> outs: array<atomic<u32>>;
var<immediate> p: Parameters;
var<workgroup> counter: atomic<u32>;
var<workgroup> start: u32;

// How many keys are at least that.
fn count(own: u32, at: u32, bound: u32) -> u32 {
    workgroupBarrier();
    if (own == 0u) {
        atomicStore(&counter, 0u);
    }
    workgroupBarrier();
    var several = 0u;
    for (var i = own; i < p.width; i += 256u) {
        several += select(0u, 1u, key(xs[at + i]) >= bound);
    }
    atomicAdd(&counter, several);
    workgroupBarrier();
    return atomicLoad(&counter);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let row = group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
    let at = p.x_at + row * p.width;
    var bound = leasts[p.leasts_at + row];
#if SELECT
    var selected = 0u;
    for (var bit = 0x80000000u; bit > 0u; bit >>= 1u) {
        let tried = selected | bit;
        if (count(own, at, tried) >= p.kept) {
            selected = tried;
        }
    }
    bound = max(bound, selected);
#end
    let several = count(own, at, bound);
    workgroupBarrier();
    if (own == 0u) {
        start = atomicAdd(&outs[p.out_at], several);
        atomicStore(&outs[p.out_at + 1u + 2u * row], start);
        atomicStore(&outs[p.out_at + 2u + 2u * row], several);
        atomicStore(&counter, 0u);
    }
    workgroupBarrier();
    let place = p.out_at + 1u + 2u * (p.rows + start);
    for (var i = own; i < p.width; i += 256u) {
        let x = xs[at + i];
        if (key(x) >= bound) {
            let slot = atomicAdd(&counter, 1u);
            atomicStore(&outs[place + 2u * slot], bitcast<u32>(x));
            atomicStore(&outs[place + 2u * slot + 1u], p.first + i);
        }
    }
}
