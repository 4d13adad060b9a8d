//! dots.llm1: DeepSeek V3's routing on attention with norms of queries and keys, experts stacked under the hub's name.

use mlx_format::checkpoint::ConfigError;

use super::architecture::{Architecture, Source};
use super::biases::{Bias, BiasRule, NETWORK, OTHERS, OUT, QKV};
use super::deepseek::{self, Corrected, Routed};
use super::family::Family;
use super::llama;
use super::rules::{PLAIN_EXPERTS, SHARED_EXPERTS, drop_tied_head, stack_experts_in_place};
use super::sketch::Sketch;
use crate::decoder::{Attention, Decoder, Layer};

const BIASES: &[BiasRule] = &[
    (QKV, Bias::If("attention_bias")),
    (OUT, Bias::If("attention_bias")),
    (NETWORK, Bias::If("mlp_bias")),
    (OTHERS, Bias::Never),
];

const ROUTED: Routed = Routed { experts: PLAIN_EXPERTS, ..Routed::new(Corrected::Always) };

pub(super) const FAMILIES: &[Family] =
    &[Family { biases: BIASES, ..Family::new(&["dots1"], dots1, decoder) }];

fn dots1(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&llama::linears()[..], &SHARED_EXPERTS, &PLAIN_EXPERTS].concat();
    Ok(Architecture::plain(source, "dots1", &linears)?
        .rules(drop_tied_head(source, false))
        .rules([stack_experts_in_place()]))
}

fn decoder(sketch: Sketch<'_>) -> Result<Decoder, ConfigError> {
    let window = sketch.window_or(None);
    sketch.llama_with(vec![sketch.rope()?], |layer, index, attention| {
        let attention = Attention {
            norms: Some(sketch.head_norms(layer, "q_norm", "k_norm")),
            window: window.filter(|_| sketch.is_sliding(index, false)),
            ..attention
        };
        let network = deepseek::feed_forward(sketch, ROUTED, layer, index)?;
        Ok(sketch.pre_norm(layer, Layer::Attention(attention), network))
    })
}
