//! EXAONE 3: the Llama shape under GPT-2's names. K-EXAONE: sliding layers that turn and global ones without
//! positions, DeepSeek V3's routing.

use mlx_format::checkpoint::{Config, ConfigError};

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias, BiasRule, OTHERS};
use super::deepseek::{self, Corrected, Routed};
use super::defaults::Defaults;
use super::family::Family;
use super::llama;
use super::rules::{EXPERTS, SHARED_EXPERTS, drop, drop_inv_freq, drop_tied_head, make, stack_mlp_experts};
use super::sketch::{Sketch, linears};
use crate::decoder::{Attention, Block, Branch, Decoder, Gate, Layer, Mlp, Norm, Projections, Stage};
use crate::ops::Activation;

const BIASES: &[BiasRule] = &[
    (&["q_proj", "k_proj", "v_proj", "out_proj"], Bias::If("attention_bias")),
    (&["c_fc_0", "c_fc_1", "c_proj"], Bias::If("mlp_bias")),
    (OTHERS, Bias::Never),
];

pub(super) const FAMILIES: &[Family] = &[
    Family { biases: BIASES, ..Family::new(&["exaone"], exaone, exaone_decoder) },
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 1_000_000.0, ..Defaults::LLAMA },
        biases: biases::NONE,
        ..Family::new(&["exaone_moe"], exaone_moe, exaone_moe_decoder)
    },
];

const EMBEDDING: &str = "wte";

/// Queries, keys, values, output; gate, up, down.
const LAYER: [&str; 7] = [
    "attn.attention.q_proj",
    "attn.attention.k_proj",
    "attn.attention.v_proj",
    "attn.attention.out_proj",
    "mlp.c_fc_0",
    "mlp.c_fc_1",
    "mlp.c_proj",
];

/// The number of layers, under the name that old configs give it.
fn layers(config: &Config) -> Result<usize, ConfigError> {
    config.count(if config.get("num_layers").is_some() { "num_layers" } else { "num_hidden_layers" })
}

fn exaone(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&[EMBEDDING, "lm_head"][..], &LAYER].concat();
    Ok(Architecture::with_layers("exaone", layers(source.config)?, &names)
        .rules([drop_inv_freq(), drop(r"\.attn\.attention\.rotary\.")])
        .rules(drop_tied_head(source, true)))
}

fn exaone_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::rms(path, sketch.float_or("layer_norm_epsilon", 1e-5));
    let activation = sketch.activation("activation_function", Activation::Silu)?;
    let (heads, kv_heads, head_dim) = (sketch.heads()?, sketch.kv_heads()?, sketch.head_dim()?);
    let block = |index| {
        let layer = format!("transformer.h.{index}.");
        let [q, k, v, output, gate, up, down] = linears(&layer, LAYER);
        let projections = Projections::Separate { q, k, v };
        let attention = Attention::new(heads, kv_heads, head_dim, projections, output);
        let mlp = Mlp::new(Gate::Separate { gate, up }, activation, down);
        let stages = vec![
            Stage::new(Branch::pre(norm(format!("{layer}ln_1")), Layer::Attention(attention))),
            Stage::new(Branch::pre(norm(format!("{layer}ln_2")), Layer::Mlp(mlp))),
        ];
        Block::new(layer, stages)
    };
    let blocks = (0..layers(sketch.config)?).map(block).collect();
    let mut decoder = sketch.decoder(vec![sketch.rope()?], blocks)?;
    decoder.embedding.path = format!("transformer.{EMBEDDING}");
    decoder.norm = norm("transformer.ln_f".to_owned());
    Ok(decoder)
}

fn exaone_moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&llama::linears()[..], &SHARED_EXPERTS, &EXPERTS].concat();
    Ok(Architecture::plain(source, "exaone_moe", &names)?
        .rules([
            drop(r"^mtp\."),
            make(r"^(?<x>.*\.mlp)\.e_score_correction_bias$", [("$x.gate.e_score_correction_bias", vec![])]),
            stack_mlp_experts(),
        ])
        .rules(drop_tied_head(source, false))
        .keep_dtype(&["e_score_correction_bias"]))
}

fn exaone_moe_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(4096));
    let slides = |index| sketch.is_sliding(index, false);
    let any = (0..sketch.layers()?).any(slides);
    let routed = |index| sketch.config.get("is_moe_layer").and_then(|list| list.get(index)?.as_bool());
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let sliding = slides(index);
        let attention = Attention {
            norms: Some(sketch.head_norms(layer, "q_norm", "k_norm")),
            rope: (sliding || !any).then_some(0),
            window: window.filter(|_| sliding),
            ..attention
        };
        // transformers 5 saves the same as kinds of networks.
        let network = if routed(index).or(sketch.is_dense(index).map(|dense| !dense)) == Some(false) {
            Layer::Mlp(sketch.mlp(layer)?)
        } else {
            Layer::Moe(deepseek::routed(sketch, Routed::new(Corrected::Always), layer)?)
        };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), network))
    })
}
