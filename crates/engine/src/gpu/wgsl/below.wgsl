// Numbers below a border, zero for the others; what is no number stays. All as bits, the border the first number of
// `state`. One thread a number, no sums.

struct Parameters {
    x_at: u32,
    state_at: u32,
    out_at: u32,
    count: u32,
}

@group(0) @binding(0) var<storage, read> xs: array<u32>;
@group(0) @binding(1) var<storage, read> state: array<u32>;
@group(0) @binding(2) var<storage, read_write> outs: array<u32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let x = xs[p.x_at + at];
    let size = x & 0x7fffffffu;
    outs[p.out_at + at] = select(x, 0u, size >= state[p.state_at] && size <= 0x7f800000u);
}
