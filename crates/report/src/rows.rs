//! What tables of evaluations show: one row for all data and one for each file.

use mlx_quant::Evaluation;
use mlx_quant::evaluate::Measures;

use super::numbers::with_error;

/// Heads of the columns.
pub(crate) fn heads(evaluation: &Evaluation) -> Vec<&'static str> {
    let mut heads = vec!["data", "windows", "tokens", "perplexity"];
    if evaluation.total.against.is_some() {
        heads.extend(["reference", "KL, nats/token", "p50", "p99", "p99.9", "max", "top-1 agreement"]);
    }
    heads
}

/// Cells of all rows.
pub(crate) fn rows(evaluation: &Evaluation) -> Vec<Vec<String>> {
    let name = match evaluation.sources.as_slice() {
        [only] => only.name.as_str(),
        _ => "all",
    };
    let mut rows = vec![row(name, &evaluation.total)];
    rows.extend(evaluation.by_source.iter().map(|source| row(&source.name, &source.measures)));
    rows
}

fn row(name: &str, measures: &Measures) -> Vec<String> {
    let mut cells = vec![
        name.to_owned(),
        measures.windows.to_string(),
        measures.tokens.to_string(),
        with_error(measures.perplexity, measures.perplexity_stderr, 3),
    ];
    if let Some(against) = &measures.against {
        cells.push(format!("{:.3}", against.reference_perplexity));
        cells.push(with_error(against.kl_mean, against.kl_stderr, 5));
        cells.extend(
            [against.kl_p50, against.kl_p99, against.kl_p999, against.kl_max].map(|kl| format!("{kl:.4}")),
        );
        let percent = |share: f64| share * 100.0;
        cells.push(format!("{} %", with_error(percent(against.top1), against.top1_stderr.map(percent), 2)));
    }
    cells
}

/// What was evaluated, in a line.
pub(crate) fn title(evaluation: &Evaluation) -> String {
    let subject = &evaluation.subject;
    let mut title = format!("{} ({:.3} bits per weight)", subject.model, subject.bits_per_weight);
    if let Some(reference) = &subject.reference {
        title.push_str(" against ");
        title.push_str(reference);
    }
    title
}
