// c = finish(a @ b): the product of matrices, for a batch of them.
//
// Shapes: a [m, k], b [k, n], c [m, n]. Each operand is stored along k or across it (A_ALONG, B_ALONG: neighbours of
// the axis k lie side by side), with a distance between its lines; so transposed forms need no copy. The batch has two
// axes, outer and inner, with a distance for each; of b, `share` neighbours of the inner axis are one.
//
// Tiling: a workgroup of 16 x 16 threads makes a tile of 64 * QM x 64 * QN, a thread 4 * QM x 4 * QN of it, in
// registers. Tiles of a and b go through workgroup memory 16 steps of k at a time, across k, in lines of vec4 with one
// vec4 of padding; the next ones are fetched while these are multiplied. With VEC all lines are whole vec4s in memory.
//
// Sums: each element over k in order, one fused multiply-add a step, whatever the tile and wherever the element lies.
// With TRIANGLE tiles wholly above the diagonal are left as they are.

struct Parameters {
    a_at: u32,
    b_at: u32,
    bias_at: u32,
    c_at: u32,
    m: u32,
    n: u32,
    k: u32,
    a_line: u32,
    b_line: u32,
    c_line: u32,
    inner: u32,
    share: u32,
    a_outer: u32,
    a_inner: u32,
    b_outer: u32,
    b_inner: u32,
    c_outer: u32,
    c_inner: u32,
}

#if VEC
@group(0) @binding(0) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> c: array<vec4<f32>>;
#else
@group(0) @binding(0) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> c: array<f32>;
#end
@group(0) @binding(2) var<storage, read> biases: array<f32>;
var<immediate> p: Parameters;

var<workgroup> a_tile: array<vec4<f32>, $A_ROOM>;
var<workgroup> b_tile: array<vec4<f32>, $B_ROOM>;

// Four neighbours in a line of `length`, zeros beyond it and in lines that are not there.
fn four_of_a(start: u32, line: u32, lines: u32, at: u32, length: u32) -> vec4<f32> {
    if (line >= lines || at >= length) {
        return vec4<f32>();
    }
    let place = start + line * p.a_line + at;
#if VEC
    return a[place / 4u];
#else
    var four = vec4<f32>(a[place], 0.0, 0.0, 0.0);
    if (at + 1u < length) { four.y = a[place + 1u]; }
    if (at + 2u < length) { four.z = a[place + 2u]; }
    if (at + 3u < length) { four.w = a[place + 3u]; }
    return four;
#end
}

fn four_of_b(start: u32, line: u32, lines: u32, at: u32, length: u32) -> vec4<f32> {
    if (line >= lines || at >= length) {
        return vec4<f32>();
    }
    let place = start + line * p.b_line + at;
#if VEC
    return b[place / 4u];
#else
    var four = vec4<f32>(b[place], 0.0, 0.0, 0.0);
    if (at + 1u < length) { four.y = b[place + 1u]; }
    if (at + 2u < length) { four.z = b[place + 2u]; }
    if (at + 3u < length) { four.w = b[place + 3u]; }
    return four;
#end
}

fn write(start: u32, row: u32, column: u32, sum: vec4<f32>) {
    if (row >= p.m || column >= p.n) {
        return;
    }
    let place = start + row * p.c_line + column;
#if VEC
#if OLD
    let old = c[place / 4u];
#end
#if BIAS
    let bias_at = p.bias_at + column;
    let bias = vec4<f32>(biases[bias_at], biases[bias_at + 1u], biases[bias_at + 2u], biases[bias_at + 3u]);
#end
    c[place / 4u] = $FINISH;
#else
    write_one(place, column, sum.x);
    if (column + 1u < p.n) { write_one(place + 1u, column + 1u, sum.y); }
    if (column + 2u < p.n) { write_one(place + 2u, column + 2u, sum.z); }
    if (column + 3u < p.n) { write_one(place + 3u, column + 3u, sum.w); }
#end
}

#if VEC
#else
fn write_one(place: u32, column: u32, sum: f32) {
#if OLD
    let old = c[place];
#end
#if BIAS
    let bias = biases[p.bias_at + column];
#end
    c[place] = $FINISH;
}
#end

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) own: u32) {
    let row = group.y * (64u * $QMu);
    let column = group.x * (64u * $QNu);
#if TRIANGLE
    if (column > row + 64u * $QMu - 1u) {
        return;
    }
#end
    let outer = group.z / p.inner;
    let inner = group.z % p.inner;
    let a_start = p.a_at + outer * p.a_outer + inner * p.a_inner;
    let b_start = p.b_at + outer * p.b_outer + (inner / p.share) * p.b_inner;
    let c_start = p.c_at + outer * p.c_outer + inner * p.c_inner;
    let tx = own % 16u;
    let ty = own / 16u;
    let quarter = own / 4u;
    let step = (own % 4u) * 4u;
#repeat q QM
#repeat i 4
#repeat r QN
    var sum_$q_$i_$r = vec4<f32>();
#end
#end
#end
#repeat q QM
    var next_a$q = vec4<f32>();
#end
#repeat r QN
    var next_b$r = vec4<f32>();
#end
    // One turn more than there are steps of k: the first only fetches.
    for (var k = 0u; k < p.k + 16u; k += 16u) {
        if (k > 0u) {
            workgroupBarrier();
#repeat q QM
#if A_ALONG
#repeat e 4
            a_tile[(step + $eu) * $A_LINEu + quarter / 4u + $qu * 16u][quarter % 4u] = next_a$q[$e];
#end
#else
            a_tile[ty * $A_LINEu + tx + $qu * 16u] = next_a$q;
#end
#end
#repeat r QN
#if B_ALONG
#repeat e 4
            b_tile[(step + $eu) * $B_LINEu + quarter / 4u + $ru * 16u][quarter % 4u] = next_b$r[$e];
#end
#else
            b_tile[ty * $B_LINEu + tx + $ru * 16u] = next_b$r;
#end
#end
            workgroupBarrier();
        }
        if (k < p.k) {
#repeat q QM
#if A_ALONG
            next_a$q = four_of_a(a_start, row + quarter + $qu * 64u, p.m, k + step, p.k);
#else
            next_a$q = four_of_a(a_start, k + ty, p.k, row + 4u * tx + $qu * 64u, p.m);
#end
#end
#repeat r QN
#if B_ALONG
            next_b$r = four_of_b(b_start, column + quarter + $ru * 64u, p.n, k + step, p.k);
#else
            next_b$r = four_of_b(b_start, k + ty, p.k, column + 4u * tx + $ru * 64u, p.n);
#end
#end
        }
        if (k > 0u) {
#repeat s 16
            {
#repeat q QM
                let a$q = a_tile[$su * $A_LINEu + ty + $qu * 16u];
#end
#repeat r QN
                let b$r = b_tile[$su * $B_LINEu + tx + $ru * 16u];
#end
#repeat q QM
#repeat i 4
#repeat r QN
                sum_$q_$i_$r = fma(vec4<f32>(a$q[$i]), b$r, sum_$q_$i_$r);
#end
#end
#end
            }
#end
        }
    }
#repeat q QM
#repeat i 4
#repeat r QN
    write(c_start, row + $qu * 64u + ty * 4u + $iu, column + $ru * 64u + tx * 4u, sum_$q_$i_$r);
#end
#end
#end
}
