//! Model types without a description: names stay as they are, and shapes tell which weights are linears.
//!
//! That is right for most dense models and wrong for others, so what is known to end badly is listed here and refused before any
//! work, and nothing is promised of the rest. The facts about mlx-lm are those of version 0.32.2, measured by converting a small
//! checkpoint of each type with both programs.

use super::{Architecture, Linears, Rule, Source, drop, drop_tied_head};
use crate::{View, known};

/// Parts of a path that see or hear (`mlx_vlm/utils.py`, `skip_multimodal_module`, and what mlx-lm's wrappers drop).
const TOWERS: [&str; 20] = [
    "aligner",
    "audio_model",
    "audio_tower",
    "embed_audio",
    "embed_vision",
    "img_projector",
    "mm_projector",
    "multi_modal_projector",
    "patch_merge_mlp",
    "sam_model",
    "speech_encoder",
    "vision",
    "vision_adapter",
    "vision_embed_tokens",
    "vision_embedder",
    "vision_model",
    "vision_projection",
    "vision_tower",
    "visual",
    "vl_connector",
];

/// Parts of a name that adapters, quantizers and trainings leave beside a model's own weights.
const LEFTOVERS: [&str; 12] = [
    "base_layer",
    "exp_avg",
    "exp_avg_sq",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "modules_to_save",
    "optimizer",
    "original_module",
    "SCB",
];

/// Types whose model in mlx-lm stacks numbered experts as it loads, scales and biases too.
const STACKS_PACKED_EXPERTS: [&str; 19] = [
    "afmoe",
    "bailing_moe",
    "bailing_moe_linear",
    "deepseek",
    "deepseek_v32",
    "dots1",
    "exaone_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "hunyuan",
    "jamba",
    "kimi_k25",
    "kimi_k3",
    "laguna",
    "longcat_flash",
    "mimo_v2_flash",
    "olmoe",
    "phixtral",
    "solar_open",
];

/// Types that mlx-lm does not load, or not rightly, once they were quantized by tensor names, and why.
const DO_NOT_LOAD: [(&str, &str); 15] = [
    ("Klear", "it stacks experts by their weights alone, scales stay over"),
    ("afm7", "it cannot quantize this type itself"),
    ("baichuan_m1", "it leaves out the norm of the head's rows once they are packed"),
    ("bailing_hybrid", "it stops at a packed kv_b_proj"),
    ("bailing_moe_v3", "it stops at a packed kv_b_proj"),
    ("bitnet", "its linears are packed in a form of their own"),
    ("ernie4_5_moe", "it stacks experts by their weights alone, scales stay over"),
    ("falcon_h1", "it multiplies packed words as if they were weights"),
    ("granitemoehybrid", "it splits networks by their weights alone, scales stay over"),
    ("kimi_linear", "it renames experts by their weights alone, scales stay over"),
    ("lfm2-vl", "it has no name for these weights"),
    ("lfm2_moe", "it renames experts by their weights alone, scales stay over"),
    ("longcat_flash_ngram", "it renames a packed embedding by its weight alone"),
    ("muse_spark", "it quantizes nothing but some experts"),
    ("nemotron_h", "it renames experts by their weights alone, scales stay over"),
];

/// mlx-lm's one model of an undescribed type that has a use for its tower.
const SEES: &str = "muse_spark";

/// Why a tensor must not be quantized by its name alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// One expert's matrix of several, which mlx-lm wants in one tensor.
    NumberedExpert,
    /// Matrices stacked in one tensor, which would stay unquantized.
    Stacked,
}

pub(super) fn architecture(source: Source<'_>) -> Architecture {
    let highest = source.tensors.keys().filter_map(|name| {
        let mut segments = name.split('.');
        segments.find(|segment| matches!(*segment, "layers" | "h" | "blocks"))?;
        segments.next()?.parse::<usize>().ok()
    });
    let layers =
        source.config.count("num_hidden_layers").ok().or_else(|| highest.max().map(|layer| layer + 1));
    Architecture {
        family: "by tensor names",
        described: false,
        layers: layers.unwrap_or(0),
        prefixes: Vec::new(),
        rules: drop_tied_head(source, false).into_iter().chain(drop_towers(source)).collect(),
        linears: Linears::ByShape,
        protected: Vec::new(),
        keep_dtype: vec!["e_score_correction_bias", "A_log"],
        tied_without_head: false,
    }
}

/// mlx-lm runs the language model of its wrappers alone, and drops the rest as it loads.
fn drop_towers(source: Source<'_>) -> Option<Rule> {
    let model_type =
        source.config.model_type().ok().filter(|name| known::model_type(name) && *name != SEES)?;
    let config = &source.config.0;
    let wraps = ["text_config", "vision_config", "audio_config"].iter().any(|key| config.contains_key(*key));
    let wraps = wraps || model_type.contains("vl") || model_type.contains("llava");
    wraps.then(|| drop(&format!(r"^(model\.)?({})\.", TOWERS.join("|"))))
}

/// Whether a tensor belongs to a part that sees or hears.
pub fn is_tower(name: &str) -> bool {
    let own = name.strip_prefix("model.").unwrap_or(name);
    own.split('.').next().is_some_and(|segment| TOWERS.contains(&segment))
}

/// Whether the module at `path` stays as it is although it has a matrix: norms, routers, towers.
pub(super) fn is_kept(path: &str) -> bool {
    let last = path.rsplit('.').next().unwrap_or(path);
    let norm = last.contains("norm") || last.starts_with("ln_") || last.ends_with("_ln");
    norm || path.split('.').any(|segment| matches!(segment, "gate" | "router" | "wg")) || is_tower(path)
}

/// Whether a name says that its tensor is none of a model's own weights.
pub(crate) fn is_leftover(name: &str) -> bool {
    name.split('.').any(|segment| LEFTOVERS.contains(&segment))
}

/// Why mlx-lm does not load this type after it was quantized by tensor names, where that is known.
pub fn obstacle(model_type: &str) -> Option<&'static str> {
    DO_NOT_LOAD.iter().find(|(name, _)| *name == model_type).map(|(_, why)| *why)
}

/// What would go wrong with a tensor of a type without a description if the model were quantized.
pub fn unfit(model_type: &str, name: &str, view: &View) -> Option<Unfit> {
    let shape = view.shape();
    if is_tower(name) || shape.len() < 2 {
        return None;
    }
    let segments: Vec<&str> = name.split('.').collect();
    let expert =
        segments.iter().position(|segment| matches!(*segment, "experts" | "expert" | "local_experts"));
    let numbered = expert.is_some_and(|at| {
        segments.get(at + 1).is_some_and(|next| next.bytes().all(|byte| byte.is_ascii_digit()))
    });
    if numbered {
        return (!STACKS_PACKED_EXPERTS.contains(&model_type)).then_some(Unfit::NumberedExpert);
    }
    // The kernel of a convolution is short, or it has one channel; matrices are neither.
    let matrices = shape.len() == 3 && shape[1..].iter().all(|axis| *axis >= 16) && !name.contains("conv");
    let bias = segments.last().is_some_and(|last| last.contains("bias"));
    let unnamed = expert.is_some() && segments.last().is_some_and(|last| *last != "weight") && !bias;
    (matrices || unnamed).then_some(Unfit::Stacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_segment_tells_a_router() {
        for path in [
            "model.layers.0.mlp.gate",
            "layers.3.router.proj",
            "model.layers.1.mlp.router.classifier",
            "x.gate.wg",
        ] {
            assert!(is_kept(path), "{path}");
        }
        for path in [
            "model.layers.0.mlp.gate_proj",
            "model.layers.0.self_attn.q_proj",
            "lm_head",
            "model.visualize.x",
        ] {
            assert!(!is_kept(path), "{path}");
        }
    }

    #[test]
    fn towers_are_told_by_their_first_segment() {
        for name in [
            "vision_tower.a.weight",
            "model.visual.blocks.0.x",
            "model.embed_audio.weight",
            "mm_projector.0.weight",
        ] {
            assert!(is_tower(name), "{name}");
        }
        for name in [
            "language_model.model.layers.0.vision.weight",
            "model.layers.0.visual.weight",
            "model.embed_tokens.weight",
        ] {
            assert!(!is_tower(name), "{name}");
        }
    }

    #[test]
    fn leftovers_are_whole_segments() {
        assert!(
            is_leftover("model.layers.0.q_proj.lora_A.default.weight")
                && is_leftover("model.layers.0.q_proj.SCB")
        );
        assert!(
            !is_leftover("model.layers.0.attn.lora.2.weight") && !is_leftover("model.base_layers.weight")
        );
    }
}
