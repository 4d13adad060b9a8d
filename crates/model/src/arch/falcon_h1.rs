//! Falcon H1: attention and Mamba 2 side by side in every layer. Its multipliers (muP) become part of the weights.

use mlx_format::FloatType;
use mlx_format::checkpoint::{Config, ConfigError};
use serde_json::Value;

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias, BiasRule, OTHERS};
use super::defaults::Defaults;
use super::family::Family;
use super::keys::{undescribed, wrong};
use super::mamba2::{self, SizeKeys};
use super::rules::{ATTENTION, drop_inv_freq, drop_tied_head, gated, make, turn_convolutions};
use super::sketch::Sketch;
use super::{Factors, Step};
use crate::decoder::{Attention, Branch, Decoder, Layer, Mamba, Stage};
use crate::ops::Activation;

const BIASES: &[BiasRule] = &[
    (&["in_proj"], Bias::If("mamba_proj_bias")),
    (&["out_proj"], Bias::If("projectors_bias")),
    (biases::QKV, Bias::If("attention_bias")),
    (biases::OUT, Bias::If("attention_bias")),
    (biases::NETWORK, Bias::If("mlp_bias")),
    (&["conv1d"], Bias::Unknown),
    (OTHERS, Bias::Never),
];

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 1e11, ..Defaults::LLAMA },
    biases: BIASES,
    lengths: &[(&["conv1d"], &["mamba_d_conv"])],
    ..Family::new(&["falcon_h1"], falcon_h1, decoder)
}];

const FEED_FORWARD: [&str; 3] = gated!("feed_forward");
const MAMBA: [&str; 2] = ["mamba.in_proj", "mamba.out_proj"];
const SIZES: SizeKeys = ["mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state"];

/// Heads of keys and values where config.json does not say, as in mlx-lm.
const KV_HEADS: usize = 2;
const EMBEDDING_MULTIPLIER: (&str, f64) = ("embedding_multiplier", 5.656_854_249_492_381);
const HEAD_MULTIPLIER: (&str, f64) = ("lm_head_multiplier", 0.039_062_5);

/// Its multipliers become part of the weights, in the dtype of the file. As in transformers, keys have theirs and the input's
/// holds for values, too: mlx-lm forgets both.
fn falcon_h1(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&ATTENTION[..], &MAMBA, &FEED_FORWARD, &["embed_tokens", "lm_head"]].concat();
    let architecture =
        Architecture::plain(source, "falcon_h1", &linears)?.rules(drop_tied_head(source, true));
    // What has MLX's convolutions has been multiplied already.
    let Some(convolutions) = turn_convolutions(source, "conv1d") else { return Ok(architecture) };
    let config = source.config;
    let number = |(key, default): (&str, f64)| config.get(key).and_then(Value::as_f64).unwrap_or(default);
    let times = |end: &str, factor: f64| {
        make(&format!(r"^(?<x>.*{end}\.weight)$"), [("$x", vec![Step::Times(Factors::even(factor))])])
    };
    let attention = number(("attention_in_multiplier", 1.0));
    let networks = numbers(config, "mlp_multipliers", &[0.883_883_476_483_184_5, 0.585_937_5])?;
    Ok(architecture
        .rules([convolutions, drop_inv_freq()])
        .rules([
            times("embed_tokens", number(EMBEDDING_MULTIPLIER)),
            times("lm_head", number(HEAD_MULTIPLIER)),
            times("(q|v)_proj", attention),
            times("k_proj", attention * number(("key_multiplier", 1.0))),
            times(r"\.o_proj", number(("attention_out_multiplier", 0.9375))),
            times("out_proj", number(("ssm_out_multiplier", 0.235_702_260_395_515_87))),
            times("gate_proj", networks[0]),
            times("down_proj", networks[1]),
        ])
        .rules(
            input_factors(source)?
                .map(|own| make(r"^(?<x>.*in_proj\.weight)$", [("$x", vec![Step::Times(own)])])),
        ))
}

fn numbers<const N: usize>(config: &Config, key: &str, default: &[f64; N]) -> Result<[f64; N], ConfigError> {
    let Some(value) = config.get(key) else { return Ok(*default) };
    let list: Option<Vec<f64>> = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
    list.and_then(|list| list.try_into().ok())
        .ok_or_else(|| wrong(key, &format!("is no list of {N} numbers")))
}

/// A factor for each row of the input projection: gate, values, two states, time steps. `None` where there is no projection.
fn input_factors(source: Source<'_>) -> Result<Option<Factors>, ConfigError> {
    const DEFAULT: [f64; 5] =
        [0.353_553_390_593_273_8, 0.25, 0.353_553_390_593_273_8, 0.5, 0.353_553_390_593_273_8];
    let config = source.config;
    let count = |key, default| if config.get(key).is_some() { config.count(key) } else { Ok(default) };
    let (width, heads) = (count("mamba_d_ssm", 1536)?, count("mamba_n_heads", 24)?);
    let state = count("mamba_n_groups", 1)?.saturating_mul(count("mamba_d_state", 128)?);
    let sizes = [width, width, state, state, heads];
    let rows = sizes.iter().fold(0usize, |rows, size| rows.saturating_add(*size));
    let projection = source.tensors.iter().find(|(name, _)| name.ends_with("mamba.in_proj.weight"));
    let Some((_, projection)) = projection else { return Ok(None) };
    if projection.shape.first() != Some(&rows) {
        return Err(wrong(
            "mamba_d_ssm",
            &format!("and the keys beside it make {rows} rows of in_proj, which has others"),
        ));
    }
    let float = FloatType::from_dtype(projection.dtype).unwrap_or(FloatType::F32);
    let own = numbers(config, "ssm_multipliers", &DEFAULT)?;
    let all = config.get("ssm_in_multiplier").and_then(Value::as_f64).unwrap_or(1.25);
    let all = float.round(all as f32);
    let factors = own.iter().zip(sizes);
    let factors = factors
        .flat_map(|(factor, size)| std::iter::repeat_n(float.round(all * float.round(*factor as f32)), size));
    Ok(Some(Factors::of_rows(factors.collect())))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    mamba2::silu(sketch, "hidden_act")?;
    for key in ["mamba_proj_bias", "projectors_bias", "attention_bias", "mlp_bias"] {
        if sketch.config.bool(key, false) {
            return Err(undescribed(key, "is true: biases, which the multipliers do not become part of"));
        }
    }
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let (first, second) =
            (sketch.rms(format!("{layer}input_layernorm")), sketch.rms(format!("{layer}pre_ff_layernorm")));
        let network = Sketch::gated(layer, FEED_FORWARD, Activation::Silu);
        let silent = sketch.config.get("num_key_value_heads").is_none();
        let kv_heads =
            if silent && attention.heads.is_multiple_of(KV_HEADS) { KV_HEADS } else { attention.kv_heads };
        Ok(vec![
            Stage::parallel(vec![
                Branch::pre(first.clone(), Layer::Mamba(mamba(sketch, layer)?)),
                Branch::pre(first, Layer::Attention(Attention { kv_heads, ..attention })),
            ]),
            Stage::new(Branch::pre(second, Layer::Mlp(network))),
        ])
    })?;
    decoder.norm = sketch.rms("model.final_layernorm");
    if decoder.head.linear.is_none() {
        // The table has the embedding's multiplier.
        let number = |(key, default): (&str, f64)| sketch.float_or(key, default);
        decoder.head.multiplier = number(HEAD_MULTIPLIER) / number(EMBEDDING_MULTIPLIER);
    }
    Ok(decoder)
}

fn mamba(sketch: Sketch<'_>, layer: &str) -> Result<Mamba, ConfigError> {
    let mixer = mamba2::mixer(sketch, &format!("{layer}mamba."), SIZES)?;
    let mixer = Mamba {
        step_limits: mamba2::step_limits(sketch)?,
        gate_last: sketch.config.bool("mamba_norm_before_gate", true),
        ..mixer
    };
    let normed = sketch.config.bool("mamba_rms_norm", false);
    Ok(if normed { mixer.normed(sketch.rms(format!("{layer}mamba.norm"))) } else { mixer })
}
