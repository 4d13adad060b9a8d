//! Every tensor that MLX 0.32.4 produced for `tests/golden` (see its README), from the scalar reference and from
//! the fast path. Run with `--nocapture` to see the number of tensors compared.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and prints its count")]

use std::path::Path;

use mlx_format::{Dtype, FloatType, Mode, PackedMut, PackedRef, Scheme, affine, fp};
use safetensors::SafeTensors;

const FLOATS: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

struct Packed {
    weight: Vec<u8>,
    scales: Vec<u8>,
    biases: Vec<u8>,
}

impl Packed {
    fn zeroed(scheme: Scheme, float: FloatType, rows: usize, columns: usize) -> Self {
        let scales = rows * scheme.scale_bytes(columns, float);
        Self {
            weight: vec![0; rows * scheme.words(columns) * 4],
            scales: vec![0; scales],
            biases: vec![0; if scheme.has_biases() { scales } else { 0 }],
        }
    }

    fn as_mut(&mut self) -> PackedMut<'_> {
        PackedMut { weight: &mut self.weight, scales: &mut self.scales, biases: &mut self.biases }
    }

    fn as_ref(&self) -> PackedRef<'_> {
        PackedRef { weight: &self.weight, scales: &self.scales, biases: &self.biases }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Route {
    Scalar,
    Fast,
}

/// One golden file and how many of its tensors were compared.
struct Golden<'a> {
    tensors: SafeTensors<'a>,
    compared: usize,
}

impl Golden<'_> {
    fn bytes(&self, name: &str) -> &[u8] {
        self.tensors.tensor(name).unwrap().data()
    }

    fn equal(&mut self, name: &str, ours: &[u8]) {
        let expected = self.bytes(name);
        assert!(expected == ours, "{name} differs");
        self.compared += 1;
    }

    /// Equal, except that any NaN equals any NaN: MLX does not promise payloads.
    fn equal_floats(&mut self, name: &str, float: FloatType, ours: &[u8]) {
        let expected = self.bytes(name).to_vec();
        let count = ours.len() / float.size();
        assert_eq!(expected.len(), ours.len(), "{name}");
        let (mut a, mut b) = (vec![0f32; count], vec![0f32; count]);
        float.widen(&expected, &mut a);
        float.widen(ours, &mut b);
        for (index, (a, b)) in a.iter().zip(&b).enumerate() {
            assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{name}[{index}]: {a} and {b}");
        }
        self.compared += 1;
    }
}

fn quantize(path: Route, scheme: Scheme, float: FloatType, columns: usize, input: &[u8]) -> Packed {
    let rows = input.len() / float.size() / columns;
    let mut packed = Packed::zeroed(scheme, float, rows, columns);
    match (path, scheme.mode()) {
        (Route::Fast, _) => {
            mlx_format::quantize(scheme, float, columns, input, packed.as_mut(), true).unwrap();
        }
        (Route::Scalar, Mode::Affine) => affine::quantize_reference(scheme, float, input, packed.as_mut()),
        (Route::Scalar, mode) => fp::quantize_reference(mode, float, input, packed.as_mut(), None),
    }
    packed
}

fn dequantize(path: Route, scheme: Scheme, float: FloatType, columns: usize, packed: &Packed) -> Vec<u8> {
    let rows = packed.weight.len() / scheme.words(columns) / 4;
    let mut out = vec![0u8; rows * columns * float.size()];
    match (path, scheme.mode()) {
        (Route::Fast, _) => mlx_format::dequantize(scheme, float, columns, packed.as_ref(), &mut out),
        (Route::Scalar, Mode::Affine) => {
            affine::dequantize_reference(scheme, float, packed.as_ref(), &mut out);
        }
        (Route::Scalar, mode) => fp::dequantize_reference(mode, float, packed.as_ref(), &mut out),
    }
    out
}

fn suffix(float: FloatType) -> &'static str {
    match float {
        FloatType::F32 => "f32",
        FloatType::F16 => "f16",
        FloatType::Bf16 => "bf16",
    }
}

fn with_file(kind: &str, float: FloatType, check: impl FnOnce(&mut Golden<'_>)) -> usize {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(format!("tests/golden/{kind}_{}.safetensors", suffix(float)));
    let bytes = std::fs::read(&path).unwrap();
    let mut golden = Golden { tensors: SafeTensors::deserialize(&bytes).unwrap(), compared: 0 };
    check(&mut golden);
    golden.compared
}

fn affine_file(path: Route, float: FloatType) -> usize {
    with_file("affine", float, |golden| {
        for bits in [1, 2, 3, 4, 5, 6, 8] {
            let input = golden.bytes(&format!("b{bits}.input")).to_vec();
            for group_size in [32, 64, 128] {
                let scheme = Scheme::affine(bits, group_size).unwrap();
                let name = format!("b{bits}.g{group_size}");
                let packed = quantize(path, scheme, float, 384, &input);
                golden.equal(&format!("{name}.weight"), &packed.weight);
                golden.equal(&format!("{name}.scales"), &packed.scales);
                golden.equal(&format!("{name}.biases"), &packed.biases);
                golden.equal(&format!("{name}.dequant"), &dequantize(path, scheme, float, 384, &packed));
            }
        }
    })
}

fn nonfinite_file(path: Route, float: FloatType) -> usize {
    with_file("nonfinite", float, |golden| {
        let input = golden.bytes("input").to_vec();
        for bits in [1, 2, 3, 4, 5, 6, 8] {
            let packed = quantize(path, Scheme::affine(bits, 32).unwrap(), float, 32, &input);
            golden.equal(&format!("b{bits}.weight"), &packed.weight);
            golden.equal_floats(&format!("b{bits}.scales"), float, &packed.scales);
            golden.equal_floats(&format!("b{bits}.biases"), float, &packed.biases);
        }
    })
}

fn fp_file(path: Route, float: FloatType) -> usize {
    with_file("fp", float, |golden| {
        let input = golden.bytes("input").to_vec();
        for mode in [Mode::Mxfp4, Mode::Mxfp8, Mode::Nvfp4] {
            let (name, scheme) = (mode.name(), Scheme::new(mode, None, None).unwrap());
            let packed = quantize(path, scheme, float, 384, &input);
            golden.equal(&format!("{name}.weight"), &packed.weight);
            golden.equal(&format!("{name}.scales"), &packed.scales);
            golden.equal(&format!("{name}.dequant"), &dequantize(path, scheme, float, 384, &packed));
        }

        let input = &input[..6 * 384 * float.size()];
        let raw = golden.bytes("nvfp4_global.global_scale").to_vec();
        let global = f32::from_le_bytes(raw[..4].try_into().unwrap());
        let mut packed = Packed::zeroed(fp::NVFP4, float, 6, 384);
        match path {
            Route::Scalar => fp::quantize_reference(Mode::Nvfp4, float, input, packed.as_mut(), Some(global)),
            Route::Fast => fp::quantize_nvfp4_global(float, input, global, packed.as_mut()).unwrap(),
        }
        golden.equal("nvfp4_global.weight", &packed.weight);
        golden.equal("nvfp4_global.scales", &packed.scales);
        let mut decoded = vec![0f32; 6 * 384];
        fp::dequantize_nvfp4_global(float, packed.as_ref(), global, &mut decoded);
        assert_eq!(golden.tensors.tensor("nvfp4_global.dequant").unwrap().dtype(), Dtype::F32);
        let mut raw = vec![0u8; decoded.len() * 4];
        FloatType::F32.narrow(&decoded, &mut raw);
        golden.equal("nvfp4_global.dequant", &raw);
    })
}

fn all(path: Route) {
    let (mut affine, mut nonfinite, mut fp) = (0, 0, 0);
    for float in FLOATS {
        affine += affine_file(path, float);
        nonfinite += nonfinite_file(path, float);
        fp += fp_file(path, float);
    }
    println!(
        "golden tensors equal, {path:?} path: {} ({affine} affine, {fp} fp, {nonfinite} non-finite); kernels: {}",
        affine + nonfinite + fp,
        mlx_format::simd_name()
    );
    assert_eq!(affine + nonfinite + fp, 351);
}

#[test]
fn scalar_reference_equals_mlx() {
    all(Route::Scalar);
}

#[test]
fn fast_path_equals_mlx() {
    all(Route::Fast);
}
