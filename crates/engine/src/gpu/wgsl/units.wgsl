// c = finish(a @ b) by matrix units, which multiply float16 and add in float32.
//
// Each operand is brought near one by a power of two (a line along k by its own, a matrix whose lines lie across k by one)
// and split in two float16, high + low, which hold 22 bits of it; a product is high * high + high * low + low * high.
//
// Tiling: a workgroup of THREADS threads makes a tile of ROWS x COLUMNS, each 32 threads that run together DOWN x ACROSS
// squares of 16 of it. Tiles of 16 steps of k lie in workgroup memory; the next ones are fetched while they are
// multiplied. Where lines lie across k a thread fetches 4 x 4 elements and stores them turned.
//
// Sums: each element over k in order, 16 steps at a time in the order that the unit has, for each of the three products.
enable f16;
enable wgpu_cooperative_matrix;

@group(0) @binding(4) var<storage, read_write> a_peaks: array<u32>;
@group(0) @binding(5) var<storage, read_write> b_peaks: array<u32>;

// Tiles of a, of b, and of what their high parts leave.
var<workgroup> tiles: array<vec4<f16>, $ROOM>;
// A square of 16 for each 32 threads: what units hold has no places.
var<workgroup> squares: array<f32, $SQUARES>;

@compute @workgroup_size($THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) own: u32) {
    let row = group.y * $ROWSu;
    let column = group.x * $COLUMNSu;
#if TRIANGLE
    if (column > row + p.above + $ROWSu - 1u) {
        return;
    }
#end
    let lane = own % 32u;
    let warp = own / 32u;
    let down = (warp / $WARPSu) * ($DOWNu * 16u);
    let across = (warp % $WARPSu) * ($ACROSSu * 16u);
    let square = warp * 256u;
#repeat e 8
    squares[square + lane * 8u + $eu] = 0.0;
#end
    workgroupBarrier();
#repeat i DOWN
#repeat j ACROSS
    var sum_$i_$j = coopLoadT<coop_mat16x16<f32, C>>(&squares[square], 16u);
#end
#end
#if A_ALONG
#repeat u A_FETCHED
    let a_factor$u = power_of_two(shift_of_a(row + (own + $uu * $THREADSu) / 4u));
#end
#else
    let a_factor = power_of_two(shift_of_a(row));
#end
#if B_ALONG
#repeat u B_FETCHED
    let b_factor$u = power_of_two(shift_of_b(column + (own + $uu * $THREADSu) / 4u));
#end
#else
    let b_factor = power_of_two(shift_of_b(column));
#end
#repeat u A_FETCHED
    var next_a$u = fetched_a(row, 0u, own, $uu);
#end
#repeat u B_FETCHED
    var next_b$u = fetched_b(column, 0u, own, $uu);
#end
    let last = (p.k - 1u) / 16u * 16u;
    for (var k = 0u; k <= last; k += 16u) {
        workgroupBarrier();
#if A_ALONG
#repeat u A_FETCHED
        keep_a(line_of(own, $uu), next_a$u * a_factor$u);
#end
#else
#repeat e 4
        keep_a(line_across(own, $eu), vec4<f32>(next_a0[$e], next_a1[$e], next_a2[$e], next_a3[$e]) * a_factor);
#end
#end
#if B_ALONG
#repeat u B_FETCHED
        keep_b(line_of(own, $uu), next_b$u * b_factor$u);
#end
#else
#repeat e 4
        keep_b(line_across(own, $eu), vec4<f32>(next_b0[$e], next_b1[$e], next_b2[$e], next_b3[$e]) * b_factor);
#end
#end
        workgroupBarrier();
        // Behind the last step it is fetched once more.
        let next = min(k + 16u, last);
#repeat u A_FETCHED
        next_a$u = fetched_a(row, next, own, $uu);
#end
#repeat u B_FETCHED
        next_b$u = fetched_b(column, next, own, $uu);
#end
        {
#repeat j ACROSS
            let at_b$j = $B_FROMu + (across + $j * 16u) * $LINEu;
            let b_high$j = coopLoad<coop_mat16x16<f16, B>>(&tiles[at_b$j], $LINEu);
            let at_b_low$j = at_b$j + $LOWu;
            let b_low$j = coopLoad<coop_mat16x16<f16, B>>(&tiles[at_b_low$j], $LINEu);
#end
#repeat i DOWN
            let at_a$i = (down + $i * 16u) * $LINEu;
            let a_high$i = coopLoadT<coop_mat16x16<f16, A>>(&tiles[at_a$i], $LINEu);
            let at_a_low$i = at_a$i + $LOWu;
            let a_low$i = coopLoadT<coop_mat16x16<f16, A>>(&tiles[at_a_low$i], $LINEu);
#repeat j ACROSS
            sum_$i_$j = coopMultiplyAdd(a_low$i, b_high$j, sum_$i_$j);
#end
#repeat j ACROSS
            sum_$i_$j = coopMultiplyAdd(a_high$i, b_low$j, sum_$i_$j);
#end
#repeat j ACROSS
            sum_$i_$j = coopMultiplyAdd(a_high$i, b_high$j, sum_$i_$j);
#end
#end
        }
    }
    let own_row = row + down + lane / 2u;
    let own_column = column + across + lane % 2u * 8u;
    let place = square + lane * 8u;
#repeat i DOWN
#repeat j ACROSS
    workgroupBarrier();
    coopStoreT(sum_$i_$j, &squares[square], 16u);
    workgroupBarrier();
    give(own_row + $i * 16u, own_column + $j * 16u, place);
    give(own_row + $i * 16u, own_column + $j * 16u + 4u, place + 4u);
#end
#end
}

// Writes the four sums from `place` on.
fn give(row: u32, column: u32, place: u32) {
    let four = vec4<f32>(squares[place], squares[place + 1u], squares[place + 2u], squares[place + 3u]);
    let by_row = power_of_two(-shift_of_a(row));
    let by_column = vec4<f32>(
        power_of_two(-shift_of_b(column)),
        power_of_two(-shift_of_b(column + 1u)),
        power_of_two(-shift_of_b(column + 2u)),
        power_of_two(-shift_of_b(column + 3u)),
    );
    write(p.c_at, row, column, four * by_row * by_column);
}

// The power of two that brings a line whose largest size is `peak` below 2^15.
fn shift_of(peak: u32) -> i32 {
    return clamp(141 - i32(peak >> 23u), -126, 126);
}

fn shift_of_a(line: u32) -> i32 {
#if A_ALONG
    return shift_of(a_peaks[p.a_peaks_at + min(line, p.m - 1u)]);
#else
    return shift_of(a_peaks[p.a_peaks_at]);
#end
}

fn shift_of_b(line: u32) -> i32 {
#if B_ALONG
    return shift_of(b_peaks[p.b_peaks_at + min(line, p.n - 1u)]);
#else
    return shift_of(b_peaks[p.b_peaks_at]);
#end
}

// A thread's vec4 number `u` of the tile of a from step `k` on: along k, or across it, one of four steps.
fn fetched_a(row: u32, k: u32, own: u32, u: u32) -> vec4<f32> {
#if A_ALONG
    let at = own + u * $THREADSu;
    return four_of_a(p.a_at, row + at / 4u, p.m, k + at % 4u * 4u, p.k);
#else
    return four_of_a(p.a_at, k + own % 4u * 4u + u, p.k, row + own / 4u * 4u, p.m);
#end
}

fn fetched_b(column: u32, k: u32, own: u32, u: u32) -> vec4<f32> {
#if B_ALONG
    let at = own + u * $THREADSu;
    return four_of_b(p.b_at, column + at / 4u, p.n, k + at % 4u * 4u, p.k);
#else
    return four_of_b(p.b_at, k + own % 4u * 4u + u, p.k, column + own / 4u * 4u, p.n);
#end
}

// Where a thread's vec4 number `u` lies in the tiles: fetched along k, and turned.
fn line_of(own: u32, u: u32) -> u32 {
    let at = own + u * $THREADSu;
    return at / 4u * $LINEu + at % 4u;
}

fn line_across(own: u32, line: u32) -> u32 {
    return (own / 4u * 4u + line) * $LINEu + own % 4u;
}

// The part of four numbers that a float16 holds, without the bits below it.
fn high_of(four: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(four) & vec4<u32>(0xffffe000u));
}

fn keep_a(place: u32, four: vec4<f32>) {
    let high = high_of(four);
    tiles[place] = vec4<f16>(high);
    tiles[place + $LOWu] = vec4<f16>(four - high);
}

fn keep_b(place: u32, four: vec4<f32>) {
    let high = high_of(four);
    tiles[place + $B_FROMu] = vec4<f16>(high);
    tiles[place + $B_FROMu + $LOWu] = vec4<f16>(four - high);
}
