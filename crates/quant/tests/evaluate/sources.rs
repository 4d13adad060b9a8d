//! Several files, few windows, interruption, memory.

use super::numbers::{OF_MANY, assert_close};
use super::*;

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
