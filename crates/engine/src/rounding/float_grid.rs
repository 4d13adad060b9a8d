//! The searched scale of the fp modes: of the bytes that a group's scale can be, the one of least weighted error.
//!
//! `mx.quantize` takes the scale at which a group's largest magnitude becomes the largest element. Elements of e2m1 are
//! far apart at the top (4, 6), so that other scales round most groups better; for nvfp4 they lie an eighth apart, for
//! the mx modes a factor of two. Neighbours of MLX's scale are tried, and MLX's is among them, so that the loss is
//! never above round-to-nearest's. Lanes are rows, as in `grid`.

use super::elements::{Elements, Scales};
use super::grid::{Grid, LANES, Lanes, mean_square, weighed};

/// Steps of e4m3 that are tried on both sides: from 0.6 to 1.8 times the scale.
const NV_STEPS: [i32; 15] = [0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, 8];
/// Powers of two that are tried.
const MX_STEPS: [i32; 4] = [0, -1, 1, -2];

/// Value of an e4m3 byte below 0x7F.
#[inline(always)]
fn e4m3_of(byte: i32) -> f32 {
    if byte >= 8 { f32::from_bits(((byte << 20) + (120 << 23)) as u32) } else { byte as f32 / 512.0 }
}

/// The byte of an e4m3 that is not negative.
#[inline(always)]
fn byte_of(value: f32) -> i32 {
    if value < 1.0 / 64.0 {
        (value * 512.0) as i32
    } else {
        (value.to_bits() >> 20).cast_signed() - (120 << 3)
    }
}

/// MLX's scales in these numbers, as steps: bytes of e4m3, exponents of e8m0.
#[inline(always)]
fn begun(largest: &Lanes, elements: Elements, scales: Scales) -> [i32; LANES] {
    let mut begun = [0; LANES];
    let part = 1.0 / elements.most();
    let mut values = *largest;
    for value in &mut values {
        *value *= part;
    }
    if scales == Scales::E8m0 {
        for lane in 0..LANES {
            let bits = values[lane].to_bits();
            // The next power of two; a group of zeros has scale 1.
            let exponent = (bits >> 23).cast_signed() + i32::from(bits & 0x7F_FFFF != 0);
            begun[lane] = if bits == 0 { 127 } else { exponent };
        }
    } else {
        Scales::E4m3.stored(&mut values);
        for lane in 0..LANES {
            begun[lane] = byte_of(values[lane]);
        }
    }
    begun
}

#[inline(always)]
fn of_steps(begun: &[i32; LANES], step: i32, scales: Scales) -> Lanes {
    let mut out = [0f32; LANES];
    for lane in 0..LANES {
        let at = begun[lane] + step;
        out[lane] = match scales {
            Scales::E8m0 => f32::from_bits((at.clamp(1, 254) << 23) as u32),
            _ => e4m3_of(at.clamp(0, 126)),
        };
    }
    out
}

/// The scales of least `sum over columns of weight * (value - decoded)^2` among those tried. Arguments as in
/// [`search_in`](super::grid::search_in).
#[inline(always)]
pub(super) fn search_float(
    columns: &[Lanes],
    weights: &[f32],
    elements: Elements,
    scales: Scales,
    blind: bool,
) -> Lanes {
    let mut largest = [0f32; LANES];
    for column in columns {
        for lane in 0..LANES {
            let value = column[lane].abs();
            largest[lane] = if value > largest[lane] { value } else { largest[lane] };
        }
    }
    let mean = mean_square(columns);
    let heavy = blind.then_some(&mean);
    let begun = begun(&largest, elements, scales);
    let mut best = of_steps(&begun, 0, scales);
    let mut least = loss(columns, weights, heavy, &best, elements);
    let steps: &[i32] = if scales == Scales::E8m0 { &MX_STEPS } else { &NV_STEPS };
    for step in &steps[1..] {
        let tried = of_steps(&begun, *step, scales);
        let loss = loss(columns, weights, heavy, &tried, elements);
        for lane in 0..LANES {
            let better = loss[lane] < least[lane];
            least[lane] = if better { loss[lane] } else { least[lane] };
            best[lane] = if better { tried[lane] } else { best[lane] };
        }
    }
    best
}

#[inline(always)]
fn loss(
    columns: &[Lanes],
    weights: &[f32],
    heavy: Option<&Lanes>,
    scale: &Lanes,
    elements: Elements,
) -> Lanes {
    let inverse = Grid { scale: *scale, bias: *scale }.inverse();
    let (mut loss, zero) = ([0f32; LANES], [0f32; LANES]);
    for (column, &weight) in columns.iter().zip(weights) {
        let nearest = elements.nearest(column, &inverse, &zero);
        for lane in 0..LANES {
            let error = column[lane] - nearest[lane] * scale[lane];
            loss[lane] += weight * weighed(column, heavy, lane) * (error * error);
        }
    }
    loss
}

#[cfg(test)]
mod tests {
    use mlx_format::fp::{e4m3_decode, e4m3_encode};

    use super::*;

    #[test]
    fn bytes_and_values_of_scales() {
        for byte in 0..=126u8 {
            assert_eq!(e4m3_of(byte as i32), e4m3_decode(byte));
            assert_eq!(byte_of(e4m3_decode(byte)), byte as i32);
        }
    }

    /// What `mx.quantize` would take, in every lane, is where the search begins.
    #[test]
    fn begins_at_mlx_scales() {
        for amax in [0.0, 1e-4, 0.013, 0.7, 6.0, 6.1, 100.0, 2600.0] {
            let own = of_steps(&begun(&[amax; LANES], Elements::E2m1, Scales::E4m3), 0, Scales::E4m3);
            assert_eq!(own, [e4m3_decode(e4m3_encode(amax / 6.0)); LANES], "{amax}");
            let own = of_steps(&begun(&[amax; LANES], Elements::E4m3, Scales::E8m0), 0, Scales::E8m0);
            let expected = if amax == 0.0 { 1.0 } else { (amax / 448.0).log2().ceil().exp2() };
            assert_eq!(own, [expected; LANES], "{amax}");
        }
    }
}
