//! Gradients of whole models, and targets.

#![allow(clippy::print_stdout, reason = "a test shows its table")]

use std::path::{Path, PathBuf};

use mlx_format::checkpoint::Directory;
use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::Tensor;

use super::*;
use crate::plan::{Plan, Settings};
use crate::testing::random_windows as windows;
use crate::{Silent, convert, open};

/// Teacher and a student of it in float32, so that nothing rounds a small change away.
fn pair(path: &Path, directory: &Path) -> (Model, Model) {
    let teacher = open(&Directory::open(path).unwrap()).unwrap();
    let settings = Settings {
        quantize: Some(Scheme::affine(4, 32).unwrap()),
        dtype: Some(FloatType::F32),
        ..Settings::default()
    };
    let plan = Plan::new(&teacher.checkpoint, &teacher.config, settings).unwrap();
    convert(&teacher, &plan, directory, 2, &Silent).unwrap();
    (teacher, open(&Directory::open(directory).unwrap()).unwrap())
}

/// Of scales and of centers.
type Numbers = [Vec<f32>; 2];

/// Lets `change` change scales and centers of a grid.
fn edit(grid: &mut Grid, change: impl FnOnce(&mut Numbers)) {
    let mut numbers = [&grid.scales, &grid.centers].map(|leaf| leaf.to_vec().unwrap());
    change(&mut numbers);
    let [scales, centers] =
        numbers.map(|leaf| Tensor::from_vec(leaf, grid.scales.dims(), grid.scales.device()).unwrap());
    (grid.scales, grid.centers) = (scales, centers);
}

struct Bench<'b> {
    distillation: Distillation<'b>,
    targets: Targets<'b>,
    lessons: Lessons<'b>,
}

impl Bench<'_> {
    /// The loss, and slopes of grids and of norms.
    fn all_slopes(&self, student: &mut Student<'_>) -> (f64, Vec<Numbers>, Vec<Vec<f32>>) {
        let batch: Vec<usize> = (0..self.distillation.training.picked.len()).collect();
        let windows: Vec<&[u32]> =
            self.distillation.training.picked.iter().map(|window| &*window.tokens).collect();
        let tokens = windows.iter().flat_map(|window| window.iter().copied()).collect();
        student.prepare(&tokens).unwrap();
        let Distillation { pool, observer, .. } = self.distillation;
        let found = slopes::slopes(student, &self.targets, &self.lessons, &batch, (pool, observer));
        let student::BatchSlopes { loss, grids, norms } = found.unwrap();
        let grids = grids.iter().map(|both| both.each_ref().map(|leaf| leaf.to_vec().unwrap()));
        (loss, grids.collect(), norms.iter().map(|norm| norm.to_vec().unwrap()).collect())
    }

    fn slopes(&self, student: &mut Student<'_>) -> (f64, Vec<Numbers>) {
        let (loss, grids, _) = self.all_slopes(student);
        (loss, grids)
    }
}

fn with_bench<R>(
    teacher: &Model,
    student: &Model,
    target_dir: Option<&Path>,
    f: impl FnOnce(&Bench<'_>, Student<'_>) -> R,
) -> R {
    let files = tempfile::tempdir().unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let (training, held_out) = (windows(teacher, 3, 2, 24), windows(teacher, 4, 2, 24));
    let settings = DwqSettings {
        target_dir: target_dir.map(Path::to_owned),
        norms: Some(true),
        ..DwqSettings::default()
    };
    let own = Student::open(student, &settings).unwrap();
    let lessons = Lessons { training: &training, held_out: &held_out, temperature: 2.0 };
    let prefix = files.path().join("t-");
    let targets =
        Targets::prepare(Some(teacher), &own.walk, &lessons, target_dir, prefix, &pool, &Silent).unwrap();
    let distillation = Distillation {
        settings: &settings,
        training: &training,
        held_out: &held_out,
        pool: &pool,
        observer: &Silent,
    };
    let lessons = Lessons { training: &training, held_out: &held_out, temperature: 2.0 };
    f(&Bench { distillation, targets, lessons }, own)
}

/// Moves a grid (or all) along its gradient, by at most `by` of its units; gives the change that the gradient promises.
fn push(grids: &mut [Grid], slopes: &[Numbers], which: Option<usize>, by: f64) -> f64 {
    let mut promised = 0.0;
    for (at, (grid, slopes)) in grids.iter_mut().zip(slopes).enumerate() {
        if which.is_some_and(|which| which != at) {
            continue;
        }
        edit(grid, |numbers| {
            let units: Vec<f64> = numbers[0].iter().map(|scale| f64::from(scale.abs())).collect();
            let steps = |leaf: usize| {
                slopes[leaf]
                    .iter()
                    .zip(&units)
                    .map(|(slope, unit)| f64::from(*slope) * unit)
                    .collect::<Vec<f64>>()
            };
            let both = [steps(0), steps(1)];
            let most = both.iter().flatten().fold(0f64, |most, step| most.max(step.abs())).max(1e-30);
            for (leaf, steps) in both.into_iter().enumerate() {
                for (at, step) in steps.into_iter().enumerate() {
                    let change = (step / most * by * units[at]) as f32;
                    let value = &mut numbers[leaf][at];
                    let before = *value;
                    *value += change;
                    promised += f64::from(slopes[leaf][at]) * f64::from(*value - before);
                }
            }
        });
    }
    promised
}

/// Moves a grid in a direction that has nothing to do with its gradient, so that what the gradient forgets is seen.
fn push_anyhow(grids: &mut [Grid], slopes: &[Numbers], which: usize, by: f64) -> f64 {
    let mut promised = 0.0;
    edit(&mut grids[which], |numbers| {
        for at in 0..numbers[0].len() {
            let unit = f64::from(numbers[0][at].abs());
            for (leaf, turn) in [(0, 2_654_435_761usize), (1, 40_503)] {
                // One way in all groups of a row and mostly, so that effects do not cancel.
                let way = if (at.wrapping_mul(turn) >> 7).is_multiple_of(8) { -1.0 } else { 1.0 };
                let value = &mut numbers[leaf][at];
                let before = *value;
                *value += (way * by * unit) as f32;
                promised += f64::from(slopes[which][leaf][at]) * f64::from(*value - before);
            }
        }
    });
    promised
}

/// Moves a norm along its gradient, by at most `by` of what it multiplies with; gives the change that the gradient
/// promises.
fn push_norm(norm: &mut NormWeight, slopes: &[f32], by: f64) -> f64 {
    let units = norm.factors().unwrap().to_vec().unwrap();
    let steps: Vec<f64> =
        slopes.iter().zip(&units).map(|(slope, unit)| f64::from(slope * unit.abs())).collect();
    let most = steps.iter().fold(1e-30f64, |most, step| most.max(step.abs()));
    let mut promised = 0.0;
    let mut weights = norm.weights.to_vec().unwrap();
    for ((weight, slope), (step, unit)) in weights.iter_mut().zip(slopes).zip(steps.iter().zip(&units)) {
        let before = *weight;
        *weight += (step / most * by * f64::from(unit.abs())) as f32;
        promised += f64::from(*slope) * f64::from(*weight - before);
    }
    norm.weights = Tensor::from_vec(weights, norm.weights.dims(), norm.weights.device()).unwrap();
    promised
}

/// What is wrong with the gradients of norms, by central differences; how many there are, and the worst.
fn wrong_norms(bench: &Bench<'_>, student: &mut Student<'_>) -> (Vec<String>, usize, f64) {
    let (loss, _, slopes) = bench.all_slopes(student);
    let before = student.norms.clone();
    let (mut failed, mut worst) = (Vec::new(), 0f64);
    for (at, norm) in before.iter().enumerate() {
        assert!(slopes[at].iter().any(|slope| *slope != 0.0), "{} has no gradient", norm.name);
        let mut wrong = f64::INFINITY;
        let mut figures = String::new();
        // Smaller steps cross no border between experts, larger ones stand above what float32 loses of a small loss; where
        // a token stands between two experts, one side says nothing.
        for by in [0.004, 0.016, 0.0005] {
            let sides = [by, -by].map(|by| {
                let promised = push_norm(&mut student.norms[at], &slopes[at], by);
                let found = bench.slopes(student).0 - loss;
                student.norms.clone_from(&before);
                (found, promised)
            });
            let [(up, up_promised), (down, down_promised)] = sides;
            let error = |found: f64, promised: f64| (found - promised).abs() / (promised.abs() + loss * 2e-4);
            wrong = wrong.min(error(up - down, up_promised - down_promised));
            if student.grids.iter().any(|grid| grid.routed) {
                wrong = wrong.min(error(up, up_promised)).min(error(down, down_promised));
            }
            let (promised, found) = (up_promised - down_promised, up - down);
            figures = format!("{figures} {promised:.3e} {found:.3e}");
            if wrong < 0.05 {
                break;
            }
        }
        if wrong > 0.05 {
            failed.push(format!("{}: by gradient and by difference{figures}", norm.name));
        }
        worst = worst.max(wrong);
    }
    (failed, before.len(), worst)
}

/// The gradient of the loss with respect to every trained grid and norm of every family, block by block, is what central differences say.
fn gradients_are_differences(zoo: &Path) {
    let mut all: Vec<PathBuf> = std::fs::read_dir(zoo).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.retain(|path| path.join("config.json").is_file());
    all.sort();
    let mut failed = Vec::new();
    for path in &all {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let out = tempfile::tempdir().unwrap();
        let (teacher, student) = pair(path, &out.path().join("student"));
        with_bench(&teacher, &student, None, |bench, mut student| {
            let (loss, slopes) = bench.slopes(&mut student);
            for (grid, slopes) in student.grids.iter().zip(&slopes) {
                let any = slopes.iter().all(|slopes| slopes.iter().any(|slope| *slope != 0.0));
                assert!(any, "{name}: {} has no gradient", grid.path);
            }
            let routed = student.grids.iter().any(|grid| grid.routed);
            let before = student.grids.clone();
            let mut worst = 0f64;
            let grids = (0..before.len()).map(Some).chain([None]);
            for which in grids {
                // All grids together bend the loss more than one of them.
                let by = if which.is_some() { 0.002 } else { 0.0005 };
                let mut measured = |by: f64| {
                    // Where a token stands between two experts the loss jumps on one side: that side says nothing.
                    let mut sides = [0.0; 2];
                    let mut promises = [0.0; 2];
                    for ((side, promise), by) in sides.iter_mut().zip(&mut promises).zip([by, -by]) {
                        student.grids.clone_from(&before);
                        *promise = push(&mut student.grids, &slopes, which, by);
                        *side = bench.slopes(&mut student).0 - loss;
                    }
                    student.grids.clone_from(&before);
                    let (found, promised) = (sides[0] - sides[1], promises[0] - promises[1]);
                    let error =
                        |found: f64, promised: f64| (found - promised).abs() / (promised.abs() + loss * 2e-4);
                    let one_side = error(sides[0], promises[0]).min(error(sides[1], promises[1]));
                    let wrong = error(found, promised).min(if routed { one_side } else { f64::INFINITY });
                    (wrong, found, promised)
                };
                let (mut wrong, found, promised) = measured(by);
                // Smaller steps cross no border between experts; larger ones stand above what float32 loses of a small loss.
                for times in [4.0, 0.125] {
                    if wrong > 0.05 {
                        wrong = wrong.min(measured(by * times).0);
                    }
                }
                if wrong > 0.05 {
                    let path = which.map_or("all", |at| &before[at].path);
                    failed.push(format!(
                        "{name} {path}: {promised:.3e} by gradient, {found:.3e} by difference"
                    ));
                }
                worst = worst.max(wrong);
            }
            let embedding = student.walk.decoder.embedding.path.clone();
            if let Some(at) = student.grids.iter().position(|grid| grid.path == embedding) {
                let (mut found, mut promised) = (0.0, 0.0);
                for (by, sign) in [(0.002, 1.0), (-0.002, -1.0)] {
                    promised += push_anyhow(&mut student.grids, &slopes, at, by) * sign;
                    found += bench.slopes(&mut student).0 * sign;
                    student.grids.clone_from(&before);
                }
                println!(
                    "{name:<20} embedding anyhow: {promised:.3e} by gradient, {found:.3e} by difference"
                );
                let wrong = (found - promised).abs() / (promised.abs() + loss * 2e-4);
                if wrong > 0.1 && !routed {
                    failed.push(format!("{name} embedding anyhow: {promised:.3e} by gradient, {found:.3e}"));
                }
            }
            let (wrong, norms, worst_norm) = wrong_norms(bench, &mut student);
            failed.extend(wrong.into_iter().map(|wrong| format!("{name} {wrong}")));
            println!(
                "{name:<20} {:>3} grids, loss {loss:.5}, worst {worst:.4}; {norms} norms, {worst_norm:.4}",
                before.len()
            );
        });
    }
    assert!(failed.is_empty(), "{} wrong:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn gradients_of_the_copied_checkpoints() {
    gradients_are_differences(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/zoo"));
}

#[test]
fn gradients_of_seeded_families() {
    gradients_are_differences(crate::testing::seeds::seeded().path());
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared")]
fn gradients_of_every_family() {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    gradients_are_differences(
        &std::env::var_os("MLX_QUANT_SHARED").map_or_else(beside, PathBuf::from).join("zoo"),
    );
}

/// Where all tokens are kept, a directory of targets teaches what the teacher teaches.
#[test]
fn targets_say_what_the_teacher_says() {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/zoo");
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(zoo).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let out = tempfile::tempdir().unwrap();
    let (teacher, student) = pair(&paths[0], &out.path().join("student"));
    let whole = with_bench(&teacher, &student, None, |bench, mut student| bench.slopes(&mut student));
    let directory = out.path().join("targets");
    let kept =
        with_bench(&teacher, &student, Some(&directory), |bench, mut student| bench.slopes(&mut student));
    assert!((whole.0 - kept.0).abs() < 1e-5 * whole.0, "{} {}", whole.0, kept.0);
    for (whole, kept) in whole.1.iter().zip(&kept.1) {
        for (whole, kept) in whole.iter().flatten().zip(kept.iter().flatten()) {
            assert!((whole - kept).abs() < 1e-4 * whole.abs() + 1e-6, "{whole} {kept}");
        }
    }
}

/// Several tiles of the vocabulary, and a tail behind the tokens that are kept: the built-in model has 6144.
#[test]
fn a_tail_has_its_gradient() {
    let out = tempfile::tempdir().unwrap();
    let demo = Directory::Embedded { name: "demo model", files: mlx_quant_demo::FILES };
    let teacher = open(&demo).unwrap();
    let settings = Settings {
        quantize: Some(Scheme::affine(3, 64).unwrap()),
        dtype: Some(FloatType::F32),
        ..Settings::default()
    };
    let plan = Plan::new(&teacher.checkpoint, &teacher.config, settings).unwrap();
    convert(&teacher, &plan, &out.path().join("student"), 2, &Silent).unwrap();
    let student = open(&Directory::open(&out.path().join("student")).unwrap()).unwrap();
    let mut losses = Vec::new();
    for target_dir in [None, Some(out.path().join("targets"))] {
        with_bench(&teacher, &student, target_dir.as_deref(), |bench, mut student| {
            let (loss, slopes) = bench.slopes(&mut student);
            losses.push(loss);
            let before = student.grids.clone();
            let (mut change, mut promised) = (0.0, 0.0);
            for (by, sign) in [(0.004, 1.0), (-0.004, -1.0)] {
                student.grids.clone_from(&before);
                promised += push(&mut student.grids, &slopes, None, by) * sign;
                change += bench.slopes(&mut student).0 * sign;
            }
            println!("loss {loss:.6}, {promised:.6e} by gradient, {change:.6e} by difference");
            assert!((change / promised - 1.0).abs() < 0.02, "{promised} {change}");
        });
    }
    // What is thrown together loses a little of the divergence, and can lose no more.
    assert!(losses[1] < losses[0] && losses[1] > 0.6 * losses[0], "{losses:?}");
}
