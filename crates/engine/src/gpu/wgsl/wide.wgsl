// c = finish(a @ b) as in product.wgsl, bit for bit, for products that keep a card busy: larger tiles, and one barrier
// for each step of k instead of two.
//
// Tiling: a workgroup of THREADS threads makes a tile of 4 * QM * DOWN x 4 * QN * ACROSS, a thread 4 * QM x 4 * QN of it
// in registers; the 32 threads that run together take 4 x 8 of these. Tiles of a and b lie in workgroup memory twice,
// STEPS steps of k each: while one is multiplied, the next one is fetched, and then stored in the other.
//
// Sums: each element over k in order, one fused multiply-add a step.

var<workgroup> a_tile: array<vec4<f32>, $A_ROOM>;
var<workgroup> b_tile: array<vec4<f32>, $B_ROOM>;

@compute @workgroup_size($THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) own: u32) {
    let row = group.y * $ROWSu;
    let column = group.x * $COLUMNSu;
#if TRIANGLE
    if (column > row + p.above + $ROWSu - 1u) {
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
    let lane = own % 32u;
    let warp = own / 32u;
    let ty = (warp / $WARPSu) * 4u + lane / 8u;
    let tx = (warp % $WARPSu) * 8u + lane % 8u;
#repeat q QM
#repeat i 4
#repeat r QN
    var sum_$q_$i_$r = vec4<f32>();
#end
#end
#end
    var a_now = 0u;
    var b_now = 0u;
#repeat u A_FETCHED
    var next_a$u = fetched_a(a_start, row, 0u, own + $uu * $THREADSu);
#end
#repeat u B_FETCHED
    var next_b$u = fetched_b(b_start, column, 0u, own + $uu * $THREADSu);
#end
#repeat u A_FETCHED
    store_a(0u, own + $uu * $THREADSu, next_a$u);
#end
#repeat u B_FETCHED
    store_b(0u, own + $uu * $THREADSu, next_b$u);
#end
    workgroupBarrier();
    for (var k = $STEPSu; k < p.k; k += $STEPSu) {
#repeat u A_FETCHED
        next_a$u = fetched_a(a_start, row, k, own + $uu * $THREADSu);
#end
#repeat u B_FETCHED
        next_b$u = fetched_b(b_start, column, k, own + $uu * $THREADSu);
#end
#repeat s STEPS
        {
#repeat q QM
            let a$q = a_tile[a_now + $su * $A_LINEu + ty + $qu * $DOWNu];
#end
#repeat r QN
            let b$r = b_tile[b_now + $su * $B_LINEu + tx + $ru * $ACROSSu];
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
        a_now = $STEPSu * $A_LINEu - a_now;
        b_now = $STEPSu * $B_LINEu - b_now;
#repeat u A_FETCHED
        store_a(a_now, own + $uu * $THREADSu, next_a$u);
#end
#repeat u B_FETCHED
        store_b(b_now, own + $uu * $THREADSu, next_b$u);
#end
        workgroupBarrier();
    }
#repeat s STEPS
    {
#repeat q QM
        let a$q = a_tile[a_now + $su * $A_LINEu + ty + $qu * $DOWNu];
#end
#repeat r QN
        let b$r = b_tile[b_now + $su * $B_LINEu + tx + $ru * $ACROSSu];
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
#repeat q QM
#repeat i 4
#repeat r QN
    write(c_start, row + ($qu * $DOWNu + ty) * 4u + $iu, column + ($ru * $ACROSSu + tx) * 4u, sum_$q_$i_$r);
#end
#end
#end
}

// Vec4 number `at` of the tile of a from step `k` on.
fn fetched_a(start: u32, row: u32, k: u32, at: u32) -> vec4<f32> {
#if A_ALONG
    return four_of_a(start, row + at / $FOURSu, $ROWS_OF_A, k + at % $FOURSu * 4u, p.k);
#else
    return four_of_a(start, k + at / ($ROWSu / 4u), p.k, row + at % ($ROWSu / 4u) * 4u, $ROWS_OF_A);
#end
}

fn fetched_b(start: u32, column: u32, k: u32, at: u32) -> vec4<f32> {
#if B_ALONG
    return four_of_b(start, column + at / $FOURSu, p.n, k + at % $FOURSu * 4u, p.k);
#else
    return four_of_b(start, k + at / ($COLUMNSu / 4u), p.k, column + at % ($COLUMNSu / 4u) * 4u, p.n);
#end
}

fn store_a(now: u32, at: u32, four: vec4<f32>) {
#if A_ALONG
    let line = at / $FOURSu;
    let step = at % $FOURSu * 4u;
#repeat e 4
    a_tile[now + (step + $eu) * $A_LINEu + line / 4u][line % 4u] = four[$e];
#end
#else
    a_tile[now + at / ($ROWSu / 4u) * $A_LINEu + at % ($ROWSu / 4u)] = four;
#end
}

fn store_b(now: u32, at: u32, four: vec4<f32>) {
#if B_ALONG
    let line = at / $FOURSu;
    let step = at % $FOURSu * 4u;
#repeat e 4
    b_tile[now + (step + $eu) * $B_LINEu + line / 4u][line % 4u] = four[$e];
#end
#else
    b_tile[now + at / ($COLUMNSu / 4u) * $B_LINEu + at % ($COLUMNSu / 4u)] = four;
#end
}
