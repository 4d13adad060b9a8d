// Softmax of each row of x [rows, d], or its gradient y * (grad - sum(y * grad)): a workgroup of 256 threads a row.
//
// Sums and the largest element: thread i takes elements i, i + 256, .. in order, then threads are joined as a binary
// tree.

struct Parameters {
    x_at: u32,
    grad_at: u32,
    out_at: u32,
    rows: u32,
    d: u32,
    lowest: f32,
}

const LANES = 256u;

// With BACK what softmax gave.
@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> grads: array<f32>;
@group(0) @binding(2) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let row = group.y * groups.x + group.x;
    if (row >= p.rows) {
        return;
    }
    let x_at = p.x_at + row * p.d;
    let grad_at = p.grad_at + row * p.d;
    let out_at = p.out_at + row * p.d;
    var sum = 0.0;
#if BACK
    for (var i = own; i < p.d; i += 256u) {
        sum += xs[x_at + i] * grads[grad_at + i];
    }
    sum = total(own, sum);
    for (var i = own; i < p.d; i += 256u) {
        let y = xs[x_at + i];
        outs[out_at + i] = y * grads[grad_at + i] - y * sum;
    }
#else
    var most = p.lowest;
    for (var i = own; i < p.d; i += 256u) {
        let x = xs[x_at + i];
        most = select(most, x, x > most);
    }
    most = largest(own, most);
    for (var i = own; i < p.d; i += 256u) {
        let y = exponential(xs[x_at + i] - most);
        outs[out_at + i] = y;
        sum += y;
    }
    let factor = 1.0 / total(own, sum);
    for (var i = own; i < p.d; i += 256u) {
        outs[out_at + i] *= factor;
    }
#end
}
