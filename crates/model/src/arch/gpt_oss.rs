//! OpenAI gpt-oss: experts packed as mxfp4 by the hub, gate and up interleaved row by row.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::rules::{ATTENTION, gated, make};
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Experts, Layer, Linear, Moe, Router, Scores};
use crate::ops::Activation;
use crate::view::Step;

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 150_000.0, ..Defaults::LLAMA },
    biases: biases::ALL_BUT_HEAD,
    ..Family::new(&["gpt_oss"], gpt_oss, decoder)
}];

const ROUTER: &str = "mlp.router";
const EXPERTS: [&str; 3] = gated!("experts");

fn gpt_oss(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [ATTENTION.as_slice(), &["embed_tokens", ROUTER, "lm_head"], &EXPERTS].concat();
    let architecture = Architecture::plain(source, "gpt_oss", &linears)?.protect(&["router"]);
    if source.any_name_ends_with("gate_proj.weight") {
        return Ok(architecture);
    }
    // Even rows are the gate, odd rows the up projection.
    let every_other = |from_last, odd| Step::EveryOther { from_last, odd };
    Ok(architecture.rules([
        make(
            r"^(?<x>.*\.experts)\.gate_up_proj_blocks$",
            [
                ("$x.gate_proj.weight", vec![Step::Words, every_other(1, false)]),
                ("$x.up_proj.weight", vec![Step::Words, every_other(1, true)]),
            ],
        ),
        make(
            r"^(?<x>.*\.experts)\.gate_up_proj_scales$",
            [
                ("$x.gate_proj.scales", vec![every_other(1, false)]),
                ("$x.up_proj.scales", vec![every_other(1, true)]),
            ],
        ),
        make(
            r"^(?<x>.*\.experts)\.gate_up_proj_bias$",
            [
                ("$x.gate_proj.bias", vec![every_other(0, false)]),
                ("$x.up_proj.bias", vec![every_other(0, true)]),
            ],
        ),
        // Decoded models store both turned, `[experts, in, out]`.
        make(
            r"^(?<x>.*\.experts)\.gate_up_proj$",
            [
                ("$x.gate_proj.weight", vec![Step::Transpose, every_other(1, false)]),
                ("$x.up_proj.weight", vec![Step::Transpose, every_other(1, true)]),
            ],
        ),
        make(r"^(?<x>.*\.experts\.down_proj)$", [("$x.weight", vec![Step::Transpose])]),
        make(r"^(?<x>.*\.experts\.down_proj)_blocks$", [("$x.weight", vec![Step::Words])]),
        make(r"^(?<x>.*\.experts\.down_proj)_scales$", [("$x.scales", vec![])]),
        make(r"^(?<x>.*\.experts\.down_proj)_bias$", [("$x.bias", vec![])]),
    ]))
}

/// Attention with sinks, every other layer sliding; clamped SwiGLU experts with biases.
fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(128));
    let count = sketch.count("num_local_experts")?;
    let top_k = sketch.top_k("num_experts_per_tok", count)?;
    let activation = Activation::ClampedSwiglu {
        alpha: sketch.float_or("swiglu_alpha", 1.702) as f32,
        limit: sketch.float_or("swiglu_limit", 7.0) as f32,
    };
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let attention = Attention {
            window: window.filter(|_| sketch.is_sliding(index, (index + 1) % 2 != 0)),
            sinks: Some(format!("{layer}self_attn.sinks")),
            ..attention
        };
        let moe = Moe {
            router: Router {
                scores: Scores::SoftmaxOfChosen,
                ..Router::new(Linear::new(format!("{layer}{ROUTER}")), top_k)
            },
            latent: None,
            experts: Experts::Stacked {
                count,
                mlp: Sketch::gated(&format!("{layer}mlp."), EXPERTS, activation),
            },
            shared: None,
        };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Moe(moe)))
    })
}
