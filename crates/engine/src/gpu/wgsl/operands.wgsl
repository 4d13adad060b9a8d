// What the kernels of products have in common: operands, how lines of them are read, how sums are written.

struct Parameters {
    a_at: u32,
    b_at: u32,
    bias_at: u32,
    c_at: u32,
#if UNITS
    a_peaks_at: u32,
    b_peaks_at: u32,
#end
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
    above: u32,
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
#if GROUPED
// Of each member of the batch: rows of a and c, and where its a, b and c begin.
@group(0) @binding(2) var<storage, read> members: array<u32>;
var<private> own_rows: u32;
#else
@group(0) @binding(2) var<storage, read> biases: array<f32>;
#end
var<immediate> p: Parameters;

// Four neighbours in a line of `length`, zeros beyond it and in lines that are not there. With WHOLE nothing lies beyond.
// Without BRANCH something is always read: behind a branch drivers wait for each read where it stands.
fn four_of_a(start: u32, line: u32, lines: u32, at: u32, length: u32) -> vec4<f32> {
#if WHOLE
    return a[(start + line * p.a_line + at) / 4u];
#else
#if BRANCH
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
#else
    let line_at = start + min(line, lines - 1u) * p.a_line;
#if VEC
    let four = a[(line_at + min(at, length - 4u)) / 4u];
    return select(vec4<f32>(), four, line < lines && at < length);
#else
    let last = length - 1u;
    let four = vec4<f32>(
        a[line_at + min(at, last)],
        a[line_at + min(at + 1u, last)],
        a[line_at + min(at + 2u, last)],
        a[line_at + min(at + 3u, last)],
    );
    let there = vec4<u32>(at, at + 1u, at + 2u, at + 3u) < vec4<u32>(length);
    return select(vec4<f32>(), four, there & vec4<bool>(line < lines));
#end
#end
#end
}

fn four_of_b(start: u32, line: u32, lines: u32, at: u32, length: u32) -> vec4<f32> {
#if WHOLE
    return b[(start + line * p.b_line + at) / 4u];
#else
#if BRANCH
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
#else
    let line_at = start + min(line, lines - 1u) * p.b_line;
#if VEC
    let four = b[(line_at + min(at, length - 4u)) / 4u];
    return select(vec4<f32>(), four, line < lines && at < length);
#else
    let last = length - 1u;
    let four = vec4<f32>(
        b[line_at + min(at, last)],
        b[line_at + min(at + 1u, last)],
        b[line_at + min(at + 2u, last)],
        b[line_at + min(at + 3u, last)],
    );
    let there = vec4<u32>(at, at + 1u, at + 2u, at + 3u) < vec4<u32>(length);
    return select(vec4<f32>(), four, there & vec4<bool>(line < lines));
#end
#end
#end
}

fn write(start: u32, row: u32, column: u32, sum: vec4<f32>) {
    if (row >= $ROWS_OF_A || column >= p.n) {
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
