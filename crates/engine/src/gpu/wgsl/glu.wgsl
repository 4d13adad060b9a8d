// Gradients of a gated product value(x) * up with respect to gate and up, in one pass: element by element, no sums.

struct Parameters {
    gate_at: u32,
    up_at: u32,
    grad_at: u32,
    for_gate_at: u32,
    for_up_at: u32,
    count: u32,
    a: f32,
    b: f32,
}

@group(0) @binding(0) var<storage, read> gates: array<f32>;
@group(0) @binding(1) var<storage, read> ups: array<f32>;
@group(0) @binding(2) var<storage, read> grads: array<f32>;
@group(0) @binding(3) var<storage, read_write> for_gates: array<f32>;
@group(0) @binding(4) var<storage, read_write> for_ups: array<f32>;
var<immediate> p: Parameters;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) own: u32) {
    let at = thread_of(group, groups, own, 256u);
    if (at >= p.count) {
        return;
    }
    let gate = gates[p.gate_at + at];
    let up = ups[p.up_at + at];
    let grad = grads[p.grad_at + at];
    let a = p.a;
    let b = p.b;
    // What the functions are of.
    let x = $INNER;
    for_gates[p.for_gate_at + at] = $FOR_GATE * grad;
    for_ups[p.for_up_at + at] = $FOR_UP * grad;
}
