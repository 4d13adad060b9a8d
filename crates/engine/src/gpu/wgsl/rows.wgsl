// Rows that are chosen, or added up.
//
// Without ADD: row i of the result is row ids[i] of x [.., width]; with several lists of `many` ids each is for `own` of a
// row's elements. With ADD: row i of the result is the sum of the rows
// list[starts[i]], .., list[starts[i + 1] - 1] of x, in this order. Of x only rows first .. end are in reach; with KEEP
// the sum goes on from what is there. One thread an element.

struct Parameters {
    x_at: u32,
    ids_at: u32,
    out_at: u32,
    count: u32,
    width: u32,
    first: u32,
    end: u32,
    list: u32,
    row: u32,
    own: u32,
    many: u32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let row = p.row + at / p.width;
    let column = at % p.width;
#if ADD
    var sum = 0.0;
#if KEEP
    sum = outs[p.out_at + at];
#end
    for (var i = ids[p.ids_at + row]; i < ids[p.ids_at + row + 1u]; i += 1u) {
        let source = ids[p.list + i];
        if (source >= p.first && source < p.end) {
            sum += xs[p.x_at + (source - p.first) * p.width + column];
        }
    }
    outs[p.out_at + at] = sum;
#else
    let source = ids[p.ids_at + (column / p.own) * p.many + row];
    if (source >= p.first && source < p.end) {
        outs[p.out_at + at] = xs[p.x_at + (source - p.first) * p.width + column];
    }
#end
}
