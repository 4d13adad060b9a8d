//! GPT-2: its `Conv1D` weights are stored `[in, out]`, its names have no `model.` prefix, its head is tied.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Linears, Sketch, Source, Step, drop, make};
use crate::decoder::{
    Attention, Block, Branch, Decoder, Embedding, Gate, Head, Layer, Linear, Mlp, Norm, Projections, Stage,
};
use crate::ops::Activation;

pub(super) fn gpt2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(Architecture {
        family: "gpt2",
        described: true,
        layers: source.config.count("n_layer")?,
        prefixes: vec![("model.", "model."), ("transformer.", "model."), ("", "model.")],
        rules: vec![
            drop(r"\.attn\.(bias|masked_bias)$"),
            drop(r"^model\.lm_head\.weight$"),
            make(
                r"^(?<x>model\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight)$",
                // A checkpoint that already carries the prefix was written by MLX and is transposed.
                [("$x", if source.any_name_is_prefixed() { vec![] } else { vec![Step::Transpose] })],
            ),
        ],
        linears: Linears::Named(vec!["wte", "wpe", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        protected: Vec::new(),
        keep_dtype: Vec::new(),
        tied_without_head: false,
        framed: false,
    })
}

impl Source<'_> {
    fn any_name_is_prefixed(&self) -> bool {
        self.tensors.keys().any(|name| name.starts_with("model."))
    }
}

/// Learned positions, layer norms, tied head.
pub(super) fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::layer(path, sketch.float_or("layer_norm_epsilon", 1e-5));
    let activation = sketch.activation("activation_function", Activation::GeluTanh)?;
    let (hidden_size, heads) = (sketch.count("n_embd")?, sketch.count("n_head")?);
    // Flags of some models of the family, which mlx-lm does not know.
    let scaled = sketch.config.bool("scale_attn_weights", true);
    let by_layer = sketch.config.bool("scale_attn_by_inverse_layer_idx", false);
    let score_scale = |index: usize| {
        let scale = if scaled { ((hidden_size / heads) as f64).powf(-0.5) } else { 1.0 };
        if by_layer { scale / (index + 1) as f64 } else { scale }
    };
    let block = |index| {
        let layer = format!("model.h.{index}.");
        let linear = |name: &str| Linear::new(format!("{layer}{name}"));
        let projections = Projections::Concatenated(linear("attn.c_attn"));
        let attention = Attention {
            rope: None,
            scale: score_scale(index),
            ..Attention::new(heads, heads, hidden_size / heads, projections, linear("attn.c_proj"))
        };
        let mlp = Mlp { gate: Gate::None(linear("mlp.c_fc")), activation, down: linear("mlp.c_proj") };
        let stages = vec![
            Stage::new(Branch::pre(norm(format!("{layer}ln_1")), Layer::Attention(attention))),
            Stage::new(Branch::pre(norm(format!("{layer}ln_2")), Layer::Mlp(mlp))),
        ];
        Block::new(layer, stages)
    };
    Ok(Decoder {
        hidden_size,
        vocabulary: sketch.count("vocab_size")?,
        embedding: Embedding {
            path: "model.wte".to_owned(),
            positions: Some("model.wpe".to_owned()),
            multiplier: 1.0,
            per_layer: None,
        },
        ropes: Vec::new(),
        blocks: (0..sketch.count("n_layer")?).map(block).collect(),
        norm: norm("model.ln_f".to_owned()),
        head: Head { linear: None, multiplier: 1.0, softcap: None },
    })
}
