//! DWQ end to end: never worse than its start, the same bytes whatever happens on the way, and what it refuses.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test panics to fail, and shows its table")]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

use mlx_format::Scheme;
use mlx_quant::dwq::{Distilled, DwqSettings};
use mlx_quant::session::{Quantized, distill, targets};
use mlx_quant::{Error, Model, Observer, Plan, QuantizeSettings, Settings, Silent, quantize};

use crate::common::{Stopper, Warned, fixtures, open_path, random_windows as windows, shared};

fn settings(model: &Model, recipe: &str, iterations: usize) -> QuantizeSettings {
    let dwq = DwqSettings {
        iterations,
        batch_size: 2,
        save_seconds: 0,
        validate_every: 2,
        ..DwqSettings::default()
    };
    let lessons = Some((windows(model, 1, 6, 32), windows(model, 2, 3, 32)));
    QuantizeSettings { threads: 2, dwq, lessons, ..QuantizeSettings::new(recipe.parse().unwrap()) }
}

fn plan(model: &Model, bits: u32) -> Plan {
    let quantize = Some(Scheme::affine(bits, 32).unwrap());
    Plan::new(&model.checkpoint, &model.config, Settings { quantize, ..Settings::default() }).unwrap()
}

fn run(
    model: &Model,
    target: &Path,
    settings: &QuantizeSettings,
    observer: &dyn Observer,
) -> Result<Quantized, Error> {
    quantize(model, &plan(model, 3), &windows(model, 1, 6, 32), target, settings, observer)
}

fn bytes(directory: &Path) -> Vec<u8> {
    std::fs::read(directory.join("model.safetensors")).unwrap()
}

fn model(name: &str) -> Model {
    open_path(&fixtures().join("zoo").join(name)).unwrap()
}

fn some_model() -> Model {
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(fixtures().join("zoo")).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    model(
        &all.into_iter()
            .find(|path| path.to_string_lossy().contains("llama"))
            .unwrap()
            .file_name()
            .unwrap()
            .to_string_lossy(),
    )
}

/// Trains every family a little, from rounding to nearest.
fn every_family(zoo: &Path) {
    let mut all: Vec<PathBuf> = std::fs::read_dir(zoo).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.retain(|path| path.join("config.json").is_file());
    all.sort();
    let out = tempfile::tempdir().unwrap();
    let mut better = 0;
    for path in &all {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let model = open_path(path).unwrap();
        let made = run(&model, &out.path().join(&name), &settings(&model, "rtn+dwq", 8), &Silent).unwrap();
        let Distilled { start_kl, best_kl, best_step, stopped, .. } = made.distilled.unwrap();
        println!("{name:<20} {start_kl:.5} -> {best_kl:.5} at step {best_step}");
        assert!(best_kl <= start_kl && stopped.is_none(), "{name}");
        better += usize::from(best_kl < start_kl);
    }
    println!("{better} of {} became better", all.len());
    assert!(better * 10 >= all.len() * 9, "{better} of {}", all.len());
}

#[test]
fn the_copied_checkpoints_learn() {
    every_family(&fixtures().join("zoo"));
}

#[test]
fn the_seeded_checkpoints_learn() {
    every_family(common::seeds::seeded().path());
}

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared")]
fn every_family_learns() {
    every_family(&shared().join("zoo"));
}

#[test]
fn threads_and_interruptions_decide_nothing() {
    let model = some_model();
    let out = tempfile::tempdir().unwrap();
    let at = |name: &str| out.path().join(name);
    let mut own = settings(&model, "awq+gptq+dwq", 7);
    own.dwq.norms = Some(true);
    run(&model, &at("whole"), &own, &Silent).unwrap();
    let whole = bytes(&at("whole"));
    run(&model, &at("one"), &QuantizeSettings { threads: 1, ..own.clone() }, &Silent).unwrap();
    assert!(whole == bytes(&at("one")), "threads");
    run(&model, &at("low"), &QuantizeSettings { low_memory: true, ..own.clone() }, &Silent).unwrap();
    assert!(whole == bytes(&at("low")), "memory");
    let mut interrupted = 0;
    for stop in 1..40 {
        let target = at(&format!("stop-{stop}"));
        match run(&model, &target, &own, &Stopper(AtomicU64::new(stop))) {
            Err(Error::Interrupted) => interrupted += 1,
            Ok(_) => break,
            Err(error) => panic!("{error}"),
        }
        assert!(!target.exists());
        let made = run(&model, &target, &own, &Silent).unwrap();
        assert!(
            whole == bytes(&target),
            "stopped at {stop}, resumed at {:?}",
            made.distilled.map(|it| it.resumed_steps)
        );
    }
    assert!(interrupted > 8, "{interrupted}");
    let made = run(&model, &at("again"), &own, &Silent).unwrap();
    assert!(
        whole == bytes(&at("again")) && made.distilled.unwrap().norms > 0,
        "norms are among what is kept"
    );
    let mut other = own.clone();
    other.dwq.norms = Some(false);
    run(&model, &at("grids"), &other, &Silent).unwrap();
    assert!(whole != bytes(&at("grids")), "norms decide bytes");
    let mut other = own;
    other.dwq.seed = 5;
    run(&model, &at("seed"), &other, &Silent).unwrap();
    assert!(whole != bytes(&at("seed")), "the seed orders the windows");
}

/// Tensors that differ between two models of the same layout.
fn changed(one: &Path, other: &Path) -> BTreeSet<String> {
    let (one, other) = (open_path(one).unwrap(), open_path(other).unwrap());
    let of_one = |name: &str| one.checkpoint.bytes(&one.checkpoint.tensors()[name]).to_vec();
    let all = other.checkpoint.tensors().iter();
    let differ = all.filter(|(name, own)| of_one(name) != other.checkpoint.bytes(own));
    differ.map(|(name, _)| name.clone()).collect()
}

fn is_grid(name: &str) -> bool {
    name.ends_with(".scales") || name.ends_with(".biases")
}

/// Every norm of blocks learns at 2 and 3 bits, nothing but scales and biases at 4, and either where it is asked for.
#[test]
fn norms_learn_where_bits_are_few() {
    let out = tempfile::tempdir().unwrap();
    for name in ["llama_tied", "qwen3_moe"] {
        let model = model(name);
        let run = |recipe: &str, bits: u32, norms: Option<bool>| {
            let target = tempfile::tempdir_in(out.path()).unwrap().keep().join("out");
            let mut own = settings(&model, recipe, 6);
            own.dwq.norms = norms;
            let plan = plan(&model, bits);
            let made = quantize(&model, &plan, &windows(&model, 1, 6, 32), &target, &own, &Silent).unwrap();
            (target, made.distilled.unwrap_or_default())
        };
        for (bits, asked, learns) in [
            (2, None, true),
            (2, Some(false), false),
            (3, None, true),
            (4, None, false),
            (4, Some(true), true),
        ] {
            let (start, _) = run("rtn", bits, None);
            let (trained, made) = run("rtn+dwq", bits, asked);
            // At 4 bits a step may not be better than the start, and norms are as they were.
            let moved = made.best_step > 0;
            assert!(moved || bits == 4, "{name} {bits} {asked:?}: {made:?}");
            let mut all = changed(&start, &trained);
            all.retain(|tensor| !is_grid(tensor));
            println!("{name} {bits} {asked:?}: {all:?}");
            let names = open_path(&trained).unwrap().checkpoint.tensors().keys().cloned().collect::<Vec<_>>();
            let norms =
                names.iter().filter(|name| name.contains("layers") && name.ends_with("norm.weight")).count();
            let expected = if learns { norms } else { 0 };
            let differ = if moved { expected } else { 0 };
            assert_eq!((made.norms, all.len()), (expected, differ), "{name} {bits} {asked:?}");
            assert!(
                all.iter().all(|tensor| tensor.contains("layers") && tensor.ends_with("norm.weight")),
                "{all:?}"
            );
            let card = std::fs::read_to_string(trained.join("README.md")).unwrap();
            assert_eq!(
                card.contains(&format!("weights of {expected} norms trained")),
                learns && moved,
                "{card}"
            );
        }
    }
}

/// Norms of every family, also those that store `w - 1`, have the bytes that they had where no step is taken.
fn untrained_norms_stay(zoo: &Path) {
    let out = tempfile::tempdir().unwrap();
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(zoo).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.join("config.json").is_file());
    for path in paths {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let model = open_path(&path).unwrap();
        let at = |recipe: &str| out.path().join(format!("{name}-{recipe}"));
        for recipe in ["rtn", "rtn+dwq"] {
            let mut own = settings(&model, recipe, 0);
            own.dwq.norms = Some(true);
            let made = run(&model, &at(recipe), &own, &Silent).unwrap();
            if let Some(made) = made.distilled {
                println!("{name}: {} norms", made.norms);
                // None of its norms has a weight.
                assert!(made.norms > 0 || name == "nanochat", "{name}");
            }
        }
        let all = changed(&at("rtn"), &at("rtn+dwq"));
        assert!(all.iter().all(|tensor| is_grid(tensor)), "{name}: {all:?}");
    }
}

#[test]
fn untrained_norms_of_the_copied_checkpoints_stay() {
    untrained_norms_stay(&fixtures().join("zoo"));
}

#[test]
fn untrained_norms_of_the_seeded_checkpoints_stay() {
    untrained_norms_stay(common::seeds::seeded().path());
}

/// A state that was cut off costs the steps, which is told, and only where the student is what it was; a file of the teacher's is made
/// again.
#[test]
fn damaged_states_cost_what_they_hold() {
    let model = some_model();
    let out = tempfile::tempdir().unwrap();
    let own = settings(&model, "rtn+dwq", 5);
    run(&model, &out.path().join("whole"), &own, &Silent).unwrap();
    let target = out.path().join("out");
    let at = |name: &str| out.path().join(".out.partial").join(name);
    let cut = |name: &str| {
        let file = std::fs::File::options().write(true).open(at(name)).unwrap();
        file.set_len(100).unwrap();
    };
    let stop = (1..60).find(|stop| {
        assert!(matches!(run(&model, &target, &own, &Stopper((*stop).into())), Err(Error::Interrupted)));
        at(".state-dwq.safetensors").exists()
    });
    assert!(stop.is_some());
    cut(".state-dwq.safetensors");
    cut(".state-dwq-teacher-training-3.safetensors");
    // As if the best numbers were written when the power failed.
    std::fs::write(at(".state-dwq-written"), "").unwrap();
    let error = run(&model, &target, &own, &Silent).unwrap_err();
    assert!(matches!(error, Error::Lost { .. }) && error.to_string().contains("hint: delete"), "{error}");
    std::fs::remove_file(at(".state-dwq-written")).unwrap();
    let warned = Warned::default();
    let made = run(&model, &target, &own, &warned).unwrap();
    assert_eq!(made.distilled.unwrap().resumed_steps, 0);
    let told = warned.0.into_inner().unwrap();
    assert!(told.len() == 1 && told[0].contains(".state-dwq.safetensors"), "{told:?}");
    assert!(bytes(&target) == bytes(&out.path().join("whole")));
}

/// A rate that ruins the model, and one that makes it infinite, leave what was there before.
#[test]
fn absurd_rates_do_no_harm() {
    let model = some_model();
    let out = tempfile::tempdir().unwrap();
    let mut own = settings(&model, "rtn+dwq", 4);
    own.dwq.iterations = 0;
    run(&model, &out.path().join("start"), &own, &Silent).unwrap();
    own.dwq.iterations = 4;
    for (rate, stops) in [(0.5, false), (1e36, true)] {
        own.dwq.learning_rate = Some(rate);
        let target = out.path().join(rate.to_string());
        let made = run(&model, &target, &own, &Silent).unwrap().distilled.unwrap();
        println!("rate {rate}: {made:?}");
        assert_eq!((made.best_step, made.best_kl), (0, made.start_kl));
        assert_eq!(made.stopped.is_some(), stops, "{:?}", made.stopped);
        assert!(bytes(&target) == bytes(&out.path().join("start")));
    }
}

#[test]
fn any_quantized_model_learns_and_targets_replace_the_teacher() {
    let teacher = some_model();
    let out = tempfile::tempdir().unwrap();
    let at = |name: &str| out.path().join(name);
    let mut own = settings(&teacher, "gptq", 6);
    own.dwq.norms = Some(true);
    let mixed = "[[layer]]\npath = \"*.down_proj\"\nbits = 5\ngroup_size = 64\n[[layer]]\npath = \"*.v_proj\"\nbits = 8\n[[layer]]\npath = \"*.o_proj\"\nkeep = true";
    let base = Scheme::affine(3, 32).unwrap();
    let overrides = Some(mlx_quant::plan::Overrides::parse(mixed, base).unwrap());
    let mixed = Settings { quantize: Some(base), overrides, ..Settings::default() };
    let plan = Plan::new(&teacher.checkpoint, &teacher.config, mixed).unwrap();
    quantize(&teacher, &plan, &windows(&teacher, 1, 6, 32), &at("student"), &own, &Silent).unwrap();
    let student = open_path(&at("student")).unwrap();
    let copy = Plan::new(&student.checkpoint, &student.config, Settings::default()).unwrap();
    own.recipe = "dwq".parse().unwrap();
    let train = |teacher: Option<&Model>, name: &str, own: &QuantizeSettings| {
        distill(teacher, &student, &copy, &windows(&student, 1, 6, 32), &at(name), own, &Silent)
    };
    let made = train(Some(&teacher), "trained", &own).unwrap().distilled.unwrap();
    assert!(made.best_kl < made.start_kl && made.norms > 0, "{made:?}");
    assert_eq!(bytes(&at("trained")).len(), bytes(&at("student")).len());
    // Codes, and what is not below eight bits, are as they were.
    let all = changed(&at("student"), &at("trained"));
    let norms = all.iter().filter(|name| !is_grid(name)).count();
    assert!(all.iter().all(|name| !name.contains("v_proj")), "{all:?}");
    assert!(all.iter().all(|name| is_grid(name) || name.ends_with("norm.weight")), "{all:?}");
    assert!(norms == made.norms && all.len() - norms > 10, "{all:?}");

    let mut with = own.clone();
    with.dwq.target_dir = Some(at("targets"));
    let error = train(None, "none", &with).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("no teacher was given"), "{error}");
    targets(&teacher, &with, &Silent).unwrap();
    train(None, "without", &with).unwrap();
    train(Some(&teacher), "with", &with).unwrap();
    assert!(bytes(&at("without")) == bytes(&at("with")));

    // Other data, another temperature, another model, another architecture.
    let refused = |teacher: &Model, own: &QuantizeSettings, text: &str| {
        let error = train(Some(teacher), "refused", own).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains(text), "{error}");
        assert!(!at("refused").exists() && !at(".refused.partial").exists());
    };
    let mut other = with.clone();
    other.lessons = Some((windows(&teacher, 8, 6, 32), windows(&teacher, 2, 3, 32)));
    refused(&teacher, &other, "of other data");
    let mut other = with.clone();
    other.dwq.temperature = 1.0;
    refused(&teacher, &other, "another temperature");
    let key = std::fs::read_to_string(at("targets/targets.json")).unwrap();
    let hash = teacher.hash().unwrap();
    std::fs::write(at("targets/targets.json"), key.replace(&hash, "0")).unwrap();
    refused(&teacher, &with, "another model");
    std::fs::write(at("targets/targets.json"), "{").unwrap();
    refused(&teacher, &with, "targets.json");
    for entry in std::fs::read_dir(fixtures().join("zoo")).unwrap() {
        let path = entry.unwrap().path();
        if !path.to_string_lossy().contains("llama") && path.join("config.json").is_file() {
            refused(&open_path(&path).unwrap(), &own, "no form of the teacher");
        }
    }
}

/// What is in eight bits, or not quantized at all, is not trained.
#[test]
fn nothing_to_train_is_said() {
    let teacher = some_model();
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("eight");
    let own = settings(&teacher, "rtn", 1);
    quantize(&teacher, &plan(&teacher, 8), &windows(&teacher, 1, 2, 32), &target, &own, &Silent).unwrap();
    let student = open_path(&target).unwrap();
    let copy = Plan::new(&student.checkpoint, &student.config, Settings::default()).unwrap();
    let own = settings(&teacher, "dwq", 1);
    let windows = windows(&teacher, 1, 2, 32);
    let error = distill(Some(&teacher), &student, &copy, &windows, &out.path().join("x"), &own, &Silent);
    assert!(matches!(error, Err(Error::NothingToTrain(_))));
}
