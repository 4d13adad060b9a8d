//! Hunyuan, dense and mixture of experts: norms of queries and keys after the rotation.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases;
use super::defaults::Defaults;
use super::family::{ExpertWidths, Family};
use super::keys::{undescribed, wrong};
use super::llama;
use super::rules::{EXPERTS, drop, gated, stack_mlp_experts};
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Experts, HeadNorms, Layer, Linear, Moe, Router, SharedExpert};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
        biases: biases::ATTENTION,
        ..Family::new(&["hunyuan_v1_dense"], llama::untied_by_default, decoder)
    },
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
        biases: biases::ATTENTION,
        experts: ExpertWidths {
            of_shared: &["intermediate_size"],
            count: &["num_shared_expert"],
            ..ExpertWidths::USUAL
        },
        ..Family::new(&["hunyuan"], hunyuan, hunyuan_decoder)
    },
];

const ROUTER: &str = "mlp.gate.wg";
const SHARED: [&str; 3] = gated!("shared_mlp");

/// Always tied; the router is quantized as the rest.
fn hunyuan(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&llama::linears()[..], &[ROUTER], &EXPERTS, &SHARED].concat();
    Ok(Architecture::plain(source, "hunyuan", &names)?
        .rules([stack_mlp_experts(), drop(r"^lm_head\.weight$")]))
}

fn hunyuan_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    if sketch.config.bool("use_cla", false) && sketch.count_or("cla_share_factor", 2)? > 1 {
        return Err(undescribed("use_cla", "is true: layers that share keys and values"));
    }
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    let normed = sketch.config.bool("use_qk_norm", false);
    let shares = sketch.config.bool("use_mixed_mlp_moe", false);
    let count = sketch.count_of_layer("num_experts", 0)?.unwrap_or(1);
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let norms = normed.then(|| HeadNorms {
            after_rope: true,
            ..sketch.head_norms(layer, "query_layernorm", "key_layernorm")
        });
        let network = |names| Sketch::gated(&format!("{layer}mlp."), names, activation);
        let network = if count == 1 {
            Layer::Mlp(sketch.mlp(layer)?)
        } else {
            let top_k = sketch.count_of_layer("moe_topk", index)?.unwrap_or(1);
            if top_k == 0 || top_k > count {
                return Err(wrong("moe_topk", &format!("is {top_k}, but there are {count} experts")));
            }
            Layer::Moe(Moe {
                router: Router::new(Linear::new(format!("{layer}{ROUTER}")), top_k),
                latent: None,
                experts: Experts::Stacked { count, mlp: network(EXPERTS) },
                shared: shares.then(|| SharedExpert { mlp: network(SHARED), gate: None }),
            })
        };
        Ok(sketch.pre_norm(layer, Layer::Attention(Attention { norms, ..attention }), network))
    })
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let norms = sketch.any_layer_has(".self_attn.query_layernorm.weight").then(|| HeadNorms {
            after_rope: true,
            ..sketch.head_norms(layer, "query_layernorm", "key_layernorm")
        });
        let attention = Attention { norms, ..attention };
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(sketch.mlp(layer)?)))
    })
}
