//! Logits that must be the same, bit for bit.

use std::path::Path;

use mlx_format::{FloatType, Mode, Scheme};
use mlx_quant::model::Weights;
use mlx_quant::plan::{MixedRecipe, PlanError};
use mlx_quant::walks::{Residency, Walk};
use mlx_quant::{Error, Settings, Silent};
use rayon::prelude::*;

use crate::common::convert_to;
use crate::{Verdict, model};

/// Ways to quantize; 3 bits of 64 and nvfp4 do not divide every layer, those stay as they are.
fn cases() -> Vec<(&'static str, Settings)> {
    let quantize =
        |scheme: Result<Scheme, _>| Settings { quantize: Some(scheme.unwrap()), ..Settings::default() };
    let fp = |mode| quantize(Scheme::new(mode, None, None));
    let mixed = Settings { mixed: Some(MixedRecipe::Mixed4_6), ..fp(Mode::Affine) };
    vec![
        ("q4", quantize(Scheme::affine(4, 32))),
        ("q3", quantize(Scheme::affine(3, 64))),
        ("mixed_4_6", mixed),
        ("mxfp4", fp(Mode::Mxfp4)),
        ("mxfp8", fp(Mode::Mxfp8)),
        ("nvfp4", fp(Mode::Nvfp4)),
    ]
}

/// Logits of the packed weights are those of the weights that `-d --dtype float32` decodes. There is no rounding in
/// between: scales and biases widen exactly, and both sides compute code * scale + bias in float32.
pub(crate) fn quantized_equals_decoded(directory: &Path) -> Verdict {
    let source = model::open(directory);
    let windows = model::windows(directory);
    let windows = model::slices(&windows);
    let mut cells = Vec::new();
    for (case, settings) in cases() {
        let temporary = tempfile::tempdir().unwrap();
        let (packed, decoded) = (temporary.path().join("packed"), temporary.path().join("decoded"));
        match convert_to(&source, settings, &packed) {
            // A recipe without layers to apply it to is refused, as mlx-lm does.
            Err(Error::Plan(PlanError::MixedLayers)) if case == "mixed_4_6" => {
                cells.push(format!("{case} refused"));
                continue;
            }
            converted => converted.map_err(|error| format!("{case}: {error}"))?,
        };
        let packed = model::open(&packed);
        let weights =
            Weights::open(&packed.checkpoint, &packed.config).map_err(|error| format!("{case}: {error}"))?;
        let modules =
            weights.shapes().filter_map(|(name, _)| weights.scheme(name.strip_suffix(".weight")?)).count();
        if modules == 0 {
            return Err(format!("{case} packs nothing"));
        }
        let settings = Settings { dequantize: true, dtype: Some(FloatType::F32), ..Settings::default() };
        convert_to(&packed, settings, &decoded).map_err(|error| format!("{case}, decoding: {error}"))?;
        let run = |model| model::logits(model, &windows).map_err(|error| format!("{case}: {error}"));
        let (a, b) = (run(&packed)?, run(&model::open(&decoded))?);
        if let Some(at) = model::first_difference(&a, &b) {
            return Err(format!("{case}: logit {at} is {} and, decoded, {}", a[at], b[at]));
        }
        cells.push(format!("{case} {modules}"));
    }
    Ok(cells.join(", "))
}

/// Logits of a batch are those of each of its windows alone.
pub(crate) fn batches_do_not_matter(directory: &Path) -> Verdict {
    let model = model::open(directory);
    let windows = model::windows(directory);
    let windows = model::slices(&windows);
    let run = |windows: &[&[u32]]| model::logits(&model, windows);
    let together = run(&windows)?;
    let alone = windows.iter().map(|window| run(&[window])).collect::<Result<Vec<_>, _>>()?.concat();
    match model::first_difference(&together, &alone) {
        None => Ok(format!("{} windows, {} logits equal", windows.len(), together.len())),
        Some(at) => Err(format!("logit {at} is {} in the batch and {} alone", together[at], alone[at])),
    }
}

/// Windows spread over the threads of a pool give the same logits for every number of threads.
pub(crate) fn threads_do_not_matter(directory: &Path) -> Verdict {
    let model = model::open(directory);
    let weights = Weights::open(&model.checkpoint, &model.config).map_err(model::text)?;
    let decoder = weights.decoder(&model.config, false).map_err(model::text)?;
    let mut windows = model::windows(directory);
    // More windows than threads: the same tokens from other places on.
    for shift in 1..4 {
        let mut shifted = windows[0].clone();
        shifted.rotate_left(shift * 7);
        windows.push(shifted);
    }
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let each = |window: &Vec<u32>| model::run(&weights, &decoder, &[window], &mut ());
        let logits: Result<Vec<_>, _> = pool.install(|| windows.par_iter().map(each).collect());
        logits.map(|logits| logits.concat())
    };
    let one = on(1)?;
    for threads in [2, 5] {
        if let Some(at) = model::first_difference(&one, &on(threads)?) {
            return Err(format!("logit {at} differs on {threads} threads"));
        }
    }
    Ok(format!("{} windows, {} logits equal", windows.len(), one.len()))
}

/// Blocks read again for every pass give what blocks that stay in memory give, on the first pass and later.
pub(crate) fn streaming_equals_resident(directory: &Path) -> Verdict {
    let source = model::open(directory);
    let windows = model::windows(directory);
    let windows = model::slices(&windows);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let states = |walk: &Walk<'_>| -> Result<Vec<f32>, String> {
        let hidden = walk.hidden(&windows, &pool, &Silent, &mut 0).map_err(model::text)?;
        let flat = hidden.iter().map(mlx_quant_engine::Tensor::to_vec);
        Ok(flat.collect::<Result<Vec<_>, _>>().map_err(model::text)?.concat())
    };
    let streaming = states(&Walk::open(&source).map_err(model::text)?)?;
    let walk = Walk::open(&source).map_err(model::text)?.with(Residency::Resident);
    for pass in ["first", "second"] {
        if let Some(at) = model::first_difference(&streaming, &states(&walk)?) {
            return Err(format!("{pass} resident pass: state {at} differs"));
        }
    }
    Ok(format!("{} states", streaming.len()))
}
