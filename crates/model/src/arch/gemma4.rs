//! Gemma 4, text: per-layer inputs beside the decoder, upper layers that share keys and values with lower
//! ones, and experts fused in one tensor.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::family::Family;
use super::gemma;
use super::keys::wrong;
use super::llama;
use super::rules::{ATTENTION, MLP, drop, drop_in_layers, drop_tied_head, gated, make};
use super::sketch::{self, Sketch};
use crate::decoder::{
    Attention, Branch, Decoder, Experts, HeadNorms, Layer, Linear, Moe, Norm, PerLayerInputs, Projections,
    Router, RouterNorm, Scores, Stage,
};
use crate::ops::Activation;
use crate::view::Step;

/// Upper layers without keys of their own where the config says nothing; mlx-lm's default.
const SHARED_LAYERS: usize = 20;

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: gemma::DEFAULTS,
    biases: biases::NONE,
    widened_by: Some("use_double_wide_mlp"),
    lengths: &[(&["embed_tokens_per_layer"], &["vocab_size_per_layer_input"])],
    ..Family::new(&["gemma4_text"], gemma4_text, decoder)
}];

const TABLE: &str = "embed_tokens_per_layer";
const EXPERTS: [&str; 3] = gated!("switch_glu");
const MODEL_PROJECTION: &str = "per_layer_model_projection";

/// Of each layer: what gates its own input, and what brings that into the residual stream.
const INPUTS: [&str; 2] = ["per_layer_input_gate", "per_layer_projection"];

fn gemma4_text(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears =
        [&llama::linears()[..], &[TABLE, MODEL_PROJECTION, "router.proj"], &INPUTS, &EXPERTS].concat();
    let architecture = Architecture::plain(source, "gemma4", &linears)?;
    let shared = source.config.count("num_kv_shared_layers").unwrap_or(SHARED_LAYERS);
    let layers = architecture.layers;
    let drop_shared = drop_in_layers(
        r"layers\.(?<l>\d+)\.self_attn\.(k_proj|v_proj|k_norm)\b",
        layers.saturating_sub(shared)..layers,
    );
    Ok(architecture
        .rules([drop(r"self_attn\.rotary_emb|input_max|input_min|output_max|output_min"), drop_shared])
        .rules([
            make(
                r"^(?<x>.*\.experts)\.gate_up_proj$",
                [
                    ("$x.switch_glu.gate_proj.weight", vec![Step::HalfOfRows(false)]),
                    ("$x.switch_glu.up_proj.weight", vec![Step::HalfOfRows(true)]),
                ],
            ),
            make(r"^(?<x>.*\.experts)\.down_proj$", [("$x.switch_glu.down_proj.weight", vec![])]),
        ])
        .rules(drop_tied_head(source, true))
        .protect(&["router.proj"]))
}

/// Experts beside the network of a layer, whose router norms the residual stream itself.
fn experts(sketch: Sketch<'_>, layer: &str, activation: Activation) -> Result<Moe, ConfigError> {
    let count = sketch.count("num_experts")?;
    let norm = RouterNorm {
        scale: format!("{layer}router.scale"),
        multiplier: (sketch.count("hidden_size")? as f64).powf(-0.5),
        epsilon: sketch.rms("").epsilon,
    };
    Ok(Moe {
        router: Router {
            norm: Some(norm),
            scores: Scores::SoftmaxOfChosen,
            expert_scale: Some(format!("{layer}router.per_expert_scale")),
            ..Router::new(Linear::new(format!("{layer}router.proj")), sketch.top_k("top_k_experts", count)?)
        },
        latent: None,
        experts: Experts::Stacked {
            count,
            mlp: Sketch::gated(&format!("{layer}experts."), EXPERTS, activation),
        },
        shared: None,
    })
}

/// The E-models, the dense ones, and those with experts beside the network of each layer.
fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let (routed, keys_as_values) =
        (sketch.config.bool("enable_moe_block", false), sketch.config.bool("attention_k_eq_v", false));
    let (layers, hidden_size) = (sketch.layers()?, sketch.count("hidden_size")?);
    let own = layers.saturating_sub(sketch.count_or("num_kv_shared_layers", SHARED_LAYERS)?);
    let slides =
        |index: usize| sketch.is_sliding(index, !(index + 1).is_multiple_of(6) && index + 1 != layers);
    sketch.causal()?;
    // transformers 5 saves it as the difference of one layer, under a number with zeros in front.
    let by_layer = sketch.config.get("per_layer_config").and_then(serde_json::Value::as_object);
    let differing = by_layer.into_iter().flatten().find_map(|(_, layer)| layer.get("head_dim")?.as_u64());
    let global_head_dim = match differing {
        Some(head_dim) => head_dim as usize,
        None => sketch.count_or("global_head_dim", 512)?,
    };
    let head_dim = |sliding: bool| if sliding { sketch.head_dim() } else { Ok(global_head_dim) };
    let rope = |kind, sliding, theta| sketch.rope_for(Some(kind), head_dim(sliding)?, 1.0, theta);
    let ropes = vec![rope("full_attention", false, 1e6)?, rope("sliding_attention", true, 10000.0)?];
    let activation = sketch.activation("hidden_activation", Activation::GeluTanh)?;
    let width = sketch.count_or("hidden_size_per_layer_input", 0)?;
    let window = sketch.window_or(Some(512));
    let mut decoder = sketch.llama_with(ropes, |layer, index, _| {
        let [q, k, v, output] = sketch::linears(layer, ATTENTION);
        let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
        let sliding = slides(index);
        let head_dim = head_dim(sliding)?;
        let keys_as_values = keys_as_values && !sliding;
        let kv_heads = match sketch.config.get("num_global_key_value_heads") {
            Some(_) if keys_as_values => sketch.count("num_global_key_value_heads")?,
            _ => sketch.kv_heads()?,
        };
        if sketch.heads()? % kv_heads != 0 {
            return Err(wrong("num_global_key_value_heads", "does not divide the number of heads"));
        }
        let source = (0..own).rev().find(|&earlier| slides(earlier) == sliding);
        let projections = match source {
            Some(block) if index >= own => Projections::Shared { q, block, unread: None },
            _ if keys_as_values => Projections::KeysAsValues { q, k },
            _ => Projections::Separate { q, k, v },
        };
        let norms = HeadNorms {
            v: Some(Norm { path: None, ..norm("") }),
            ..sketch.head_norms(layer, "q_norm", "k_norm")
        };
        let attention = Attention {
            scale: 1.0,
            norms: Some(norms),
            rope: Some(usize::from(sliding)),
            window: window.filter(|_| sliding),
            keep_keys: own < layers && source == Some(index),
            ..Attention::new(sketch.heads()?, kv_heads, head_dim, projections, output)
        };
        let mlp = Sketch::gated(layer, MLP, activation);
        let mut stages = vec![Stage::sandwich(
            norm("input_layernorm"),
            Layer::Attention(attention),
            norm("post_attention_layernorm"),
        )];
        let after = norm("post_feedforward_layernorm");
        let before = norm("pre_feedforward_layernorm");
        stages.push(if routed {
            let moe = Layer::Moe(experts(sketch, layer, activation)?);
            let branches = vec![
                Branch::sandwich(before, Layer::Mlp(mlp), norm("post_feedforward_layernorm_1")),
                Branch::sandwich(
                    norm("pre_feedforward_layernorm_2"),
                    moe,
                    norm("post_feedforward_layernorm_2"),
                ),
            ];
            Stage { post_norm: Some(after), ..Stage::parallel(branches) }
        } else {
            Stage::sandwich(before, Layer::Mlp(mlp), after)
        });
        if width > 0 {
            let [gate, projection] = sketch::linears(layer, INPUTS);
            let own = Layer::PerLayerInput { gate, activation, projection };
            stages.push(Stage::new(Branch::post(own, norm("post_per_layer_input_norm"))));
        }
        Ok(stages)
    })?;
    let scalars = sketch.any_layer_has(".layer_scalar");
    for block in &mut decoder.blocks {
        block.scalar = scalars.then(|| format!("{}layer_scalar", block.prefix));
    }
    decoder.embedding.multiplier = (hidden_size as f64).sqrt();
    decoder.head.softcap = sketch.float("final_logit_softcapping");
    decoder.embedding.per_layer = (width > 0).then(|| PerLayerInputs {
        path: sketch.place.name(&format!("model.{TABLE}")),
        rows: None,
        multiplier: (width as f64).sqrt(),
        projection: Linear::new(sketch.place.name(&format!("model.{MODEL_PROJECTION}"))),
        projection_multiplier: (hidden_size as f64).powf(-0.5),
        norm: sketch.rms(sketch.place.name("model.per_layer_projection_norm")),
        sum_multiplier: 0.5f64.sqrt(),
        width,
    });
    Ok(decoder)
}
