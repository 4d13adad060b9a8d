// What every kernel may use: where a thread stands, and functions of one number.
//
// The functions are those of the CPU engine (src/exp.rs), with the same bounds: those of a driver's exp are its own.
// They have comparisons instead of min and max, which may drop NaN. A driver may fuse a product and a sum.

// The number of a thread whose workgroups lie in two axes.
fn thread_of(group: vec3<u32>, groups: vec3<u32>, thread: u32, threads: u32) -> u32 {
    return (group.y * groups.x + group.x) * threads + thread;
}

// x = n * ln 2 + r: n, and exp(r) - 1 in series.
fn reduced(x: f32, series: ptr<function, f32>) -> i32 {
    let n = round(x * 1.44269504);
    // ln 2 as a number of few bits, whose multiples are exact, and the rest.
    let r = (x - n * 0.693359375) - n * -2.12194440e-4;
    var s = 1.0 / 5040.0;
    s = s * r + 1.0 / 720.0;
    s = s * r + 1.0 / 120.0;
    s = s * r + 1.0 / 24.0;
    s = s * r + 1.0 / 6.0;
    s = s * r + 0.5;
    *series = r + r * r * s;
    return i32(n);
}

fn power_of_two(n: i32) -> f32 {
    return bitcast<f32>(u32(n + 127) << 23u);
}

fn is_nan(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u;
}

// Within 2 units in the last place of e^x.
fn exponential(x: f32) -> f32 {
    if (is_nan(x)) {
        return x;
    }
    var within = select(x, -104.0, x < -104.0);
    within = select(within, 89.0, within > 89.0);
    var s = 0.0;
    let n = reduced(within, &s);
    let half = n >> 1u;
    // Two factors: neither overflows, and a subnormal result is rounded once.
    return ((1.0 + s) * power_of_two(half)) * power_of_two(n - half);
}

fn hyperbolic_tangent(x: f32) -> f32 {
    if (is_nan(x)) {
        return x;
    }
    var s = 0.0;
    let n = reduced(select(2.0 * abs(x), 40.0, abs(x) > 20.0), &s);
    let scale = power_of_two(n);
    let below = scale * s + (scale - 1.0);
    let size = below / (below + 2.0);
    return select(size, -size, x < 0.0);
}

fn sigmoid(x: f32) -> f32 {
    return 1.0 / (1.0 + exponential(-x));
}

fn softplus(x: f32) -> f32 {
    let u = exponential(-abs(x));
    let s = u / (2.0 + u);
    let q = s * s;
    var series = 1.0 / 15.0;
    series = series * q + 1.0 / 13.0;
    series = series * q + 1.0 / 11.0;
    series = series * q + 1.0 / 9.0;
    series = series * q + 1.0 / 7.0;
    series = series * q + 1.0 / 5.0;
    series = series * q + 1.0 / 3.0;
    series = series * q + 1.0;
    return select(x, 0.0, x < 0.0) + 2.0 * s * series;
}

// The normal distribution function.
fn normal(x: f32) -> f32 {
    let far = abs(x) * 0.70710678;
    let z = select(far, 10.5, far > 10.5);
    let t = 1.0 / (1.0 + 0.5 * z);
    let u = (2.0 * t - 1.16) * (1.0 / 0.84);
    var series = -5.810831e-5;
    series = series * u + 2.4681742e-5;
    series = series * u + 6.153885e-4;
    series = series * u - 6.861686e-4;
    series = series * u - 6.324628e-3;
    series = series * u + 6.311618e-3;
    series = series * u + 0.10352079;
    series = series * u + 0.32718766;
    series = series * u + 0.5694087;
    let tail = 0.5 * t * series * exponential(-z * z);
    return select(tail, 1.0 - tail, x > 0.0);
}

fn error_function(x: f32) -> f32 {
    return 2.0 * normal(x * 1.41421356) - 1.0;
}

// -1, 0 or 1.
fn sign_of(x: f32) -> f32 {
    return select(select(x, -1.0, x < 0.0), 1.0, x > 0.0);
}

fn clamped(x: f32, low: f32, high: f32) -> f32 {
    let above = select(x, low, x < low);
    return select(select(above, high, above > high), x, is_nan(x));
}

fn above_zero(x: f32) -> f32 {
    return select(select(x, 0.0, x < 0.0), x, is_nan(x));
}

// The nearest bfloat16, halves to even.
fn as_bf16(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    let rounded = bitcast<f32>((bits + 0x7fffu + ((bits >> 16u) & 1u)) & 0xffff0000u);
    return select(rounded, x, is_nan(x));
}

// The nearest float16, halves to even.
fn as_f16(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    let size = bits & 0x7fffffffu;
    let sign = bits & 0x80000000u;
    if (size > 0x7f800000u) {
        return x;
    }
    if (size < 0x38800000u) {
        // Below 2^-14 the step is 2^-24.
        let steps = round(bitcast<f32>(size) * 16777216.0);
        return bitcast<f32>(bitcast<u32>(steps * 5.9604644775390625e-8) | sign);
    }
    let rounded = (size + 0xfffu + ((size >> 13u) & 1u)) & 0xffffe000u;
    return bitcast<f32>(select(rounded, 0x7f800000u, rounded >= 0x47800000u) | sign);
}

// x, in a form that the compiler cannot see through: what is rounded stays rounded. `zero` is 0, which it does not
// know.
fn opaque(x: f32, zero: u32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) ^ zero);
}

// A pair of float32 and a number: the second of the pair holds what the first lost (Knuth's two-sum).
fn added(sum: vec2<f32>, value: f32, zero: u32) -> vec2<f32> {
    let next = opaque(sum.x + value, zero);
    let there = opaque(next - sum.x, zero);
    let lost = opaque(sum.x - opaque(next - there, zero), zero) + opaque(value - there, zero);
    return vec2<f32>(next, sum.y + lost);
}

// A whole number for each float32, in their total order: -NaN, -infinity, .., infinity, NaN.
fn key(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}
