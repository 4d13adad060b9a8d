//! Small models and texts, written as a test wants them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::common::mlx_quant;

pub(crate) const HIDDEN: usize = 128;
const INNER: usize = 256;
const VOCABULARY: usize = 512;

/// dtype, shape and bytes of a tensor.
pub(crate) type Held = (&'static str, Vec<usize>, Vec<u8>);

/// A model in the making.
#[derive(Clone)]
pub(crate) struct Made {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Held>,
    pub(crate) files: Vec<(&'static str, String)>,
}

/// bfloat16 that looks random; another seed, other numbers.
pub(crate) fn random(seed: u64, shape: &[usize]) -> Held {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut value = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let value = ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.2;
        ((value.to_bits() >> 16) as u16).to_le_bytes()
    };
    let bytes = (0..shape.iter().product::<usize>()).flat_map(|_| value()).collect();
    ("BF16", shape.to_vec(), bytes)
}

pub(crate) fn ones(count: usize) -> Held {
    ("BF16", vec![count], [0x80, 0x3f].repeat(count))
}

pub(crate) fn raw(dtype: &'static str, shape: &[usize], byte: u8) -> Held {
    let size = match dtype {
        "F32" | "I32" | "U32" => 4,
        "BF16" => 2,
        _ => 1,
    };
    (dtype, shape.to_vec(), vec![byte; shape.iter().product::<usize>() * size])
}

/// A whole llama with a head of its own.
pub(crate) fn llama(layers: usize) -> Made {
    let mut made = Made {
        config: json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
            "tie_word_embeddings": false, "torch_dtype": "bfloat16", "hidden_act": "silu"
        }),
        tensors: BTreeMap::new(),
        files: Vec::new(),
    };
    made.add("model.embed_tokens.weight", random(1, &[VOCABULARY, HIDDEN]));
    for layer in 0..layers {
        made.add_layer(layer);
    }
    made.add("model.norm.weight", ones(HIDDEN));
    made.add("lm_head.weight", random(2, &[VOCABULARY, HIDDEN]));
    made
}

impl Made {
    pub(crate) fn add(&mut self, name: &str, tensor: Held) {
        self.tensors.insert(name.to_owned(), tensor);
    }

    /// One more layer, whatever config.json says.
    pub(crate) fn add_layer(&mut self, layer: usize) {
        let path = |name: &str| format!("model.layers.{layer}.{name}.weight");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            self.add(&path(norm), ones(HIDDEN));
        }
        let matrices = [
            ("self_attn.q_proj", [HIDDEN, HIDDEN]),
            ("self_attn.k_proj", [HIDDEN / 2, HIDDEN]),
            ("self_attn.v_proj", [HIDDEN / 2, HIDDEN]),
            ("self_attn.o_proj", [HIDDEN, HIDDEN]),
            ("mlp.gate_proj", [INNER, HIDDEN]),
            ("mlp.up_proj", [INNER, HIDDEN]),
            ("mlp.down_proj", [HIDDEN, INNER]),
        ];
        for (index, (name, shape)) in matrices.into_iter().enumerate() {
            self.add(&path(name), random(10 + 100 * layer as u64 + index as u64, &shape));
        }
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        assert!(self.tensors.remove(name).is_some(), "{name} was there");
        self
    }

    pub(crate) fn with(mut self, name: &str, tensor: Held) -> Self {
        self.add(name, tensor);
        self
    }

    pub(crate) fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    pub(crate) fn unset(mut self, key: &str) -> Self {
        self.config.as_object_mut().unwrap().remove(key);
        self
    }

    pub(crate) fn file(mut self, name: &'static str, content: impl ToString) -> Self {
        self.files.push((name, content.to_string()));
        self
    }

    /// With every name changed.
    pub(crate) fn renamed(mut self, rename: impl Fn(&str) -> String) -> Self {
        self.tensors = self.tensors.into_iter().map(|(name, held)| (rename(&name), held)).collect();
        self
    }

    /// Everything but the weights.
    fn write_small(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("config.json"), self.config.to_string()).unwrap();
        tokenizer(directory);
        for (name, content) in &self.files {
            std::fs::write(directory.join(name), content).unwrap();
        }
    }

    pub(crate) fn write(&self, directory: &Path) -> PathBuf {
        self.write_small(directory);
        save(&directory.join("model.safetensors"), &self.tensors);
        directory.to_owned()
    }

    /// In files of these names, tensors dealt out in turn, with an index that names `said` instead of them.
    pub(crate) fn write_shards(&self, directory: &Path, names: &[&str], said: &[&str]) -> PathBuf {
        self.write_small(directory);
        let mut map = Map::new();
        for (index, name) in self.tensors.keys().enumerate() {
            map.insert(name.clone(), said[index % said.len()].into());
        }
        for (at, file) in names.iter().enumerate() {
            let part = self.tensors.iter().enumerate().filter(|(index, _)| index % names.len() == at);
            save(
                &directory.join(file),
                &part.map(|(_, (name, held))| (name.clone(), held.clone())).collect(),
            );
        }
        let index = json!({"metadata": {}, "weight_map": map});
        std::fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
        directory.to_owned()
    }
}

/// The tokenizer of the zoo's checkpoints: 512 tokens, no chat template.
pub(crate) fn tokenizer(directory: &Path) {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/fixtures/zoo/llama_tied");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(zoo.join(file), directory.join(file)).unwrap();
    }
}

pub(crate) fn save(path: &Path, tensors: &BTreeMap<String, Held>) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        let range = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": range}));
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(path, file).unwrap();
}

/// Name to dtype, shape and bytes of all tensors of a directory.
pub(crate) fn read(directory: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let mut tensors = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "safetensors")
            || path.ends_with("oracle.safetensors")
        {
            continue;
        }
        let bytes = std::fs::read(path).unwrap();
        let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        for (name, entry) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
            let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
            let shape = entry["shape"].as_array().unwrap().iter().map(number).collect();
            let (start, end) = (number(&entry["data_offsets"][0]), number(&entry["data_offsets"][1]));
            let held = bytes[8 + length + start..8 + length + end].to_vec();
            tensors.insert(name, (entry["dtype"].as_str().unwrap().to_owned(), shape, held));
        }
    }
    tensors
}

/// config.json of a directory.
pub(crate) fn config(directory: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(directory.join("config.json")).unwrap()).unwrap()
}

/// How a run ended.
pub(crate) struct Ran {
    pub(crate) code: i32,
    /// stdout and stderr.
    pub(crate) text: String,
    /// Where its output would be.
    pub(crate) out: PathBuf,
}

/// Runs a command on `model`; `{out}` in the arguments stands for a directory that is not there yet.
pub(crate) fn run(arguments: &str, model: &Path) -> Ran {
    let mut out = model.as_os_str().to_owned();
    out.push(".out");
    let out = PathBuf::from(out);
    let _ = std::fs::remove_dir_all(&out);
    let words = arguments.split(' ').map(|word| match word {
        "{model}" => model.as_os_str().to_owned(),
        "{out}" => out.as_os_str().to_owned(),
        word => word.into(),
    });
    let output = mlx_quant().args(words).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    Ran { code: output.status.code().unwrap(), text, out }
}

pub(crate) const CONVERT: &str = "convert -q --model {model} --mlx-path {out}";

/// Runs a command that must refuse: exit code 2, nothing written, and a message that says all of `says` and what to do.
#[track_caller]
pub(crate) fn refused(arguments: &str, model: &Path, says: &[&str]) -> String {
    let ran = run(arguments, model);
    assert_eq!(ran.code, 2, "{}: {}", model.display(), ran.text);
    for word in says.iter().chain(&["hint: "]) {
        assert!(ran.text.contains(word), "{}: {word:?} is not in: {}", model.display(), ran.text);
    }
    let parent = ran.out.parent().unwrap();
    let name = ran.out.file_name().unwrap().to_string_lossy().into_owned();
    let left = std::fs::read_dir(parent)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let left: Vec<String> = left.filter(|entry| entry.contains(&name)).collect();
    assert!(left.is_empty(), "{}: left behind: {left:?}", model.display());
    ran.text
}

/// Runs a command that must succeed, and gives its output directory and what it said.
#[track_caller]
pub(crate) fn done(arguments: &str, model: &Path) -> (PathBuf, String) {
    let ran = run(arguments, model);
    assert_eq!(ran.code, 0, "{}: {}", model.display(), ran.text);
    (ran.out, ran.text)
}

/// A checkpoint of the zoo, changed.
pub(crate) fn damaged(at: &Path, zoo: &str, change: impl FnOnce(&mut Made)) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/fixtures/zoo").join(zoo);
    let index: Option<Value> = std::fs::read(source.join("model.safetensors.index.json"))
        .ok()
        .map(|bytes| serde_json::from_slice(&bytes).unwrap());
    let named = |name: &str| index.as_ref().is_none_or(|index| index["weight_map"].get(name).is_some());
    let mut made = Made { config: config(&source), tensors: BTreeMap::new(), files: Vec::new() };
    for (name, (dtype, shape, bytes)) in read(&source) {
        if named(&name) {
            let known = ["BF16", "F32", "F16", "U8", "BOOL", "U32", "I32", "I64", "F8_E4M3"];
            made.add(&name, (known.into_iter().find(|known| *known == dtype).unwrap(), shape, bytes));
        }
    }
    change(&mut made);
    let number = std::fs::read_dir(at).unwrap().count();
    made.write(&at.join(format!("{zoo}-{number}")))
}
