// The largest size among the elements of each line of x, as bits: a workgroup of 256 threads for each line. What is not a
// number is larger than all that is.

struct Parameters {
    x_at: u32,
    out_at: u32,
    lines: u32,
    length: u32,
    // Elements between lines.
    apart: u32,
}

@group(0) @binding(0) var<storage, read> xs: array<u32>;
@group(0) @binding(1) var<storage, read_write> outs: array<u32>;
var<immediate> p: Parameters;

var<workgroup> lanes: array<u32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let line = group.y * groups.x + group.x;
    if (line >= p.lines) {
        return;
    }
    var largest = 0u;
    for (var i = own; i < p.length; i += 256u) {
        largest = max(largest, xs[p.x_at + line * p.apart + i] & 0x7fffffffu);
    }
    lanes[own] = largest;
    for (var width = 128u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if (own < width) {
            lanes[own] = max(lanes[own], lanes[own + width]);
        }
    }
    if (own == 0u) {
        outs[p.out_at + line] = lanes[0];
    }
}
