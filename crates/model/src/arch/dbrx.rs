//! DBRX: one matrix for queries, keys and values, whose results are clipped; experts of all layers in one tensor in the
//! hub's form, and one by one in MLX's.

use mlx_format::checkpoint::ConfigError;
use serde_json::Value;

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias};
use super::family::{ExpertWidths, Family};
use super::keys::{MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, at_most, undescribed, wrong};
use super::rules::make;
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Block, Branch, Decoder, Embedding, Experts, Head, Layer, Linear, Moe, Norm, Projections, Rope,
    Router, Stage,
};
use crate::ops::Activation;
use crate::view::Step;

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: biases::NONE,
    norm_bias: Bias::Never,
    experts: ExpertWidths { expert: &[WIDTH], ..ExpertWidths::USUAL },
    ..Family::new(&["dbrx"], dbrx, decoder)
}];

const WIDTH: &str = "ffn_config.ffn_hidden_size";
const COUNT: &str = "ffn_config.moe_num_experts";

/// Queries, keys and values in one, output, and what chooses experts.
const LAYER: [&str; 3] = ["norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj", "ffn.router.layer"];

/// Of an expert: gate, up, down.
const EXPERT: [&str; 3] = ["w1", "v1", "w2"];

fn dbrx(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let experts = ["ffn.experts.#.w1", "ffn.experts.#.v1", "ffn.experts.#.w2"];
    let linears = [&["wte", "lm_head"][..], &LAYER, &experts].concat();
    let layers = source.config.count("n_layers")?;
    let fused = source.tensors.keys().any(|name| name.contains(".experts.mlp."));
    let (width, count) = if fused {
        (source.config.count(WIDTH)?, at_most(MOST_EXPERTS, COUNT, source.config.count(COUNT)?)?)
    } else {
        (0, 0)
    };
    if fused && (width == 0 || count == 0) {
        return Err(wrong(if width == 0 { WIDTH } else { COUNT }, "is 0"));
    }
    let split = |name: &str| {
        let one = |expert: usize| {
            let rows = Step::Rows { start: expert * width, count: width, of: count * width };
            let steps = if name == "w2" { vec![rows, Step::Transpose] } else { vec![rows] };
            (format!("$x.{expert}.{name}.weight"), steps)
        };
        make(&format!(r"^(?<x>.*\.experts)\.mlp\.{name}$"), (0..count).map(one))
    };
    let rules = fused.then(|| EXPERT.map(split));
    Ok(Architecture::with_layers("dbrx", layers, &linears).rules(rules.into_iter().flatten()))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let (hidden_size, layers) =
        (sketch.count("d_model")?, at_most(MOST_LAYERS, "n_layers", sketch.count("n_layers")?)?);
    let heads = at_most(MOST_HEADS, "n_heads", sketch.count("n_heads")?)?;
    let kv_heads = sketch.count_or("attn_config.kv_n_heads", 1)?;
    let head_dim = hidden_size / heads;
    if kv_heads == 0 || heads % kv_heads != 0 || head_dim == 0 {
        let reason = format!("is {kv_heads}, with {heads} heads and {hidden_size} features");
        return Err(wrong("attn_config.kv_n_heads", &reason));
    }
    let clip = sketch.float("attn_config.clip_qkv").map(|most| most as f32);
    let activation = sketch.config.get("ffn_config.ffn_act_fn").and_then(|activation| activation.get("name"));
    if activation.is_some_and(|name| name != "silu") {
        return Err(undescribed("ffn_config.ffn_act_fn", "is another activation than silu"));
    }
    let count = at_most(MOST_EXPERTS, COUNT, sketch.count(COUNT)?)?;
    at_most(16 * MOST_EXPERTS, COUNT, layers * count)?;
    let top_k = sketch.top_k("ffn_config.moe_top_k", count)?;
    // mlx-lm divides by the sum in any case; null is transformers' word for no division.
    let said = sketch.config.0.get("ffn_config").and_then(|ffn| ffn.get("moe_normalize_expert_weights"));
    let renormalize = match said.map(Value::as_f64) {
        Some(None) => None,
        None | Some(Some(1.0)) => Some(0.0),
        Some(Some(power)) => {
            let reason = format!("is {power}: weights are divided by another norm than their sum");
            return Err(undescribed("ffn_config.moe_normalize_expert_weights", &reason));
        }
    };
    let norm = |path: String| Norm::layer(path, 1e-5);
    let block = |index: usize| {
        let layer = format!("transformer.blocks.{index}.");
        let [qkv, output, router] = linears(&layer, LAYER);
        let projections = Projections::Concatenated(qkv);
        let attention = Attention { clip, ..Attention::new(heads, kv_heads, head_dim, projections, output) };
        let expert =
            |number: usize| Sketch::gated(&format!("{layer}ffn.experts.{number}."), EXPERT, Activation::Silu);
        let moe = Moe {
            latent: None,
            router: Router { renormalize, ..Router::new(router, top_k) },
            experts: Experts::Apart((0..count).map(expert).collect()),
            shared: None,
        };
        let before = |name: &str| norm(format!("{layer}norm_attn_norm.{name}"));
        let stages = vec![
            Stage::new(Branch::pre(before("norm_1"), Layer::Attention(attention))),
            Stage::new(Branch::pre(before("norm_2"), Layer::Moe(moe))),
        ];
        Block::new(layer, stages)
    };
    Ok(Decoder {
        hidden_size,
        vocabulary: sketch.count("vocab_size")?,
        embedding: Embedding {
            path: "transformer.wte".to_owned(),
            positions: None,
            multiplier: 1.0,
            per_layer: None,
        },
        streams: None,
        ropes: vec![Rope::plain(sketch.float_or("attn_config.rope_theta", 10000.0), head_dim)],
        blocks: (0..layers).map(block).collect(),
        norm: norm("transformer.norm_f".to_owned()),
        head: Head { linear: Some(Linear::new("lm_head")), multiplier: 1.0, softcap: None },
    })
}
