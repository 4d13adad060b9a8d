//! docs/architectures.md is what the registry says. `MLX_QUANT_UPDATE=1 cargo test -p mlx-quant --test architectures` writes it anew.

use std::fmt::Write as _;
use std::path::Path;

use mlx_quant::model::arch::{self, Loader};

/// Types whose checkpoints are in the zoo or among the seeds, whose logits are compared with their makers' own definition.
const PROVEN: [&str; 72] = [
    "afmoe",
    "apertus",
    "bailing_hybrid",
    "bailing_moe",
    "bailing_moe_linear",
    "cohere2",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone",
    "exaone4",
    "exaone_moe",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "gemma3n",
    "gemma4_text",
    "glm4",
    "glm4_moe",
    "glm_moe_dsa",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "helium",
    "hunyuan",
    "hunyuan_v1_dense",
    "internlm2",
    "internlm3",
    "kimi_linear",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "llama",
    "llama4",
    "mamba2",
    "mimo",
    "mimo_v2_flash",
    "minicpm",
    "minicpm3",
    "minimax_m2",
    "ministral3",
    "mistral",
    "mistral4",
    "mixtral",
    "muse_glimmer",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "step3p5",
];

/// What holds for some types only.
fn note(model_type: &str) -> &'static str {
    match model_type {
        "gemma4_text" => "per-layer inputs are kept as the command line says",
        "gemma3n" => "vision and audio are kept; what mixes the streams is rounded to nearest",
        "kimi_linear" => "matrices between the heads are not trained by dwq",
        "dbrx" => "weights of experts are divided by their sum where config.json does not deny it",
        "deepseek_v2" | "deepseek_v3" | "kimi_k2" | "joyai_llm_flash" | "glm4_moe_lite" | "mistral4" => {
            "the hub's fp8 is decoded; matrices between the heads are not trained by dwq"
        }
        "deepseek_v32" | "glm_moe_dsa" => {
            "as deepseek_v3, in windows of up to index_topk tokens; matrices of the indexer keep 8 bits in methods that look at text"
        }
        "minimax_m2" | "mimo_v2_flash" => "the hub's fp8 is decoded",
        "ernie4_5_moe" => "the correction of its router is left out, as mlx-lm leaves it out",
        "bailing_moe" | "bailing_moe_linear" => "models whose head is normed (norm_head) are refused",
        "bailing_hybrid" => "the third generation, which goes by the same name: convert only",
        "nemotron_h" => "as in transformers time steps are at least time_step_min",
        "hunyuan" => "layers that share keys and values (use_cla): convert only",
        "gpt_oss" => {
            "experts come packed as mxfp4: taken over as they are by convert, left alone by awq and gptq"
        }
        "olmo" => "the form of Ai2's own package; by reading, mlx-lm needs that package to run it",
        "falcon_h1" => "its multipliers become part of the weights; the keys' too, which mlx-lm forgets",
        "gpt2" => "the table of positions is not trained by dwq",
        _ => "",
    }
}

fn page() -> String {
    let mut text = String::from(
        "# Architectures\n\n\
         Generated from the registry (`crates/model/src/arch/mod.rs`) by `crates/quant/tests/architectures.rs`.\n\n\
         *proven*: logits of a checkpoint are compared with the model's own definition (transformers, or mlx-lm where that defines it), and\n\
         what every method writes is loaded strictly by mlx-lm. *convert proven*: every tensor that mlx_lm.convert writes for a small checkpoint is\n\
         compared (`crates/quant/tests/rules.rs`). *described*: the same code under another name.\n\n\
         | model type | convert | eval | awq | gptq | dynamic | dwq | | note |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    let (mut types, mut decoders) = (0, 0);
    let mut described: Vec<(&str, bool)> = arch::described()
        .flat_map(|(types, decoder)| types.iter().map(move |model_type| (*model_type, decoder)))
        .collect();
    described.sort_unstable();
    for (model_type, decoder) in described {
        types += 1;
        decoders += usize::from(decoder);
        let yes = if decoder { "yes" } else { "no" };
        let proven = match decoder {
            _ if PROVEN.contains(&model_type) => "proven",
            false if model_type != "olmo" => "convert proven",
            _ => "described",
        };
        let _ = writeln!(
            text,
            "| `{model_type}` | yes | {yes} | {yes} | {yes} | {yes} | {yes} | {proven} | {} |",
            note(model_type)
        );
    }
    text.push_str(
        "\nModels that see or hear around one of these: the language model is converted in mlx-lm's names, and evaluated and calibrated\n\
         as what it is described as. What sees and hears is kept in mlx-vlm's layout where the last column says so, and dropped elsewhere. Of some types mlx-lm has no model:\n\
         mlx-vlm alone loads what is written.\n\n\
         | model type | `text_config.model_type` | described as | vision and audio |\n|---|---|---|---|\n",
    );
    let quoted = |types: &[&str]| types.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    for wrapped in arch::wrapped() {
        let towers = match (wrapped.keeps_towers, wrapped.loader) {
            (true, Loader::MlxLm) => "kept",
            (true, Loader::MlxVlm) => "kept; mlx-vlm alone",
            (false, _) => "dropped",
        };
        for (types, family) in wrapped.inside {
            let (around, inside) = (quoted(wrapped.types), quoted(types));
            let _ = writeln!(text, "| {around} | {inside} | `{family}` | {towers} |");
        }
    }
    text.push_str(
        "\nMulti-token-prediction heads that `--mtp` keeps, as a drafter that mlx-vlm loads (docs/formats.md):\n\n\
         | model type | drafter |\n|---|---|\n",
    );
    for (types, drafter) in arch::drafters() {
        let _ = writeln!(text, "| {} | `{drafter}` |", quoted(types));
    }
    let _ = write!(
        text,
        "\n{types} model types, {decoders} of them with their decoder. Any other type converts by its tensor names (two-dimensional weights that are\n\
         neither norms nor routers are quantized), with a warning; the methods that look at text refuse it. Their vision parts are dropped,\n\
         as mlx-lm drops them; what mlx-lm runs in no form is refused.\n\n\
         Bits 2, 3, 4, 5, 6 and 8 and groups of 32, 64 and 128 for all methods; mxfp4, mxfp8 and nvfp4 for `convert`, and for single layers of the others\n\
         by a recipe file.\n"
    );
    text
}

#[test]
fn the_page_is_what_the_registry_says() {
    for name in PROVEN {
        assert!(arch::described().any(|(types, _)| types.contains(&name)), "{name} is not described");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/architectures.md");
    let page = page();
    if std::env::var_os("MLX_QUANT_UPDATE").is_some() {
        std::fs::write(&path, &page).expect("docs can be written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == page,
        "docs/architectures.md is old; MLX_QUANT_UPDATE=1 cargo test -p mlx-quant --test architectures"
    );
}
