// The transpose of a matrix x [rows, columns]: out [columns, rows].
//
// Tiles of 32 x 32 go through workgroup memory, so that neighbours are read and written together; a workgroup of 32 x 8
// threads takes one. Rows of x and of out that are in reach are given as ranges. No sums.

struct Parameters {
    x_at: u32,
    out_at: u32,
    rows: u32,
    columns: u32,
    row: u32,
    row_end: u32,
    column: u32,
    column_end: u32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;
var<workgroup> tile: array<f32, 1056>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) own: u32) {
    let row = p.row + group.y * 32u;
    let column = p.column + group.x * 32u;
    let across = own % 32u;
    for (var i = own / 32u; i < 32u; i += 8u) {
        if (row + i < p.row_end && column + across < p.column_end) {
            tile[i * 33u + across] = xs[p.x_at + (row + i - p.row) * p.columns + column + across];
        }
    }
    workgroupBarrier();
    for (var i = own / 32u; i < 32u; i += 8u) {
        if (column + i < p.column_end && row + across < p.row_end) {
            outs[p.out_at + (column + i - p.column) * p.rows + row + across] = tile[across * 33u + i];
        }
    }
}
