//! Nemotron-H and Nemotron 3: layers of one mixer each, which a pattern tells apart: Mamba 2, attention without positions,
//! networks with squared ReLU, experts of them, whose input may be a latent vector.

use mlx_format::checkpoint::ConfigError;
use serde_json::Value;

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias, BiasRule, OTHERS};
use super::family::{ExpertWidths, Family};
use super::keys::{MOST_LAYERS, at_most, wrong};
use super::mamba2::{self, SizeKeys};
use super::rules::{drop, stack, turn_convolutions};
use super::sketch::{Sketch, linears};
use crate::decoder::{
    Attention, Block, Branch, Decoder, Experts, Gate, Groups, LatentExperts, Layer, Linear, Mamba, Mlp, Moe,
    Norm, Projections, Router, Scores, SharedExpert, Stage,
};
use crate::ops::Activation;

const BIASES: &[BiasRule] = &[
    (&["in_proj", "out_proj"], Bias::If("mamba_proj_bias")),
    (biases::QKV, Bias::If("attention_bias")),
    (biases::OUT, Bias::If("attention_bias")),
    (&["up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj"], Bias::If("mlp_bias")),
    (&["conv1d"], Bias::Unknown),
    (OTHERS, Bias::Never),
];

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: BIASES,
    experts: ExpertWidths {
        shared: &["moe_shared_expert_intermediate_size"],
        count: &[],
        ..ExpertWidths::USUAL
    },
    lengths: &[(&["conv1d"], &["conv_kernel"])],
    ..Family::new(&["nemotron_h"], nemotron_h, decoder)
}];

const MAMBA: [&str; 2] = ["mixer.in_proj", "mixer.out_proj"];
const ATTENTION: [&str; 4] = ["mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj"];

/// Up, down: of a layer's network, of its experts, of those that every token passes.
const NETWORK: [&str; 2] = ["mixer.up_proj", "mixer.down_proj"];
const EXPERTS: [&str; 2] = ["mixer.switch_mlp.fc1", "mixer.switch_mlp.fc2"];
const SHARED: [&str; 2] = ["mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"];

/// To the latent vector and back.
const LATENT: [&str; 2] = ["mixer.fc1_latent_proj", "mixer.fc2_latent_proj"];

const ROUTER: &str = "mixer.gate";
const CORRECTION: &str = "e_score_correction_bias";
const SIZES: SizeKeys = ["mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"];

fn nemotron_h(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names =
        [&MAMBA[..], &ATTENTION, &NETWORK, &EXPERTS, &SHARED, &LATENT, &["embeddings", "lm_head"]].concat();
    let experts = |own: &str, name| {
        stack(&format!(r"^(?<x>.*\.mixer)\.experts\.(?<e>\d+)\.{own}\.(?<k>weight|scales|biases)$"), name)
    };
    Ok(Architecture::plain(source, "nemotron_h", &names)?
        .rules([
            drop(r"^mtp\."),
            experts("up_proj", "$x.switch_mlp.fc1.$k"),
            experts("down_proj", "$x.switch_mlp.fc2.$k"),
        ])
        .rules(turn_convolutions(source, "conv1d"))
        .keep_dtype(&[CORRECTION, "A_log"]))
}

/// What a layer is.
#[derive(Clone, Copy)]
enum Kind {
    Mamba,
    Attention,
    Network,
    Experts,
}

/// The layers, by a letter each or by their names.
fn kinds(sketch: Sketch<'_>) -> Result<Vec<Kind>, ConfigError> {
    let key = sketch.first_key(&["hybrid_override_pattern", "layers_block_type"]);
    let kind = |word: &str| match word {
        "M" | "mamba" | "linear_attention" => Ok(Kind::Mamba),
        "*" | "attention" | "full_attention" => Ok(Kind::Attention),
        "-" | "mlp" => Ok(Kind::Network),
        "E" | "moe" => Ok(Kind::Experts),
        _ => Err(wrong(key, &format!("has {word:?}, no kind of layer"))),
    };
    let kinds: Vec<Kind> = match sketch.config.get(key) {
        Some(Value::String(pattern)) => {
            pattern.chars().map(|letter| kind(letter.encode_utf8(&mut [0; 4]))).collect::<Result<_, _>>()?
        }
        Some(Value::Array(list)) => {
            list.iter().map(|word| kind(word.as_str().unwrap_or_default())).collect::<Result<_, _>>()?
        }
        _ => return Err(wrong(key, "is missing, or does not say what each layer is")),
    };
    at_most(MOST_LAYERS, key, kinds.len())?;
    let layers = sketch.layers()?;
    if layers != kinds.len() {
        return Err(wrong(
            "num_hidden_layers",
            &format!("is {layers}, but {key} has {} layers", kinds.len()),
        ));
    }
    Ok(kinds)
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    mamba2::silu(sketch, "mamba_hidden_act")?;
    let epsilon = sketch.float_or("layer_norm_epsilon", 1e-5);
    let activation = sketch.activation("mlp_hidden_act", Activation::ReluSquared)?;
    let network = |layer: &str, names: [&'static str; 2]| {
        let [up, down] = linears(layer, names);
        Mlp::new(Gate::None(up), activation, down)
    };
    let block = |(index, kind)| {
        let layer = format!("backbone.layers.{index}.");
        let mixer = match kind {
            Kind::Mamba => Layer::Mamba(mamba(sketch, &layer, epsilon)?),
            Kind::Attention => {
                let [q, k, v, output] = linears(&layer, ATTENTION);
                let projections = Projections::Separate { q, k, v };
                let (heads, kv_heads) = (sketch.heads()?, sketch.kv_heads()?);
                let attention = Attention::new(heads, kv_heads, sketch.head_dim()?, projections, output);
                Layer::Attention(Attention { rope: None, ..attention })
            }
            Kind::Network => Layer::Mlp(network(&layer, NETWORK)),
            Kind::Experts => Layer::Moe(experts(sketch, &layer, network)?),
        };
        let norm = Norm::rms(format!("{layer}norm"), epsilon);
        Ok(Block::new(layer, vec![Stage::new(Branch::pre(norm, mixer))]))
    };
    let blocks = kinds(sketch)?.into_iter().enumerate().map(block).collect::<Result<_, ConfigError>>()?;
    mamba2::backbone(sketch, blocks, epsilon)
}

/// As in transformers steps have a least size, and `time_step_limit` is not read.
fn mamba(sketch: Sketch<'_>, layer: &str, epsilon: f64) -> Result<Mamba, ConfigError> {
    let least = sketch.float_or("time_step_min", 1e-3) as f32;
    let norm = Norm::rms(format!("{layer}mixer.norm"), epsilon);
    let mixer = mamba2::mixer(sketch, &format!("{layer}mixer."), SIZES)?.normed(norm);
    Ok(Mamba { step_limits: [least, f32::INFINITY], ..mixer })
}

fn experts(
    sketch: Sketch<'_>,
    layer: &str,
    network: impl Fn(&str, [&'static str; 2]) -> Mlp,
) -> Result<Moe, ConfigError> {
    let count = sketch.count("n_routed_experts")?;
    let groups = Groups {
        count: sketch.count_or("n_group", 1)?,
        keep: sketch.count_or("topk_group", 1)?,
        best_two: true,
    };
    if groups.count == 0 || count % groups.count != 0 {
        return Err(wrong("n_group", &format!("is {}, which does not divide {count} experts", groups.count)));
    }
    let router = Linear::new(format!("{layer}{ROUTER}"));
    let [down, up] = linears(layer, LATENT);
    let latent = sketch.config.get("moe_latent_size").map(|_| sketch.count("moe_latent_size")).transpose()?;
    let shares = sketch.config.get("n_shared_experts").is_some();
    Ok(Moe {
        router: Router {
            scores: Scores::Sigmoid,
            correction: Some(format!("{}.{CORRECTION}", router.path)),
            groups: (groups.count > 1).then_some(groups),
            renormalize: sketch.config.bool("norm_topk_prob", true).then_some(1e-20),
            multiplier: sketch.float_or("routed_scaling_factor", 1.0),
            ..Router::new(router, sketch.top_k("num_experts_per_tok", count)?)
        },
        latent: latent.map(|width| LatentExperts { width, down, up }),
        experts: Experts::Stacked { count, mlp: network(layer, EXPERTS) },
        shared: shares.then(|| SharedExpert { mlp: network(layer, SHARED), gate: None }),
    })
}
