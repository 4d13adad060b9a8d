//! Predicted divergence of replacing one layer against the true one, for every layer at several widths, and what mlx-lm's first-order
//! sensitivities say of the same layers.
//!
//!     cargo run --release --features demo --example sensitivity -- MODEL CALIBRATION.txt HELD_OUT.txt [MLX_LM_SENSITIVITIES.json]
//!
//! Prints a line a layer and width, then rank correlations (Spearman), the mean ratio of predicted and true, and its spread.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "an example")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use mlx_format::Scheme;
use mlx_format::checkpoint::Directory;
use mlx_quant::dynamic::{SensitivitySettings, sensitivities};
use mlx_quant::plan::Overrides;
use mlx_quant::{
    DataSource, EvaluationSettings, Pick, Plan, QuantizeSettings, Settings, Silent, Windows, evaluate, open,
    quantize,
};

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    for (rank, at) in order.into_iter().enumerate() {
        ranks[at] = rank as f64;
    }
    ranks
}

fn spearman(pairs: &[(f64, f64)]) -> f64 {
    let (a, b): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
    let (a, b) = (ranks(&a), ranks(&b));
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let product =
        |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum() };
    product(&a, &b) / (product(&a, &a) * product(&b, &b)).sqrt()
}

fn main() -> Result<(), mlx_quant::Error> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [path, calibration, held_out, theirs @ ..] = &arguments[..] else {
        println!("MODEL CALIBRATION.txt HELD_OUT.txt [MLX_LM_SENSITIVITIES.json]");
        return Ok(());
    };
    let model = open(&Directory::open(path)?)?;
    let read = |path: &PathBuf, pick| {
        let data = DataSource::Path(path.clone());
        Windows::read(&data, &model.tokenizer()?, model.vocabulary()?, 512, pick)
            .map_err(mlx_quant::Error::from)
    };
    let windows = read(calibration, Pick::Sampled { windows: 16, seed: 123 })?;
    let judged = read(held_out, Pick::EvenlySpaced { windows: 4 })?;
    let all = sensitivities(&model, &windows, &SensitivitySettings::default(), None, &Silent)?;
    let theirs: BTreeMap<String, f64> = match theirs {
        [file, ..] => {
            let text = std::fs::read_to_string(file).unwrap();
            serde_json::from_str::<Vec<(String, f64)>>(&text).unwrap().into_iter().collect()
        }
        [] => BTreeMap::new(),
    };
    let base = Scheme::affine(4, 64).unwrap();
    let work = tempfile::tempdir().unwrap();
    let mut by_width: BTreeMap<u32, Vec<(f64, f64)>> = BTreeMap::new();
    let mut first_order = Vec::new();
    for layer in &all.layers {
        for bits in [2, 3, 4, 6] {
            let name = &layer.path;
            let text = format!(
                "[[layer]]\npath = \"*\"\nkeep = true\n[[layer]]\npath = \"{name}\"\nbits = {bits}\ngroup_size = 64"
            );
            let overrides = Some(Overrides::parse(&text, base).unwrap());
            let settings = Settings { quantize: Some(base), overrides, ..Settings::default() };
            let plan = Plan::new(&model.checkpoint, &model.config, settings)?;
            let mut how = QuantizeSettings::new("search".parse().unwrap());
            how.columns = [(name.clone(), layer.column_weights())].into_iter().collect();
            let target = work.path().join("one");
            quantize(&model, &plan, &judged, &target, &how, &Silent)?;
            let written = open(&Directory::open(&target)?)?;
            let quality = evaluate(&written, Some(&model), &judged, &EvaluationSettings::default(), &Silent)?;
            std::fs::remove_dir_all(&target).unwrap();
            let found = quality.total.against.map_or(f64::NAN, |against| against.kl_mean);
            let cost = layer.costs.iter().find(|cost| cost.bits == bits && cost.group_size == 64);
            let predicted = cost.map_or(f64::NAN, |cost| cost.kl);
            println!("{name:<40} {bits} bits: predicted {predicted:.4e}, true {found:.4e}");
            by_width.entry(bits).or_default().push((predicted, found));
            if let Some(own) = theirs.get(name).filter(|_| bits == 4) {
                // Theirs is by a million weights.
                let weights = layer.shape.iter().product::<usize>() as f64;
                first_order.push((own * weights, found));
            }
        }
    }
    for (bits, pairs) in &by_width {
        println!("{bits} bits: Spearman {:.4} over {} layers", spearman(pairs), pairs.len());
    }
    let pairs: Vec<(f64, f64)> = by_width.into_values().flatten().collect();
    let logs: Vec<f64> = pairs.iter().map(|(predicted, found)| (predicted / found).ln()).collect();
    let mean = logs.iter().sum::<f64>() / logs.len() as f64;
    let spread = (logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / logs.len() as f64).sqrt();
    println!(
        "all: Spearman {:.4} over {}, predicted by true {:.3}, spread x/÷ {:.3}",
        spearman(&pairs),
        pairs.len(),
        mean.exp(),
        spread.exp()
    );
    if !first_order.is_empty() {
        println!(
            "mlx-lm's first order, 4 bits: Spearman {:.4} over {}",
            spearman(&first_order),
            first_order.len()
        );
    }
    Ok(())
}
