//! What tables of evaluations show: one row for all data and one for each file.

use mlx_quant::Evaluation;
use mlx_quant::evaluate::Measures;

use super::numbers::with_error;
use super::table::Column;

/// Columns; the order in which they leave is that of what is asked least.
pub(crate) fn columns(evaluation: &Evaluation) -> Vec<Column> {
    if evaluation.total.against.is_none() {
        return vec![
            Column::words("data"),
            Column::figures("windows").leaving(2),
            Column::figures("tokens").leaving(1),
            Column::figures("perplexity"),
        ];
    }
    vec![
        Column::words("data"),
        Column::figures("windows").leaving(6),
        Column::figures("tokens").leaving(5),
        Column::figures("KL, nats/token"),
        Column::figures("top-1 agreement").leaving(11),
        Column::figures("perplexity ratio"),
        Column::figures("log difference").leaving(9),
        Column::figures("perplexity").leaving(8),
        Column::figures("reference").leaving(7),
        Column::figures("p50").leaving(1),
        Column::figures("p99").leaving(10),
        Column::figures("p99.9").leaving(4),
        Column::figures("max").leaving(3),
    ]
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
    let mut cells = vec![name.to_owned(), measures.windows.to_string(), measures.tokens.to_string()];
    let Some(against) = &measures.against else {
        cells.push(with_error(measures.perplexity, measures.perplexity_stderr, 3));
        return cells;
    };
    let percent = |share: f64| share * 100.0;
    cells.extend([
        with_error(against.kl_mean, against.kl_stderr, 5),
        format!("{} %", with_error(percent(against.top1), against.top1_stderr.map(percent), 2)),
        with_error(against.perplexity_ratio, against.perplexity_ratio_stderr, 4),
        with_error(against.log_perplexity_difference, against.log_perplexity_difference_stderr, 4),
        // Without errors: those of two perplexities cannot be compared, the one of their ratio can.
        format!("{:.3}", measures.perplexity),
        format!("{:.3}", against.reference_perplexity),
    ]);
    cells.extend(
        [against.kl_p50, against.kl_p99, against.kl_p999, against.kl_max].map(|kl| format!("{kl:.4}")),
    );
    cells
}

/// How the perplexity compares with the reference's, in a sentence; nothing without a reference.
pub(crate) fn difference(measures: &Measures) -> Option<String> {
    let against = measures.against.as_ref()?;
    let gap = against.log_perplexity_difference;
    let ratio = with_error(against.perplexity_ratio, against.perplexity_ratio_stderr, 4);
    let gap_text = with_error(gap, against.log_perplexity_difference_stderr, 4);
    let within = match against.log_perplexity_difference_stderr {
        Some(error) if gap.abs() <= 2.0 * error => ", which is within two standard errors of none",
        Some(_) => "",
        None => "; one window gives no error",
    };
    Some(format!(
        "perplexity {ratio} times the reference's (log-perplexity {}{gap_text}, paired over windows{within})",
        if gap >= 0.0 { "+" } else { "" }
    ))
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
