//! MiniMax M2: norms of queries and keys over all heads at once, part of each head turns, experts behind a sigmoid
//! router with a correction.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::rules::{ATTENTION, EXPERTS, drop_tied_head, stack_w_experts};
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Experts, HeadNorms, Layer, Linear, Moe, Router, Scores};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rope_theta: 5_000_000.0, ..Defaults::LLAMA },
    biases: biases::NONE,
    ..Family::new(&["minimax_m2"], minimax, decoder)
}];

const MOE: &str = "block_sparse_moe";
const ROUTER: &str = "block_sparse_moe.gate";
const CORRECTION: &str = "e_score_correction_bias";

fn minimax(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [ATTENTION.as_slice(), &EXPERTS, &["embed_tokens", ROUTER, "lm_head"]].concat();
    Ok(Architecture::plain(source, "minimax", &linears)?
        .rules(drop_tied_head(source, false))
        .rules(stack_w_experts(MOE))
        .protect(&[ROUTER])
        .keep_dtype(&[CORRECTION]))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let head_dim = sketch.head_dim()?;
    let turning = sketch.count_or("rotary_dim", head_dim)? as f64 / head_dim as f64;
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let count = sketch.count("num_local_experts")?;
    let top_k = sketch.top_k("num_experts_per_tok", count)?;
    let normed = sketch.config.bool("use_qk_norm", true);
    sketch.llama_with(vec![sketch.rope_of(head_dim, turning)?], |layer, _, attention| {
        let norms = normed.then(|| HeadNorms { flat: true, ..sketch.head_norms(layer, "q_norm", "k_norm") });
        let moe = Moe {
            router: Router {
                scores: Scores::Sigmoid,
                correction: Some(format!("{layer}{MOE}.{CORRECTION}")),
                renormalize: Some(1e-20),
                ..Router::new(Linear::new(format!("{layer}{ROUTER}")), top_k)
            },
            latent: None,
            experts: Experts::Stacked {
                count,
                mlp: Sketch::gated(&format!("{layer}{MOE}."), EXPERTS, activation),
            },
            shared: None,
        };
        Ok(sketch.pre_norm(layer, Layer::Attention(Attention { norms, ..attention }), Layer::Moe(moe)))
    })
}
