//! Evaluation: what it measures, that nothing but the model and the text changes it, and what it refuses.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use common::{convert_to, fixtures, open_path, quantize, write_checkpoint};
use mlx_format::checkpoint::Directory;
use mlx_format::{Dtype, Mode, Scheme};
use mlx_quant::model::{SourceError, WeightsError};
use mlx_quant::{
    Against, DataError, DataSource, Error, Evaluation, EvaluationSettings, Event, Measures, Model, Observer,
    Pick, Residency, Settings, Silent, TokenMeasure, Walk, Windows, evaluate, measure, memory,
};
use serde_json::Value;
use tempfile::TempDir;

/// Copied from the zoo: dense, mixtures of experts, latent attention, delta nets, sinks, learned positions.
const ZOO: [&str; 6] = ["deepseek_v3", "gpt2", "gpt_oss", "llama_tied", "qwen3_5", "qwen3_moe"];

fn demo() -> Model {
    mlx_quant::open(&Directory::Embedded { name: "demo model", files: mlx_quant_demo::FILES }).unwrap()
}

fn demo_moe() -> Model {
    open_path(&fixtures().join("demo-moe")).unwrap()
}

fn zoo(name: &str) -> Model {
    open_path(&fixtures().join("zoo").join(name)).unwrap()
}

/// A converted model, and the directory that goes with it.
struct Converted {
    model: Model,
    path: PathBuf,
    directory: TempDir,
}

impl std::ops::Deref for Converted {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

fn converted(model: &Model, settings: Settings) -> Converted {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model");
    convert_to(model, settings, &path).unwrap();
    Converted { model: open_path(&path).unwrap(), path, directory }
}

fn four_bits(model: &Model) -> Converted {
    converted(model, quantize(4, 64))
}

/// Windows of the beginning of the built-in held-out text.
fn windows(model: &Model, sequence_length: usize, windows: usize) -> Windows {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("text.txt");
    std::fs::write(&file, text(0)).unwrap();
    read(model, &file, sequence_length, windows).unwrap()
}

/// Some thousand bytes of the built-in held-out text.
fn text(part: usize) -> &'static [u8] {
    &mlx_quant_texts::HELD_OUT.as_bytes()[part * 6000..][..6000]
}

fn read(model: &Model, data: &Path, sequence_length: usize, windows: usize) -> Result<Windows, DataError> {
    let pick = Pick::EvenlySpaced { windows };
    let vocabulary = model.vocabulary().unwrap();
    let data = DataSource::Path(data.to_owned());
    Windows::read(&data, &model.tokenizer().unwrap(), vocabulary, sequence_length, pick)
}

/// Without the one field that differs between runs.
fn timeless(mut evaluation: Evaluation) -> Evaluation {
    evaluation.subject.seconds = 0.0;
    evaluation
}

fn evaluated(
    model: &Model,
    reference: Option<&Model>,
    windows: &Windows,
    settings: &EvaluationSettings,
) -> Evaluation {
    timeless(evaluate(model, reference, windows, settings, &Silent).unwrap())
}

fn refused(model: &Model, reference: Option<&Model>, windows: &Windows) -> Error {
    let error = evaluate(model, reference, windows, &EvaluationSettings::default(), &Silent).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("hint: "), "{error}");
    error
}

fn against(measures: &Measures) -> &Against {
    measures.against.as_ref().unwrap()
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn tokens(windows: &Windows) -> Vec<&[u32]> {
    windows.picked.iter().map(|window| window.tokens.as_slice()).collect()
}

fn hidden(walk: &Walk<'_>, windows: &[&[u32]]) -> Vec<Tensor> {
    walk.hidden(windows, &pool(2), &Silent, &mut 0).unwrap()
}

fn numbers(tensors: &[Tensor]) -> Vec<f32> {
    tensors.iter().flat_map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    for name in ZOO {
        let model = zoo(name);
        let evaluation =
            evaluated(&model, Some(&model), &windows(&model, 24, 3), &EvaluationSettings::default());
        let against = against(&evaluation.total);
        let divergences = [against.kl_mean, against.kl_p50, against.kl_p99, against.kl_p999, against.kl_max];
        assert_eq!(divergences, [0.0; 5], "{name}");
        assert_eq!(
            (against.kl_stderr, against.top1, against.top1_stderr),
            (Some(0.0), 1.0, Some(0.0)),
            "{name}"
        );
        assert_eq!(against.reference_perplexity, evaluation.total.perplexity, "{name}");
        assert_eq!((evaluation.total.windows, evaluation.total.tokens), (3, 3 * 23), "{name}");
    }
}

#[test]
fn a_reference_does_not_change_perplexity() {
    let reference = zoo("qwen3_moe");
    let model = four_bits(&reference);
    let (windows, settings) = (windows(&model, 32, 3), EvaluationSettings::default());
    let alone = evaluated(&model, None, &windows, &settings);
    let beside = evaluated(&model, Some(&reference), &windows, &settings);
    let of_reference = evaluated(&reference, None, &windows, &settings);
    assert_eq!(alone.total.against, None);
    assert_eq!(alone.total.perplexity, beside.total.perplexity);
    assert_eq!(alone.total.perplexity_stderr, beside.total.perplexity_stderr);
    assert_eq!(of_reference.total.perplexity, against(&beside.total).reference_perplexity);
}

#[test]
fn resident_blocks_give_what_streamed_ones_give() {
    for name in ZOO {
        let model = zoo(name);
        let windows = windows(&model, 24, 3);
        let windows = tokens(&windows);
        let streaming = numbers(&hidden(&Walk::open(&model).unwrap(), &windows));
        let resident = Walk::open(&model).unwrap().with(Residency::Resident);
        assert_eq!(streaming, numbers(&hidden(&resident, &windows)), "{name}");
        assert_eq!(streaming, numbers(&hidden(&resident, &windows)), "{name}, blocks read before");
    }
}

#[test]
fn low_memory_changes_nothing() {
    let reference = demo_moe();
    let model = four_bits(&reference);
    let windows = windows(&model, 32, 3);
    let result = |low_memory| {
        evaluated(
            &model,
            Some(&reference),
            &windows,
            &EvaluationSettings { low_memory, ..Default::default() },
        )
    };
    assert_eq!(result(false), result(true));
}

#[test]
fn threads_change_nothing() {
    for name in ZOO {
        let reference = zoo(name);
        let model = four_bits(&reference);
        let windows = windows(&model, 24, 4);
        let [one, two, five] = [1, 2, 5].map(|threads| {
            let settings = EvaluationSettings { threads, ..EvaluationSettings::default() };
            evaluated(&model, Some(&reference), &windows, &settings)
        });
        assert_eq!(one, two, "{name}");
        assert_eq!(one, five, "{name}");
    }
}

/// Measures of a model against another, window by window.
fn measured(model: &Walk<'_>, reference: &Walk<'_>, windows: &[&[u32]]) -> Vec<Vec<TokenMeasure>> {
    let (own, theirs) = (hidden(model, windows), hidden(reference, windows));
    measure((model, own), Some((reference, theirs)), windows, &pool(2), &Silent).unwrap()
}

#[test]
fn a_window_does_not_depend_on_the_windows_beside_it() {
    for name in ZOO {
        let reference = zoo(name);
        let model = four_bits(&reference);
        let windows = windows(&model, 24, 4);
        let (model, reference) = (Walk::open(&model).unwrap(), Walk::open(&reference).unwrap());
        let all = measured(&model, &reference, &tokens(&windows));
        let one_by_one =
            tokens(&windows).into_iter().flat_map(|window| measured(&model, &reference, &[window]));
        assert_eq!(all, one_by_one.collect::<Vec<_>>(), "{name}");
    }
}

/// Logits in float64, a whole row at a time: head times hidden state, bias, factor, cap.
fn logits(walk: &Walk<'_>, window: &[u32]) -> Vec<Vec<f64>> {
    let hidden = hidden(walk, &[window])[0].to_vec2::<f32>().unwrap();
    let last = walk.weights.load_last(&walk.decoder, &walk.device).unwrap();
    let head = &walk.decoder.head;
    let path = head.linear.as_ref().map_or(&walk.decoder.embedding.path, |linear| &linear.path);
    let weight = last.tensor(&format!("{path}.weight")).unwrap().to_vec2::<f32>().unwrap();
    let bias = match last.get(&format!("{path}.bias")) {
        Some(bias) => bias.to_vec1::<f32>().unwrap(),
        None => vec![0.0; weight.len()],
    };
    let product = |left: &[f32], right: &[f32]| -> f64 {
        left.iter().zip(right).map(|(left, right)| f64::from(*left) * f64::from(*right)).sum()
    };
    let logit = |state: &[f32], row: &[f32], bias: f32| {
        let logit = (product(state, row) + f64::from(bias)) * head.multiplier;
        head.softcap.map_or(logit, |cap| cap * (logit / cap).tanh())
    };
    let row =
        |state: &Vec<f32>| weight.iter().zip(&bias).map(|(row, bias)| logit(state, row, *bias)).collect();
    hidden[..window.len() - 1].iter().map(row).collect()
}

fn log_probabilities(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
    logits.iter().map(|logit| logit - largest - sum.ln()).collect()
}

fn most_likely(values: &[f64]) -> usize {
    (0..values.len()).max_by(|left, right| values[*left].total_cmp(&values[*right])).unwrap()
}

/// (minus log probability, of the reference, divergence, agreement) of each token, by window.
fn naive(model: &Walk<'_>, reference: &Walk<'_>, windows: &[&[u32]]) -> Vec<Vec<[f64; 4]>> {
    let token = |(own, theirs): (Vec<f64>, Vec<f64>), target: u32| {
        let (own, theirs) = (log_probabilities(&own), log_probabilities(&theirs));
        let divergence = own.iter().zip(&theirs).map(|(own, theirs)| theirs.exp() * (theirs - own)).sum();
        let agreement = f64::from(u8::from(most_likely(&own) == most_likely(&theirs)));
        [-own[target as usize], -theirs[target as usize], divergence, agreement]
    };
    let window = |window: &&[u32]| {
        let pairs = logits(model, window).into_iter().zip(logits(reference, window));
        pairs.zip(&window[1..]).map(|(pair, target)| token(pair, *target)).collect()
    };
    windows.iter().map(window).collect()
}

/// Means: 1e-5 of their value.
const OF_MANY: f64 = 1e-7;

/// What is measured of one token: float32 logits of more than 20 are right to a few 1e-6.
const OF_ONE: f64 = 2e-5;

fn assert_close(name: &str, absolute: f64, ours: &[f64], expected: &[f64]) {
    for (index, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        let close = (ours - expected).abs() <= 1e-5 * expected.abs() + absolute;
        assert!(close, "{name}, value {index}: {ours}, not {expected}");
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// numpy.std(values, ddof=1) / sqrt(len(values))
fn standard_error(values: &[f64]) -> f64 {
    let center = mean(values);
    let squares: f64 = values.iter().map(|value| (value - center).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt() / (values.len() as f64).sqrt()
}

/// numpy.percentile
fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = percent / 100.0 * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

fn check_against_naive(name: &str, model: &Model, reference: &Model, windows: &Windows) {
    let evaluation = evaluated(model, Some(reference), windows, &EvaluationSettings::default());
    let (total, against) = (&evaluation.total, against(&evaluation.total));
    let (model, reference) = (Walk::open(model).unwrap(), Walk::open(reference).unwrap());
    let measures = naive(&model, &reference, &tokens(windows));
    let all = |value: usize| measures.iter().flatten().map(|measure| measure[value]).collect::<Vec<_>>();
    let of_windows = |value: usize| {
        let of_window =
            |window: &Vec<[f64; 4]>| mean(&window.iter().map(|token| token[value]).collect::<Vec<_>>());
        measures.iter().map(of_window).collect::<Vec<_>>()
    };
    let perplexity = mean(&all(0)).exp();
    let divergences = all(2);
    assert!(mean(&divergences) > 1e-4, "{name}: the models differ");
    let ours = [total.perplexity, against.reference_perplexity, against.kl_mean, against.top1];
    let expected = [perplexity, mean(&all(1)).exp(), mean(&divergences), mean(&all(3))];
    assert_close(name, OF_MANY, &ours, &expected);
    let ours = [total.perplexity_stderr, against.kl_stderr, against.top1_stderr].map(Option::unwrap);
    let expected = [0, 2, 3].map(|value| standard_error(&of_windows(value)));
    assert_close(name, OF_MANY, &ours, &[perplexity * expected[0], expected[1], expected[2]]);
    let ours = [against.kl_p50, against.kl_p99, against.kl_p999, against.kl_max];
    assert_close(
        name,
        OF_ONE,
        &ours,
        &[50.0, 99.0, 99.9, 100.0].map(|percent| percentile(&divergences, percent)),
    );
}

#[test]
fn tiles_give_what_whole_rows_of_logits_give() {
    // Three tiles of the vocabulary, and one that is not full.
    let reference = demo();
    let model = four_bits(&reference);
    check_against_naive("demo", &model, &reference, &windows(&model, 32, 3));
    for name in ZOO {
        let reference = zoo(name);
        let model = four_bits(&reference);
        check_against_naive(name, &model, &reference, &windows(&model, 48, 3));
    }
}

/// Their heads have a bias, a factor, a cap.
#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn heads_of_other_families() {
    for name in ["phi", "cohere2", "granite", "gemma2", "gemma4_text", "nemotron"] {
        let reference = open_path(&common::shared().join("zoo").join(name)).unwrap();
        let model = four_bits(&reference);
        check_against_naive(name, &model, &reference, &windows(&model, 48, 3));
    }
}

/// A granite without blocks and with a head of 5003 rows, so that the last tile is partly filled: a bias, a factor of 1/4.
fn two_tiles_and_a_rest(directory: &Path, step: f32) -> Model {
    let config = r#"{"model_type": "granite", "hidden_size": 16, "num_hidden_layers": 0, "num_attention_heads": 1,
        "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 5003, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "logits_scaling": 4.0, "torch_dtype": "float32"}"#;
    let wave = |count: usize, scale: f32, phase: f32| {
        (0..count).flat_map(|i| ((i as f32 * 0.7 + phase).sin() * scale).to_le_bytes()).collect::<Vec<u8>>()
    };
    let tensors = [
        ("model.embed_tokens.weight", vec![5003, 16], wave(5003 * 16, 1.0, 0.0)),
        ("model.norm.weight", vec![16], wave(16, 2.0, 1.0)),
        ("lm_head.weight", vec![5003, 16], wave(5003 * 16, 5.0, step)),
        ("lm_head.bias", vec![5003], wave(5003, 3.0, 2.0 + step)),
    ];
    write_checkpoint(
        directory,
        config,
        &tensors.map(|(name, shape, bytes)| (name, Dtype::F32, shape, bytes)),
    );
    open_path(directory).unwrap()
}

/// Windows of any numbers below a vocabulary, its last tokens among them.
fn any_windows(vocabulary: u32) -> Windows {
    let reader = zoo("llama_tied");
    let mut windows = windows(&reader, 24, 3);
    for (index, window) in windows.picked.iter_mut().enumerate() {
        for (place, token) in window.tokens.iter_mut().enumerate() {
            *token = vocabulary - 1 - (place * place * 173 + index * 31) as u32 % vocabulary;
        }
    }
    windows
}

#[test]
fn heads_with_a_bias_a_factor_and_a_last_tile_that_is_not_full() {
    let directory = tempfile::tempdir().unwrap();
    let reference = two_tiles_and_a_rest(&directory.path().join("reference"), 0.0);
    let model = two_tiles_and_a_rest(&directory.path().join("model"), 0.1);
    let walk = Walk::open(&model).unwrap();
    assert_eq!((walk.decoder.vocabulary, walk.decoder.head.multiplier), (5003, 0.25));
    check_against_naive("granite", &model, &reference, &any_windows(5003));
}

#[test]
fn heads_with_a_cap() {
    let directory = tempfile::tempdir().unwrap();
    let reference = two_tiles_and_a_rest(&directory.path().join("reference"), 0.0);
    let model = two_tiles_and_a_rest(&directory.path().join("model"), 0.1);
    let capped = |model| {
        let mut walk = Walk::open(model).unwrap();
        walk.decoder.head.softcap = Some(3.0);
        walk
    };
    let (capped_model, capped_reference) = (capped(&model), capped(&reference));
    let windows = any_windows(5003);
    let measures = measured(&capped_model, &capped_reference, &tokens(&windows));
    let expected = naive(&capped_model, &capped_reference, &tokens(&windows));
    let free = measured(&Walk::open(&model).unwrap(), &Walk::open(&reference).unwrap(), &tokens(&windows));
    assert_ne!(measures, free, "the cap matters");
    for (measure, expected) in measures.iter().flatten().zip(expected.iter().flatten()) {
        let divergence = measure.divergence.unwrap();
        let agrees = f64::from(u8::from(divergence.agrees));
        assert_close(
            "softcap",
            OF_ONE,
            &[measure.nll, divergence.reference_nll, divergence.kl, agrees],
            expected,
        );
    }
}

/// What another implementation says of a conversion.
struct Judged {
    windows: usize,
    perplexity: f64,
    reference_perplexity: f64,
    kl: [f64; 5],
    top1: f64,
}

// From ../shared/tools/evaluate.py of this project's shared data (MLX 0.32.4 and mlx-lm 0.32.2 on a CPU), for conversions by this
// program: --teacher demo/llama --student OUT --text text/eval.txt --windows 16, and with --windows 4. That text is
// the built-in held-out text, and demo/moe is fixtures/demo-moe.
const DEMO_4_BITS_FEW: Judged = Judged {
    windows: 4,
    perplexity: 15.60758,
    reference_perplexity: 14.92971,
    kl: [0.08781, 0.01018, 0.06095, 0.47775, 0.7776],
    top1: 0.83757,
};
const DEMO_4_BITS: Judged = Judged {
    windows: 16,
    perplexity: 19.58224,
    reference_perplexity: 18.42206,
    kl: [0.09392, 0.00366, 0.06453, 0.50808, 1.4012],
    top1: 0.8218,
};
const DEMO_MXFP4: Judged = Judged {
    windows: 16,
    perplexity: 20.63623,
    reference_perplexity: 18.42206,
    kl: [0.15401, 0.00497, 0.10601, 0.89934, 2.44311],
    top1: 0.78009,
};
const MOE_4_BITS: Judged = Judged {
    windows: 16,
    perplexity: 20.89874,
    reference_perplexity: 19.55049,
    kl: [0.09302, 0.00356, 0.06227, 0.60439, 2.13666],
    top1: 0.8262,
};

fn judge(reference: &Model, settings: Settings, judged: &Judged) {
    let model = converted(reference, settings);
    let pick = Pick::EvenlySpaced { windows: judged.windows };
    let tokenizer = reference.tokenizer().unwrap();
    let vocabulary = reference.vocabulary().unwrap();
    let windows = Windows::read(&DataSource::BuiltinHeldOut, &tokenizer, vocabulary, 512, pick).unwrap();
    let evaluation = evaluated(&model, Some(reference), &windows, &EvaluationSettings::default());
    let against = against(&evaluation.total);
    let kl = [against.kl_mean, against.kl_stderr.unwrap(), against.kl_p50, against.kl_p99, against.kl_max];
    let within =
        |ours: f64, theirs: f64| assert!((ours / theirs - 1.0).abs() < 0.005, "{ours}, not {theirs}");
    within(evaluation.total.perplexity, judged.perplexity);
    within(against.reference_perplexity, judged.reference_perplexity);
    kl.into_iter().zip(judged.kl).for_each(|(ours, theirs)| within(ours, theirs));
    assert!((against.top1 - judged.top1).abs() < 0.001, "{}, not {}", against.top1, judged.top1);
    assert_eq!(evaluation.total.tokens, judged.windows * 511);
}

fn mxfp4() -> Settings {
    Settings { quantize: Some(Scheme::new(Mode::Mxfp4, None, None).unwrap()), ..Settings::default() }
}

#[test]
fn mlx_lm_measures_the_same() {
    judge(&demo(), quantize(4, 64), &DEMO_4_BITS_FEW);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "8192 tokens through six models are slow without optimization")]
fn mlx_lm_measures_the_same_of_more() {
    judge(&demo(), quantize(4, 64), &DEMO_4_BITS);
    judge(&demo(), mxfp4(), &DEMO_MXFP4);
    judge(&demo_moe(), quantize(4, 64), &MOE_4_BITS);
}

/// Remembers which parts of the work were done.
#[derive(Default)]
struct Phases(std::sync::Mutex<Vec<&'static str>>);

impl Observer for Phases {
    fn event(&self, event: Event<'_>) {
        if let Event::Phase { name, .. } = event {
            self.0.lock().unwrap().push(name);
        }
    }
}

/// A reference, its conversion, and a cache for both.
struct Cached {
    reference: PathBuf,
    model: Converted,
}

impl Cached {
    fn new() -> Self {
        let model = four_bits(&zoo("llama_tied"));
        let reference = model.directory.path().join("reference");
        copy(&fixtures().join("zoo/llama_tied"), &reference);
        Self { reference, model }
    }

    fn directory(&self) -> PathBuf {
        self.model.directory.path().join("some/cache")
    }

    fn entries(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.directory()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    fn entry(&self) -> PathBuf {
        let entries = self.entries();
        assert_eq!(entries.len(), 1, "{entries:?}");
        entries[0].clone()
    }

    /// The result, and whether the reference came from the cache.
    fn run(&self, windows: &Windows) -> (Evaluation, bool) {
        let settings = EvaluationSettings { cache: Some(self.directory()), ..EvaluationSettings::default() };
        let (reference, phases) = (open_path(&self.reference).unwrap(), Phases::default());
        let mut evaluation =
            timeless(evaluate(&self.model, Some(&reference), windows, &settings, &phases).unwrap());
        let hit = std::mem::take(&mut evaluation.subject.reference_cached);
        assert_eq!(!hit, phases.0.lock().unwrap().contains(&"reference"), "what is cached is not computed");
        (evaluation, hit)
    }
}

fn copy(source: &Path, target: &Path) {
    std::fs::create_dir_all(target).unwrap();
    for entry in std::fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
    }
}

#[test]
fn the_second_run_takes_the_reference_from_the_cache() {
    let cached = Cached::new();
    let windows = windows(&cached.model, 24, 3);
    let (first, hit) = cached.run(&windows);
    assert!(!hit);
    let without = {
        let reference = open_path(&cached.reference).unwrap();
        evaluated(&cached.model, Some(&reference), &windows, &EvaluationSettings::default())
    };
    assert_eq!(first, without);
    assert_eq!(cached.run(&windows), (first.clone(), true));
    assert_eq!(cached.run(&windows), (first, true));
    cached.entry();
}

#[test]
fn other_windows_are_computed_anew() {
    let cached = Cached::new();
    let model = &cached.model;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("text.txt");
    std::fs::write(&file, text(1)).unwrap();
    let all = [
        windows(model, 24, 3),
        windows(model, 25, 3),
        windows(model, 24, 4),
        read(model, &file, 24, 3).unwrap(),
    ];
    for windows in &all {
        assert!(!cached.run(windows).1);
    }
    for windows in &all {
        assert!(cached.run(windows).1);
    }
    assert_eq!(cached.entries().len(), 4);
}

#[test]
fn a_changed_reference_is_computed_anew() {
    let cached = Cached::new();
    let windows = windows(&cached.model, 24, 3);
    let (first, _) = cached.run(&windows);
    // The same size, one weight of the embedding another.
    edit(&cached.reference.join("model-00001-of-00002.safetensors"), |bytes| *bytes.last_mut().unwrap() ^= 1);
    let (changed, hit) = cached.run(&windows);
    assert!(!hit);
    assert_ne!(first.total, changed.total);
    // Settings that weights do not show.
    edit_config(&cached.reference, |config| config["rope_theta"] = 1000.0.into());
    let (other_config, hit) = cached.run(&windows);
    assert!(!hit);
    assert_ne!(changed.total, other_config.total);
    assert!(cached.run(&windows).1);
}

#[test]
fn damaged_entries_are_written_anew() {
    let cached = Cached::new();
    let windows = windows(&cached.model, 24, 3);
    let (first, _) = cached.run(&windows);
    let entry = cached.entry();
    let whole = std::fs::read(&entry).unwrap();
    let damages: [fn(&mut Vec<u8>); 7] = [
        Vec::clear,
        |bytes| bytes.truncate(10),
        |bytes| bytes.truncate(bytes.len() - 4),
        |bytes| bytes.extend([0; 4]),
        |bytes| bytes[20] ^= 1,
        |bytes| *bytes.last_mut().unwrap() ^= 1,
        |bytes| bytes.fill(b' '),
    ];
    for (index, damage) in damages.into_iter().enumerate() {
        edit(&entry, damage);
        assert_eq!(cached.run(&windows), (first.clone(), false), "damage {index}");
        assert!(std::fs::read(cached.entry()).unwrap() == whole, "damage {index}");
    }
    assert!(cached.run(&windows).1);
}

#[test]
fn caches_that_cannot_be_written_are_found_before_any_work() {
    let cached = Cached::new();
    let windows = windows(&cached.model, 24, 3);
    let file = cached.model.directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    // Permissions do not stop root: a file in the place of a directory does, and the system's own directory.
    let mut directories = vec![file.clone(), file.join("cache")];
    if cfg!(target_os = "linux") {
        directories.push("/proc".into());
    }
    let reference = open_path(&cached.reference).unwrap();
    for directory in directories {
        let settings = EvaluationSettings { cache: Some(directory.clone()), ..EvaluationSettings::default() };
        let phases = Phases::default();
        let error = evaluate(&cached.model, Some(&reference), &windows, &settings, &phases).unwrap_err();
        let Error::Cache { path, working: false, .. } = &error else { panic!("{error}") };
        assert_eq!(Path::new(path), directory);
        assert!(error.is_refusal());
        assert!(error.to_string().contains("hint: give another directory to --cache"), "{error}");
        assert!(phases.0.lock().unwrap().is_empty(), "{error}");
    }
}

#[test]
fn files_are_measured_apart() {
    let reference = zoo("llama_tied");
    let model = four_bits(&reference);
    let directory = tempfile::tempdir().unwrap();
    let names = ["a.txt", "b.txt", "c.jsonl"];
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("a.txt"), text(0)).unwrap();
    std::fs::write(path("b.txt"), text(1)).unwrap();
    std::fs::write(
        path("c.jsonl"),
        serde_json::json!({"text": String::from_utf8_lossy(text(2))}).to_string(),
    )
    .unwrap();
    let evaluation = |data: &Path| {
        evaluated(
            &model,
            Some(&reference),
            &read(&model, data, 24, 3).unwrap(),
            &EvaluationSettings::default(),
        )
    };
    let together = evaluation(directory.path());
    let apart = names.map(|name| evaluation(&path(name)));
    assert!(apart.iter().all(|evaluation| evaluation.by_source.is_empty()));
    assert_eq!(together.by_source.iter().map(|source| source.name.as_str()).collect::<Vec<_>>(), names);
    for (source, evaluation) in together.by_source.iter().zip(&apart) {
        assert_eq!(source.measures, evaluation.total, "{}", source.name);
    }
    // As many tokens of each file, so that means are means of the files' means.
    assert_eq!((together.total.windows, together.total.tokens), (9, 9 * 23));
    let mean_of =
        |value: fn(&Measures) -> f64| mean(&apart.each_ref().map(|evaluation| value(&evaluation.total)));
    let ours =
        [together.total.perplexity.ln(), against(&together.total).kl_mean, against(&together.total).top1];
    let expected = [
        mean_of(|measures| measures.perplexity.ln()),
        mean_of(|measures| against(measures).kl_mean),
        mean_of(|measures| against(measures).top1),
    ];
    assert_close("total", OF_MANY, &ours, &expected);
    let maxima = apart.each_ref().map(|evaluation| against(&evaluation.total).kl_max);
    assert_eq!(against(&together.total).kl_max, maxima.into_iter().fold(0.0, f64::max));
}

#[test]
fn one_window_has_no_standard_error() {
    let model = zoo("llama_tied");
    let evaluation = evaluated(&model, Some(&model), &windows(&model, 24, 1), &EvaluationSettings::default());
    assert_eq!(evaluation.total.perplexity_stderr, None);
    assert_eq!((against(&evaluation.total).kl_stderr, against(&evaluation.total).top1_stderr), (None, None));
}

fn edit(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(file).unwrap();
    change(&mut bytes);
    std::fs::write(file, bytes).unwrap();
}

fn edit_config(directory: &Path, change: impl FnOnce(&mut Value)) {
    edit(&directory.join("config.json"), |bytes| {
        let mut config = serde_json::from_slice(bytes).unwrap();
        change(&mut config);
        *bytes = config.to_string().into_bytes();
    });
}

/// Changes the header of model.safetensors and the data behind it.
fn edit_weights(directory: &Path, change: impl FnOnce(&mut Value, &mut [u8])) {
    edit(&directory.join("model.safetensors"), |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let mut data = bytes.split_off(8 + length);
        change(&mut header, &mut data);
        let header = header.to_string();
        *bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
    });
}

#[test]
fn references_with_another_vocabulary() {
    let (model, reference) = (zoo("llama_tied"), demo());
    let error = refused(&model, Some(&reference), &windows(&model, 24, 3));
    assert!(matches!(error, Error::Vocabulary(_)), "{error}");
    assert!(error.to_string().contains("6144") && error.to_string().contains("512"), "{error}");
}

#[test]
fn scales_that_are_no_numbers() {
    let layer = "model.layers.1.mlp.down_proj";
    let cases = [(quantize(4, 64), &[0xC0, 0x7F][..]), (mxfp4(), &[0xFF][..])];
    for (settings, not_a_number) in cases {
        let converted = converted(&zoo("llama_tied"), settings);
        edit_weights(&converted.path, |header, data| {
            let start = header[format!("{layer}.scales")]["data_offsets"][0].as_u64().unwrap() as usize;
            data[start..start + not_a_number.len()].copy_from_slice(not_a_number);
        });
        let model = open_path(&converted.path).unwrap();
        let error = refused(&model, None, &windows(&model, 24, 3));
        let Error::Weights(WeightsError::NonFinite { tensor, element: 0, file, .. }) = &error else {
            panic!("{error}")
        };
        assert_eq!(*tensor, format!("{layer}.weight"));
        assert!(file.contains("model.safetensors"), "{file}");
    }
}

#[test]
fn packed_tensors_that_do_not_belong_together() {
    let layer = "model.layers.1.mlp.down_proj";
    let converted = four_bits(&zoo("llama_tied"));
    let windows = windows(&converted, 24, 3);
    edit_weights(&converted.path, |header, _| {
        let shape = &mut header[format!("{layer}.scales")]["shape"];
        *shape = serde_json::json!([shape[1], shape[0]]);
    });
    let error = refused(&open_path(&converted.path).unwrap(), None, &windows);
    let Error::Weights(WeightsError::Source(SourceError::Packed { path, .. })) = &error else {
        panic!("{error}")
    };
    assert_eq!(path, layer);
}

#[test]
fn weights_that_the_config_does_not_describe() {
    let converted = four_bits(&zoo("llama_tied"));
    let windows = windows(&converted, 24, 3);
    edit_config(&converted.path, |config| config["intermediate_size"] = 256.into());
    edit_config(&converted.path, |config| config["hidden_size"] = 32.into());
    let error = refused(&open_path(&converted.path).unwrap(), None, &windows);
    assert!(matches!(error, Error::Weights(WeightsError::Shape { .. })), "{error}");
}

#[test]
fn model_types_that_are_not_described() {
    let converted = four_bits(&zoo("llama_tied"));
    let windows = windows(&converted, 24, 3);
    for name in ["new_one", "phimoe"] {
        edit_config(&converted.path, |config| config["model_type"] = name.into());
        let error = refused(&open_path(&converted.path).unwrap(), None, &windows);
        assert!(error.to_string().contains(name), "{error}");
        assert!(matches!(error, Error::Weights(WeightsError::Undescribed { .. })), "{error}");
    }
}

#[test]
fn texts_shorter_than_a_window() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("short.txt");
    std::fs::write(&file, "A few words only.").unwrap();
    let error = read(&zoo("llama_tied"), &file, 512, 3).unwrap_err();
    assert!(matches!(error, DataError::TooShort { .. }) && error.to_string().contains("hint: "), "{error}");
}

#[test]
fn tokens_beyond_the_vocabulary() {
    let model = zoo("llama_tied");
    let tokenizer = demo().tokenizer().unwrap();
    let pick = Pick::EvenlySpaced { windows: 3 };
    let error = Windows::read(&DataSource::BuiltinHeldOut, &tokenizer, 512, 24, pick).unwrap_err();
    assert!(matches!(error, DataError::Vocabulary { vocabulary: 512, .. }), "{error}");
    // Windows that were made for another model.
    let error = refused(&model, None, &windows(&demo(), 24, 3));
    assert!(matches!(error, Error::Weights(WeightsError::Token { rows: 512, .. })), "{error}");
}

#[test]
fn activations_that_overflow() {
    let directory = tempfile::tempdir().unwrap();
    let model = two_tiles_and_a_rest(directory.path(), 0.0);
    edit_weights(directory.path(), |header, data| {
        let start = header["model.norm.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
        data[start..start + 4].copy_from_slice(&f32::MAX.to_le_bytes());
    });
    drop(model);
    let error = refused(&open_path(directory.path()).unwrap(), None, &any_windows(5003));
    assert!(matches!(error, Error::NotANumber { .. }), "{error}");
}

/// Asks to stop at once.
struct Stop;

impl Observer for Stop {
    fn event(&self, _: Event<'_>) {}

    fn cancelled(&self) -> bool {
        true
    }
}

#[test]
fn an_observer_may_stop_it() {
    let model = zoo("llama_tied");
    let error =
        evaluate(&model, None, &windows(&model, 24, 3), &EvaluationSettings::default(), &Stop).unwrap_err();
    assert!(matches!(error, Error::Interrupted) && !error.is_refusal(), "{error}");
}

#[test]
fn memory_is_predicted() {
    for model in [zoo("llama_tied"), zoo("qwen3_moe"), demo_moe(), demo()] {
        let windows = windows(&model, 32, 3);
        let needed = |low_memory, reference| {
            let settings = EvaluationSettings { threads: 2, low_memory, ..EvaluationSettings::default() };
            memory(&model, reference, &windows, &settings, 0).unwrap()
        };
        let (normal, low) = (needed(false, None), needed(true, None));
        assert!(low.peak > 0 && low.peak <= normal.peak, "{low:?} {normal:?}");
        assert!(low.blocks > 0 && low.states > 0 && low.scratch > 0 && low.head > 0, "{low:?}");
        assert!(needed(false, Some(&model)).peak > normal.peak, "a reference takes memory");
    }
}

/// Many windows: more than a wave of them, so that blocks stay in memory unless that is too much.
#[test]
fn low_memory_pays_where_windows_are_many() {
    let model = demo();
    let mut windows = windows(&model, 32, 1);
    let walk = Walk::open(&model).unwrap();
    windows.picked = vec![windows.picked[0].clone(); walk.wave(32) + 1];
    assert_eq!(walk.residency(false, &windows), Residency::Resident);
    assert_eq!(walk.residency(true, &windows), Residency::Streaming);
    let blocks = |low_memory| {
        memory(&model, None, &windows, &EvaluationSettings { low_memory, ..EvaluationSettings::default() }, 0)
            .unwrap()
            .blocks
    };
    assert_eq!(blocks(false), walk.block_bytes().iter().sum::<u64>());
    assert_eq!(blocks(true), *walk.block_bytes().iter().max().unwrap());
}
