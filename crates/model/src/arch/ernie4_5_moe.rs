//! ERNIE 4.5 with experts: pairs of neighbours turn; the correction of its router is left out, as in mlx-lm.

use mlx_format::checkpoint::ConfigError;
use serde_json::Value;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, OTHERS};
use super::defaults::Defaults;
use super::family::{ExpertWidths, Family};
use super::keys::undescribed;
use super::llama;
use super::rules::{EXPERTS, SHARED_EXPERTS, drop, drop_tied_head, stack_mlp_experts};
use super::sketch::Sketch;
use crate::decoder::{Decoder, Experts, Layer, Linear, Moe, Router, Scores, SharedExpert};
use crate::ops::Activation;

const BIASES: &[BiasRule] = &[(&["lm_head", "gate"], Bias::Never), (OTHERS, Bias::If("use_bias"))];

const ROUTER: &str = "mlp.gate";

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 500_000.0, ..Defaults::LLAMA },
    biases: BIASES,
    experts: ExpertWidths { count: &["moe_num_shared_experts"], ..ExpertWidths::USUAL },
    ..Family::new(&["ernie4_5_moe"], ernie4_5_moe, decoder)
}];

fn ernie4_5_moe(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&llama::linears()[..], &[ROUTER], &EXPERTS, &SHARED_EXPERTS].concat();
    Ok(Architecture::plain(source, "ernie4_5_moe", &linears)?.rules(drop_tied_head(source, false)).rules([
        drop(r"mtp_(block|linear_proj|hidden_norm|emb_norm)\.|e_score_correction_bias"),
        stack_mlp_experts(),
    ]))
}

/// A layer's number, or the least or largest of several.
fn layer_at(sketch: Sketch<'_>, key: &str, default: usize, largest: bool) -> usize {
    let all = |list: &Vec<Value>| {
        let numbers = list.iter().filter_map(Value::as_u64);
        if largest { numbers.max() } else { numbers.min() }
    };
    let value = sketch.config.get(key);
    let found = value.and_then(|value| value.as_array().map_or_else(|| value.as_u64(), all));
    found.map_or(default, |layer| layer as usize)
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let scores = match sketch.config.str("moe_gate_act") {
        None | Some("softmax") => Scores::Softmax,
        Some("sigmoid") => Scores::Sigmoid,
        Some(other) => return Err(undescribed("moe_gate_act", &format!("is {other:?}"))),
    };
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let layers = sketch.layers()?;
    let first = layer_at(sketch, "moe_layer_start_index", 1, false);
    let last = layer_at(sketch, "moe_layer_end_index", layers.saturating_sub(1), true);
    let interval = sketch.count_or("moe_layer_interval", 1)?.max(1);
    let count = sketch.count("moe_num_experts")?;
    let top_k = sketch.top_k("moe_k", count)?;
    let shares = sketch.count_or("moe_num_shared_experts", 0)? > 0;
    sketch.llama_with(vec![sketch.rope()?.interleaved()], |layer, index, attention| {
        let network = |names| Sketch::gated(&format!("{layer}mlp."), names, activation);
        let routed = (first..=last).contains(&index) && (index + 1).is_multiple_of(interval);
        let network = if routed {
            let router = Linear::new(format!("{layer}{ROUTER}"));
            Layer::Moe(Moe {
                router: Router { scores, renormalize: Some(0.0), ..Router::new(router, top_k) },
                latent: None,
                experts: Experts::Stacked { count, mlp: network(EXPERTS) },
                shared: shares.then(|| SharedExpert { mlp: network(SHARED_EXPERTS), gate: None }),
            })
        } else {
            Layer::Mlp(sketch.mlp(layer)?)
        };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), network))
    })
}
