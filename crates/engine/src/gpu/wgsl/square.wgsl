// A square matrix made of another one, element by element: row and column of the source, and what becomes of its
// element x, are filled in. `list` has a number for each row and column. Of the source only rows first .. end are in
// reach, `line` elements apart.
// One thread an element, no sums.

struct Parameters {
    xs_at: u32,
    list_at: u32,
    out_at: u32,
    count: u32,
    size: u32,
    line: u32,
    row: u32,
    first: u32,
    end: u32,
    number: f32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> list: array<u32>;
@group(0) @binding(2) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let i = p.row + at / p.size;
    let j = at % p.size;
    let row = $ROW;
    if (row < p.first || row >= p.end) {
        return;
    }
    let x = xs[p.xs_at + (row - p.first) * p.line + $COLUMN];
    outs[p.out_at + at] = $VALUE;
}
