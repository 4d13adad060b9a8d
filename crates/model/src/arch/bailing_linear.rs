//! Ling and Ring with lightning attention in most layers, and in the others latent attention (`bailing_hybrid`) or plain one
//! (`bailing_moe_linear`). Names, networks and experts are Bailing MoE's.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::bailing::{self, EMBEDDING, ROUTER, Routing};
use super::biases::{Bias, BiasRule, OTHERS};
use super::deepseek::{self, LatentWords};
use super::family::{ExpertWidths, Family};
use super::keys::{undescribed, wrong};
use super::rules::{
    EXPERTS, MLP, SHARED_EXPERTS, drop_layers_from, drop_tied_head, split_kv_b, stack_mlp_experts,
};
use super::rules_only::bailing::{is_third, third};
use super::sketch::{Sketch, linears};
use crate::decoder::{Decoder, GroupNorm, HeadNorms, Layer, LightningAttention};

/// Of latent attention other keys say it than of lightning attention, under one name.
const HYBRID_BIASES: &[BiasRule] = &[
    (&["query_key_value", "q_a_proj", "kv_a_proj_with_mqa"], Bias::If("use_qkv_bias")),
    (&["gate_proj", "up_proj", "down_proj"], Bias::If("use_bias")),
    (&["dense"], Bias::Unknown),
    (OTHERS, Bias::Never),
];

pub(super) const FAMILIES: &[Family] = &[
    Family {
        biases: bailing::BIASES,
        experts: bailing::WIDTHS,
        ..Family::new(&["bailing_moe_linear"], linear, linear_decoder)
    },
    Family {
        biases: HYBRID_BIASES,
        experts: ExpertWidths { shared: &["moe_shared_expert_intermediate_size"], ..ExpertWidths::USUAL },
        lengths: &[(&["q_a_proj", "q_b_proj", "q_a_layernorm"], &["q_lora_rank"])],
        // The third generation goes by the same name.
        ..Family::new(
            &["bailing_hybrid"],
            |source| if is_third(source.config) { third(source) } else { hybrid(source) },
            hybrid_decoder,
        )
    },
];

const ATTENTION: [&str; 3] = ["attention.query_key_value", "attention.dense", "attention.g_proj"];
const LATENT: [&str; 6] = [
    "attention.q_proj",
    "attention.q_a_proj",
    "attention.q_b_proj",
    "attention.kv_a_proj_with_mqa",
    "attention.embed_q",
    "attention.unembed_out",
];

fn linear(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let mut architecture = bailing::bailing(source, &[ATTENTION[2]])?;
    architecture.family = "bailing_moe_linear";
    Ok(architecture)
}

fn hybrid(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names = [&ATTENTION[..], &LATENT, &MLP, &EXPERTS, &SHARED_EXPERTS, &[ROUTER, EMBEDDING, "lm_head"]];
    let architecture = Architecture::plain(source, "bailing_hybrid", &names.concat())?;
    let layers = architecture.layers;
    Ok(architecture
        .rules([drop_layers_from(layers), stack_mlp_experts(), bailing::router()])
        .rules(split_kv_b(source)?)
        .rules(drop_tied_head(source, false))
        .protect(&[ROUTER])
        .leave(r"\battention\.(embed_q|unembed_out)$")
        .keep_dtype(&["expert_bias"]))
}

/// Whether a layer attends to all tokens: the last of each group, and those behind the last whole group.
fn attends(sketch: Sketch<'_>) -> Result<impl Fn(usize) -> bool, ConfigError> {
    let (layers, every) = (sketch.layers()?, sketch.count("layer_group_size")?);
    Ok(move |index: usize| (index + 1).is_multiple_of(every) || index >= layers / every * every)
}

fn linear_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let attends = attends(sketch)?;
    bailing::described(sketch, Routing::PLAIN, vec![bailing::rope(sketch, 1.0)?], |layer, index| {
        if attends(index) {
            return Ok(Layer::Attention(bailing::attention(sketch, layer)?));
        }
        // The first two layers forget alike.
        Ok(Layer::Lightning(lightning(sketch, layer, index.saturating_sub(1), false)?))
    })
}

fn hybrid_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    if is_third(sketch.config) {
        return Err(undescribed("architectures", "says the third generation, whose mixers are others"));
    }
    let attends = attends(sketch)?;
    let words = LatentWords {
        module: "attention",
        output: "dense",
        epsilon: sketch.float_or("rms_norm_eps", sketch.defaults.rms_norm_eps),
    };
    let turned = sketch.rope_of_features(sketch.count("qk_rope_head_dim")?)?;
    let turned = if sketch.config.bool("rope_interleave", true) { turned.interleaved() } else { turned };
    let ropes = vec![bailing::rope(sketch, 0.5)?, turned];
    let routing = Routing { sigmoid: true, corrected: true };
    bailing::described(sketch, routing, ropes, |layer, index| {
        if !attends(index) {
            return Ok(Layer::Lightning(lightning(sketch, layer, index, true)?));
        }
        let mut latent = deepseek::latent_under(sketch, layer, words, sketch.count("v_head_dim")?)?;
        latent.table = Some(1);
        Ok(Layer::Latent(latent))
    })
}

/// Lightning attention; `depth` is how many layers stand in front of it: the more, the less it forgets. `normed`: whether queries
/// and keys have norms where config.json does not say.
fn lightning(
    sketch: Sketch<'_>,
    layer: &str,
    depth: usize,
    normed: bool,
) -> Result<LightningAttention, ConfigError> {
    let (heads, head_dim) = (sketch.heads()?, sketch.head_dim()?);
    let [projection, output, gate] = linears(layer, ATTENTION);
    let norm = |name: &str| sketch.rms(format!("{layer}attention.{name}"));
    let groups = sketch.count("group_norm_size")?;
    if !(heads * head_dim).is_multiple_of(groups) {
        let all = heads * head_dim;
        return Err(wrong("group_norm_size", &format!("is {groups}, which does not divide {all} features")));
    }
    let last = sketch.layers()?.saturating_sub(1).max(1);
    let part = 1.0 - depth as f64 / last as f64 + 1e-5;
    let normed = sketch.config.bool("use_qk_norm", normed);
    Ok(LightningAttention {
        heads,
        head_dim,
        scale: (head_dim as f64).powf(-0.5),
        log_decays: slopes(heads).into_iter().map(|slope| (-slope * part) as f32).collect(),
        projection,
        norms: normed.then(|| HeadNorms::new(norm("query_layernorm"), norm("key_layernorm"))),
        rope: 0,
        norm: GroupNorm { norm: norm("g_norm"), groups },
        gate,
        output,
    })
}

/// A geometric sequence that ends at 1/256; where the heads are no power of two, that of fewer heads, then every other number
/// of that of twice as many (`ALiBi`, arXiv 2108.12409).
fn slopes(heads: usize) -> Vec<f64> {
    let geometric = |count: usize| {
        let first = -8.0 / count as f64;
        (1..=count).map(move |step| (first * step as f64).exp2())
    };
    let whole = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    geometric(whole).chain(geometric(2 * whole).step_by(2)).take(heads).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_of_any_number_of_heads() {
        assert_eq!(slopes(8), (1..=8).map(|step| 0.5f64.powi(step)).collect::<Vec<_>>());
        let six = slopes(6);
        assert_eq!(six[..4], [0.25, 0.0625, 0.015_625, 0.003_906_25]);
        assert_eq!(six[4..], [0.5, 0.125]);
        assert_eq!(slopes(1), [0.003_906_25]);
    }
}
