// How many numbers, of those whose sizes begin with the bits that are known, have which bits next: a part of a radix
// selection. `state` has the known bits of the size that is looked for.
//
// x in any shape, as bits; to counts those of each value of the next bits. A workgroup of 256 threads takes `part`
// numbers. Counts are whole numbers, so their order decides nothing.

struct Parameters {
    x_at: u32,
    state_at: u32,
    counts_at: u32,
    count: u32,
    part: u32,
    parts: u32,
    // Bits of a size that follow those that are known, and that follow the next ones.
    known: u32,
    next: u32,
    values: u32,
}

@group(0) @binding(0) var<storage, read> xs: array<u32>;
@group(0) @binding(1) var<storage, read> state: array<u32>;
@group(0) @binding(2) var<storage, read_write> counts: array<atomic<u32>>;
var<immediate> p: Parameters;

var<workgroup> seen: array<atomic<u32>, 2048>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let part = group.y * groups.x + group.x;
    if (part >= p.parts) {
        return;
    }
    for (var i = own; i < p.values; i += 256u) {
        atomicStore(&seen[i], 0u);
    }
    workgroupBarrier();
    for (var at = part * p.part + own; at < min((part + 1u) * p.part, p.count); at += 256u) {
        let size = xs[p.x_at + at] & 0x7fffffffu;
        if ((size >> p.known) == state[p.state_at]) {
            atomicAdd(&seen[(size >> p.next) & (p.values - 1u)], 1u);
        }
    }
    workgroupBarrier();
    for (var i = own; i < p.values; i += 256u) {
        let count = atomicLoad(&seen[i]);
        if (count > 0u) {
            atomicAdd(&counts[p.counts_at + i], count);
        }
    }
}
