//! The model card, README.md of the output.

use std::fmt::Write as _;

use crate::plan::Plan;

/// Front matter as mlx-lm writes it for a local source (`mlx_lm/utils.py`, `create_model_card`), and below it
/// what was done, so that a model can be told apart later. `source` names the source, `command` the settings.
pub fn model_card(plan: &Plan, source: &str) -> String {
    let mut schemes = String::new();
    for (scheme, count) in plan.report().schemes {
        let _ = writeln!(schemes, "| {scheme} | {count} |");
    }
    format!(
        "---\nlanguage: en\nlibrary_name: mlx\npipeline_tag: text-generation\ntags:\n- mlx\n---\n\n\
         Converted from `{source}` with mlx-quant {version} (round to nearest), {bits:.3} bits per weight.\n\n\
         | stored as | tensors |\n|---|---|\n{schemes}\n\
         ```\nmlx_lm.generate --model <this directory> --prompt \"Hello\"\n```\n",
        version = env!("CARGO_PKG_VERSION"),
        bits = plan.bits_per_weight(),
    )
}
