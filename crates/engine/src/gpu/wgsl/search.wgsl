// The searched grid of each group of each row: both edges of the range are moved inwards in 7 x 7 steps, beside the
// grid of mx.quantize, and the best is improved by weighted least squares three times (src/rounding/grid.rs). A careful
// search moves edges a quarter as far, keeps zero and one of them exact as mx.quantize does, and leaves it there.
//
// values [columns, rows], weights [columns] for each member, whose rows are side by side, scales and biases [groups, rows]. A workgroup takes one group of 4 rows,
// 64 threads each: thread i judges candidate i, all at a time, over the group's columns in order; the first of the best
// is taken. Least squares: thread i adds columns i, i + 64, then threads are added as a binary tree.

struct Parameters {
    values_at: u32,
    weights_at: u32,
    scales_at: u32,
    biases_at: u32,
    rows: u32,
    group: u32,
    // 0: the grid of mx.quantize alone.
    candidates: u32,
    most: f32,
    unit: f32,
    zero: u32,
    highest: f32,
    // Rows of a member, and weights from one member's to the next one's.
    own: u32,
    apart: u32,
}

@group(0) @binding(0) var<storage, read> values: array<f32>;
@group(0) @binding(1) var<storage, read> weights: array<f32>;
@group(0) @binding(2) var<storage, read_write> scales: array<f32>;
@group(0) @binding(3) var<storage, read_write> biases: array<f32>;
var<immediate> p: Parameters;
var<workgroup> x: array<f32, 512>;
var<workgroup> w: array<f32, 128>;
var<workgroup> sums: array<vec4<f32>, 256>;
var<workgroup> losses: array<f32, 256>;

// The smallest step, as in mx.quantize.
const EPS = 1e-7;

fn plain(low: f32, high: f32) -> vec2<f32> {
    let step = (high - low) / p.most;
    let size = select(step, EPS, step < EPS);
    let negative = abs(low) > abs(high);
    let scale = select(-size, size, negative);
    let edge = select(high, low, negative);
    let steps = round(edge / scale);
    let own = select(edge / select(steps, 1.0, steps == 0.0), scale, steps == 0.0);
    return vec2<f32>(stored(own), stored(select(edge, 0.0, steps == 0.0)));
}

fn of_range(low: f32, high: f32) -> vec2<f32> {
    let step = (high - low) / p.most;
    return vec2<f32>(stored(select(step, EPS, step < EPS)), stored(low));
}

// Rounds of least squares.
#if CAREFUL
const REFINEMENTS = 0u;
#else
const REFINEMENTS = 3u;
#end

// What an element weighs.
fn weighed(column: u32, value: f32, mean: f32) -> f32 {
#if BLIND
    return w[column] * (mean + value * value);
#else
    return w[column];
#end
}

// The loss of one column.
fn loss(column: u32, row: u32, grid: vec2<f32>, inverse: f32, mean: f32) -> f32 {
    let value = x[column * 4u + row];
    let code = code_of(value, inverse, grid.y, p.most);
    let error = value - decoded(code, grid.x, grid.y, p.zero);
    return weighed(column, value, mean) * (error * error);
}

// The sum over the 64 threads of a row.
fn total(own: u32, value: vec4<f32>) -> vec4<f32> {
    let lane = own % 64u;
    workgroupBarrier();
    sums[own] = value;
    for (var width = 32u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if (lane < width) {
            sums[own] += sums[own + width];
        }
    }
    workgroupBarrier();
    return sums[own - lane];
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) own: u32) {
    let first = group.y * p.group;
    for (var at = own; at < p.group * 4u; at += 256u) {
        let row = group.x * 4u + at % 4u;
        var value = 0.0;
        if (row < p.rows) {
            value = values[p.values_at + (first + at / 4u) * p.rows + row];
        }
        x[at] = value;
    }
    if (own < p.group) {
        w[own] = weights[p.weights_at + (group.x * 4u / p.own) * p.apart + first + own];
    }
    workgroupBarrier();
    let row = own / 64u;
    let lane = own % 64u;
    var low = x[row];
    var high = low;
    var square = 0.0;
    for (var i = 0u; i < p.group; i += 1u) {
        let value = x[i * 4u + row];
        low = select(low, value, value < low);
        high = select(high, value, value > high);
        square += value * value;
    }
    let mean = square * (1.0 / f32(p.group));
    var grid = plain(low, high);
    if (p.candidates > 0u) {
        var own_loss = p.highest;
        if (lane < p.candidates) {
            if (lane > 0u) {
                let range = high - low;
                let step = lane - 1u;
                let lower = low + range * (p.unit * f32(step / 7u));
                let upper = high - range * (p.unit * f32(step % 7u));
#if CAREFUL
                grid = plain(lower, upper);
#else
                grid = of_range(lower, upper);
#end
            }
            let inverse = inverse_of(grid.x);
            own_loss = 0.0;
            for (var i = 0u; i < p.group; i += 1u) {
                own_loss += loss(i, row, grid, inverse, mean);
            }
        }
        losses[own] = own_loss;
        sums[own] = vec4<f32>(grid, 0.0, 0.0);
        workgroupBarrier();
        var best = row * 64u;
        for (var i = best + 1u; i < row * 64u + p.candidates; i += 1u) {
            best = select(best, i, losses[i] < losses[best]);
        }
        grid = sums[best].xy;
        var least = losses[best];
        let middle = p.most / 2.0;
        for (var turn = 0u; turn < REFINEMENTS; turn += 1u) {
            let inverse = inverse_of(grid.x);
            var part = vec4<f32>();
            var other = 0.0;
            for (var i = lane; i < p.group; i += 64u) {
                let value = x[i * 4u + row];
                let weight = weighed(i, value, mean);
                // Codes around zero, so that 8 bits do not cancel.
                let code = code_of(value, inverse, grid.y, p.most) - middle;
                part += vec4<f32>(weight, weight * code, weight * code * code, weight * value);
                other += weight * code * value;
            }
            // Sum of weights, of codes q, of q^2, of values v; and of q v.
            let all = total(own, part);
            let qv = total(own, vec4<f32>(other, 0.0, 0.0, 0.0)).x;
            let determinant = all.x * all.z - all.y * all.y;
            let sound = determinant > 1e-6 * all.x * all.z;
            let scale = (all.x * qv - all.y * all.w) / select(1.0, determinant, sound);
            let center = (all.w - scale * all.y) / select(1.0, all.x, sound);
            let next = vec2<f32>(
                stored(select(grid.x, scale, sound)),
                stored(select(grid.y, center - scale * middle, sound)),
            );
            let next_inverse = inverse_of(next.x);
            var next_loss = 0.0;
            for (var i = lane; i < p.group; i += 64u) {
                next_loss += loss(i, row, next, next_inverse, mean);
            }
            next_loss = total(own, vec4<f32>(next_loss, 0.0, 0.0, 0.0)).x;
            if (next_loss < least) {
                least = next_loss;
                grid = next;
            }
        }
    }
    if (lane == 0u && group.x * 4u + row < p.rows) {
        let at = group.y * p.rows + group.x * 4u + row;
        scales[p.scales_at + at] = grid.x;
        biases[p.biases_at + at] = grid.y;
    }
}
