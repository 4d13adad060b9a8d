// What the kernels of learned rounding share: codes of positions, and quotients by the largest code. This text is put
// in front of theirs.

// The nearest whole number, halves away from zero, with the sign of x.
fn nearest(x: f32) -> f32 {
    let size = abs(x);
    let whole = floor(size);
    let near = whole + select(0.0, 1.0, size - whole >= 0.5);
    return bitcast<f32>(bitcast<u32>(near) | (bitcast<u32>(x) & 0x80000000u));
}

// The code of a position, as a number.
fn code_at(position: f32, most: f32) -> f32 {
    return clamped(nearest(position), 0.0, most);
}

// x / most, rounded as a processor rounds it, where a driver's quotient may be off in the last places: long division of
// the digits of x. most is odd and less than 256. What is next to zero or not finite is left to the driver.
fn quotient(x: f32, most: u32) -> f32 {
    let bits = bitcast<u32>(x);
    let exponent = (bits >> 23u) & 255u;
    if (exponent < 10u || exponent == 255u) {
        return x / f32(most);
    }
    let digits = ((bits & 0x7fffffu) | 0x800000u) << 8u;
    let whole = digits / most;
    let rest = digits % most;
    // Of 24 to 32 digits 24 stay.
    let beyond = 8u - countLeadingZeros(whole);
    let kept = whole >> beyond;
    let lost = whole - (kept << beyond);
    let half = (1u << beyond) >> 1u;
    let up = select(
        lost > half || (lost == half && (rest > 0u || (kept & 1u) == 1u)),
        2u * rest > most,
        beyond == 0u,
    );
    let rounded = bitcast<u32>(f32(kept + select(0u, 1u, up))) + ((exponent + beyond - 158u) << 23u);
    return bitcast<f32>(rounded | (bits & 0x80000000u));
}
