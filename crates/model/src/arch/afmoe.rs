//! AFMoE (Trinity): an output gate of attention, norms before and after each layer, three sliding layers that turn to
//! each global one without positions, experts stacked under the hub's name.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::defaults::Defaults;
use super::family::Family;
use super::keys::{undescribed, wrong};
use super::llama;
use super::rules::{PLAIN_EXPERTS, SHARED_EXPERTS, drop_tied_head, stack_experts_in_place};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Decoder, Experts, Groups, Layer, Linear, Moe, OutputGate, Router, Scores, SharedExpert, Stage,
};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, head_dim: Some(128), ..Defaults::LLAMA },
    biases: biases::NONE,
    ..Family::new(&["afmoe"], afmoe, decoder)
}];

const GATE: [&str; 1] = ["self_attn.gate_proj"];
const ROUTER: &str = "mlp.router.gate";
const CORRECTION: &str = "expert_bias";

fn afmoe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&llama::linears()[..], &GATE, &PLAIN_EXPERTS, &SHARED_EXPERTS, &[ROUTER]].concat();
    Ok(Architecture::plain(source, "afmoe", &names)?
        .rules(drop_tied_head(source, false))
        .rules([stack_experts_in_place()])
        .protect(&[ROUTER])
        .keep_dtype(&[CORRECTION]))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(Some(2048));
    let dense = sketch.count_or("num_dense_layers", 2)?;
    let interval = sketch.count_or("global_attn_every_n_layers", 4)?.max(1);
    let mut decoder = sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let sliding = sketch.is_sliding(index, (index + 1) % interval != 0);
        let [linear] = linears(layer, GATE);
        let gate = OutputGate::Linear { linear, activation: Activation::Sigmoid, per_head: false };
        let attention = Attention {
            norms: Some(sketch.head_norms(layer, "q_norm", "k_norm")),
            rope: sliding.then_some(0),
            window: window.filter(|_| sliding),
            output_gate: Some(gate),
            ..attention
        };
        let network =
            if index < dense { Layer::Mlp(sketch.mlp(layer)?) } else { Layer::Moe(experts(sketch, layer)?) };
        let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
        Ok(vec![
            Stage::sandwich(
                norm("input_layernorm"),
                Layer::Attention(attention),
                norm("post_attention_layernorm"),
            ),
            Stage::sandwich(norm("pre_mlp_layernorm"), network, norm("post_mlp_layernorm")),
        ])
    })?;
    if sketch.config.bool("mup_enabled", false) {
        decoder.embedding.multiplier = (decoder.hidden_size as f64).sqrt();
    }
    Ok(decoder)
}

fn experts(sketch: Sketch<'_>, layer: &str) -> Result<Moe, ConfigError> {
    let scores = match sketch.config.str("score_func") {
        None | Some("sigmoid") => Scores::Sigmoid,
        Some("softmax") => Scores::Softmax,
        Some(other) => return Err(undescribed("score_func", &format!("is {other:?}"))),
    };
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let network = |names| Sketch::gated(&format!("{layer}mlp."), names, activation);
    let count = sketch.count("num_experts")?;
    let groups = Groups {
        count: sketch.count_or("n_group", 1)?,
        keep: sketch.count_or("topk_group", 1)?,
        best_two: true,
    };
    if groups.count == 0 || count % groups.count != 0 {
        return Err(wrong("n_group", &format!("is {}, which does not divide {count} experts", groups.count)));
    }
    let router = Linear::new(format!("{layer}{ROUTER}"));
    Ok(Moe {
        router: Router {
            scores,
            correction: Some(format!("{layer}mlp.{CORRECTION}")),
            groups: (groups.count > 1).then_some(groups),
            renormalize: sketch.config.bool("route_norm", true).then_some(1e-20),
            multiplier: sketch.float_or("route_scale", 1.0),
            ..Router::new(router, sketch.top_k("num_experts_per_tok", count)?)
        },
        latent: None,
        experts: Experts::Stacked { count, mlp: network(PLAIN_EXPERTS) },
        shared: (sketch.count_or("num_shared_experts", 1)? > 0)
            .then(|| SharedExpert { mlp: network(SHARED_EXPERTS), gate: None }),
    })
}
