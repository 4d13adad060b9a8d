//! What decoder descriptions are drawn from: config.json, the tensors that are there, and the parts most families
//! share.

use std::collections::BTreeSet;

use mlx_format::checkpoint::{Config, ConfigError};
use serde_json::Value;

use super::defaults::Defaults;
use super::keys::{MOST_HEADS, MOST_LAYERS, MOST_WIDTH, at_most, undescribed, wrong};
use super::place::Place;
use super::rules::{ATTENTION, MLP, tied};
use crate::decoder::{
    Attention, Block, Branch, Decoder, Embedding, Gate, Head, HeadNorms, Layer, Linear, Mlp, Norm,
    Projections, QueryScaling, Rope, Stage,
};
use crate::ops::Activation;

/// What a family's decoder function sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sketch<'a> {
    /// config.json.
    pub(super) config: &'a Config,
    /// Names of all tensors, by MLX's names; `None` if only config.json is known.
    pub(super) names: Option<&'a BTreeSet<&'a str>>,
    /// Numbers that config.json may leave out.
    pub(super) defaults: Defaults,
    /// Where the language model stands in a wrapper.
    pub(super) place: Place,
}

/// Linears below a prefix such as `model.layers.0.`, by the names that the family lists.
pub(super) fn linears<const N: usize>(prefix: &str, names: [&str; N]) -> [Linear; N] {
    names.map(|name| Linear::new(format!("{prefix}{name}")))
}

impl Sketch<'_> {
    pub(super) fn count(&self, key: &str) -> Result<usize, ConfigError> {
        let count = self.config.count(key)?;
        if count == 0 { Err(wrong(key, "is 0")) } else { at_most(MOST_WIDTH, key, count) }
    }

    pub(super) fn count_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        if self.config.get(key).is_none() {
            Ok(default)
        } else {
            at_most(MOST_WIDTH, key, self.config.count(key)?)
        }
    }

    pub(super) fn float_or(&self, key: &str, default: f64) -> f64 {
        self.config.get(key).and_then(Value::as_f64).unwrap_or(default)
    }

    pub(super) fn float(&self, key: &str) -> Option<f64> {
        self.config.get(key).and_then(Value::as_f64)
    }

    /// The first of these keys that config.json has, or else the first.
    pub(super) fn first_key<'k>(&self, keys: &[&'k str]) -> &'k str {
        keys.iter().find(|key| self.config.get(key).is_some()).or(keys.first()).copied().unwrap_or_default()
    }

    /// What a list says of a layer.
    pub(super) fn of_layer(&self, key: &str, index: usize) -> Option<&Value> {
        self.config.get(key)?.get(index)
    }

    /// A count that a list may say of each layer.
    pub(super) fn count_of_layer(&self, key: &str, index: usize) -> Result<Option<usize>, ConfigError> {
        match self.config.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => {
                let count = list.get(index).and_then(Value::as_u64);
                let count = count.ok_or_else(|| wrong(key, &format!("does not count for layer {index}")))?;
                at_most(MOST_WIDTH, key, count as usize).map(Some)
            }
            Some(_) => at_most(MOST_WIDTH, key, self.config.count(key)?).map(Some),
        }
    }

    /// `llama_4_scaling_beta` of `rope_parameters`: queries that grow with the position.
    pub(super) fn query_scaling(&self) -> Option<QueryScaling> {
        let parameter = |key: &str| self.config.get("rope_parameters")?.get(key)?.as_f64();
        let beta = parameter("llama_4_scaling_beta")?;
        Some(QueryScaling { beta, original: parameter("original_max_position_embeddings")?, first: 0 })
    }

    /// Experts of a token, of `count`.
    pub(super) fn top_k(&self, key: &str, count: usize) -> Result<usize, ConfigError> {
        let top_k = self.count(key)?;
        if top_k > count {
            return Err(wrong(key, &format!("is {top_k}, but there are {count} experts")));
        }
        Ok(top_k)
    }

    /// Whether a tensor is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.has_or(name, false)
    }

    /// Whether a tensor is there; where only config.json is known, what that lets expect.
    pub(super) fn has_or(&self, name: &str, expected: bool) -> bool {
        self.names.map_or(expected, |names| names.contains(name))
    }

    pub(super) fn heads(&self) -> Result<usize, ConfigError> {
        at_most(MOST_HEADS, "num_attention_heads", self.count("num_attention_heads")?)
    }

    pub(super) fn kv_heads(&self) -> Result<usize, ConfigError> {
        let (heads, kv_heads) = (self.heads()?, self.count_or("num_key_value_heads", self.heads()?)?);
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err(wrong(
                "num_key_value_heads",
                &format!("is {kv_heads}, which does not divide {heads} heads"),
            ));
        }
        Ok(kv_heads)
    }

    pub(super) fn head_dim(&self) -> Result<usize, ConfigError> {
        let default = match self.defaults.head_dim {
            Some(head_dim) => head_dim,
            None => self.count("hidden_size")? / self.heads()?,
        };
        let head_dim = self.count_or("head_dim", default)?;
        if head_dim == 0 {
            Err(wrong("head_dim", "is 0, or there are more heads than features"))
        } else {
            Ok(head_dim)
        }
    }

    pub(super) fn layers(&self) -> Result<usize, ConfigError> {
        at_most(MOST_LAYERS, "num_hidden_layers", self.config.count("num_hidden_layers")?)
    }

    /// The activation that `key` names, as `transformers` maps the names.
    pub(super) fn activation(&self, key: &str, default: Activation) -> Result<Activation, ConfigError> {
        let Some(name) = self.config.str(key) else { return Ok(default) };
        Ok(match name {
            "silu" | "swish" => Activation::Silu,
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" | "gelu_python_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            "relu2" => Activation::ReluSquared,
            _ => return Err(undescribed(key, &format!("is {name:?}, an activation"))),
        })
    }

    /// `sliding_window`, or `None` where the config says null; `default` where it says nothing.
    pub(super) fn window_or(&self, default: Option<usize>) -> Option<usize> {
        match self.config.0.get("sliding_window") {
            None => default,
            Some(value) => value.as_u64().map(|window| window as usize).filter(|window| *window > 0),
        }
    }

    /// A number that may be null: `default` only where the config says nothing.
    pub(super) fn float_or_null(&self, key: &str, default: f64) -> Option<f64> {
        if self.config.0.contains_key(key) { self.float(key) } else { Some(default) }
    }

    /// Refuses models that see what follows.
    pub(super) fn causal(&self) -> Result<(), ConfigError> {
        let both_ways = self
            .config
            .get("use_bidirectional_attention")
            .is_some_and(|value| value.as_bool() == Some(true) || value.as_str() == Some("all"));
        if both_ways {
            return Err(undescribed("use_bidirectional_attention", "is set: a model that sees what follows"));
        }
        Ok(())
    }

    /// Whether a tensor is there in any layer, so that it has to be in all of them.
    pub(super) fn any_layer_has(&self, name: &str) -> bool {
        let mut names = self.names.into_iter().flatten();
        names.any(|own| own.ends_with(name) && own.contains(".layers."))
    }

    /// Whether layer `index` is a sliding one: `layer_types` where the config has it, else `default`.
    pub(super) fn is_sliding(&self, index: usize, default: bool) -> bool {
        self.layer_type(index).map_or(default, |kind| kind.contains("sliding"))
    }

    /// Whether the network of layer `index` is a dense one among experts, where `mlp_layer_types` says so.
    pub(super) fn is_dense(&self, index: usize) -> Option<bool> {
        Some(self.config.get("mlp_layer_types")?.get(index)?.as_str()? == "dense")
    }

    pub(super) fn layer_type(&self, index: usize) -> Option<&str> {
        self.config.get("layer_types")?.get(index)?.as_str()
    }

    /// `model.layers.INDEX.`
    pub(super) fn layer(&self, index: usize) -> String {
        self.place.name(&format!("model.layers.{index}."))
    }

    pub(super) fn rms(&self, path: impl Into<String>) -> Norm {
        Norm::rms(path, self.float_or("rms_norm_eps", self.defaults.rms_norm_eps))
    }

    /// RMS norms of queries and keys, by their names below `self_attn`.
    pub(super) fn head_norms(&self, layer: &str, q: &str, k: &str) -> HeadNorms {
        let norm = |name: &str| self.rms(format!("{layer}self_attn.{name}"));
        HeadNorms::new(norm(q), norm(k))
    }

    /// Attention with separate projections and rotary embedding 0.
    pub(super) fn attention(&self, layer: &str) -> Result<Attention, ConfigError> {
        let [q, k, v, output] = linears(layer, ATTENTION);
        let projections = Projections::Separate { q, k, v };
        Ok(Attention::new(self.heads()?, self.kv_heads()?, self.head_dim()?, projections, output))
    }

    /// Attention with q, k and v in one matrix.
    pub(super) fn fused_attention(&self, qkv: Linear, output: Linear) -> Result<Attention, ConfigError> {
        let projections = Projections::Concatenated(qkv);
        Ok(Attention::new(self.heads()?, self.kv_heads()?, self.head_dim()?, projections, output))
    }

    /// Gated network with gate, up and down at these names below a prefix such as `model.layers.0.`.
    pub(super) fn gated(prefix: &str, names: [&str; 3], activation: Activation) -> Mlp {
        let [gate, up, down] = linears(prefix, names);
        Mlp::new(Gate::Separate { gate, up }, activation, down)
    }

    pub(super) fn mlp(&self, layer: &str) -> Result<Mlp, ConfigError> {
        Ok(Self::gated(layer, MLP, self.activation("hidden_act", Activation::Silu)?))
    }

    /// `x + attention(norm(x))`, then `x + feed_forward(norm(x))`, under the Llama names.
    pub(super) fn pre_norm(&self, layer: &str, attention: Layer, feed_forward: Layer) -> Vec<Stage> {
        let norm = |name: &str| self.rms(format!("{layer}{name}"));
        vec![
            Stage::new(Branch::pre(norm("input_layernorm"), attention)),
            Stage::new(Branch::pre(norm("post_attention_layernorm"), feed_forward)),
        ]
    }

    /// A decoder under the Llama names; the head is tied where the checkpoint has none and config.json does not deny
    /// it.
    pub(super) fn decoder(&self, ropes: Vec<Rope>, blocks: Vec<Block>) -> Result<Decoder, ConfigError> {
        let head = self.place.name("lm_head");
        let untied = tied(self.config) == Some(false);
        let linear = (untied || self.has(&format!("{head}.weight"))).then(|| Linear::new(head));
        Ok(Decoder {
            hidden_size: self.count("hidden_size")?,
            vocabulary: self.count("vocab_size")?,
            embedding: Embedding {
                path: self.place.name("model.embed_tokens"),
                positions: None,
                multiplier: 1.0,
                per_layer: None,
            },
            streams: None,
            ropes,
            blocks,
            norm: self.rms(self.place.name("model.norm")),
            head: Head { linear, multiplier: 1.0, softcap: None },
        })
    }

    /// Llama's shape with blocks of each layer's own making.
    pub(super) fn llama_with_heads(
        &self,
        ropes: Vec<Rope>,
        mut stages: impl FnMut(&str, usize) -> Result<Vec<Stage>, ConfigError>,
    ) -> Result<Decoder, ConfigError> {
        let block = |index| {
            let layer = self.layer(index);
            let stages = stages(&layer, index)?;
            Ok(Block::new(layer, stages))
        };
        let blocks = (0..self.layers()?).map(block).collect::<Result<Vec<_>, ConfigError>>()?;
        self.decoder(ropes, blocks)
    }

    /// Llama's shape with changes to each block.
    pub(super) fn llama_with(
        &self,
        ropes: Vec<Rope>,
        mut stages: impl FnMut(&str, usize, Attention) -> Result<Vec<Stage>, ConfigError>,
    ) -> Result<Decoder, ConfigError> {
        self.llama_with_heads(ropes, |layer, index| stages(layer, index, self.attention(layer)?))
    }
}
