//! Parts of a checkpoint that see or hear, and other parts that stay as they are, told by their names.

/// Parts of a path that see or hear (`mlx_vlm/utils.py`, `skip_multimodal_module`, and what mlx-lm's wrappers drop).
pub(super) const TOWERS: [&str; 28] = [
    "aligner",
    "connector",
    "embed_tokens_extend",
    "mlp1",
    "mm_proj",
    "projector",
    "resampler",
    "vpm",
    "apm",
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

/// Whether a tensor belongs to the language model of a frame that sets it apart.
pub(super) fn is_inside(name: &str) -> bool {
    name.ends_with("lm_head")
        || name.ends_with("lm_head.weight")
        || name.split('.').take(3).any(|segment| segment == "language_model")
}

/// Whether a tensor belongs to a part that sees or hears.
pub(super) fn is_tower(name: &str) -> bool {
    const EARS_AND_EYES: [&str; 5] = ["vision", "visual", "audio", "speech", "image"];
    // What lies within a layer of the language model is its own.
    let mut outer = name.split('.').take_while(|segment| !matches!(*segment, "layers" | "h" | "blocks"));
    outer.any(|segment| {
        let lower = segment.to_ascii_lowercase();
        TOWERS.contains(&lower.as_str()) || lower.split('_').any(|word| EARS_AND_EYES.contains(&word))
    })
}

/// Whether the module at `path` stays as it is although it has a matrix: norms, routers, towers.
pub(super) fn is_kept(path: &str) -> bool {
    let last = path.rsplit('.').next().unwrap_or(path);
    let norm = last.contains("norm") || last.starts_with("ln_") || last.ends_with("_ln");
    norm || path.split('.').any(|segment| matches!(segment, "gate" | "router" | "wg")) || is_tower(path)
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
}
