//! State space models, alone or between layers of attention.

use mlx_format::FloatType;
use mlx_format::checkpoint::{Config, ConfigError};
use serde_json::Value;

use super::words::{EMBEDDING_AND_HEAD, named};
use crate::arch::architecture::{Architecture, Source};
use crate::arch::family::Family;
use crate::arch::keys::wrong;
use crate::arch::rules::{
    ATTENTION, EXPERTS, MLP, drop, drop_inv_freq, gated, make, stack, turn_convolutions,
};
use crate::arch::{Factors, Rule, Step};

pub(super) const FAMILIES: &[Family] = &[
    Family::rules_only(&["mamba", "falcon_mamba"], |source| {
        backbone(source, "mamba", &["mixer.x_proj", "mixer.dt_proj"])
    }),
    Family::rules_only(&["mamba2"], |source| backbone(source, "mamba2", &[])),
    Family::rules_only(&["jamba"], jamba),
    Family::rules_only(&["plamo2"], plamo2),
    Family::rules_only(&["falcon_h1"], falcon_h1),
    Family::rules_only(&["granitemoehybrid"], granite),
    Family::rules_only(&["nemotron_h"], nemotron_h),
];

const FEED_FORWARD: [&str; 3] = gated!("feed_forward");
const MAMBA: [&str; 2] = ["mamba.in_proj", "mamba.out_proj"];

/// A stack of mixers alone.
fn backbone(
    source: Source<'_>,
    family: &'static str,
    own: &[&'static str],
) -> Result<Architecture, ConfigError> {
    let linears = [&["mixer.in_proj", "mixer.out_proj"][..], own, &["embeddings", "lm_head"]];
    Ok(named(source, family, &linears)?
        .rules(turn_convolutions(source, "conv1d"))
        .parameters(&["conv1d", "A_log"])
        .tied(source, true))
}

fn jamba(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        &ATTENTION[..],
        &MAMBA,
        &["mamba.x_proj", "mamba.dt_proj", "feed_forward.router"],
        &FEED_FORWARD,
        &EXPERTS,
        &EMBEDDING_AND_HEAD,
    ];
    let experts = stack(
        r"^(?<x>.*\.feed_forward)\.experts\.(?<e>\d+)\.(?<p>\w+)\.(?<k>weight|bias|scales|biases)$",
        "$x.switch_mlp.$p.$k",
    );
    Ok(named(source, "jamba", &linears)?
        .rules(turn_convolutions(source, "conv1d"))
        .rules([experts])
        .protect(&["feed_forward.router"])
        .parameters(&["conv1d", "A_log"])
        .tied(source, true))
}

fn plamo2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let mixer = ["in_proj", "bcdt_proj", "dt_proj", "out_proj", "qkv_proj", "o_proj"];
    let linears = [&mixer[..], &["mlp.gate_up_proj", "mlp.down_proj"], &EMBEDDING_AND_HEAD];
    Ok(named(source, "plamo2", &linears)?
        .rules(turn_convolutions(source, "conv1d"))
        .parameters(&["conv1d", "q_weight", "k_weight"])
        .tied(source, true))
}

fn granite(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let has_experts = source.config.count("num_local_experts").unwrap_or(0) > 0;
    let shared = ["shared_mlp.input_linear", "shared_mlp.output_linear", "router.layer"];
    let linears = [&ATTENTION[..], &MAMBA, &MLP, &EXPERTS, &shared, &EMBEDDING_AND_HEAD];
    let halves =
        |first, second| [(first, vec![Step::HalfOfRows(false)]), (second, vec![Step::HalfOfRows(true)])];
    let network: [Rule; 2] = if has_experts {
        [
            make(
                r"^(?<x>.*\.block_sparse_moe)\.input_linear\.weight$",
                halves("$x.switch_mlp.gate_proj.weight", "$x.switch_mlp.up_proj.weight"),
            ),
            make(
                r"^(?<x>.*\.block_sparse_moe)\.output_linear\.weight$",
                [("$x.switch_mlp.down_proj.weight", Vec::new())],
            ),
        ]
    } else {
        [
            make(
                r"^(?<x>.*)\.shared_mlp\.input_linear\.weight$",
                halves("$x.mlp.gate_proj.weight", "$x.mlp.up_proj.weight"),
            ),
            make(r"^(?<x>.*)\.shared_mlp\.output_linear\.weight$", [("$x.mlp.down_proj.weight", Vec::new())]),
        ]
    };
    Ok(named(source, "granitemoehybrid", &linears)?
        .rules(turn_convolutions(source, "conv1d"))
        .rules(network)
        .protect(&["router.layer"])
        .parameters(&["conv1d"])
        .tied(source, true))
}

/// Mixers of three kinds, one a layer; experts have no gate.
fn nemotron_h(source: Source<'_>) -> Result<Architecture, ConfigError> {
    const MIXER: [&str; 6] =
        ["mixer.in_proj", "mixer.out_proj", "mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj"];
    const NETWORKS: [&str; 8] = [
        "mixer.up_proj",
        "mixer.down_proj",
        "mixer.switch_mlp.fc1",
        "mixer.switch_mlp.fc2",
        "mixer.fc1_latent_proj",
        "mixer.fc2_latent_proj",
        "shared_experts.up_proj",
        "shared_experts.down_proj",
    ];
    let experts = |source_name: &str, name| {
        stack(
            &format!(r"^(?<x>.*\.mixer)\.experts\.(?<e>\d+)\.{source_name}\.(?<k>weight|scales|biases)$"),
            name,
        )
    };
    Ok(named(source, "nemotron_h", &[&MIXER, &NETWORKS, &["embeddings", "lm_head"]])?
        .rules([
            drop(r"^mtp\."),
            experts("up_proj", "$x.switch_mlp.fc1.$k"),
            experts("down_proj", "$x.switch_mlp.fc2.$k"),
        ])
        .rules(turn_convolutions(source, "conv1d"))
        .parameters(&["conv1d", "mixer.gate"])
        .keep_dtype(&["e_score_correction_bias", "A_log"]))
}

/// Its multipliers become part of the weights, in the dtype of the file. As in transformers, keys have theirs and the input's
/// holds for values, too: mlx-lm forgets both.
fn falcon_h1(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&ATTENTION[..], &MAMBA, &FEED_FORWARD, &EMBEDDING_AND_HEAD];
    let architecture = named(source, "falcon_h1", &linears)?.parameters(&["conv1d"]).tied(source, true);
    // What has MLX's convolutions has been multiplied already.
    let Some(convolutions) = turn_convolutions(source, "conv1d") else { return Ok(architecture) };
    let config = source.config;
    let number = |key: &str, default: f64| config.get(key).and_then(Value::as_f64).unwrap_or(default);
    let times = |end: &str, factor: f64| {
        make(&format!(r"^(?<x>.*{end}\.weight)$"), [("$x", vec![Step::Times(Factors::even(factor))])])
    };
    let attention = number("attention_in_multiplier", 1.0);
    let networks = numbers(config, "mlp_multipliers", &[0.883_883_476_483_184_5, 0.585_937_5])?;
    Ok(architecture.rules([convolutions, drop_inv_freq()]).rules([
        times("embed_tokens", number("embedding_multiplier", 5.656_854_249_492_381)),
        times("lm_head", number("lm_head_multiplier", 0.039_062_5)),
        times("(q|v)_proj", attention),
        times("k_proj", attention * number("key_multiplier", 1.0)),
        times(r"\.o_proj", number("attention_out_multiplier", 0.9375)),
        times("out_proj", number("ssm_out_multiplier", 0.235_702_260_395_515_87)),
        times("gate_proj", networks[0]),
        times("down_proj", networks[1]),
        make(r"^(?<x>.*in_proj\.weight)$", [("$x", vec![Step::Times(input_factors(source)?)])]),
    ]))
}

fn numbers<const N: usize>(config: &Config, key: &str, default: &[f64; N]) -> Result<[f64; N], ConfigError> {
    let Some(value) = config.get(key) else { return Ok(*default) };
    let list: Option<Vec<f64>> = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
    list.and_then(|list| list.try_into().ok())
        .ok_or_else(|| wrong(key, &format!("is no list of {N} numbers")))
}

/// A factor for each row of the input projection: gate, values, two states, time steps.
fn input_factors(source: Source<'_>) -> Result<Factors, ConfigError> {
    const DEFAULT: [f64; 5] =
        [0.353_553_390_593_273_8, 0.25, 0.353_553_390_593_273_8, 0.5, 0.353_553_390_593_273_8];
    let config = source.config;
    let count = |key, default| if config.get(key).is_some() { config.count(key) } else { Ok(default) };
    let (width, heads) = (count("mamba_d_ssm", 1536)?, count("mamba_n_heads", 24)?);
    let state = count("mamba_n_groups", 1)?.saturating_mul(count("mamba_d_state", 128)?);
    let sizes = [width, width, state, state, heads];
    let rows = sizes.iter().fold(0usize, |rows, size| rows.saturating_add(*size));
    let projection = source.tensors.iter().find(|(name, _)| name.ends_with("mamba.in_proj.weight"));
    let Some((_, projection)) = projection.filter(|(_, own)| own.shape.first() == Some(&rows)) else {
        return Err(wrong(
            "mamba_d_ssm",
            &format!("and the keys beside it make {rows} rows of in_proj, which has others"),
        ));
    };
    let float = FloatType::from_dtype(projection.dtype).unwrap_or(FloatType::F32);
    let own = numbers(config, "ssm_multipliers", &DEFAULT)?;
    let all = config.get("ssm_in_multiplier").and_then(Value::as_f64).unwrap_or(1.25);
    let all = float.round(all as f32);
    let factors = own.iter().zip(sizes);
    let factors = factors
        .flat_map(|(factor, size)| std::iter::repeat_n(float.round(all * float.round(*factor as f32)), size));
    Ok(Factors::of_rows(factors.collect()))
}
