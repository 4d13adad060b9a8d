// c = finish(a @ b) as in product.wgsl, bit for bit, for products that keep a card busy: larger tiles, and one barrier
// for each step of k instead of two.
//
// Tiling: a workgroup of 256 threads makes a tile of 64 * QM x 64 * QN, a thread 4 * QM x 4 * QN of it in registers; the
// 32 threads that run together take 4 x 8 of these. Tiles of a and b lie in workgroup memory twice, 8 steps of k each:
// while one is multiplied, the next one is fetched, and then stored in the other.
//
// Sums: each element over k in order, one fused multiply-add a step.

var<workgroup> a_tile: array<vec4<f32>, $A_ROOM>;
var<workgroup> b_tile: array<vec4<f32>, $B_ROOM>;

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
    let lane = own % 32u;
    let warp = own / 32u;
    let ty = (warp / 2u) * 4u + lane / 8u;
    let tx = (warp % 2u) * 8u + lane % 8u;
    // Along k: two threads fetch the 8 numbers of a line; across: 32 threads those of a step.
    let half = own / 2u;
    let step = (own % 2u) * 4u;
#repeat q QM
#repeat i 4
#repeat r QN
    var sum_$q_$i_$r = vec4<f32>();
#end
#end
#end
#repeat u AM
    var next_a$u = vec4<f32>();
#end
#repeat u BN
    var next_b$u = vec4<f32>();
#end
    var a_now = 0u;
    var b_now = 0u;
    // One turn more than there are steps of k: the first only fetches.
    for (var k = 0u; k < p.k + 8u; k += 8u) {
        if (k < p.k) {
#repeat u AM
#if A_ALONG
            next_a$u = four_of_a(a_start, row + half + $uu * 128u, p.m, k + step, p.k);
#else
            next_a$u = four_of_a(a_start, k + warp, p.k, row + 4u * lane + $uu * 128u, p.m);
#end
#end
#repeat u BN
#if B_ALONG
            next_b$u = four_of_b(b_start, column + half + $uu * 128u, p.n, k + step, p.k);
#else
            next_b$u = four_of_b(b_start, k + warp, p.k, column + 4u * lane + $uu * 128u, p.n);
#end
#end
        }
        if (k > 0u) {
#repeat s 8
            {
#repeat q QM
                let a$q = a_tile[a_now + $su * $A_LINEu + ty + $qu * 16u];
#end
#repeat r QN
                let b$r = b_tile[b_now + $su * $B_LINEu + tx + $ru * 16u];
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
        a_now = 8u * $A_LINEu - a_now;
        b_now = 8u * $B_LINEu - b_now;
        if (k < p.k) {
#repeat u AM
#if A_ALONG
#repeat e 4
            a_tile[a_now + (step + $eu) * $A_LINEu + half / 4u + $uu * 32u][half % 4u] = next_a$u[$e];
#end
#else
            a_tile[a_now + warp * $A_LINEu + lane + $uu * 32u] = next_a$u;
#end
#end
#repeat u BN
#if B_ALONG
#repeat e 4
            b_tile[b_now + (step + $eu) * $B_LINEu + half / 4u + $uu * 32u][half % 4u] = next_b$u[$e];
#end
#else
            b_tile[b_now + warp * $B_LINEu + lane + $uu * 32u] = next_b$u;
#end
#end
            workgroupBarrier();
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
