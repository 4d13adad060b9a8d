//! What a method is expected to lose at a size, before it is tried: curves of KL over bits per weight, measured once and kept here
//! as data.
//!
//! They were measured on two models, the built-in demo model (7.9 million weights) and SmolLM2-135M (dithered), on the same held-out
//! text and windows; `docs/results.md` shows them, and every point names the file in `benches/results/` that it is from. A model
//! loses what neither of them lost: an estimate is the range between both, and says no more than which method and size to try.
//!
//! Rounding errors fall by the same factor for each bit, so KL is interpolated in its logarithm. Where a method was not measured, its
//! distance to round-to-nearest is taken as at the nearest size where it was; where round-to-nearest was not measured on SmolLM2,
//! its distance to the demo model's.

use serde::Serialize;

/// KL that is expected of a method, in nats per token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Expected {
    /// Of the model that lost less.
    pub low: f64,
    /// Of the model that lost more.
    pub high: f64,
}

impl Expected {
    /// Between both, by ratio: what methods are ranked by.
    pub fn middle(&self) -> f64 {
        (self.low * self.high).sqrt()
    }
}

/// One measurement.
struct Point {
    model: Model,
    method: &'static str,
    bits_per_weight: f64,
    kl: f64,
    /// File in `benches/results/`.
    #[cfg_attr(not(test), expect(dead_code, reason = "for readers, and for a test that looks it up"))]
    source: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Model {
    Demo,
    Smol,
}

/// Points of one method on one model, from one file.
macro_rules! points {
    ($($model:ident $method:literal $source:literal: $($bits:literal => $kl:literal),+;)*) => {
        &[$($(Point {
            model: Model::$model,
            method: $method,
            bits_per_weight: $bits,
            kl: $kl,
            source: $source,
        },)+)*]
    };
}

/// Every measurement. 32 calibration windows of 512 tokens or more; dwq trained on 400 windows of 256 tokens (demo model), 48 of them
/// (SmolLM2).
const POINTS: &[Point] = points! {
    Demo "basic" "quality-2026-11-25.md": 2.507 => 2.7782, 3.507 => 0.4759, 4.506 => 0.0939;
    Demo "basic" "compare-demo-345bit-2026-11-25.md": 5.506 => 0.0208;
    Demo "basic" "compare-demo-68bit-2026-11-29.md": 6.505 => 0.0054, 8.504 => 0.0005;
    Demo "awq" "quality-2026-11-25.md": 2.507 => 1.4258, 3.507 => 0.2835, 4.506 => 0.0682;
    Demo "awq" "compare-demo-345bit-2026-11-25.md": 5.506 => 0.0162;
    Demo "awq" "compare-demo-68bit-2026-11-29.md": 6.505 => 0.0042;
    Demo "gptq" "quality-2026-11-25.md": 2.507 => 1.1885, 3.507 => 0.2386, 4.506 => 0.0556;
    Demo "gptq" "compare-demo-345bit-2026-11-25.md": 5.506 => 0.0131;
    Demo "gptq" "compare-demo-68bit-2026-11-29.md": 6.505 => 0.0035;
    Demo "dynamic" "trained-2026-11-25.md": 3.507 => 0.18264, 4.499 => 0.04604, 5.000 => 0.02203;
    Demo "dynamic" "compare-demo-345bit-2026-11-25.md": 5.505 => 0.0112;
    Demo "dwq" "trained-2026-11-25.md": 2.507 => 0.86666, 3.507 => 0.21556, 4.506 => 0.05244;
    Demo "dynamic+awq+gptq" "trained-2026-11-25.md": 3.507 => 0.17584, 4.499 => 0.04578, 5.000 => 0.02193;
    Demo "dynamic+awq+gptq" "compare-demo-345bit-2026-11-25.md": 5.505 => 0.0108;
    Demo "dynamic+awq+gptq+dwq" "trained-2026-11-25.md": 3.507 => 0.15831, 4.499 => 0.04110, 5.000 => 0.01978;
    Smol "basic" "quality-2026-11-25.md": 2.504 => 14.5844, 3.503 => 2.0782, 4.503 => 0.5634;
    Smol "awq" "quality-2026-11-25.md": 2.504 => 3.9351, 3.503 => 0.7537, 4.503 => 0.1876;
    Smol "gptq" "quality-2026-11-25.md": 2.504 => 1.9638, 3.503 => 0.4716, 4.503 => 0.1277;
    Smol "dynamic" "trained-2026-11-25.md": 3.507 => 0.48213, 4.500 => 0.12262, 5.000 => 0.06505;
    Smol "dwq" "trained-2026-11-25.md": 3.503 => 0.43334, 4.503 => 0.13174;
    Smol "dynamic+awq+gptq" "trained-2026-11-25.md": 3.507 => 0.45864, 4.500 => 0.11788, 5.000 => 0.06229;
    Smol "dynamic+awq+gptq+dwq" "compare-smollm2-2026-11-25.md": 3.503 => 0.4608, 4.503 => 0.1158;
};

/// What `method` (a name of mlx-lm's guide, or a recipe) is expected to lose at so many bits per weight of the whole model, scales
/// included. Nothing for methods that were not measured, and for sizes below all that were.
pub fn expected(method: &str, bits_per_weight: f64) -> Option<Expected> {
    let kl = |model| at(model, method, bits_per_weight);
    let (demo, smol) = (kl(Model::Demo)?, kl(Model::Smol)?);
    Some(Expected { low: demo.min(smol), high: demo.max(smol) })
}

fn at(model: Model, method: &str, bits: f64) -> Option<f64> {
    let points: Vec<(f64, f64)> = POINTS
        .iter()
        .filter(|point| point.model == model && point.method == method)
        .map(|point| (point.bits_per_weight, point.kl))
        .collect();
    let (first, last) = (points.first()?, points.last()?);
    // What the curve ends at, and what goes on where it does.
    let beyond =
        |(end, kl): (f64, f64), model, method| Some(kl * at(model, method, bits)? / at(model, method, end)?);
    match (model, method) {
        _ if (first.0..=last.0).contains(&bits) => Some(between(&points, bits)),
        (Model::Demo, "basic") if bits > last.0 => Some(last.1),
        // The narrowest codes have two bits: what has a few more hundredths for scales is the same.
        (Model::Demo, "basic") if bits > first.0 - ROOM => Some(first.1),
        (Model::Demo, "basic") => None,
        (Model::Smol, "basic") => beyond(if bits > last.0 { *last } else { *first }, Model::Demo, method),
        _ => beyond(if bits > last.0 { *last } else { *first }, model, "basic"),
    }
}

/// Bits per weight that models differ in at one width of codes, by what is not quantized.
const ROOM: f64 = 0.05;

/// Between two points, in the logarithm of KL. `bits` is within the points' range.
fn between(points: &[(f64, f64)], bits: f64) -> f64 {
    let after = points.iter().position(|point| point.0 >= bits).unwrap_or(points.len() - 1).max(1);
    let (low, high) = (points[after - 1], points[after]);
    let part = (bits - low.0) / (high.0 - low.0);
    (low.1.ln() * (1.0 - part) + high.1.ln() * part).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number without its measurement is a rumour: a row of the file has the size, and the KL to as many digits as are here.
    #[test]
    fn every_point_stands_where_it_says() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/results");
        for Point { method, bits_per_weight, kl, source, .. } in POINTS {
            let text = std::fs::read_to_string(root.join(source)).unwrap();
            let (bits, long, short) =
                (format!("{bits_per_weight:.3}"), format!("{kl:.5}"), format!("{kl:.4} "));
            let named = match *method {
                "basic" => ["| rtn", "| basic"],
                _ => [*method, *method],
            };
            let row = text.lines().find(|row| {
                let cells: Vec<&str> = row.split('|').map(str::trim).collect();
                let has = |text: &str| cells.contains(&text);
                let kl = has(&long) || cells.iter().any(|cell| cell.starts_with(&short));
                has(&bits) && kl && named.iter().any(|name| row.contains(name))
            });
            assert!(row.is_some(), "{method}, {bits} bits, {kl}: {source}");
        }
    }

    #[test]
    fn curves_pass_through_what_was_measured_and_fall() {
        for Point { model, method, bits_per_weight, kl, .. } in POINTS {
            let found = at(*model, method, *bits_per_weight).unwrap();
            assert!((found / kl - 1.0).abs() < 1e-9, "{method}: {found}");
        }
        for method in ["basic", "awq", "gptq", "dynamic", "dwq", "dynamic+awq+gptq", "dynamic+awq+gptq+dwq"] {
            let mut before = f64::INFINITY;
            for step in 0..=62 {
                let bits = 2.5 + f64::from(step) * 0.1;
                let Expected { low, high } = expected(method, bits).unwrap();
                let middle = Expected { low, high }.middle();
                assert!(low > 0.0 && low <= middle && middle <= high, "{method}, {bits}");
                assert!(middle <= before, "{method} rises at {bits}: {middle} after {before}");
                before = middle;
            }
        }
        assert_eq!(expected("basic", 1.5), None);
        assert_eq!(expected("search", 4.5), None);
        // Beyond its own points a method keeps its distance.
        let ratio =
            |bits| expected("dwq", bits).unwrap().middle() / expected("basic", bits).unwrap().middle();
        assert!((ratio(6.5) / ratio(7.5) - 1.0).abs() < 1e-9);
        assert!(ratio(6.5) < 1.0);
    }
}
