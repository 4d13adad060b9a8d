//! The fast path against the scalar reference on generated weights: every width, group size, dtype and mode.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

use mlx_format::{FloatType, Mode, PackedMut, PackedRef, Scheme, affine, fp};
use proptest::prelude::*;

const FLOATS: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

fn schemes() -> Vec<Scheme> {
    let mut schemes: Vec<Scheme> = [Mode::Mxfp4, Mode::Mxfp8, Mode::Nvfp4]
        .into_iter()
        .map(|mode| Scheme::new(mode, None, None).unwrap())
        .collect();
    for bits in [1, 2, 3, 4, 5, 6, 8] {
        schemes.extend([32, 64, 128].map(|group_size| Scheme::affine(bits, group_size).unwrap()));
    }
    schemes
}

type Buffers = [Vec<u8>; 3];

fn buffers(scheme: Scheme, float: FloatType, rows: usize, columns: usize) -> Buffers {
    let scales = rows * scheme.scale_bytes(columns, float);
    let biases = if scheme.has_biases() { scales } else { 0 };
    [vec![0; rows * scheme.words(columns) * 4], vec![0; scales], vec![0; biases]]
}

fn out(buffers: &mut Buffers) -> PackedMut<'_> {
    let [weight, scales, biases] = buffers;
    PackedMut { weight, scales, biases }
}

fn reference(scheme: Scheme, float: FloatType, input: &[u8], out: PackedMut<'_>) {
    match scheme.mode() {
        Mode::Affine => affine::quantize_reference(scheme, float, input, out),
        mode => fp::quantize_reference(mode, float, input, out, None),
    }
}

/// Compares all schemes on rows of `columns` elements: both ways to quantize and both to decode.
fn compare(float: FloatType, columns: usize, input: &[u8]) {
    let rows = input.len() / float.size() / columns;
    for scheme in schemes() {
        let context = format!("{scheme} {float:?} {rows}x{columns}");
        let mut expected = buffers(scheme, float, rows, columns);
        reference(scheme, float, input, out(&mut expected));
        let mut fast = buffers(scheme, float, rows, columns);
        mlx_format::quantize(scheme, float, columns, input, out(&mut fast), false).unwrap();
        assert!(fast == expected, "fast path differs: {context}");

        let packed = PackedRef { weight: &fast[0], scales: &fast[1], biases: &fast[2] };
        let (mut ours, mut theirs) = (vec![0u8; input.len()], vec![0u8; input.len()]);
        mlx_format::dequantize(scheme, float, columns, packed, &mut ours);
        match scheme.mode() {
            Mode::Affine => affine::dequantize_reference(scheme, float, packed, &mut theirs),
            mode => fp::dequantize_reference(mode, float, packed, &mut theirs),
        }
        assert!(ours == theirs, "decoder differs: {context}");
    }
}

fn finite(float: FloatType, value: f32) -> f32 {
    let rounded = float.round(value);
    if rounded.is_finite() { rounded } else { 0.0 }
}

/// Weights as they occur, plus grids that make exact ties, plus arbitrary bit patterns.
fn weights(count: usize) -> impl Strategy<Value = Vec<f32>> {
    let smooth = proptest::collection::vec((-4.0f32..4.0).prop_map(|x| x * x * x * 0.01), count);
    let scaled = (proptest::collection::vec(-1.0f32..1.0, count), -40i32..30)
        .prop_map(|(values, exponent)| values.into_iter().map(|v| v * f32::powi(2.0, exponent)).collect());
    let grid = (proptest::collection::vec(-32i32..32, count), -12i32..4).prop_map(|(values, exponent)| {
        values.into_iter().map(|v| v as f32 * f32::powi(2.0, exponent)).collect()
    });
    let bits = proptest::collection::vec(any::<u32>().prop_map(f32::from_bits), count);
    let sparse =
        proptest::collection::vec(prop_oneof![8 => Just(0.0f32), 1 => Just(-0.0), 1 => -1.0f32..1.0], count);
    prop_oneof![smooth, scaled, grid, bits, sparse]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn fast_equals_reference(values in weights(3 * 384), columns in prop_oneof![Just(128usize), Just(384), Just(1152)]) {
        for float in FLOATS {
            let values: Vec<f32> = values.iter().map(|v| finite(float, *v)).collect();
            let mut input = vec![0u8; values.len() * float.size()];
            float.narrow(&values, &mut input);
            compare(float, columns, &input);
        }
    }

    #[test]
    fn nonfinite_is_refused_where_it_stands(at in 0usize..1024, bad in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)]) {
        for float in FLOATS {
            let mut values = vec![0.25f32; 1024];
            values[at] = bad;
            let mut input = vec![0u8; values.len() * float.size()];
            float.narrow(&values, &mut input);
            for scheme in schemes() {
                let mut fast = buffers(scheme, float, 8, 128);
                let found = mlx_format::quantize(scheme, float, 128, &input, out(&mut fast), false).unwrap_err();
                prop_assert_eq!(found.element, at);
                mlx_format::quantize(scheme, float, 128, &input, out(&mut fast), true).unwrap();
                let mut expected = buffers(scheme, float, 8, 128);
                reference(scheme, float, &input, out(&mut expected));
                prop_assert!(fast == expected);
            }
        }
    }
}

/// Every finite 16-bit value beside every exponent's neighbours: rows of one large value and a sweep.
#[test]
fn every_16_bit_value_as_element_and_as_maximum() {
    for float in [FloatType::F16, FloatType::Bf16] {
        let mut all: Vec<u8> = Vec::new();
        for bits in 0..=u16::MAX {
            let mut value = [0f32];
            float.widen(&bits.to_le_bytes(), &mut value);
            if value[0].is_finite() {
                all.extend(bits.to_le_bytes());
            }
        }
        all.truncate(all.len() / 256 * 256);
        compare(float, 128, &all);
        // Each value as the maximum of a group of smaller ones with the same significands.
        let mut spread = Vec::new();
        for (index, raw) in all.chunks_exact(2).enumerate() {
            let mut value = [0f32];
            float.widen(raw, &mut value);
            let group: Vec<f32> =
                (0..16).map(|k| value[0] * (((k * 37 + index) % 64) as f32 / 64.0)).collect();
            let mut out = [0u8; 32];
            float.narrow(&group, &mut out);
            out[..2].copy_from_slice(raw);
            spread.extend(out);
        }
        spread.truncate(spread.len() / 256 * 256);
        compare(float, 128, &spread);
    }
}

/// Any cut between rows gives the same bytes: programs spread rows over threads.
#[test]
fn rows_are_independent() {
    const ROWS: usize = 30;
    const COLUMNS: usize = 256;
    let float = FloatType::Bf16;
    let input: Vec<u8> = (0..ROWS * COLUMNS)
        .flat_map(|i| half::bf16::from_f32((i as f32 * 0.37).sin() * 0.02).to_le_bytes())
        .collect();
    for scheme in schemes() {
        let mut whole = buffers(scheme, float, ROWS, COLUMNS);
        mlx_format::quantize(scheme, float, COLUMNS, &input, out(&mut whole), false).unwrap();
        for rows in [1, 7, 29] {
            let mut cut = [Vec::new(), Vec::new(), Vec::new()];
            for input in input.chunks(rows * COLUMNS * float.size()) {
                let mut part = buffers(scheme, float, input.len() / COLUMNS / float.size(), COLUMNS);
                mlx_format::quantize(scheme, float, COLUMNS, input, out(&mut part), false).unwrap();
                cut.iter_mut().zip(part).for_each(|(cut, part)| cut.extend(part));
            }
            assert!(cut == whole, "{scheme}, {rows} rows at a time");
        }
    }
}
