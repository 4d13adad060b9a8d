//! The figures, against a plain computation and against mlx-lm's own.

use super::*;

/// Logits in float64, a whole row at a time: head times hidden state, bias, factor, cap.
fn logits(walk: &Walk<'_>, window: &[u32]) -> Vec<Vec<f64>> {
    let rows = |matrix: &Tensor| -> Vec<Vec<f32>> {
        let columns = matrix.dim(1).unwrap();
        matrix.to_vec().unwrap().chunks_exact(columns).map(<[f32]>::to_vec).collect()
    };
    let hidden = rows(&hidden(walk, &[window])[0]);
    let last = walk.weights.load_last(&walk.decoder, &walk.device).unwrap();
    let head = &walk.decoder.head;
    let path = head.linear.as_ref().map_or(&walk.decoder.embedding.path, |linear| &linear.path);
    let weight = rows(last.tensor(&format!("{path}.weight")).unwrap());
    let bias = match last.get(&format!("{path}.bias")) {
        Some(bias) => bias.to_vec().unwrap(),
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
pub(crate) const OF_MANY: f64 = 1e-7;

/// What is measured of one token: float32 logits of more than 20 are right to a few 1e-6.
const OF_ONE: f64 = 2e-5;

pub(crate) fn assert_close(name: &str, absolute: f64, ours: &[f64], expected: &[f64]) {
    for (index, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        let close = (ours - expected).abs() <= 1e-5 * expected.abs() + absolute;
        assert!(close, "{name}, value {index}: {ours}, not {expected}");
    }
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
pub(crate) fn two_tiles_and_a_rest(directory: &Path, step: f32) -> Model {
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
    // No granite has such a bias; the interpreter does not mind.
    Model { allow_unread: true, ..open_path(directory).unwrap() }
}

/// Windows of any numbers below a vocabulary, its last tokens among them.
pub(crate) fn any_windows(vocabulary: u32) -> Windows {
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
