//! Mixtral and Phi-3.5-MoE: experts w1, w2, w3 stacked as gate, down, up; the router is quantized like the rest.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::rules::{ATTENTION, EXPERTS, drop_tied_head, stack};
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Experts, Layer, Linear, Moe, Router, Scores};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 1_000_000.0, ..Defaults::LLAMA },
        biases: biases::NONE,
        ..Family::new(&["mixtral"], mixtral, decoder)
    },
    // Its router (sparsemixer) is not described.
    Family { decoder: None, ..Family::new(&["phimoe"], phimoe, decoder) },
];

const ROUTER: &str = "block_sparse_moe.gate";

fn mixtral(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(phimoe(source)?.rules(drop_tied_head(source, false)))
}

/// Always has a head of its own.
fn phimoe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [ATTENTION.as_slice(), &EXPERTS, &["embed_tokens", ROUTER, "lm_head"]].concat();
    let experts = |source_name: &str, name| {
        let text = format!(
            r"^(?<x>.*\.block_sparse_moe)\.experts\.(?<e>\d+)\.{source_name}\.(?<k>weight|scales|biases)$"
        );
        stack(&text, name)
    };
    Ok(Architecture::plain(source, "mixtral", &linears)?.rules([
        experts("w1", "$x.switch_mlp.gate_proj.$k"),
        experts("w2", "$x.switch_mlp.down_proj.$k"),
        experts("w3", "$x.switch_mlp.up_proj.$k"),
    ]))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let window = sketch.window_or(None);
    let count = sketch.count("num_local_experts")?;
    let top_k = sketch.top_k("num_experts_per_tok", count)?;
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let moe = Moe {
            router: Router {
                linear: Linear::new(format!("{layer}{ROUTER}")),
                scores: Scores::SoftmaxOfChosen,
                correction: None,
                groups: None,
                top_k,
                renormalize: None,
                multiplier: 1.0,
            },
            experts: Experts {
                count,
                mlp: Sketch::gated(&format!("{layer}block_sparse_moe."), EXPERTS, activation),
            },
            shared: None,
        };
        Ok(sketch.pre_norm(layer, Layer::Attention(Attention { window, ..attention }), Layer::Moe(moe)))
    })
}
