//! GPT-2: its `Conv1D` weights are stored `[in, out]`, its names have no `model.` prefix, its head is tied.

use mlx_format::checkpoint::{Config, ConfigError};

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias};
use super::family::Family;
use super::keys::first_width;
use super::rules::{drop, make};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Block, Branch, Decoder, Embedding, Gate, Head, Layer, Mlp, Norm, Projections, Stage,
};
use crate::ops::Activation;
use crate::view::Step;

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: biases::ALL,
    norm_bias: Bias::Always,
    inner_width,
    lengths: &[(&[POSITIONS], &["n_positions", "max_position_embeddings"])],
    ..Family::new(&["gpt2"], gpt2, decoder)
}];

const EMBEDDING: &str = "wte";
const POSITIONS: &str = "wpe";

/// Queries, keys and values in one, output; the two linears of the network.
const LAYER: [&str; 4] = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"];

fn gpt2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&[EMBEDDING, POSITIONS][..], &LAYER].concat();
    let architecture = Architecture::with_layers("gpt2", source.config.count("n_layer")?, &linears);
    Ok(Architecture {
        prefixes: vec![("model.", "model."), ("transformer.", "model."), ("", "model.")],
        ..architecture.rules([
            drop(r"\.attn\.(bias|masked_bias)$"),
            drop(r"^model\.lm_head\.weight$"),
            make(
                r"^(?<x>model\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight)$",
                // A checkpoint that already carries the prefix was written by MLX and is transposed.
                [("$x", if source.any_name_is_prefixed() { vec![] } else { vec![Step::Transpose] })],
            ),
        ])
    })
}

/// Four times the hidden size where config.json says nothing.
fn inner_width(config: &Config) -> Result<Option<usize>, ConfigError> {
    let found = first_width(config, &["n_inner"])?;
    Ok(found.or(first_width(config, &["n_embd"])?.map(|width| width.saturating_mul(4))))
}

impl Source<'_> {
    fn any_name_is_prefixed(&self) -> bool {
        self.tensors.keys().any(|name| name.starts_with("model."))
    }
}

/// Learned positions, layer norms, tied head.
fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
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
        let [qkv, output, first, second] = linears(&layer, LAYER);
        let projections = Projections::Concatenated(qkv);
        let attention = Attention {
            rope: None,
            scale: score_scale(index),
            ..Attention::new(heads, heads, hidden_size / heads, projections, output)
        };
        let mlp = Mlp::new(Gate::None(first), activation, second);
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
            path: format!("model.{EMBEDDING}"),
            positions: Some(format!("model.{POSITIONS}")),
            multiplier: 1.0,
            per_layer: None,
        },
        streams: None,
        ropes: Vec::new(),
        blocks: (0..sketch.count("n_layer")?).map(block).collect(),
        norm: norm("model.ln_f".to_owned()),
        head: Head { linear: None, multiplier: 1.0, softcap: None },
    })
}
