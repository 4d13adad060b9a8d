//! Granite 4: Mamba 2 between layers of attention, then a dense network or experts beside one that every token passes, under
//! Granite's multipliers.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Rule, Source};
use super::biases::{self, Bias, BiasRule, OTHERS};
use super::family::{ExpertWidths, Family};
use super::granite;
use super::keys::wrong;
use super::mamba2::{self, SizeKeys};
use super::rules::{ATTENTION, EXPERTS, MLP, drop_tied_head, make, turn_convolutions};
use super::sketch::{Sketch, linears};
use crate::decoder::{Attention, Decoder, Gate, Layer, Mamba, Mlp, SharedExpert};
use crate::ops::Activation;
use crate::view::Step;

const BIASES: &[BiasRule] = &[
    (&["in_proj", "out_proj"], Bias::If("mamba_proj_bias")),
    (biases::QKV, Bias::If("attention_bias")),
    (biases::OUT, Bias::If("attention_bias")),
    (biases::NETWORK, Bias::If("mlp_bias")),
    (&["conv1d"], Bias::Unknown),
    (OTHERS, Bias::Never),
];

pub(super) const FAMILIES: &[Family] = &[Family {
    biases: BIASES,
    experts: ExpertWidths {
        expert: &["intermediate_size"],
        shared: &["shared_intermediate_size"],
        of_shared: &[],
        count: &[],
    },
    lengths: &[(&["conv1d"], &["mamba_d_conv"])],
    ..Family::new(&["granitemoehybrid"], granitemoehybrid, decoder)
}];

const MAMBA: [&str; 2] = ["mamba.in_proj", "mamba.out_proj"];

/// Gate and up in one, down: of what every token passes beside experts.
const SHARED: [&str; 2] = ["shared_mlp.input_linear", "shared_mlp.output_linear"];
const SIZES: SizeKeys = ["mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state"];

/// Networks of models without experts stand under the name of the shared one, gate and up in one matrix.
fn granitemoehybrid(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let names =
        [&ATTENTION[..], &MAMBA, &MLP, &EXPERTS, &SHARED, &[granite::ROUTER, "embed_tokens", "lm_head"]]
            .concat();
    let halves =
        |first, second| [(first, vec![Step::HalfOfRows(false)]), (second, vec![Step::HalfOfRows(true)])];
    let network: [Rule; 2] = if has_experts(source.config) {
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
    Ok(Architecture::plain(source, "granitemoehybrid", &names)?
        .rules(turn_convolutions(source, "conv1d"))
        .rules(network)
        .protect(&[granite::ROUTER])
        .rules(drop_tied_head(source, true)))
}

fn has_experts(config: &mlx_format::checkpoint::Config) -> bool {
    config.count("num_local_experts").unwrap_or(0) > 0
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    mamba2::silu(sketch, "hidden_act")?;
    let turns = sketch.config.str("position_embedding_type") == Some("rope");
    let mixer = |layer: &str, index: usize, attention: Attention| match sketch.layer_type(index) {
        None | Some("mamba" | "linear_attention") => Ok(Layer::Mamba(mamba(sketch, layer)?)),
        Some("attention" | "full_attention") => {
            Ok(Layer::Attention(Attention { rope: turns.then_some(0), ..attention }))
        }
        Some(kind) => Err(wrong("layer_types", &format!("has {kind:?}, no kind of layer"))),
    };
    granite::multiplied(sketch, mixer, |layer| {
        if !has_experts(sketch.config) {
            return Ok(Layer::Mlp(sketch.mlp(layer)?));
        }
        let [both, down] = linears(layer, SHARED);
        let shared = Mlp::new(Gate::Fused(both), Activation::Silu, down);
        let mut moe = granite::experts(sketch, layer)?;
        moe.shared = Some(SharedExpert { mlp: shared, gate: None });
        Ok(Layer::Moe(moe))
    })
}

fn mamba(sketch: Sketch<'_>, layer: &str) -> Result<Mamba, ConfigError> {
    let mixer = mamba2::mixer(sketch, &format!("{layer}mamba."), SIZES)?;
    let mixer = mixer.normed(sketch.rms(format!("{layer}mamba.norm")));
    Ok(Mamba { step_limits: mamba2::step_limits(sketch)?, ..mixer })
}
