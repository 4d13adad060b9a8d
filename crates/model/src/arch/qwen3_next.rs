//! Qwen3-Next and Qwen 3.5: gated delta nets between attention layers, norms stored as w of `1 + w`, strays of
//! multi-token prediction.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Rule, Source};
use super::biases;
use super::family::Family;
use super::keys::wrong;
use super::llama;
use super::qwen::{self, Generation, ROUTER, SHARED_EXPERT, SHARED_GATE};
use super::rules::{EXPERTS, drop, drop_tied_head, make, stack_mlp_experts};
use super::sketch::{self, Sketch};
use crate::decoder::{Attention, Decoder, DeltaNet, DeltaProjections, Layer, OutputGate};
use crate::ops::Activation;
use crate::view::Step;

pub(super) const FAMILIES: &[Family] = &[
    Family {
        biases: biases::ATTENTION,
        lengths: LENGTHS,
        ..Family::new(&["qwen3_next"], qwen3_next, decoder)
    },
    Family {
        biases: biases::ATTENTION,
        lengths: LENGTHS,
        ..Family::new(&["qwen3_5", "qwen3_5_moe"], qwen3_5, decoder)
    },
];

const LENGTHS: &[(&[&str], &[&str])] = &[(&["conv1d"], &["linear_conv_kernel_dim"])];

const GENERATION: Generation = Generation { may_be_dense: true, renormalizes: true };

const DELTA_NET: [&str; 7] = [
    "linear_attn.in_proj_qkvz",
    "linear_attn.in_proj_ba",
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.in_proj_a",
    "linear_attn.in_proj_b",
    "linear_attn.out_proj",
];

/// mlx-lm adds 1 to the stored norms, in the dtype of the file.
fn add_one_to_norms() -> Rule {
    make(
        r"^(?<x>.*(\.input_layernorm|\.post_attention_layernorm|model\.norm|\.q_norm|\.k_norm)\.weight)$",
        [("$x", vec![Step::AddOne])],
    )
}

/// `[channels, 1, kernel]` to MLX's `[channels, kernel, 1]`.
fn transpose_conv() -> Rule {
    make(r"^(?<x>.*conv1d\.weight)$", [("$x", vec![Step::Transpose])])
}

fn linears() -> Vec<&'static str> {
    [&llama::linears()[..], &[ROUTER, SHARED_GATE], &EXPERTS, &SHARED_EXPERT, &DELTA_NET].concat()
}

fn qwen3_next(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let architecture = Architecture::plain(source, "qwen3_next", &linears())?.protect(&[ROUTER, SHARED_GATE]);
    if !source.any_name_ends_with(".mlp.experts.0.up_proj.weight") {
        return Ok(architecture);
    }
    Ok(architecture.rules([drop(r"mtp\.")]).rules(drop_tied_head(source, false)).rules([
        stack_mlp_experts(),
        transpose_conv(),
        add_one_to_norms(),
    ]))
}

/// Qwen 3.5: the language model inside a wrapper of the same name. Experts, where it has them, come fused.
fn qwen3_5(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let untouched = source
        .tensors
        .iter()
        .any(|(name, tensor)| name.contains("conv1d.weight") && tensor.shape.last() != Some(&1));
    let mut architecture = Architecture::plain(source, "qwen3_5", &linears())?
        .rules([drop(r"mtp\.")])
        .rules(drop_tied_head(source, false))
        .rules([
            make(
                r"^(?<x>.*\.mlp)\.experts\.gate_up_proj$",
                [
                    ("$x.switch_mlp.gate_proj.weight", vec![Step::HalfOfRows(false)]),
                    ("$x.switch_mlp.up_proj.weight", vec![Step::HalfOfRows(true)]),
                ],
            ),
            make(r"^(?<x>.*\.mlp)\.experts\.down_proj$", [("$x.switch_mlp.down_proj.weight", vec![])]),
            // The fp8 releases store experts one by one.
            stack_mlp_experts(),
        ])
        .keep_dtype(&["A_log"]);
    if untouched {
        architecture = architecture.rules([transpose_conv(), add_one_to_norms()]);
    }
    if source.config.count("num_experts").unwrap_or(0) > 0 {
        architecture = architecture.protect(&[ROUTER, SHARED_GATE]);
    }
    Ok(architecture)
}

/// Every fourth layer attends (with an output gate), the others are gated delta nets.
fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let interval = sketch.count_or("full_attention_interval", 4)?.max(1);
    let rope = sketch.rope_of(sketch.head_dim()?, 0.25)?;
    sketch.llama_with(vec![rope], |layer, index, attention| {
        let attends = match sketch.layer_type(index) {
            Some(kind) => kind == "full_attention",
            None => (index + 1) % interval == 0,
        };
        let mixer = if attends {
            let norms = Some(qwen::head_norms(sketch, layer));
            let gated = sketch.config.bool("attn_output_gate", true);
            let output_gate = gated.then_some(OutputGate::WithQueries);
            Layer::Attention(Attention { norms, output_gate, ..attention })
        } else {
            Layer::DeltaNet(delta_net(sketch, layer)?)
        };
        Ok(sketch.pre_norm(layer, mixer, qwen::feed_forward(sketch, GENERATION, layer, index)?))
    })
}

fn delta_net(sketch: Sketch<'_>, layer: &str) -> Result<DeltaNet, ConfigError> {
    let path = |name: &str| format!("{layer}linear_attn.{name}");
    let [qkvz, ba, qkv, z, a, b, output] = sketch::linears(layer, DELTA_NET);
    let projections = if sketch.has(&format!("{}.weight", qkvz.path)) {
        DeltaProjections::Grouped { qkvz, ba }
    } else {
        DeltaProjections::Separate { qkv, z, b, a }
    };
    let (key_heads, value_heads) =
        (sketch.count("linear_num_key_heads")?, sketch.count("linear_num_value_heads")?);
    if value_heads % key_heads != 0 {
        return Err(wrong(
            "linear_num_key_heads",
            &format!("is {key_heads}, which does not divide {value_heads} value heads"),
        ));
    }
    Ok(DeltaNet {
        key_heads,
        value_heads,
        key_dim: sketch.count("linear_key_head_dim")?,
        value_dim: sketch.count("linear_value_head_dim")?,
        projections,
        convolutions: vec![path("conv1d")],
        dt_bias: path("dt_bias"),
        decay_log: path("A_log"),
        norm: sketch.rms(path("norm")),
        gate: Activation::Silu,
        output,
    })
}
