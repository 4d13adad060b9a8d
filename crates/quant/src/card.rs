//! The model card, README.md of the output.

mod front_matter;

use std::fmt::Write as _;

use mlx_format::Mode;
use mlx_quant_model::arch::{self, Loader};

use crate::plan::{Job, Plan};
use crate::{Evaluation, Model};

/// Front matter as mlx-lm writes it for a local source (`mlx_lm/utils.py`, `create_model_card`), and below it
/// what was done, so that a model can be told apart later.
pub fn model_card(plan: &Plan, source: &Model) -> String {
    let source = Some(source);
    let searched = plan.settings.search
        && plan
            .items
            .iter()
            .any(|item| matches!(item.job, Job::Quantize { scheme, .. } if scheme.mode() == Mode::Affine));
    let how = if searched { "round to nearest, searched scales and biases" } else { "round to nearest" };
    card(plan, source, how, "")
}

/// The card of a drafter: `line` recognises the run that made it.
pub(crate) fn drafter_card(plan: &Plan, source: &Model, line: &str) -> String {
    let how = "multi-token-prediction heads, round to nearest";
    let card = card(plan, Some(source), how, "");
    let (before, _) =
        card.rsplit_once("```\n").and_then(|(rest, _)| rest.rsplit_once("```\n")).unwrap_or((&card, ""));
    format!(
        "{before}It drafts for the model that it was split from, and does not run alone:\n\n\
         ```\nmlx_vlm.generate --model <the model> --draft-model <this directory> --draft-kind mtp --prompt \"Hello\"\n```\n\n{line}\n"
    )
}

/// What was measured, by name.
pub(crate) fn quality(evaluation: &Evaluation) -> Vec<(&'static str, String)> {
    let error = |error: Option<f64>| error.map_or_else(String::new, |error| format!(" ± {error:.5}"));
    let total = &evaluation.total;
    let perplexity = format!("{:.4}{}", total.perplexity, error(total.perplexity_stderr));
    let mut rows = vec![("perplexity on held-out text", perplexity)];
    if let Some(against) = &total.against {
        let kl = format!("{:.5}{}", against.kl_mean, error(against.kl_stderr));
        let (windows, length) = (total.windows, evaluation.sequence_length);
        rows.push((KL, format!("{kl} ({windows} windows of {length} tokens)")));
        rows.push(("top-1 agreement with the source", format!("{:.4}", against.top1)));
    }
    rows
}

const KL: &str = "KL(source, this) in nats a token";
const SCHEMES: &str = "| stored as | tensors |";

/// A model card with what was measured since it was written; unchanged if it says so already or is not one of ours.
pub fn with_quality(card: &str, evaluation: &Evaluation) -> String {
    let Some((before, after)) = card.split_once(SCHEMES).filter(|_| lacks_quality(card)) else {
        return card.to_owned();
    };
    let rows = quality(evaluation).into_iter().map(|(name, value)| format!("| {name} | {value} |\n"));
    format!("{before}| | |\n|---|---|\n{}\n{SCHEMES}{after}", rows.collect::<String>())
}

/// Whether a card is one of ours that does not tell yet how close its model is to the source.
pub fn lacks_quality(card: &str) -> bool {
    card.contains(SCHEMES) && !card.contains(KL)
}

/// What front matter has from the source, and so from strangers.
const INHERITED: [&str; 5] = ["license", "license_name", "license_link", "language", "base_model"];

/// Whether a card is one of ours.
pub fn is_own_card(card: &str) -> bool {
    card.contains(SCHEMES)
}

/// The keys of a card's front matter that it has from the source.
pub fn inherited_keys(card: &str) -> Vec<&'static str> {
    let Some([_, yaml, _]) = front_matter::split(card) else { return Vec::new() };
    INHERITED.into_iter().filter(|key| front_matter::has(yaml, key)).collect()
}

/// A card whose front matter has a key no more, and nothing that means nothing without it.
pub fn without_key(card: &str, key: &str) -> String {
    let Some([before, yaml, after]) = front_matter::split(card) else { return card.to_owned() };
    let mut yaml = front_matter::without(yaml, key);
    if key == "base_model" {
        yaml = front_matter::without(&yaml, "base_model_relation");
    }
    format!("{before}{yaml}{after}")
}

/// What a model's own card says of licence and language, as lines of front matter (`mlx_lm/utils.py` keeps all of it; what names
/// other libraries, widgets and results does not hold for the quantized model).
fn inherited(source: &Model) -> String {
    const KEYS: [&str; 4] = ["license", "license_name", "license_link", "language"];
    let readme = source.checkpoint.directory().read("README.md").ok().flatten();
    let text = readme.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let Some([_, yaml, _]) = front_matter::split(&text) else { return String::new() };
    let values = front_matter::values(yaml, &KEYS);
    let lines = KEYS.iter().filter_map(|key| Some(front_matter::write(key, values.get(key)?)));
    lines.collect()
}

/// A card that says how the model was made, with a table of figures.
pub(crate) fn card(plan: &Plan, source: Option<&Model>, how: &str, table: &str) -> String {
    let report = plan.report();
    let mut schemes = String::new();
    for (scheme, count) in &report.schemes {
        let _ = writeln!(schemes, "| {scheme} | {count} |");
    }
    let mut front = source.map_or_else(String::new, inherited);
    let name = source.map_or_else(|| "a quantized model".to_owned(), Model::name);
    if !front_matter::has(&front, "language") {
        front.insert_str(0, "language: en\n");
    }
    let (mut of, mut from) = (String::new(), format!("`{name}`"));
    if let Some((id, commit)) = source.and_then(Model::hub_id) {
        let quantized = plan.items.iter().any(|item| matches!(item.job, Job::Quantize { .. }));
        let relation = if quantized { "base_model_relation: quantized\n" } else { "" };
        of = format!("base_model: {id}\n{relation}");
        from = format!("[{id}](https://huggingface.co/{id}) (commit `{commit}`)");
    }
    // A model that sees or hears is run by mlx-vlm, and as a language model by mlx-lm.
    let (task, seen, run) = if plan.towers.tensors > 0 {
        let language = plan.language_bits_per_weight();
        let size = crate::numbers::bytes(plan.towers.bytes);
        let seen = format!(
            "Vision and audio are kept as they were ({size}); without them it has {language:.3} bits per weight.\n\n"
        );
        let run =
            "mlx_vlm.generate --model <this directory> --image <file> --prompt \"Describe this image.\"\n";
        ("image-text-to-text", seen, run)
    } else {
        ("text-generation", String::new(), "")
    };
    // What a text alone is given to.
    let text = match arch::loader(&plan.config) {
        Loader::MlxLm => "mlx_lm.generate --model <this directory> --prompt \"Hello\"\n",
        Loader::MlxVlm => "",
    };
    let heads = match plan.prediction_heads {
        0 => String::new(),
        _ if plan.drafter.is_some() => {
            "Its multi-token-prediction head is in a directory of its own, which has this one's name with `-mtp` behind it.\n\n"
                .to_owned()
        }
        count => format!(
            "Its multi-token-prediction head ({count} tensors) is left out: mlx_lm predicts a token at a time.\n\n"
        ),
    };
    format!(
        "---\n{front}library_name: mlx\npipeline_tag: {task}\n{of}tags:\n- mlx\n---\n\n\
         Converted from {from} with mlx-quant {version} ({how}), {bits:.3} bits per weight.\n\n\
         {seen}{heads}{table}{SCHEMES}\n|---|---|\n{schemes}\n\
         ```\n{run}{text}```\n",
        version = env!("CARGO_PKG_VERSION"),
        bits = plan.bits_per_weight(),
    )
}
