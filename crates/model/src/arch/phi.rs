//! Microsoft Phi: phi-2 (parallel blocks, plain MLP, biases everywhere) and phi-3/phi-4 (fused q, k, v and gate, up).

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{self, Bias};
use super::defaults::Defaults;
use super::family::Family;
use super::rules::drop_tied_head;
use super::sketch::{Sketch, linears};
use crate::decoder::{Attention, Branch, Decoder, Gate, HeadNorms, Layer, Mlp, Norm, Projections, Stage};
use crate::ops::Activation;

pub(super) const FAMILIES: &[Family] = &[
    Family {
        defaults: Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA },
        biases: biases::NONE,
        ..Family::new(&["phi3"], phi3, phi3_decoder)
    },
    Family { biases: biases::ALL, norm_bias: Bias::Always, ..Family::new(&["phi"], phi, phi_decoder) },
];

const TABLES: [&str; 2] = ["embed_tokens", "lm_head"];

/// Queries, keys and values in one, output; gate and up in one, down.
const PHI3: [&str; 4] = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"];

/// Queries, keys, values, output; the two linears of the network.
const PHI: [&str; 6] =
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"];

fn phi3(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&TABLES[..], &PHI3].concat();
    Ok(Architecture::plain(source, "phi3", &linears)?.rules(drop_tied_head(source, false)))
}

fn phi(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Architecture::plain(source, "phi", &[&TABLES[..], &PHI].concat())
}

fn phi3_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(None);
    let activation = sketch.activation("hidden_act", Activation::Silu)?;
    sketch.llama_with(vec![sketch.rope()?], |layer, _, _| {
        let [qkv, output, gate_up, down] = linears(layer, PHI3);
        let attention = Attention { window, ..sketch.fused_attention(qkv, output)? };
        let mlp = Mlp::new(Gate::Fused(gate_up), activation, down);
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), Layer::Mlp(mlp)))
    })
}

/// Attention and MLP side by side behind one layer norm.
fn phi_decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let norm = |path: String| Norm::layer(path, sketch.float_or("layer_norm_eps", 1e-5));
    let activation = sketch.activation("hidden_act", Activation::GeluTanh)?;
    let rope = sketch.rope_of(sketch.head_dim()?, 0.5)?;
    let mut decoder = sketch.llama_with(vec![rope], |layer, _, attention| {
        let [q, k, v, output, first, second] = linears(layer, PHI);
        let head_norm = |name: &str| norm(format!("{layer}self_attn.{name}"));
        let norms = sketch
            .config
            .bool("qk_layernorm", false)
            .then(|| HeadNorms::new(head_norm("q_layernorm"), head_norm("k_layernorm")));
        let projections = Projections::Separate { q, k, v };
        let attention = Attention { projections, output, norms, ..attention };
        let mlp = Mlp::new(Gate::None(first), activation, second);
        let first = norm(format!("{layer}input_layernorm"));
        let branches = vec![
            Branch::pre(first.clone(), Layer::Attention(attention)),
            Branch::pre(first, Layer::Mlp(mlp)),
        ];
        Ok(vec![Stage::parallel(branches)])
    })?;
    decoder.norm = norm("model.final_layernorm".to_owned());
    Ok(decoder)
}
