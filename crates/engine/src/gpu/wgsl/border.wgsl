// The next bits of the size that is looked for, the `wanted`th from the largest: those at which the counts of larger
// ones reach it.
//
// counts [values]; state: the bits that are known, and how many sizes lie beyond all that begin with these. One
// workgroup of 256 threads, of which each adds up neighbouring counts; one thread goes through what they have, from the
// largest on.

struct Parameters {
    counts_at: u32,
    state_at: u32,
    values: u32,
    wanted: u32,
}

@group(0) @binding(0) var<storage, read> counts: array<u32>;
@group(0) @binding(1) var<storage, read_write> state: array<u32>;
var<immediate> p: Parameters;

var<workgroup> sums: array<u32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) own: u32) {
    let width = p.values / 256u;
    var sum = 0u;
    for (var i = 0u; i < width; i += 1u) {
        sum += counts[p.counts_at + own * width + i];
    }
    sums[own] = sum;
    workgroupBarrier();
    if (own != 0u) {
        return;
    }
    var beyond = state[p.state_at + 1u];
    var lane = 255u;
    while (lane > 0u && beyond + sums[lane] < p.wanted) {
        beyond += sums[lane];
        lane -= 1u;
    }
    var value = lane * width + width - 1u;
    while (value > lane * width && beyond + counts[p.counts_at + value] < p.wanted) {
        beyond += counts[p.counts_at + value];
        value -= 1u;
    }
    state[p.state_at] = state[p.state_at] * p.values + value;
    state[p.state_at + 1u] = beyond;
}
