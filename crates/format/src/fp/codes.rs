//! The values of codes and scales, one at a time.

/// Values of the e2m1 codes 0 to 15.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Largest e4m3 times largest e2m1: what a global scale is spread over.
pub(super) const NV_RANGE: f32 = 448.0 * 6.0;

/// e4m3 (finite, no infinity) byte of a float32: nearest even, saturating at +-448.
#[inline(always)]
pub fn e4m3_encode(value: f32) -> u8 {
    const DENORMAL: u32 = 141 << 23;
    let bits = value.to_bits();
    let sign = bits >> 24 & 0x80;
    let magnitude = bits & 0x7FFF_FFFF;
    let low = (f32::from_bits(magnitude) + f32::from_bits(DENORMAL)).to_bits().wrapping_sub(DENORMAL);
    let high = magnitude.wrapping_sub(120 << 23).wrapping_add(0x7_FFFF + (magnitude >> 20 & 1)) >> 20;
    let code = if magnitude < 121 << 23 { low } else { high };
    let code = if magnitude >= 448f32.to_bits() { 0x7E } else { code };
    (code | sign) as u8
}

/// Value of an e4m3 byte; 0x7F and 0xFF are NaN.
pub const fn e4m3_decode(byte: u8) -> f32 {
    let (exponent, mantissa) = ((byte >> 3 & 0xF) as u32, (byte & 7) as u32);
    let magnitude = if byte & 0x7F == 0x7F {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 / 512.0
    } else {
        f32::from_bits((exponent + 120) << 23 | mantissa << 20)
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// [`e4m3_decode`] of every byte.
pub(super) const E4M3: [f32; 256] = {
    let mut table = [0f32; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = e4m3_decode(byte as u8);
        byte += 1;
    }
    table
};

/// 2^exponent as float32, subnormals and infinity included.
pub(super) fn power_of_two(exponent: i32) -> f32 {
    f64::powi(2.0, exponent) as f32
}

/// Smallest integer e with 2^e >= t, for positive finite t.
pub(super) fn ceil_log2(t: f32) -> i32 {
    let bits = (t as f64).to_bits();
    let exponent = (bits >> 52) as i32 - 1023;
    exponent + i32::from(bits & ((1 << 52) - 1) != 0)
}

/// Nearest e2m1 code: the first of equal distances; NaN never wins, so that NaN gives code 0.
pub(super) fn e2m1_nearest(x: f32, round: impl Fn(f32) -> f32) -> u8 {
    let distance = |code: usize| round(x - E2M1[code]).abs();
    let (mut best, mut code) = (distance(0), 0);
    for candidate in 1..16 {
        if distance(candidate) < best {
            (best, code) = (distance(candidate), candidate);
        }
    }
    code as u8
}

/// Largest magnitude; NaN makes it NaN, as `mx.max` does.
pub(super) fn magnitude(group: &[f32]) -> f32 {
    group.iter().fold(0f32, |max, v| if v.is_nan() || max.is_nan() { f32::NAN } else { max.max(v.abs()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_round_trips_and_rounds_to_nearest_even() {
        for byte in 0..=255u8 {
            let value = e4m3_decode(byte);
            if value.is_nan() {
                assert!(byte & 0x7F == 0x7F);
                continue;
            }
            assert_eq!(e4m3_encode(value), byte);
            if byte & 0x7F < 0x7E {
                let next = e4m3_decode(byte + 1);
                let middle = f32::midpoint(value, next);
                let even = if byte % 2 == 0 { byte } else { byte + 1 };
                assert_eq!(e4m3_encode(middle), even, "{middle}");
            }
        }
        assert_eq!(
            (e4m3_encode(1e9), e4m3_encode(-f32::INFINITY), e4m3_encode(f32::NAN) & 0x7F),
            (0x7E, 0xFE, 0x7E)
        );
    }

    #[test]
    fn ceil_log2_is_exact_at_powers() {
        for exponent in -149..=127 {
            let power = power_of_two(exponent);
            assert_eq!(ceil_log2(power), exponent);
            if exponent > -149 {
                assert_eq!(ceil_log2(f32::from_bits(power.to_bits() + 1)), exponent + 1);
            }
        }
    }
}
