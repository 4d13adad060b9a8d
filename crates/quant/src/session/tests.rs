//! Properties of calibrated runs that hold for every family of models.

#![allow(clippy::print_stdout, reason = "a test shows its table")]

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use mlx_format::checkpoint::Directory;
use mlx_format::{FloatType, Mode, Scheme};
use mlx_quant_engine::Tensor;
use mlx_quant_model::{Forward, State, Weights};

use super::choose::{Candidate, ChooseFactors, Hooks, Room, Searched};
use super::{QuantizeSettings, Quantized, quantize_with};
use crate::data::Windows;
use crate::dynamic::{SensitivitySettings, sensitivities};
use crate::learn::{LearnSettings, costs};
use crate::methods::Recipe;
use crate::observer::{Event, Observer};
use crate::plan::{Overrides, Plan, Settings};
use crate::testing::random_windows;
use crate::testing::seeds::seeded;
use crate::walks::calibrate::Saving;
use crate::{Error, Model, Silent, convert, open};

/// Powers of two that look random, tied features alike, wherever they can be folded.
struct Drawn;

impl ChooseFactors for Drawn {
    fn always(&self) -> bool {
        true
    }

    fn choose(&self, candidate: &Candidate<'_>, _: &Room) -> mlx_quant_engine::Result<Option<Vec<f32>>> {
        let tie = |at: usize| candidate.ties.map_or(at, |tie| tie(at));
        let factor = |at: usize| [0.25, 1.0, 4.0, 0.5, 2.0][(tie(at) * 2_654_435_761) / 7 % 5];
        Ok(Some((0..candidate.gram.size).map(factor).collect()))
    }
}

fn checkpoints(zoo: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(zoo).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<PathBuf> = entries.filter(|path| path.join("config.json").is_file()).collect();
    all.sort();
    all
}

fn copied() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/zoo")
}

fn shared() -> PathBuf {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    std::env::var_os("MLX_QUANT_SHARED").map_or_else(beside, PathBuf::from).join("zoo")
}

/// Windows of tokens that look random.
fn windows(model: &Model, count: usize, tokens: usize) -> Windows {
    random_windows(model, 12345, count, tokens)
}

fn settings(bits: u32, group_size: usize) -> Settings {
    Settings { quantize: Some(Scheme::affine(bits, group_size).unwrap()), ..Settings::default() }
}

/// What a run did, what left its last block, and what it wrote.
fn run(
    model: &Model,
    plan: Settings,
    recipe: &str,
    drawn: bool,
    target: &Path,
) -> (Quantized, Vec<State>, Model) {
    let plan = Plan::new(&model.checkpoint, &model.config, plan).unwrap();
    let mut settings = QuantizeSettings::new(recipe.parse::<Recipe>().unwrap());
    settings.threads = 2;
    settings.learn = LearnSettings { steps: 4, batch: 2, ..LearnSettings::default() };
    let windows = windows(model, 6, 48);
    let states = Mutex::default();
    let keep = |left| *states.lock().unwrap() = left;
    let hooks = Hooks { choose: if drawn { &Drawn } else { &Searched }, left: Some(&keep), saving: None };
    let made = quantize_with(model, &plan, &windows, target.into(), &settings, (&Silent, &hooks)).unwrap();
    (made, states.into_inner().unwrap(), open(&Directory::open(target).unwrap()).unwrap())
}

/// What leaves the last block of a model on disk.
fn states(model: &Model, windows: &Windows) -> Vec<State> {
    let device = mlx_quant_engine::cpu();
    let weights = Weights::open(&model.checkpoint, &model.config).unwrap();
    let decoder = weights.decoder(&model.config, false).unwrap();
    let forward = Forward::new(&decoder, windows.sequence_length, &device).unwrap();
    let start = windows.picked.iter().map(|window| forward.embed(&weights, &[&window.tokens]).unwrap());
    let mut states: Vec<State> = start.collect();
    for (index, block) in decoder.blocks.iter().enumerate() {
        let parameters = weights.load(&block.prefix, &device).unwrap();
        let step = |state: State| forward.block(index, &parameters, state, &mut ()).unwrap();
        states = states.into_iter().map(step).collect();
    }
    states
}

/// Largest difference, and largest value.
fn distance(a: &[State], b: &[State]) -> (f32, f32) {
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec().unwrap();
    let mut largest = (0f32, 0f32);
    for (a, b) in a.iter().zip(b) {
        for (a, b) in values(&a.hidden).into_iter().zip(values(&b.hidden)) {
            largest = (largest.0.max((a - b).abs()), largest.1.max(a.abs()));
        }
    }
    largest
}

/// Whether a norm stores `w - 1`: its factors are no powers of two, so that products round differently.
fn norms_store_less(model: &Model) -> bool {
    let decoder = super::Walk::open(model).unwrap().decoder;
    let branches = decoder.blocks.iter().flat_map(|block| &block.stages).flat_map(|stage| &stage.branches);
    branches.filter_map(|branch| branch.norm.as_ref()).any(|norm| norm.plus_one)
}

/// Nothing but the table is quantized, factors are folded wherever they can be: the model is the same, bit for bit.
fn folding_changes_nothing(zoo: &Path) {
    println!("{:<20} {:>7} {:>10}", "checkpoint", "folds", "difference");
    for path in checkpoints(zoo) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let model = open(&Directory::open(&path).unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let table = super::Walk::open(&model).unwrap().decoder.embedding.path;
        let recipe = format!("[[layer]]\npath = \"*\"\nkeep = true\n[[layer]]\npath = \"{table}\"\nbits = 8");
        let overrides = Overrides::parse(&recipe, Scheme::affine(4, 32).unwrap()).unwrap();
        let plan = Settings { overrides: Some(overrides), dtype: Some(FloatType::F32), ..settings(4, 32) };
        let plan = Plan::new(&model.checkpoint, &model.config, plan).unwrap();
        let plain = directory.path().join("plain");
        convert(&model, &plan, &plain, 2, &Silent).unwrap();
        let plain = open(&Directory::open(&plain).unwrap()).unwrap();
        let settings = QuantizeSettings::new("awq+rtn".parse().unwrap());
        let hooks = Hooks { choose: &Drawn, ..Hooks::USUAL };
        let windows = windows(&model, 1, 4);
        let target = directory.path().join("out");
        let made =
            quantize_with(&model, &plan, &windows, (&target).into(), &settings, (&Silent, &hooks)).unwrap();
        let folded = open(&Directory::open(&target).unwrap()).unwrap();
        // Other windows than those it saw: experts that no token reached are folded too.
        let windows = self::windows(&model, 8, 48);
        let (difference, largest) = distance(&states(&plain, &windows), &states(&folded, &windows));
        println!("{name:<20} {:>7} {difference:>10.1e}", made.folded);
        assert!(difference == 0.0, "{name}: {difference} of {largest}");
        assert_eq!(made.folded, made.foldable, "{name}");
    }
}

/// What is written computes what the walk computed with, bit for bit, folds on rounded weights included.
fn written_equals_walked(zoo: &Path) {
    println!("{:<20} {:>7} {:>12} {:>12} {:>12}", "checkpoint", "folds", "gptq", "awq+gptq", "with learn");
    for path in checkpoints(zoo) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let model = open(&Directory::open(&path).unwrap()).unwrap();
        let mut cells = Vec::new();
        let mut folds = 0;
        for (recipe, drawn) in [("gptq", false), ("awq+gptq", true), ("awq+gptq+learn", true)] {
            let directory = tempfile::tempdir().unwrap();
            let target = directory.path().join("out");
            let (made, left, written) = run(&model, settings(4, 32), recipe, drawn, &target);
            let (difference, largest) = distance(&left, &states(&written, &windows(&model, 6, 48)));
            folds = made.folded;
            let bound = if norms_store_less(&model) { 1e-5 } else { 0.0 };
            assert!(difference <= bound * largest, "{name}, {recipe}: {difference} of {largest}");
            cells.push(difference / largest);
        }
        println!("{name:<20} {folds:>7} {:>12.1e} {:>12.1e} {:>12.1e}", cells[0], cells[1], cells[2]);
    }
}

#[test]
fn folding_changes_nothing_in_the_copied_checkpoints() {
    folding_changes_nothing(&copied());
}

#[test]
fn folding_changes_nothing_in_the_seeded_checkpoints() {
    folding_changes_nothing(seeded().path());
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn folding_changes_nothing_in_any_family() {
    folding_changes_nothing(&shared());
}

#[test]
fn written_equals_walked_in_the_copied_checkpoints() {
    written_equals_walked(&copied());
}

#[test]
fn written_equals_walked_in_the_seeded_checkpoints() {
    written_equals_walked(seeded().path());
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn written_equals_walked_in_any_family() {
    written_equals_walked(&shared());
}

/// Layers in an fp mode, whose codes do not learn, pass windows as they are written.
#[test]
fn what_does_not_learn_is_walked_as_it_is_written() {
    for name in ["llama_tied", "qwen3_moe"] {
        let model = open(&Directory::open(&copied().join(name)).unwrap()).unwrap();
        for (mode, drawn) in [(Mode::Mxfp4, false), (Mode::Nvfp4, false), (Mode::Mxfp8, true)] {
            let directory = tempfile::tempdir().unwrap();
            let scheme = Scheme::new(mode, None, None).unwrap();
            let plan = Settings { quantize: Some(scheme), ..Settings::default() };
            let recipe = if drawn { "awq+gptq+learn" } else { "gptq+learn" };
            let (_, left, written) = run(&model, plan, recipe, drawn, &directory.path().join("out"));
            let (difference, largest) = distance(&left, &states(&written, &windows(&model, 6, 48)));
            assert!(difference == 0.0, "{name}, {scheme}: {difference} of {largest}");
        }
    }
}

/// What leaves a block's last linear is added to what leaves the block: both have the same gradients, and `dynamic` measures those.
#[test]
fn costs_are_those_that_dynamic_sees() {
    let mut compared = 0;
    for name in ["llama_tied", "qwen3_moe"] {
        let model = open(&Directory::open(&copied().join(name)).unwrap()).unwrap();
        let windows = windows(&model, 5, 48);
        let measure = SensitivitySettings { seed: 7, threads: 1, ..SensitivitySettings::default() };
        let seen = sensitivities(&model, &windows, &measure, None, &Silent).unwrap();
        let walk = super::Walk::open(&model).unwrap();
        let measured = |threads, together| {
            let pool = crate::threads::pool(threads).unwrap();
            costs(&walk, &windows, (7, together), (&pool, &Silent)).unwrap()
        };
        let found = measured(2, 2);
        assert!(found == measured(1, 5), "{name}: threads and waves change nothing");
        for (block, costs) in walk.decoder.blocks.iter().zip(&found) {
            let path = format!("{}mlp.down_proj", block.prefix);
            let Some(layer) = seen.layers.iter().find(|layer| layer.path == path) else { continue };
            let gradients = &layer.seen[0].gradients;
            let mean = gradients.iter().sum::<f32>() / gradients.len() as f32;
            for (cost, gradient) in costs.iter().zip(gradients) {
                assert!((cost - gradient / mean).abs() < 1e-3 * cost, "{path}: {cost}, {}", gradient / mean);
            }
            compared += 1;
        }
        let even = found.iter().all(|costs| {
            (costs.iter().sum::<f32>() / costs.len() as f32 - 1.0).abs() < 1e-4
                && costs.iter().all(|cost| *cost >= 0.0)
        });
        assert!(even && found.len() == walk.decoder.blocks.len(), "{name}");
    }
    assert!(compared >= 2, "blocks with a dense network");
}

/// Codes of the fp modes are what later columns and blocks made up for, and rows that a fold divides stay what they are.
#[test]
fn fp_modes_are_walked_as_they_are_written() {
    for name in ["llama_tied", "qwen3_moe", "gpt2"] {
        let model = open(&Directory::open(&copied().join(name)).unwrap()).unwrap();
        for mode in [Mode::Mxfp4, Mode::Nvfp4, Mode::Mxfp8] {
            for (recipe, drawn) in [("gptq", false), ("awq+gptq", true), ("awq+rtn", true)] {
                let directory = tempfile::tempdir().unwrap();
                let scheme = Scheme::new(mode, None, None).unwrap();
                let plan = Settings { quantize: Some(scheme), ..Settings::default() };
                let (made, left, written) = run(&model, plan, recipe, drawn, &directory.path().join("out"));
                let (difference, largest) = distance(&left, &states(&written, &windows(&model, 6, 48)));
                assert!(difference == 0.0, "{name}, {scheme}, {recipe}: {difference} of {largest}");
                assert_eq!(made.folded > 0, drawn || mode == Mode::Nvfp4, "{name}, {scheme}, {recipe}");
            }
        }
    }
}

/// Weights so small that nvfp4 has no scales for them: what stands before them takes a power of two, exactly, and they are
/// rounded as well as larger ones.
#[test]
fn small_weights_get_a_range_in_nvfp4() {
    let path = copied().join("llama_tied");
    let model = open(&Directory::open(&path).unwrap()).unwrap();
    let scheme = Scheme::new(Mode::Nvfp4, None, None).unwrap();
    let plan = Settings { quantize: Some(scheme), ..Settings::default() };
    let directory = tempfile::tempdir().unwrap();
    let (made, _, written) = run(&model, plan.clone(), "gptq", false, &directory.path().join("out"));
    // Both norms, the network's product and attention's output of every block.
    assert_eq!((made.folded, made.foldable), (4 * 2, 4 * 2));
    let plain = Plan::new(&model.checkpoint, &model.config, plan).unwrap();
    convert(&model, &plain, &directory.path().join("plain"), 2, &Silent).unwrap();
    let plain = open(&Directory::open(&directory.path().join("plain")).unwrap()).unwrap();
    let device = mlx_quant_engine::cpu();
    let [source, written, plain] = [&model, &written, &plain].map(|model| {
        let weights = Weights::open(&model.checkpoint, &model.config).unwrap();
        weights.load("model.layers.1.", &device).unwrap()
    });
    let of = |parameters: &mlx_quant_model::Parameters, name: &str| {
        parameters.tensor(&format!("model.layers.1.{name}.weight")).unwrap().to_vec().unwrap()
    };
    let range = |norm: &str| {
        let (before, after) = (of(&source, norm), of(&written, norm));
        let factor = before[0] / after[0];
        assert!(factor > 1.0 && factor.log2().fract() == 0.0, "{norm}: {factor}");
        assert!(before.iter().zip(&after).all(|(before, after)| before / factor == *after), "{norm}");
        factor
    };
    let error = |found: &[f32], truth: &[f32], factor: f32| {
        let lost: f32 = found.iter().zip(truth).map(|(a, b)| (a / factor - b).powi(2)).sum();
        (lost / truth.iter().map(|value| value * value).sum::<f32>()).sqrt()
    };
    let (attention, network) = (range("input_layernorm"), range("post_attention_layernorm"));
    for (reader, factor) in [("self_attn.q_proj", attention), ("mlp.gate_proj", network)] {
        let truth = of(&source, reader);
        let [own, usual] =
            [error(&of(&written, reader), &truth, factor), error(&of(&plain, reader), &truth, 1.0)];
        println!("{reader}: {own} by gptq, {usual} plain");
        assert!(own < usual, "{reader}: {own} against {usual}");
    }
}

/// Stops behind a number of blocks.
struct StopsBehind(u64, AtomicBool);

impl Observer for StopsBehind {
    fn event(&self, event: Event<'_>) {
        if let Event::Progress { done } = event {
            self.1.fetch_or(done >= self.0, Ordering::Relaxed);
        }
    }

    fn cancelled(&self) -> bool {
        self.1.load(Ordering::Relaxed)
    }
}

/// Stops when it is asked for the so-manieth time whether to.
struct StopsWhenAsked(usize, AtomicUsize);

impl Observer for StopsWhenAsked {
    fn event(&self, _: Event<'_>) {}

    fn cancelled(&self) -> bool {
        self.1.fetch_add(1, Ordering::Relaxed) + 1 == self.0
    }
}

/// The tensors of an output directory, file after file.
fn weights(directory: &Path) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors")).collect();
    files.sort();
    files.into_iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Stopped between two steps of a block, a run goes on with the second: the bytes are those of one that was not stopped. What
/// cannot be read costs the steps alone.
#[test]
fn a_block_learns_on_where_it_was_stopped() {
    const STEPS: usize = 12;
    let model = open(&Directory::open(&copied().join("qwen3_moe")).unwrap()).unwrap();
    let plan = Plan::new(&model.checkpoint, &model.config, settings(3, 32)).unwrap();
    let mut settings = QuantizeSettings::new("gptq+learn".parse().unwrap());
    settings.learn = LearnSettings { steps: STEPS, batch: 2, ..LearnSettings::default() };
    let windows = windows(&model, 6, 48);
    let directory = tempfile::tempdir().unwrap();
    let go = |name: &str, stop: usize| {
        let observer = StopsWhenAsked(stop, AtomicUsize::new(0));
        let target = directory.path().join(name);
        let made =
            quantize_with(&model, &plan, &windows, (&target).into(), &settings, (&observer, &Hooks::USUAL));
        (made, observer.1.into_inner())
    };
    let (made, all) = go("whole", usize::MAX);
    made.unwrap();
    let kept = |name: &str| directory.path().join(format!(".{name}.partial/.state-learn-1.safetensors"));
    // The head follows the last block, and asks as well.
    let within = (1..all).rev().find(|stop| {
        let name = stop.to_string();
        assert!(matches!(go(&name, *stop).0, Err(Error::Interrupted)));
        kept(&name).exists()
    });
    let last = within.expect("a stop within the last block's steps");
    let stop = last - STEPS / 2;
    for (name, damage) in [("goes on", false), ("begins the block again", true)] {
        assert!(matches!(go(name, stop).0, Err(Error::Interrupted)));
        if damage {
            let bytes = std::fs::read(kept(name)).unwrap();
            std::fs::write(kept(name), &bytes[..bytes.len() - 1]).unwrap();
        }
        let (made, asked) = go(name, usize::MAX);
        assert_eq!(made.unwrap().resumed_blocks, 1, "{name}");
        let saved = if damage { 0 } else { STEPS / 2 - 1 };
        assert!(asked + stop >= all && asked + saved <= all, "{name}: {asked} of {all}, stopped at {stop}");
        assert!(weights(&directory.path().join(name)) == weights(&directory.path().join("whole")), "{name}");
    }
}

/// Where states are too large for every block, a stopped run goes on behind the last block at which they were saved, or
/// begins again; the bytes are the same.
#[test]
fn states_are_saved_seldom_and_the_bytes_are_the_same() {
    let model = open(&Directory::open(&copied().join("qwen3_moe")).unwrap()).unwrap();
    let plan = Plan::new(&model.checkpoint, &model.config, settings(4, 32)).unwrap();
    let settings = QuantizeSettings::new("gptq".parse().unwrap());
    let windows = windows(&model, 6, 48);
    let directory = tempfile::tempdir().unwrap();
    let go = |name: &str, every: Duration, observer: &dyn Observer| {
        let hooks = Hooks { saving: Some(Saving { small: 0, every }), ..Hooks::USUAL };
        let target = directory.path().join(name);
        quantize_with(&model, &plan, &windows, (&target).into(), &settings, (observer, &hooks))
    };
    let weights = |name: &str| weights(&directory.path().join(name));
    go("whole", Duration::ZERO, &Silent).unwrap();
    for (name, every, behind) in [("never", Duration::MAX, 0), ("always", Duration::ZERO, 1)] {
        let stopped = go(name, every, &StopsBehind(1, AtomicBool::new(false)));
        assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
        assert_eq!(go(name, every, &Silent).unwrap().resumed_blocks, behind);
        assert!(weights(name) == weights("whole"), "{name}");
    }
    // Saved behind one block and not behind the next: that one is done again.
    let stopped = go("mixed", Duration::ZERO, &StopsBehind(1, AtomicBool::new(false)));
    assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
    let stopped = go("mixed", Duration::MAX, &StopsBehind(2, AtomicBool::new(false)));
    assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
    assert_eq!(go("mixed", Duration::MAX, &Silent).unwrap().resumed_blocks, 1);
    assert!(weights("mixed") == weights("whole"));
}
