// One number for each pair of elements of two strided tensors, into a third: functions of one number or two, and
// every rearrangement.
//
// Shapes: up to five axes; a stride is a number of elements, 0 to repeat. One thread an element.
// No sums.

struct Parameters {
    x_at: u32,
    y_at: u32,
    out_at: u32,
    count: u32,
    rank: u32,
    sizes: array<u32, 5>,
    x_strides: array<u32, 5>,
    y_strides: array<u32, 5>,
    out_strides: array<u32, 5>,
    a: f32,
    b: f32,
}

@group(0) @binding(0) var<storage, read> xs: array<f32>;
@group(0) @binding(1) var<storage, read> ys: array<f32>;
@group(0) @binding(2) var<storage, read_write> outs: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    var rest = thread_of(group, groups, own, 256u);
    if (rest >= p.count) {
        return;
    }
    var x_at = p.x_at;
    var y_at = p.y_at;
    var out_at = p.out_at;
    for (var axis = p.rank; axis > 1u; axis -= 1u) {
        let size = p.sizes[axis - 1u];
        let index = rest % size;
        rest = rest / size;
        x_at += index * p.x_strides[axis - 1u];
        y_at += index * p.y_strides[axis - 1u];
        out_at += index * p.out_strides[axis - 1u];
    }
    let x = xs[x_at + rest * p.x_strides[0]];
    let y = ys[y_at + rest * p.y_strides[0]];
    let a = p.a;
    let b = p.b;
    outs[out_at + rest * p.out_strides[0]] = $VALUE;
}
