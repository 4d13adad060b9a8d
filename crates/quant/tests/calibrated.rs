//! Calibrated methods end to end: better than round to nearest in every family, and the same bytes whatever happens on the way.
//!
//! That folds are exact and that what is written is what was walked are unit tests of `session`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use std::path::{Path, PathBuf};

use mlx_format::checkpoint::{Array, Arrays, read_arrays, write_arrays};
use mlx_format::{Mode, Scheme};
use mlx_quant::data::Window;
use mlx_quant::learn::LearnSettings;
use mlx_quant::model::{Forward, State, Weights};
use mlx_quant::session::Quantized;
use mlx_quant::{Error, Model, Plan, QuantizeSettings, Settings, Silent, Windows, convert, quantize};

use crate::common::{Stopper, Warned, fixtures, open_path, random_windows as windows, shared};

fn plan(model: &Model, bits: u32) -> Plan {
    let quantize = Some(Scheme::affine(bits, 32).unwrap());
    Plan::new(&model.checkpoint, &model.config, Settings { quantize, ..Settings::default() }).unwrap()
}

fn settings(recipe: &str) -> QuantizeSettings {
    let learn = LearnSettings { steps: 8, batch: 4, ..LearnSettings::default() };
    QuantizeSettings { threads: 2, learn, ..QuantizeSettings::new(recipe.parse().unwrap()) }
}

fn run(model: &Model, target: &Path, settings: &QuantizeSettings) -> Quantized {
    quantize(model, &plan(model, 4), &windows(model, 1, 6, 48), target, settings, &Silent).unwrap()
}

fn bytes(directory: &Path) -> Vec<u8> {
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let weights = names.iter().filter(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
    weights.flat_map(|path| std::fs::read(path).unwrap()).collect()
}

/// A model's blocks on the inputs that the full-precision model gives them.
struct Blocks {
    windows: Windows,
    /// In front of each block, and behind the last.
    states: Vec<Vec<State>>,
}

impl Blocks {
    fn of(model: &Model) -> Self {
        let windows = windows(model, 99, 4, 48);
        let weights = Weights::open(&model.checkpoint, &model.config).unwrap();
        let decoder = weights.decoder(&model.config, false).unwrap();
        let forward = Forward::new(&decoder, windows.sequence_length, &mlx_quant_engine::cpu()).unwrap();
        let embed = |window: &Window| forward.embed(&weights, &[&window.tokens]).unwrap();
        let mut states = vec![windows.picked.iter().map(embed).collect::<Vec<_>>()];
        for (index, block) in decoder.blocks.iter().enumerate() {
            let parameters = weights.load(&block.prefix, &mlx_quant_engine::cpu()).unwrap();
            let step = |state: &State| forward.block(index, &parameters, state.clone(), &mut ()).unwrap();
            states.push(states[index].iter().map(step).collect());
        }
        Self { windows, states }
    }

    /// Squared error of each block's output over the square of what the block adds, summed over blocks.
    fn error(&self, model: &Model) -> f64 {
        let weights = Weights::open(&model.checkpoint, &model.config).unwrap();
        let decoder = weights.decoder(&model.config, false).unwrap();
        let forward = Forward::new(&decoder, self.windows.sequence_length, &mlx_quant_engine::cpu()).unwrap();
        let square = |a: &State, b: &State| {
            let difference = (&a.hidden - &b.hidden).unwrap().sqr().unwrap().sum_all().unwrap();
            difference.to_vec().unwrap()[0] as f64
        };
        let mut sum = 0.0;
        for (index, block) in decoder.blocks.iter().enumerate() {
            let parameters = weights.load(&block.prefix, &mlx_quant_engine::cpu()).unwrap();
            let (mut error, mut added) = (0.0, 0.0);
            for (before, after) in self.states[index].iter().zip(&self.states[index + 1]) {
                let found = forward.block(index, &parameters, before.clone(), &mut ()).unwrap();
                error += square(&found, after);
                added += square(before, after);
            }
            sum += error / added;
        }
        sum
    }

    /// Squared error of what leaves the last block of a model on its own stream, over the square of what its blocks add.
    fn drift(&self, model: &Model) -> f64 {
        let device = mlx_quant_engine::cpu();
        let weights = Weights::open(&model.checkpoint, &model.config).unwrap();
        let decoder = weights.decoder(&model.config, false).unwrap();
        let forward = Forward::new(&decoder, self.windows.sequence_length, &device).unwrap();
        let embed = |window: &Window| forward.embed(&weights, &[&window.tokens]).unwrap();
        let mut states: Vec<State> = self.windows.picked.iter().map(embed).collect();
        for (index, block) in decoder.blocks.iter().enumerate() {
            let parameters = weights.load(&block.prefix, &device).unwrap();
            let step = |state: State| forward.block(index, &parameters, state, &mut ()).unwrap();
            states = states.into_iter().map(step).collect();
        }
        let square = |(a, b): (&State, &State)| {
            let difference = (&a.hidden - &b.hidden).unwrap().sqr().unwrap().sum_all().unwrap();
            f64::from(difference.to_vec().unwrap()[0])
        };
        let (first, last) = (&self.states[0], &self.states[self.states.len() - 1]);
        let errors: f64 = states.iter().zip(last).map(square).sum();
        errors / first.iter().zip(last).map(square).sum::<f64>()
    }
}

/// The checkpoints of a folder, by their names.
fn checkpoints(zoo: &Path) -> Vec<(String, Model)> {
    let mut directories: Vec<PathBuf> =
        std::fs::read_dir(zoo).unwrap().map(|entry| entry.unwrap().path()).collect();
    directories.retain(|path| path.join("config.json").is_file());
    directories.sort();
    let open =
        |path: &PathBuf| (path.file_name().unwrap().to_string_lossy().into_owned(), open_path(path).unwrap());
    directories.iter().map(open).collect()
}

/// Errors of all blocks against those of round to nearest, on windows that were not calibrated on.
fn beats_round_to_nearest(zoo: &Path) {
    const RECIPES: [&str; 3] = ["awq", "gptq", "awq+gptq"];
    println!(
        "{:<20} {:>9} {:>9} {:>9} {:>9}",
        "4 bits, groups of 32", "rtn", RECIPES[0], RECIPES[1], RECIPES[2]
    );
    let (mut failed, checkpoints) = (Vec::new(), checkpoints(zoo));
    for (name, model) in &checkpoints {
        let blocks = Blocks::of(model);
        let out = tempfile::tempdir().unwrap();
        let plan = plan(model, 4);
        convert(model, &plan, &out.path().join("rtn"), 2, &Silent).unwrap();
        let plain = blocks.error(&open_path(&out.path().join("rtn")).unwrap());
        let ratios = RECIPES.map(|recipe| {
            let target = out.path().join(recipe);
            let windows = windows(model, 1, 40, 48);
            quantize(model, &plan, &windows, &target, &settings(recipe), &Silent).unwrap();
            blocks.error(&open_path(&target).unwrap()) / plain
        });
        let [awq, gptq, both] = ratios;
        println!("{name:<20} {plain:>9.3e} {awq:>9.3} {gptq:>9.3} {both:>9.3}");
        if ratios.iter().any(|ratio| *ratio >= 1.0) {
            failed.push(format!("{name}: {ratios:.3?}"));
        }
    }
    println!("{} checkpoints", checkpoints.len());
    assert!(failed.is_empty(), "no better than round to nearest: {failed:?}");
}

/// Errors of all blocks in the fp modes, against those of `mx.quantize`.
fn fp_modes_beat_plain_rounding(zoo: &Path) {
    println!("{:<20} {:>8} {:>9} {:>9} {:>9} {:>9}", "", "mode", "plain", "search", "gptq", "awq+gptq");
    let (mut failed, mut judged) = (Vec::new(), 0);
    let checkpoints = checkpoints(zoo);
    for (name, model) in &checkpoints {
        let blocks = Blocks::of(model);
        for mode in [Mode::Mxfp4, Mode::Nvfp4, Mode::Mxfp8] {
            let out = tempfile::tempdir().unwrap();
            let quantize_to = Some(Scheme::new(mode, None, None).unwrap());
            let settings_of = Settings { quantize: quantize_to, ..Settings::default() };
            let Ok(plan) = Plan::new(&model.checkpoint, &model.config, settings_of) else { continue };
            judged += 1;
            convert(model, &plan, &out.path().join("plain"), 2, &Silent).unwrap();
            let plain = blocks.error(&open_path(&out.path().join("plain")).unwrap());
            let ratios = ["search", "gptq", "awq+gptq"].map(|recipe| {
                let target = out.path().join(recipe);
                let windows = windows(model, 1, 40, 48);
                quantize(model, &plan, &windows, &target, &settings(recipe), &Silent).unwrap();
                blocks.error(&open_path(&target).unwrap()) / plain
            });
            println!(
                "{name:<20} {:>8} {plain:>9.3e} {:>9.3} {:>9.3} {:>9.3}",
                mode.name(),
                ratios[0],
                ratios[1],
                ratios[2]
            );
            // Of 8 bits under powers of two nearly every scale is MLX's.
            let looked_at = if mode == Mode::Mxfp8 { &ratios[1..] } else { &ratios };
            if looked_at.iter().any(|ratio| *ratio >= 1.0) {
                failed.push(format!("{name}, {}: {ratios:.3?}", mode.name()));
            }
        }
    }
    // One or another has no width for groups of one mode.
    assert!(judged >= 2 * checkpoints.len() && judged > 6, "{judged} of {} checkpoints", checkpoints.len());
    assert!(failed.is_empty(), "no better than plain rounding: {failed:?}");
}

#[test]
fn fp_modes_beat_plain_rounding_in_the_copied_checkpoints() {
    fp_modes_beat_plain_rounding(&fixtures().join("zoo"));
}

/// What leaves the last block on windows that nothing learned from, by `gptq+learn` and by `gptq`.
fn learning_helps(zoo: &Path) {
    let mut ratios = Vec::new();
    for (name, model) in checkpoints(zoo) {
        let (blocks, plan, windows) = (Blocks::of(&model), plan(&model, 2), windows(&model, 1, 40, 48));
        let out = tempfile::tempdir().unwrap();
        let drift = |recipe: &str| {
            let learn = LearnSettings { steps: 30, ..LearnSettings::default() };
            let (target, settings) =
                (out.path().join(recipe), QuantizeSettings { learn, ..settings(recipe) });
            quantize(&model, &plan, &windows, &target, &settings, &Silent).unwrap();
            blocks.drift(&open_path(&target).unwrap())
        };
        let (before, after) = (drift("gptq"), drift("gptq+learn"));
        println!("{name:<20} {before:.4} {after:.4} {:.3}", after / before);
        ratios.push(after / before);
    }
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    println!("mean {mean:.3}");
    assert!(mean < 0.9);
    assert!(ratios.iter().all(|ratio| *ratio < 1.05), "{ratios:?}");
}

#[test]
fn the_copied_checkpoints_learn() {
    learning_helps(&fixtures().join("zoo"));
}

#[test]
fn the_copied_checkpoints_beat_round_to_nearest() {
    beats_round_to_nearest(&fixtures().join("zoo"));
}

#[test]
fn the_seeded_checkpoints_beat_round_to_nearest() {
    beats_round_to_nearest(common::seeds::seeded().path());
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn every_family_beats_round_to_nearest() {
    beats_round_to_nearest(&shared().join("zoo"));
}

/// Attention, dense layers and experts; and keys of other blocks, where there is such a model.
fn several() -> Vec<Model> {
    ["llama_tied", "qwen3_moe", "deepseek_v3", "qwen3_5"]
        .map(|name| open_path(&fixtures().join("zoo").join(name)).unwrap())
        .into()
}

#[test]
fn threads_runs_and_memory_decide_nothing() {
    for model in several() {
        for recipe in ["awq", "awq+gptq", "awq+gptq+learn"] {
            let out = tempfile::tempdir().unwrap();
            let of = |name: &str, threads, low_memory| {
                let target = out.path().join(name);
                run(&model, &target, &QuantizeSettings { threads, low_memory, ..settings(recipe) });
                bytes(&target)
            };
            let first = of("first", 1, false);
            assert!(first == of("again", 1, false), "another run");
            assert!(first == of("two", 2, false), "two threads");
            assert!(first == of("low", 2, true), "low memory");
            assert!(first == of("lowest", 1, true), "low memory, one thread");
            let other = windows(&model, 2, 6, 48);
            let target = out.path().join("other");
            quantize(&model, &plan(&model, 4), &other, &target, &settings(recipe), &Silent).unwrap();
            assert!(first != bytes(&target), "other windows change nothing");
        }
    }
}

#[test]
fn an_interrupted_run_goes_on_where_it_stopped() {
    for model in several() {
        let blocks = mlx_quant::walks::Walk::open(&model).unwrap().decoder.blocks.len();
        let out = tempfile::tempdir().unwrap();
        run(&model, &out.path().join("whole"), &settings("awq+gptq+learn"));
        let whole = bytes(&out.path().join("whole"));
        for low_memory in [false, true] {
            for stop in 1..=blocks as u64 {
                let target = out.path().join(format!("{stop}-{low_memory}"));
                let settings = QuantizeSettings { low_memory, ..settings("awq+gptq+learn") };
                let windows = windows(&model, 1, 6, 48);
                let stopped = quantize(
                    &model,
                    &plan(&model, 4),
                    &windows,
                    &target,
                    &settings,
                    &Stopper((stop - 1).into()),
                );
                assert!(matches!(stopped, Err(Error::Interrupted)), "{stop}: {stopped:?}");
                assert!(!target.exists());
                // Where the activations wait may change in between.
                let again = QuantizeSettings { low_memory: !low_memory, ..settings };
                let made = run(&model, &target, &again);
                assert_eq!(made.resumed_blocks as u64, stop - 1);
                assert!(bytes(&target) == whole, "{stop}");
                let left: Vec<_> =
                    std::fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
                assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");
            }
        }
    }
}

/// A file of activations that was cut off costs the block that it came out of, not those before; that is told, and the bytes
/// are the same.
#[test]
fn a_damaged_state_costs_one_block() {
    for model in several() {
        let out = tempfile::tempdir().unwrap();
        run(&model, &out.path().join("whole"), &settings("gptq"));
        for (damaged, words) in [(&["1"][..], 1), (&["1", "0"], 3)] {
            let target = out.path().join(damaged.len().to_string());
            let (plan, windows, settings) = (plan(&model, 4), windows(&model, 1, 6, 48), settings("gptq"));
            // Behind the first block.
            let stopped = quantize(&model, &plan, &windows, &target, &settings, &Stopper(1.into()));
            assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
            for block in damaged {
                let name = format!(".{}.partial/.state-{block}-4.safetensors", damaged.len());
                let file = std::fs::File::options().write(true).open(out.path().join(name)).unwrap();
                file.set_len(100).unwrap();
            }
            let warned = Warned::default();
            let made = quantize(&model, &plan, &windows, &target, &settings, &warned).unwrap();
            assert_eq!(made.resumed_blocks, 0);
            let told = warned.0.into_inner().unwrap();
            assert_eq!(told.len(), words, "{told:?}");
            assert!(told[0].contains(".state-1-4.safetensors"), "{told:?}");
            assert!(bytes(&target) == bytes(&out.path().join("whole")));
        }
    }
}

#[test]
fn statistics_are_kept_and_checked() {
    for model in several() {
        let out = tempfile::tempdir().unwrap();
        let kept =
            QuantizeSettings { statistics: Some(out.path().join("statistics")), ..settings("awq+gptq") };
        run(&model, &out.path().join("first"), &kept);
        run(&model, &out.path().join("second"), &kept);
        assert!(bytes(&out.path().join("first")) == bytes(&out.path().join("second")));
        // Interrupted, it goes on behind the last block, and starts over if its statistics are gone.
        let third = out.path().join("third");
        for again in [true, false] {
            let stopped = quantize(
                &model,
                &plan(&model, 4),
                &windows(&model, 1, 6, 48),
                &third,
                &kept,
                &Stopper(1.into()),
            );
            assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
            if !again {
                std::fs::remove_dir_all(out.path().join("statistics")).unwrap();
            }
            let made = run(&model, &third, &kept);
            assert_eq!(made.resumed_blocks, usize::from(again));
            assert!(bytes(&third) == bytes(&out.path().join("first")), "{again}");
            std::fs::remove_dir_all(&third).unwrap();
        }
        run(&model, &out.path().join("propagated"), &settings("awq+gptq"));
        assert!(bytes(&out.path().join("first")) != bytes(&out.path().join("propagated")));
        // They are what is read, and nothing else: a damaged one is noticed.
        let matrix = out.path().join("statistics/block-0-site-0.safetensors");
        let sound = std::fs::read(&matrix).unwrap();
        std::fs::write(&matrix, &sound[..sound.len() / 2]).unwrap();
        let target = out.path().join("damaged");
        let damaged = quantize(&model, &plan(&model, 4), &windows(&model, 1, 6, 48), &target, &kept, &Silent)
            .unwrap_err();
        assert!(damaged.to_string().contains("block-0-site-0"), "{damaged}");
        std::fs::write(&matrix, sound).unwrap();
        // Other bits take the same statistics; a matrix that is missing is noticed.
        let three = plan(&model, 3);
        let windows_of = |seed| windows(&model, seed, 6, 48);
        quantize(&model, &three, &windows_of(1), &out.path().join("three"), &kept, &Silent).unwrap();
        let refused = quantize(&model, &three, &windows_of(2), &out.path().join("other"), &kept, &Silent);
        let refused = refused.unwrap_err();
        assert!(
            refused.is_refusal() && refused.to_string().contains("other calibration windows"),
            "{refused}"
        );
        assert!(!out.path().join(".other.partial").exists());
    }
}

/// Sites, the head and the table of a tied model: what is no matrix of their inputs is refused, what a header tells before anything
/// is written.
#[test]
fn statistics_that_do_not_fit_are_refused() {
    for model in several() {
        let out = tempfile::tempdir().unwrap();
        let directory = out.path().join("statistics");
        let kept = QuantizeSettings { statistics: Some(directory.clone()), ..settings("gptq") };
        run(&model, &out.path().join("first"), &kept);
        let entries = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<PathBuf> =
            entries.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors")).collect();
        files.sort();
        for file in [&files[0], &files[files.len() / 2], &files[files.len() - 1]] {
            let sound = std::fs::read(file).unwrap();
            let read = || read_arrays(std::fs::File::open(file).unwrap()).unwrap();
            let size = read()["gram"].shape[0];
            let eye = |rows: usize, columns: usize| -> Vec<f32> {
                (0..rows * columns).map(|at| f32::from(u8::from(at % (columns + 1) == 0))).collect()
            };
            let with = |at: usize, value: f32| {
                let mut values = eye(size, size);
                values[at] = value;
                values
            };
            for (shape, values, tokens, early) in [
                (vec![size / 2, size / 2], eye(size / 2, size / 2), 9i64, true),
                (vec![size, size * 2], eye(size, size * 2), 9, true),
                (vec![size * size], eye(size, size), 9, true),
                (vec![0, 0], Vec::new(), 9, true),
                (vec![size, size], with(1, f32::NAN), 9, false),
                (vec![size, size], with(size * size - 2, f32::INFINITY), 9, false),
                (vec![size, size], with(0, -1.0), 9, false),
                (vec![size, size], eye(size, size), -9, false),
            ] {
                let both = Arrays::from([
                    ("gram".to_owned(), Array::new(&shape[..], values)),
                    ("tokens".to_owned(), Array::new([1], vec![tokens])),
                ]);
                write_arrays(&mut std::fs::File::create(file).unwrap(), &both).unwrap();
                let target = out.path().join("refused");
                let windows = windows(&model, 1, 6, 48);
                let refused =
                    quantize(&model, &plan(&model, 4), &windows, &target, &kept, &Silent).unwrap_err();
                let name = file.file_name().unwrap().to_str().unwrap();
                assert!(refused.is_refusal() && refused.to_string().contains(name), "{shape:?}: {refused}");
                let partial = out.path().join(".refused.partial");
                assert!(!target.exists(), "{shape:?}: {refused}");
                assert!(!early || !partial.exists(), "{shape:?}: {refused}");
                let _ = std::fs::remove_dir_all(partial);
            }
            std::fs::write(file, sound).unwrap();
        }
        run(&model, &out.path().join("again"), &kept);
        assert!(bytes(&out.path().join("first")) == bytes(&out.path().join("again")));
    }
}

/// Readers of one site with groups of different sizes, loud columns first: each group's codes stay with its scale.
#[test]
fn activation_order_keeps_groups_together() {
    let model = open_path(&fixtures().join("zoo/llama_tied")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let base = Scheme::affine(4, 32).unwrap();
    let mixed =
        "[[layer]]\npath = \"*.q_proj\"\ngroup_size = 64\n[[layer]]\npath = \"*.up_proj\"\ngroup_size = 64";
    let settings_of = |overrides| Settings { quantize: Some(base), overrides, ..Settings::default() };
    let overrides = mlx_quant::plan::Overrides::parse(mixed, base).unwrap();
    let plan = Plan::new(&model.checkpoint, &model.config, settings_of(Some(overrides))).unwrap();
    let blocks = Blocks::of(&model);
    let error = |name: &str, act_order: bool| {
        let mut settings = settings("gptq");
        settings.method.act_order = act_order;
        let target = out.path().join(name);
        quantize(&model, &plan, &windows(&model, 1, 40, 48), &target, &settings, &Silent).unwrap();
        blocks.error(&open_path(&target).unwrap())
    };
    let (natural, ordered) = (error("natural", false), error("ordered", true));
    assert!(ordered < 1.1 * natural, "{ordered} {natural}");
}

/// With one window of two tokens experts see too few tokens, and some none.
#[test]
fn experts_without_tokens_fall_back() {
    let model = open_path(&fixtures().join("zoo/qwen3_moe")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("out");
    let few = windows(&model, 1, 1, 2);
    let made = quantize(&model, &plan(&model, 4), &few, &target, &settings("gptq"), &Silent).unwrap();
    assert!(!made.experts.is_empty());
    for (path, experts) in &made.experts {
        assert!(
            experts.tokens.iter().sum::<u64>() > 0 && !experts.fell_back.is_empty(),
            "{path}: {experts:?}"
        );
    }
    assert!(made.experts.values().any(|experts| experts.tokens.contains(&0)), "{:?}", made.experts);
    let many = windows(&model, 1, 60, 48);
    let target = out.path().join("many");
    let made = quantize(&model, &plan(&model, 4), &many, &target, &settings("gptq"), &Silent).unwrap();
    assert!(made.experts.values().all(|experts| experts.fell_back.is_empty()), "{:?}", made.experts);
}
