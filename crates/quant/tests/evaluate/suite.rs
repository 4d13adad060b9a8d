//! Answers to multiple-choice questions are scored by log-likelihood, whatever goes through the model beside them.

use mlx_quant::data::{Choice, Suite};
use mlx_quant::evaluate::suite::{Asked, evaluate_suite, scores, suite_memory};

use super::*;

fn written(lines: &[Value]) -> Suite {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("suite.jsonl");
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(&file, text.join("\n")).unwrap();
    Suite::read(&file).unwrap()
}

/// Questions of many lengths, with white space at ends, answers of one token and of many.
fn suite() -> Suite {
    let text = std::str::from_utf8(text(0)).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    let question = |at: usize| {
        let stem = words[at * 3..at * 3 + 1 + at % 5].join(" ");
        let (first, second) = (words[at * 7 + 1], words[at * 5 + 2..at * 5 + 4 + at % 3].join(" "));
        let end = ["", " ", "?\n", "\nAnswer: "][at % 4];
        serde_json::json!({"question": format!("{stem}{end}"), "choices": [first, second, "\u{fc}ber"], "answer": at % 3})
    };
    written(&(0..24).map(question).collect::<Vec<_>>())
}

/// Each answer alone, with whole rows of logits and sums in float64.
fn directly(model: &Model, choice: &Choice) -> f64 {
    let walk = Walk::open(model).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let hidden = walk.hidden(&[&choice.tokens], &pool, &Silent, &mut 0).unwrap().remove(0);
    let head = walk.head_tile(0..walk.decoder.vocabulary).unwrap();
    let forward = walk.forward(choice.tokens.len()).unwrap();
    let logits = forward.logits(&head, &hidden).unwrap();
    let rows = logits.to_vec().unwrap();
    let rows: Vec<&[f32]> = rows.chunks_exact(walk.decoder.vocabulary).collect();
    let log_probability = |at: usize| {
        let row = rows[at - 1];
        let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        f64::from(row[choice.tokens[at] as usize]) - sum.ln()
    };
    (choice.given..choice.tokens.len()).map(log_probability).sum()
}

#[test]
fn scores_are_sums_of_log_probabilities() {
    let suite = suite();
    for name in ZOO {
        let model = zoo(name);
        let (tokenizer, vocabulary) = (model.tokenizer().unwrap(), model.vocabulary().unwrap());
        let mut choices = suite.tokens(&tokenizer, vocabulary, None).unwrap();
        assert_eq!(choices.len(), 72);
        // gpt2 has 64 positions here.
        choices.retain(|choice| choice.tokens.len() <= 64);
        assert!(choices.len() > 36, "{name}: {} are short enough", choices.len());
        for settings in
            [EvaluationSettings::default(), EvaluationSettings { threads: 1, low_memory: true, cache: None }]
        {
            let found = scores(&model, &choices, &suite, "answers", &settings, &Silent).unwrap();
            for (choice, found) in choices.iter().zip(&found) {
                let expected = directly(&model, choice);
                assert!(
                    (found - expected).abs() < 2e-4 * (1.0 + expected.abs()),
                    "{name}: {found} {expected}"
                );
            }
        }
    }
}

/// A question and its answer are tokenized together; white space at the question's end is the answer's.
#[test]
fn answers_are_what_follows_the_questions_tokens() {
    let model = demo();
    let (tokenizer, vocabulary) = (model.tokenizer().unwrap(), model.vocabulary().unwrap());
    let line =
        |question: &str| serde_json::json!({"question": question, "choices": ["red", "blue"], "answer": 0});
    let suite = written(&[line("The rose is"), line("The rose is "), line("The rose is\n")]);
    let choices = suite.tokens(&tokenizer, vocabulary, None).unwrap();
    let prefix = tokenizer.prefix();
    let stem = [prefix, &tokenizer.encode("The rose is").unwrap()].concat();
    for (at, text) in ["The rose is red", "The rose is  red", "The rose is\n red"].into_iter().enumerate() {
        let choice = &choices[2 * at];
        assert_eq!(choice.tokens, [prefix, &tokenizer.encode(text).unwrap()].concat());
        assert_eq!((choice.given, choice.question), (stem.len(), at));
    }
    let error = suite.tokens(&tokenizer, vocabulary, Some(stem.len())).unwrap_err().to_string();
    assert!(error.contains("suite.jsonl, line 1: ") && error.contains("the model sees"), "{error}");
}

#[test]
fn a_model_agrees_with_itself_and_a_bad_one_does_not() {
    let model = zoo("llama_tied");
    let suite = suite();
    let settings = EvaluationSettings::default();
    let answer = |model: &Model, reference: Option<&Model>| {
        let asked = Asked::new(&suite, model, reference).unwrap();
        assert!(suite_memory(&asked, (model, reference), &settings, 0).unwrap().peak > 0);
        evaluate_suite(&suite, &asked, (model, reference), &settings, &Silent).unwrap()
    };
    let same = answer(&model, Some(&model));
    let beside = same.beside.as_ref().unwrap();
    assert_eq!((beside.agreement, beside.agreement_norm, beside.acc_difference), (1.0, 1.0, 0.0));
    assert_eq!(beside.reference, same.model);
    assert_eq!((same.questions, same.choices), (24, 72));
    let alone = answer(&model, None);
    assert_eq!((alone.beside, &alone.model), (None, &same.model));
    let two_bits = converted(&model, quantize(2, 64));
    let worse = answer(&two_bits, Some(&model)).beside.unwrap();
    assert!(worse.agreement < 1.0 && worse.agreement_stderr.unwrap() > 0.0, "{worse:?}");
    assert_eq!(worse.reference, same.model);
}
