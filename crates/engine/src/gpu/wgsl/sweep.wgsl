// Coordinate descent within one group: its scale and bias by least squares under the Hessian, where that lowers the
// error, then each of its codes in order (src/rounding/task.rs).
//
// values, codes [columns, rows] and gradients H (original - value): this group's are in reach; hessian holds the
// group's rows of H, whose columns begin at `start`. What values change by goes to changes [group, rows]; gradients are
// the caller's to follow. A workgroup takes ROWS rows, LANES threads each. Sums: a thread's columns in order, then threads
// in order.

struct Parameters {
    hessian_at: u32,
    gradients_at: u32,
    scales_at: u32,
    biases_at: u32,
    values_at: u32,
    codes_at: u32,
    changes_at: u32,
    rows: u32,
    group: u32,
    line: u32,
    start: u32,
    // Rows of a member, and elements from one member's matrix to the next one's.
    own: u32,
    apart: u32,
    most: f32,
    zero: u32,
}

@group(0) @binding(0) var<storage, read> hessian: array<f32>;
@group(0) @binding(1) var<storage, read> gradients: array<f32>;
@group(0) @binding(2) var<storage, read_write> scales: array<f32>;
@group(0) @binding(3) var<storage, read_write> biases: array<f32>;
@group(0) @binding(4) var<storage, read_write> values: array<f32>;
@group(0) @binding(5) var<storage, read_write> codes: array<f32>;
@group(0) @binding(6) var<storage, read_write> changes: array<f32>;
var<immediate> p: Parameters;
// [group, ROWS] each.
var<workgroup> code: array<f32, 1024>;
var<workgroup> slope: array<f32, 1024>;
var<workgroup> value: array<f32, 1024>;
var<workgroup> sums: array<vec4<f32>, 256>;

const ROWS = $ROWSu;
const LANES = $LANESu;

// The sum over a row's threads.
fn total(own: u32, part: vec4<f32>) -> vec4<f32> {
    workgroupBarrier();
    sums[own] = part;
    workgroupBarrier();
    var sum = vec4<f32>();
    for (var lane = 0u; lane < LANES; lane += 1u) {
        sum += sums[lane * ROWS + own % ROWS];
    }
    return sum;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) own: u32) {
    let lane = own / ROWS;
    let place = own % ROWS;
    let row = group.x * ROWS + place;
    let there = row < p.rows;
    let hessian_at = p.hessian_at + (group.x * ROWS / p.own) * p.apart;
    var scale = 1.0;
    var bias = 0.0;
    if (there) {
        scale = scales[p.scales_at + row];
        bias = biases[p.biases_at + row];
    }
    for (var at = lane; at < p.group; at += LANES) {
        let i = at * ROWS + place;
        code[i] = 0.0;
        slope[i] = 0.0;
        value[i] = 0.0;
        if (there) {
            code[i] = codes[p.codes_at + at * p.rows + row];
            slope[i] = gradients[p.gradients_at + at * p.rows + row];
            value[i] = values[p.values_at + at * p.rows + row];
        }
    }
    workgroupBarrier();
    // Of codes q and the slope g: q H q, q H 1, q g, 1 g; and 1 H 1.
    var part = vec4<f32>();
    var part_ones = 0.0;
    for (var at = lane; at < p.group; at += LANES) {
        let line = hessian_at + at * p.line + p.start;
        var product = 0.0;
        var sum = 0.0;
        for (var i = 0u; i < p.group; i += 1u) {
            product = fma(hessian[line + i], code[i * ROWS + place], product);
            sum += hessian[line + i];
        }
        part_ones += sum;
        let q = code[at * ROWS + place];
        let g = slope[at * ROWS + place];
        part += vec4<f32>(q * product, product, q * g, g);
    }
    let all = total(own, part);
    let ones = total(own, vec4<f32>(part_ones, 0.0, 0.0, 0.0)).x;
    let determinant = all.x * ones - all.y * all.y;
    let sound = determinant > 1e-5 * all.x * ones;
    let divisor = select(1.0, determinant, sound);
    let new_scale = stored(scale + select(0.0, (all.z * ones - all.w * all.y) / divisor, sound));
    let new_bias = stored(bias + select(0.0, (all.w * all.x - all.z * all.y) / divisor, sound));
    let ds = new_scale - scale;
    let db = new_bias - bias;
    let change = ds * ds * all.x + 2.0 * ds * db * all.y + db * db * ones - 2.0 * (ds * all.z + db * all.w);
    // What each of this thread's columns changes by, until all have read the old values.
    let better = change < 0.0 && (ds != 0.0 || db != 0.0);
    scale = select(scale, new_scale, better);
    bias = select(bias, new_bias, better);
    for (var at = lane; at < p.group; at += LANES) {
        var lost = 0.0;
        for (var i = 0u; i < p.group; i += 1u) {
            let moved = decoded(code[i * ROWS + place], scale, bias, p.zero) - value[i * ROWS + place];
            lost = fma(hessian[hessian_at + i * p.line + p.start + at], select(0.0, moved, better), lost);
        }
        slope[at * ROWS + place] -= lost;
    }
    workgroupBarrier();
    for (var at = lane; at < p.group; at += LANES) {
        let i = at * ROWS + place;
        let now = select(value[i], decoded(code[i], scale, bias, p.zero), better);
        if (there) {
            changes[p.changes_at + at * p.rows + row] = now - value[i];
        }
        value[i] = now;
    }
    let inverse = inverse_of(scale);
    for (var at = 0u; at < p.group; at += 1u) {
        workgroupBarrier();
        let i = at * ROWS + place;
        let line = hessian_at + at * p.line + p.start;
        let wanted = value[i] + slope[i] * (1.0 / hessian[line + at]);
        let next = code_of(wanted, inverse, bias, p.most);
        let now = select(value[i], decoded(next, scale, bias, p.zero), next != code[i]);
        let moved = now - value[i];
        for (var k = at + 1u + lane; k < p.group; k += LANES) {
            slope[k * ROWS + place] = fma(-hessian[line + k], moved, slope[k * ROWS + place]);
        }
        // The thread that wrote the change above adds to it.
        if (lane == at % LANES && there) {
            changes[p.changes_at + at * p.rows + row] += moved;
            codes[p.codes_at + at * p.rows + row] = next;
            values[p.values_at + at * p.rows + row] = now;
        }
    }
    if (lane == 0u && there) {
        scales[p.scales_at + row] = scale;
        biases[p.biases_at + row] = bias;
    }
}
