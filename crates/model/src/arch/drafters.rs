//! Heads that predict tokens beyond the next one, as mlx-vlm loads them: a model of their own, a *drafter*, which shares the
//! embedding and the head of the model that it drafts for.
//!
//! mlx-vlm splits them from a checkpoint of the hub (`mlx_vlm/speculative/drafters/*/split.py`, version 0.7.10) and loads
//! them from a directory of their own; mlx-lm drops them. Names, the keys of config.json and what is rounded are data
//! here. Left out is what mlx-vlm's splitter takes along although its own model has no place for it.

use mlx_format::checkpoint::{Config, ConfigError};
use regex::escape;
use serde_json::{Map, Value, json};

use super::architecture::{Architecture, Rule, Source};
use super::keys::{MOST_LAYERS, at_most, wrong};
use super::rules::{
    ATTENTION, EXPERTS, MLP, SHARED_EXPERTS, drop, make, split_fused_experts, split_kv_b, stack,
};
use super::rules::{gated, stack_mlp_experts};
use crate::view::Step;

/// A drafter and the models that it drafts for.
#[derive(Debug)]
pub(crate) struct Drafter {
    /// Types of these models, as `model_type` or `text_config.model_type` has them.
    types: &'static [&'static str],
    /// Its own `model_type`.
    pub(crate) model_type: &'static str,
    /// Files of the tokenizer that lie beside it.
    pub(crate) files: &'static [&'static str],
    /// The key that counts its layers, and how many tokens a round drafts beyond them.
    depth: (&'static str, u64),
    /// What mlx-vlm takes for `tie_word_embeddings` where config.json does not say.
    tied: bool,
    /// Settles what its `text_config` may leave out.
    settle: fn(&mut Map<String, Value>),
    /// Names, rules and linears, by the language model's config.json and the names of the whole checkpoint.
    names: fn(Source<'_>) -> Result<Architecture, ConfigError>,
    /// Names of all tensors that it has.
    tensors: fn(&Config) -> Result<Vec<String>, ConfigError>,
}

const FEW_FILES: &[&str] = &["tokenizer.json", "tokenizer_config.json", "vocab.json"];
const FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
];

const DRAFTERS: &[Drafter] = &[
    Drafter {
        types: &["qwen3_5", "qwen3_5_moe", "qwen3_next"],
        model_type: "qwen3_5_mtp",
        files: FEW_FILES,
        depth: ("mtp_num_hidden_layers", 2),
        tied: true,
        settle: qwen_text,
        names: qwen,
        tensors: qwen_tensors,
    },
    Drafter {
        types: &["glm_moe_dsa"],
        model_type: "glm_moe_dsa_mtp",
        files: FILES,
        depth: ("num_nextn_predict_layers", 1),
        tied: false,
        settle: |_| {},
        names: glm,
        tensors: glm_tensors,
    },
    Drafter {
        types: &["nemotron_h"],
        model_type: "nemotron_h_mtp",
        files: FEW_FILES,
        depth: ("num_nextn_predict_layers", 1),
        tied: false,
        settle: |_| {},
        names: nemotron,
        tensors: nemotron_tensors,
    },
];

/// Why nothing loads the heads of these types, although mlx-vlm splits them.
const UNUSABLE: [(&str, &str); 1] =
    [("glm4_moe_lite", "mlx_vlm 0.7.10 splits its heads, but has no model of type glm4_moe_lite_mtp")];

/// Types whose heads can be kept, with the type of the drafter that they become.
pub fn drafters() -> impl Iterator<Item = (&'static [&'static str], &'static str)> {
    DRAFTERS.iter().map(|drafter| (drafter.types, drafter.model_type))
}

impl Drafter {
    /// The drafter for models of this config.json, or why there is none.
    pub(crate) fn of(config: &Config) -> Result<&'static Self, String> {
        let text =
            config.0.get("text_config").and_then(|text| text.get("model_type")).and_then(Value::as_str);
        let types: Vec<&str> = text.into_iter().chain(config.model_type().ok()).collect();
        let found = DRAFTERS.iter().find(|drafter| types.iter().any(|own| drafter.types.contains(own)));
        found.ok_or_else(|| {
            let known =
                UNUSABLE.iter().find(|(own, _)| types.contains(own)).map(|(_, why)| (*why).to_owned());
            known.unwrap_or_else(|| {
                "mlx_vlm 0.7.10 has no drafter of this type, mlx_lm 0.32.2 has none".to_owned()
            })
        })
    }

    /// Names and rules of a checkpoint's heads; `source.config` is the whole config.json.
    pub(crate) fn architecture(&self, source: Source<'_>) -> Result<Architecture, ConfigError> {
        let config = Config(language(source.config));
        let mut architecture = (self.names)(Source { config: &config, ..source })?;
        // Everything else is the model that it drafts for.
        architecture.rules.push(drop(""));
        Ok(architecture)
    }

    /// Names of all tensors that it has.
    pub(crate) fn tensors(&self, config: &Config) -> Result<Vec<String>, ConfigError> {
        (self.tensors)(&Config(language(config)))
    }

    /// Its config.json, without what says how it is quantized.
    pub(crate) fn config(&self, config: &Config) -> Config {
        let mut text = language(config);
        (self.settle)(&mut text);
        for key in ["quantization", "quantization_config"] {
            text.shift_remove(key);
        }
        let (key, more) = self.depth;
        let depth = text.get(key).and_then(Value::as_u64).filter(|depth| *depth > 0).unwrap_or(1);
        let tied = text.get("tie_word_embeddings").map_or(self.tied, mlx_format::checkpoint::is_truthy);
        let mut own = Map::new();
        own.insert("model_type".to_owned(), self.model_type.into());
        // As of the model: the dtype of what is not rounded.
        own.extend(config.0.get("torch_dtype").map(|dtype| ("torch_dtype".to_owned(), dtype.clone())));
        own.insert("block_size".to_owned(), depth.saturating_add(more).into());
        own.insert("tie_word_embeddings".to_owned(), tied.into());
        own.insert("text_config".to_owned(), text.into());
        Config(own)
    }
}

/// config.json of the language model.
fn language(config: &Config) -> Map<String, Value> {
    config.0.get("text_config").and_then(Value::as_object).unwrap_or(&config.0).clone()
}

/// A count of `config`, or what it is where that does not say.
fn count_or(config: &Config, key: &str, default: usize) -> Result<usize, ConfigError> {
    if config.get(key).is_none() { Ok(default) } else { at_most(MOST_LAYERS, key, config.count(key)?) }
}

/// Names with `.weight` behind them.
fn weights<'n>(names: impl IntoIterator<Item = &'n str>) -> impl Iterator<Item = String> {
    names.into_iter().map(|name| format!("{name}.weight"))
}

const SHARED_EXPERT: [&str; 3] = gated!("shared_expert");
const SHARED_GATE: &str = "mlp.shared_expert_gate";

/// mlx-vlm reads the ropes of Qwen3-Next under the key of Qwen3.5.
fn qwen_text(text: &mut Map<String, Value>) {
    if text.get("model_type").and_then(Value::as_str) != Some("qwen3_next") {
        return;
    }
    let number = |key: &str| text.get(key).and_then(Value::as_f64);
    if let (false, Some(head_dim), Some(part), Some(theta)) = (
        text.contains_key("rope_parameters"),
        number("head_dim"),
        number("partial_rotary_factor"),
        text.get("rope_theta").cloned(),
    ) {
        let pairs = (head_dim * part) as u64 / 2;
        let ropes = json!({"type": "default", "rope_theta": theta, "partial_rotary_factor": part, "mrope_section": [pairs, 0, 0]});
        text.insert("rope_parameters".to_owned(), ropes);
    }
    text.entry("norm_topk_prob").or_insert(Value::Bool(false));
}

/// Layers below `mtp`, whose norms multiply by `1 + w`.
#[expect(clippy::unnecessary_wraps, reason = "as the names of every type")]
fn qwen(_: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [&["fc", SHARED_GATE][..], &ATTENTION, &MLP, &EXPERTS, &SHARED_EXPERT].concat();
    let within = |rule: Rule| below("mtp", rule);
    Ok(Architecture::with_layers("qwen3_5_mtp", 0, &linears).rules(split_fused_experts().map(within)).rules(
        [
            within(stack_mlp_experts()),
            make(r"^mtp\.(?<x>.*norm(_embedding|_hidden)?\.weight)$", [("$x", vec![Step::AddOne])]),
            make(r"^mtp\.(?<x>.*)$", [("$x", vec![])]),
        ],
    ))
}

/// The rule, for names below a path that it takes away.
fn below(path: &str, mut rule: Rule) -> Rule {
    let text = rule.pattern.as_str().replacen('^', &format!(r"^{}\.", escape(path)), 1);
    rule.pattern = regex::Regex::new(&text).expect("rule patterns are valid");
    rule
}

fn qwen_tensors(config: &Config) -> Result<Vec<String>, ConfigError> {
    const DEPTH: &str = "mtp_num_hidden_layers";
    if count_or(config, DEPTH, 1)? > 1 {
        // Its loader makes `text_config` anew without that key.
        return Err(wrong(DEPTH, "is more than 1, and mlx_vlm 0.7.10 loads one layer of qwen3_5_mtp"));
    }
    let sparse = config.count("num_experts").is_ok_and(|experts| experts > 0);
    let norms = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"];
    let experts: Vec<String> =
        EXPERTS.iter().chain(&SHARED_EXPERT).map(|name| format!("mlp.{name}")).collect();
    let routed = ["mlp.gate", SHARED_GATE].into_iter().chain(experts.iter().map(String::as_str));
    let network: Vec<&str> = if sparse { routed.collect() } else { MLP.to_vec() };
    let own = norms.into_iter().chain(ATTENTION).chain(network);
    let layer = weights(own).map(|name| format!("layers.0.{name}"));
    Ok(weights(["fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"]).chain(layer).collect())
}

/// The layer behind the last one.
fn glm(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let layers = source.config.count("num_hidden_layers")?;
    let prefix = format!(r"^model\.layers\.{layers}\.");
    let linears = [
        &["eh_proj", "self_attn.o_proj", "self_attn.q_a_proj", "self_attn.q_b_proj"][..],
        &["self_attn.kv_a_proj_with_mqa", "self_attn.embed_q", "self_attn.unembed_out"],
        &["self_attn.indexer.wq_b", "self_attn.indexer.wk", "self_attn.indexer.weights_proj"],
        &EXPERTS,
        &SHARED_EXPERTS,
    ];
    let projections = r"gate_proj|up_proj|down_proj";
    let experts = format!(r"{prefix}mlp\.experts\.(?<e>\d+)\.(?<p>{projections})\.weight$");
    let split = split_kv_b(source)?.map(|mut rule| {
        rule.pattern = regex::Regex::new(&format!(r"{prefix}(?<x>self_attn)\.kv_b_proj\.weight$"))
            .expect("rule patterns are valid");
        for output in &mut rule.outputs {
            output.name = format!("mtp.{}", output.name).into();
        }
        rule
    });
    Ok(Architecture::with_layers("glm_moe_dsa_mtp", 0, &linears.concat())
        .rules([
            // Its target's, and what is made anew.
            drop(&format!(r"{prefix}(embed_tokens|shared_head\.head)\.|{prefix}.*rotary_emb\.inv_freq$")),
            make(&format!(r"{prefix}shared_head\.norm\.weight$"), [("mtp.shared_head_norm.weight", vec![])]),
            stack(&experts, "mtp.mlp.switch_mlp.$p.weight"),
        ])
        .rules(split)
        .rules([make(&format!(r"{prefix}(?<x>.*)$"), [("mtp.$x", vec![])])])
        .keep_dtype(&["e_score_correction_bias"]))
}

fn glm_tensors(config: &Config) -> Result<Vec<String>, ConfigError> {
    if count_or(config, "num_nextn_predict_layers", 1)? > 1 {
        return Err(wrong(
            "num_nextn_predict_layers",
            "is more than 1, and mlx_vlm's glm_moe_dsa_mtp has one layer",
        ));
    }
    let attention = [
        "q_a_proj",
        "q_a_layernorm",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_a_layernorm",
        "embed_q",
        "unembed_out",
        "o_proj",
        "indexer.wq_b",
        "indexer.wk",
        "indexer.k_norm",
        "indexer.weights_proj",
    ];
    let around =
        ["enorm", "hnorm", "eh_proj", "input_layernorm", "post_attention_layernorm", "shared_head_norm"];
    let network = ["gate"].into_iter().chain(EXPERTS).chain(SHARED_EXPERTS);
    let names = around.into_iter().map(str::to_owned);
    let names = names.chain(attention.map(|name| format!("self_attn.{name}")));
    let names = names.chain(network.map(|name| format!("mlp.{name}")));
    let names = names.map(|name| format!("mtp.{name}.weight"));
    let beside = ["mtp.self_attn.indexer.k_norm.bias", "mtp.mlp.gate.e_score_correction_bias"];
    Ok(names.chain(beside.map(str::to_owned)).collect())
}

/// Nemotron's: layers of attention and experts, as the model's own are named.
#[expect(clippy::unnecessary_wraps, reason = "as the names of every type")]
fn nemotron(_: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        &["eh_proj", "mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj"][..],
        &["mixer.switch_mlp.fc1", "mixer.switch_mlp.fc2", "mixer.fc1_latent_proj", "mixer.fc2_latent_proj"],
        &["mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"],
    ];
    let prefix = r"^(language_model\.)?mtp\.";
    let experts = |own: &str, name| {
        stack(&format!(r"{prefix}(?<x>.*\.mixer)\.experts\.(?<e>\d+)\.{own}\.weight$"), name)
    };
    Ok(Architecture::with_layers("nemotron_h_mtp", 0, &linears.concat())
        .rules([
            drop(&format!(r"{prefix}.*\.(k_scale|v_scale)$")),
            experts("up_proj", "$x.switch_mlp.fc1.weight"),
            experts("down_proj", "$x.switch_mlp.fc2.weight"),
            make(&format!(r"{prefix}(?<x>.*)$"), [("$x", vec![])]),
        ])
        .keep_dtype(&["e_score_correction_bias"]))
}

fn nemotron_tensors(config: &Config) -> Result<Vec<String>, ConfigError> {
    const KEY: &str = "mtp_hybrid_override_pattern";
    if count_or(config, "num_nextn_predict_layers", 0)? != 1 {
        return Err(wrong("num_nextn_predict_layers", "is not 1, which mlx_vlm's nemotron_h_mtp asks for"));
    }
    let unknown =
        || wrong(KEY, "does not say of each layer of the head whether it is attention (*) or experts (E)");
    let kinds: Vec<bool> = match (config.get(KEY), config.get("mtp_layers_block_type")) {
        (Some(Value::String(pattern)), _) => pattern
            .chars()
            .map(|kind| matches!(kind, '*' | 'E').then_some(kind == '*').ok_or_else(unknown))
            .collect::<Result<_, _>>()?,
        (None, Some(Value::Array(list))) => list
            .iter()
            .map(|kind| match kind.as_str() {
                Some("attention") => Ok(true),
                Some("moe") => Ok(false),
                _ => Err(unknown()),
            })
            .collect::<Result<_, _>>()?,
        _ => return Err(unknown()),
    };
    let last = at_most(MOST_LAYERS, KEY, kinds.len())?.checked_sub(1).ok_or_else(unknown)?;
    let latent = config.get("moe_latent_size").is_some();
    let shared = config.count("n_shared_experts").is_ok_and(|experts| experts > 0);
    let mut names = Vec::new();
    for (layer, attends) in kinds.into_iter().enumerate() {
        let mut own = vec!["norm"];
        if layer == 0 {
            own.extend(["enorm", "hnorm", "eh_proj"]);
        }
        if layer == last {
            own.push("final_layernorm");
        }
        if attends {
            own.extend(["mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj"]);
        } else {
            own.extend(["mixer.gate", "mixer.switch_mlp.fc1", "mixer.switch_mlp.fc2"]);
            own.extend(["mixer.fc1_latent_proj", "mixer.fc2_latent_proj"].into_iter().filter(|_| latent));
            let both = ["mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"];
            own.extend(both.into_iter().filter(|_| shared));
            names.push(format!("layers.{layer}.mixer.gate.e_score_correction_bias"));
        }
        names.extend(weights(own).map(|name| format!("layers.{layer}.{name}")));
    }
    Ok(names)
}
