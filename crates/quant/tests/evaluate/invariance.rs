//! What must not change a result.

use super::*;

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
