//! Apertus: the Llama shape with norms of queries and keys, and a network whose activation (xIELU) has parameters.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, NETWORK, OTHERS};
use super::defaults::Defaults;
use super::family::Family;
use super::keys::undescribed;
use super::llama;
use super::rules::{drop_tied_head, make};
use super::sketch::{Sketch, linears};
use crate::decoder::{Attention, Branch, Decoder, Gate, Layer, Mlp, Stage};
use crate::ops::Activation;
use crate::view::Step;

const BIASES: &[BiasRule] = &[(NETWORK, Bias::If("mlp_bias")), (OTHERS, Bias::Never)];

pub(super) const FAMILIES: &[Family] = &[Family {
    defaults: Defaults { rms_norm_eps: 1e-5, rope_theta: 12_000_000.0, ..Defaults::LLAMA },
    biases: BIASES,
    ..Family::new(&["apertus"], apertus, decoder)
}];

const NETWORK_NAMES: [&str; 2] = ["mlp.up_proj", "mlp.down_proj"];

fn apertus(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(Architecture::plain(source, "apertus", &llama::linears())?
        .rules(drop_tied_head(source, false))
        .rules([make(r"^(?<x>.*\.act_fn\.(alpha_p|alpha_n))$", [("$x", vec![Step::Scalar])])]))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    if let Some(other) = sketch.config.str("hidden_act").filter(|name| *name != "xielu") {
        return Err(undescribed("hidden_act", &format!("is {other:?}")));
    }
    sketch.llama_with(vec![sketch.rope()?], |layer, _, attention| {
        let norm = |name: &str| sketch.rms(format!("{layer}{name}"));
        let norms = Some(sketch.head_norms(layer, "q_norm", "k_norm"));
        let [up, down] = linears(layer, NETWORK_NAMES);
        let gate = Gate::Xielu { up, parameters: format!("{layer}mlp.act_fn") };
        let mlp = Mlp::new(gate, Activation::Identity, down);
        let attention = Layer::Attention(Attention { norms, ..attention });
        Ok(vec![
            Stage::new(Branch::pre(norm("attention_layernorm"), attention)),
            Stage::new(Branch::pre(norm("feedforward_layernorm"), Layer::Mlp(mlp))),
        ])
    })
}
