//! MiMo-V2-Flash: values narrower than keys and scaled, sinks in sliding layers, DeepSeek V3's routing.

use mlx_format::checkpoint::ConfigError;
use serde_json::Value;

use super::architecture::{Architecture, Source};
use super::biases;
use super::deepseek::{self, Corrected, Routed};
use super::defaults::Defaults;
use super::family::Family;
use super::keys::wrong;
use super::llama;
use super::rules::{ATTENTION, EXPERTS, SHARED_EXPERTS, drop, stack_mlp_experts};
use super::sketch::{Sketch, linears};
use crate::decoder::{Attention, Branch, Decoder, Layer, Linear, Norm, Projections, Rope, Stage};

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 5_000_000.0, ..Defaults::LLAMA },
    biases: biases::NONE,
    ..Family::new(&["mimo_v2_flash"], mimo_v2_flash, decoder)
}];

fn mimo_v2_flash(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&llama::linears()[..], &SHARED_EXPERTS, &EXPERTS].concat();
    Ok(Architecture::plain(source, "mimo_v2_flash", &names)?
        .rules([drop(r"^model\.mtp"), stack_mlp_experts()])
        .keep_dtype(&["e_score_correction_bias"]))
}

/// Sizes of one kind of layers.
struct Kind {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    sinks: bool,
    window: Option<usize>,
}

fn kind(sketch: Sketch<'_>, sliding: bool) -> Result<Kind, ConfigError> {
    let count = |key: &str, own: &str| {
        if sliding && sketch.config.get(own).is_some() { sketch.count(own) } else { sketch.count(key) }
    };
    let kind = Kind {
        heads: count("num_attention_heads", "swa_num_attention_heads")?,
        kv_heads: count("num_key_value_heads", "swa_num_key_value_heads")?,
        head_dim: count("head_dim", "swa_head_dim")?,
        value_dim: count("v_head_dim", "swa_v_head_dim")?,
        sinks: if sliding {
            sketch.config.bool("add_swa_attention_sink_bias", true)
        } else {
            sketch.config.bool("add_full_attention_sink_bias", false)
        },
        // So many tokens before itself.
        window: match sketch.config.get("sliding_window_size").and_then(Value::as_u64) {
            Some(before) => Some((before as usize).saturating_add(1)),
            None => sketch.window_or(None),
        }
        .filter(|_| sliding),
    };
    if !kind.heads.is_multiple_of(kind.kv_heads) {
        return Err(wrong(
            "num_key_value_heads",
            &format!("is {}, which does not divide {} heads", kind.kv_heads, kind.heads),
        ));
    }
    Ok(kind)
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let partial = sketch.float_or("partial_rotary_factor", 1.0);
    let rope = |sliding: bool, theta: f64| -> Result<Rope, ConfigError> {
        let head_dim = kind(sketch, sliding)?.head_dim;
        let own = if sliding { "sliding_attention" } else { "full_attention" };
        let named = sketch.config.get("rope_parameters").is_some_and(|map| map.get(own).is_some());
        sketch.rope_for(named.then_some(own), head_dim, partial, theta)
    };
    let ropes = vec![
        rope(false, sketch.float_or("rope_theta", sketch.defaults.rope_theta))?,
        rope(true, sketch.float_or("swa_rope_theta", 10_000.0))?,
    ];
    let flag =
        |key: &str, index: usize| sketch.of_layer(key, index).and_then(Value::as_u64).map(|flag| flag == 1);
    let slides = |index: usize| {
        flag("hybrid_layer_pattern", index)
            .unwrap_or_else(|| sketch.is_sliding(index, index > 0 && !(index + 1).is_multiple_of(6)))
    };
    let routed = |index: usize| {
        flag("moe_layer_freq", index).or(sketch.is_dense(index).map(|dense| !dense)).unwrap_or(index > 0)
    };
    let norm =
        |path: String| Norm::rms(path, sketch.float_or("layernorm_epsilon", sketch.defaults.rms_norm_eps));
    let mut decoder = sketch.llama_with_heads(ropes, |layer, index| {
        let sliding = slides(index);
        let Kind { heads, kv_heads, head_dim, value_dim, sinks, window } = kind(sketch, sliding)?;
        let [q, k, v, output] = linears(layer, ATTENTION);
        let attention = Attention {
            value_dim,
            value_multiplier: sketch.float_or("attention_value_scale", 1.0),
            rope: Some(usize::from(sliding)),
            window,
            sinks: sinks.then(|| format!("{layer}self_attn.attention_sink_bias")),
            ..Attention::new(heads, kv_heads, head_dim, Projections::Separate { q, k, v }, output)
        };
        let network = if routed(index) {
            Layer::Moe(deepseek::routed(sketch, Routed::new(Corrected::Always), layer)?)
        } else {
            Layer::Mlp(sketch.mlp(layer)?)
        };
        let branch = |name: &str, layer_of| Stage::new(Branch::pre(norm(format!("{layer}{name}")), layer_of));
        Ok(vec![
            branch("input_layernorm", Layer::Attention(attention)),
            branch("post_attention_layernorm", network),
        ])
    })?;
    decoder.norm = norm("model.norm".to_owned());
    decoder.head.linear = Some(Linear::new("lm_head"));
    Ok(decoder)
}
