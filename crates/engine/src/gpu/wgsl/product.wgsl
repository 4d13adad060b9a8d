// c = finish(a @ b): the product of matrices, for a batch of them.
//
// Shapes: a [m, k], b [k, n], c [m, n]. Each operand is stored along k or across it (A_ALONG, B_ALONG: neighbours of
// the axis k lie side by side), with a distance between its lines; so transposed forms need no copy. The batch has two
// axes, outer and inner, with a distance for each; of b, `share` neighbours of the inner axis are one. With GROUPED each
// member of the batch has rows of its own number, and a table says where its operands lie.
//
// Tiling: a workgroup of 16 x 16 threads makes a tile of 64 * QM x 64 * QN, a thread 4 * QM x 4 * QN of it, in
// registers. Tiles of a and b go through workgroup memory 16 steps of k at a time, across k, in lines of vec4 with one
// vec4 of padding; the next ones are fetched while these are multiplied. With VEC all lines are whole vec4s in memory.
//
// Sums: each element over k in order, one fused multiply-add a step, whatever the tile and wherever the element lies.
// With TRIANGLE tiles wholly above the diagonal, which begins `above` columns from the left, are left as they are.

var<workgroup> a_tile: array<vec4<f32>, $A_ROOM>;
var<workgroup> b_tile: array<vec4<f32>, $B_ROOM>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) own: u32) {
    let row = group.y * (64u * $QMu);
    let column = group.x * (64u * $QNu);
#if TRIANGLE
    if (column > row + p.above + 64u * $QMu - 1u) {
        return;
    }
#end
#if GROUPED
    let member = p.bias_at + group.z * 4u;
    own_rows = members[member];
    if (row >= own_rows) {
        return;
    }
    let a_start = p.a_at + members[member + 1u];
    let b_start = p.b_at + members[member + 2u];
    let c_start = p.c_at + members[member + 3u];
#else
    let outer = group.z / p.inner;
    let inner = group.z % p.inner;
    let a_start = p.a_at + outer * p.a_outer + inner * p.a_inner;
    let b_start = p.b_at + outer * p.b_outer + (inner / p.share) * p.b_inner;
    let c_start = p.c_at + outer * p.c_outer + inner * p.c_inner;
#end
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
            next_a$q = four_of_a(a_start, row + quarter + $qu * 64u, $ROWS_OF_A, k + step, p.k);
#else
            next_a$q = four_of_a(a_start, k + ty, p.k, row + 4u * tx + $qu * 64u, $ROWS_OF_A);
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
