//! The plan: every output tensor, its scheme and its place, known from headers alone.
//!
//! `--dry-run` prints a plan and stops; [`crate::convert`] carries one out. Everything that can be wrong with a
//! source or with settings is found here, before any work.

mod existing;
mod mixed;
mod names;
mod overrides;
mod report;

use std::collections::{BTreeSet, HashMap};

use mlx_format::checkpoint::{Checkpoint, Config, ConfigError, Layout, SHARD_BYTES, TensorSpec};
use mlx_format::{Dtype, FloatType, Mode, Scheme, SchemeError};
use serde_json::{Map, Value};

pub use self::mixed::MixedRecipe;
pub use self::overrides::{Overrides, OverridesError};
pub use self::report::{LayerReport, PlanReport};

use self::existing::Existing;
use self::mixed::Mixed;
use crate::arch::{self, Architecture, Source};
use crate::view::View;

/// What is to be done with a model.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Quantize with this scheme.
    pub quantize: Option<Scheme>,
    /// With a mixed-bit recipe (affine; its bits replace those of the scheme).
    pub mixed: Option<MixedRecipe>,
    /// Per-layer settings.
    pub overrides: Option<Overrides>,
    /// Decode an MLX-quantized model.
    pub dequantize: bool,
    /// dtype of what is not quantized, and of scales and biases; default: config.json's `torch_dtype`.
    pub dtype: Option<FloatType>,
    /// Store NaN and infinity as MLX does instead of refusing them.
    pub allow_nonfinite: bool,
}

/// A source or settings that cannot be converted; found before any work.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum PlanError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Scheme(#[from] SchemeError),
    #[error("recipe file: {0}")]
    Overrides(#[from] OverridesError),
    #[error("quantize and dequantize exclude each other; hint: choose one of -q and -d")]
    Both,
    #[error(
        "the source is already quantized ({0}); quantizing it again would only lose quality; hint: quantize the original model, or decode this one first (convert -d) and quantize the result"
    )]
    AlreadyQuantized(String),
    #[error("the source is not quantized, there is nothing to decode; hint: leave out -d")]
    NotQuantized,
    #[error(
        "the source is quantized by {method:?}, which cannot be converted; hint: get the original bfloat16 or float16 version of this model"
    )]
    Foreign { method: String },
    #[error("mixed-bit recipes are affine, not {0}; hint: leave out --q-mode or --quant-predicate")]
    MixedMode(&'static str),
    #[error(
        "mixed-bit recipes need layers named down_proj, which this model does not have; hint: leave out --quant-predicate, or set bits per layer with --recipe-file"
    )]
    MixedLayers,
    #[error("a recipe file sets how layers are quantized; hint: add -q")]
    OverridesWithoutQuantize,
    #[error(
        "group size {group_size} divides the input of no layer of this model ({examples}); hint: choose a smaller group size"
    )]
    NothingDivides { group_size: usize, examples: String },
    #[error(
        "layer {path}: input of {columns} does not divide into groups of {group_size} (--recipe-file); hint: choose another group size for it, or keep it"
    )]
    OverrideDivides { path: String, columns: usize, group_size: usize },
    #[error(
        "tensor {tensor} in {file}: {reason}; hint: config.json and weights do not belong together, or the source is packed in an old form: convert the original model"
    )]
    Shape { tensor: String, file: String, reason: String },
    #[error(
        "tensor {source_name} would become {output}, which another tensor becomes as well; hint: the checkpoint holds the same weights twice, remove one copy"
    )]
    Twice { output: String, source_name: String },
    #[error("expert {missing} of {output} is missing ({found} found); hint: download the missing shard")]
    MissingExpert { output: String, missing: usize, found: usize },
    #[error(
        "expert {odd} of {output} is {other:?}, expert 0 {first:?}; hint: experts must be alike, the checkpoint is damaged"
    )]
    UnequalExperts { output: String, odd: usize, first: (Dtype, Vec<usize>), other: (Dtype, Vec<usize>) },
    #[error(
        "fp8 tensor {tensor} (shape {shape:?}) has no {scale} for blocks of {block:?}; hint: get the bfloat16 version of this model"
    )]
    Fp8 { tensor: String, scale: String, shape: Vec<usize>, block: [usize; 2] },
    #[error(
        "layer {path}: {words} words and {groups} groups a row fit no quantization in config.json; hint: the source's config.json is damaged"
    )]
    UnclearScheme { path: String, words: usize, groups: usize },
    #[error(
        "layer {path}: weight {weight:?}, scales {scales:?} and biases {biases:?} do not belong together; hint: the checkpoint is damaged, download it again"
    )]
    Packed {
        path: String,
        weight: (Dtype, Vec<usize>),
        scales: (Dtype, Vec<usize>),
        biases: Option<(Dtype, Vec<usize>)>,
    },
    #[error(
        "layer {missing} of {layers} has no weights; hint: a shard is missing, or config.json belongs to another model"
    )]
    MissingLayer { missing: usize, layers: usize },
    #[error(
        "{directory} holds {found} of the {expected} shards that their names speak of; hint: download the missing ones"
    )]
    MissingShards { directory: String, found: usize, expected: usize },
    #[error(
        "tensor {tensor} (shape {shape:?}) is no part of a {family} model as MLX knows it; hint: get the model in the form that its makers published"
    )]
    Unknown { tensor: String, shape: Vec<usize>, family: &'static str },
    #[error("nothing is left to quantize in this model; hint: leave out -q")]
    NothingToQuantize,
    #[error("tensor {tensor} is {dtype}; hint: language model weights are float32, float16 or bfloat16")]
    Dtype { tensor: String, dtype: Dtype },
}

/// What is done to one tensor or layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Job {
    /// Written as it is, or in another dtype.
    Copy {
        /// The tensor.
        view: View,
        /// Its dtype in the output where it changes (or 1 is added).
        float: Option<FloatType>,
    },
    /// Cast to `float`, then quantized; weight, scales and (affine) biases are written.
    Quantize {
        /// The weight, `[.., out, in]`.
        view: View,
        /// dtype of scales and biases.
        float: FloatType,
        /// How.
        scheme: Scheme,
    },
    /// Decoded from packed form.
    Dequantize {
        /// uint32 codes.
        weight: View,
        /// Scales.
        scales: View,
        /// Biases, affine only.
        biases: Option<View>,
        /// dtype of the result (affine scales and biases are cast to it first, as mlx-lm does).
        float: FloatType,
        /// How it is packed.
        scheme: Scheme,
    },
}

/// One step of the plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Module path for layers, full name for other tensors.
    pub name: String,
    /// What is done.
    pub job: Job,
    /// Index of its first tensor in the layout; the others follow.
    pub first_output: usize,
}

/// A complete plan.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Description of the model type.
    pub architecture: Architecture,
    /// In output order.
    pub items: Vec<Item>,
    /// Files, headers, offsets.
    pub layout: Layout,
    /// config.json of the output.
    pub config: Config,
    /// Weights, as mlx-lm counts them: codes, not scales.
    pub parameters: u64,
    /// What a person should know.
    pub notes: Vec<String>,
    /// The settings it was made from.
    pub settings: Settings,
}

/// A linear or embedding layer's decision.
enum Decision {
    Keep { listed: bool },
    Quantize { scheme: Scheme, entry: Option<Value> },
}

impl Plan {
    /// Plans the conversion of an opened checkpoint. Reads headers and config.json only.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn new(checkpoint: &Checkpoint, config: &Config, settings: Settings) -> Result<Self, PlanError> {
        let existing = Existing::of(config)?;
        check_settings(&settings, &existing)?;
        let architecture = arch::describe(Source { config, tensors: checkpoint.tensors() })?;
        let block = if let Existing::Fp8 { block } = existing { Some(block) } else { None };
        check_shards(checkpoint)?;
        let named = names::apply(&architecture, checkpoint, block)?;
        check_layers(&architecture, named.tensors.iter().map(|(name, _)| name.as_str()))?;
        Planner::new(architecture, existing, settings, config, named)?.finish(config)
    }

    /// Stored bits per weight of the whole model, as mlx-lm counts them.
    pub fn bits_per_weight(&self) -> f64 {
        self.layout.tensor_bytes() as f64 * 8.0 / self.parameters.max(1) as f64
    }

    /// Bytes read from the source.
    pub fn input_bytes(&self) -> u64 {
        self.items
            .iter()
            .map(|item| item.views().map(|view| (view.rows() * view.row_bytes()) as u64).sum::<u64>())
            .sum()
    }
}

impl Item {
    /// All views it reads.
    pub fn views(&self) -> impl Iterator<Item = &View> {
        let (first, second, third) = match &self.job {
            Job::Copy { view, .. } | Job::Quantize { view, .. } => (view, None, None),
            Job::Dequantize { weight, scales, biases, .. } => (weight, Some(scales), biases.as_ref()),
        };
        std::iter::once(first).chain(second).chain(third)
    }
}

fn check_settings(settings: &Settings, existing: &Existing) -> Result<(), PlanError> {
    match (settings.quantize, settings.dequantize) {
        (Some(_), true) => return Err(PlanError::Both),
        (None, true) if existing.packed().is_none() => return Err(PlanError::NotQuantized),
        _ => {}
    }
    if let (Some(_), Existing::Mlx(map)) = (settings.quantize, existing) {
        let what = |key: &str| map.get(key).map_or("?".to_owned(), Value::to_string);
        return Err(PlanError::AlreadyQuantized(format!(
            "{} bits, group size {}",
            what("bits"),
            what("group_size")
        )));
    }
    if settings.overrides.is_some() && settings.quantize.is_none() {
        return Err(PlanError::OverridesWithoutQuantize);
    }
    match (settings.mixed, settings.quantize) {
        (Some(_), Some(scheme)) if scheme.mode() != Mode::Affine => {
            Err(PlanError::MixedMode(scheme.mode().name()))
        }
        _ => Ok(()),
    }
}

/// Without an index, shards that call themselves one of several must all be there.
fn check_shards(checkpoint: &Checkpoint) -> Result<(), PlanError> {
    let expected =
        |name: &str| name.strip_suffix(".safetensors")?.rsplit_once("-of-")?.1.parse::<usize>().ok();
    let found = checkpoint.shards().count();
    match checkpoint.shards().filter_map(expected).max() {
        Some(expected) if expected > found => {
            let directory = checkpoint.directory().display().into_owned();
            Err(PlanError::MissingShards { directory, found, expected })
        }
        _ => Ok(()),
    }
}

/// Every layer of a described model must have some weights.
fn check_layers<'n>(
    architecture: &Architecture,
    names: impl Iterator<Item = &'n str>,
) -> Result<(), PlanError> {
    let layer = |name: &'n str| {
        let mut segments = name.split('.');
        segments.find(|segment| matches!(*segment, "layers" | "h"))?;
        segments.next()?.parse::<usize>().ok()
    };
    let found: BTreeSet<usize> = names.filter_map(layer).collect();
    let layers = architecture.layers;
    // At most one step more than there are layers with weights.
    match (0..layers).find(|layer| !found.contains(layer)) {
        Some(missing) if architecture.described => Err(PlanError::MissingLayer { missing, layers }),
        _ => Ok(()),
    }
}

/// The dtype everything is cast to: the flag, else `torch_dtype`, else `text_config.dtype`
/// (`mlx_lm/convert.py`; a top-level `dtype` is not consulted there).
fn target_dtype(settings: &Settings, config: &Config) -> Option<FloatType> {
    let nested = config.0.get("text_config").and_then(|text| text.get("dtype"));
    let named = config.0.get("torch_dtype").filter(|value| !value.is_null()).or(nested);
    settings.dtype.or_else(|| named.and_then(Value::as_str).and_then(FloatType::from_name))
}

struct Planner {
    architecture: Architecture,
    existing: Existing,
    settings: Settings,
    target: Option<FloatType>,
    tensors: Vec<(String, Option<View>)>,
    /// Position of a name among the tensors.
    positions: HashMap<String, usize>,
    /// Modules that hold other modules.
    inner: BTreeSet<String>,
    mixed: Option<Mixed>,
    items: Vec<Item>,
    specs: Vec<TensorSpec>,
    parameters: u64,
    entries: Map<String, Value>,
    undivided: Vec<(String, usize)>,
    quantized: usize,
    notes: Vec<String>,
}

impl Planner {
    fn new(
        architecture: Architecture,
        existing: Existing,
        settings: Settings,
        config: &Config,
        named: names::Named,
    ) -> Result<Self, PlanError> {
        let target = target_dtype(&settings, config);
        let mut notes = Vec::new();
        if !architecture.described {
            notes.push(format!(
                "model type {:?} has no description here: every two-dimensional *.weight that is not a norm or a router is \
                 taken for a linear or embedding layer, names stay as they are; check that mlx_lm loads the result",
                config.model_type()?
            ));
        }
        if !named.dropped.is_empty() {
            notes.push(format!("{} tensors that MLX does not load are dropped", named.dropped.len()));
        }
        let mut planner = Self {
            architecture,
            existing,
            settings,
            target,
            positions: named
                .tensors
                .iter()
                .enumerate()
                .map(|(index, (name, _))| (name.clone(), index))
                .collect(),
            tensors: named.tensors.into_iter().map(|(name, view)| (name, Some(view))).collect(),
            inner: BTreeSet::new(),
            mixed: None,
            items: Vec::new(),
            specs: Vec::new(),
            parameters: 0,
            entries: Map::new(),
            undivided: Vec::new(),
            quantized: 0,
            notes,
        };
        for (name, _) in &planner.tensors {
            // The module that holds the tensor is itself held by all modules above it.
            let mut path = name.rsplit_once('.').map_or("", |(module, _)| module);
            while let Some((outer, _)) = path.rsplit_once('.') {
                if !planner.inner.insert(outer.to_owned()) {
                    break;
                }
                path = outer;
            }
        }
        if let (Some(recipe), Some(scheme)) = (planner.settings.mixed, planner.settings.quantize) {
            let layers = planner.architecture.layers;
            let mixed = Mixed::new(recipe, scheme.group_size(), layers, planner.linear_paths())?;
            planner.mixed = Some(mixed.ok_or(PlanError::MixedLayers)?);
        }
        if let Some(overrides) = &planner.settings.overrides {
            // What the source has packed stays as it is.
            let open = |path: &&str| !planner.positions.contains_key(&format!("{path}.scales"));
            let open: Vec<&str> = planner.linear_paths().filter(open).collect();
            overrides.check_used(open.into_iter())?;
        }
        Ok(planner)
    }

    fn linear_paths(&self) -> impl Iterator<Item = &str> + Clone {
        self.tensors.iter().filter_map(|(name, view)| {
            let path = name.strip_suffix(".weight")?;
            self.architecture.is_linear(path, view.as_ref()?.shape().len()).then_some(path)
        })
    }

    /// Takes a tensor out of the list.
    fn take(&mut self, name: &str) -> Option<View> {
        self.positions.get(name).and_then(|index| self.tensors[*index].1.take())
    }

    fn finish(mut self, config: &Config) -> Result<Plan, PlanError> {
        let packed: BTreeSet<String> = self
            .tensors
            .iter()
            .filter_map(|(name, _)| name.strip_suffix(".scales").map(str::to_owned))
            .collect();
        for index in 0..self.tensors.len() {
            // Scales and biases are taken along with their weight.
            let (name, Some(view)) = (self.tensors[index].0.clone(), self.tensors[index].1.take()) else {
                continue;
            };
            let path = name.strip_suffix(".weight");
            match path.filter(|path| packed.contains(*path) && view.dtype == Dtype::U32) {
                Some(path) => self.packed_layer(path, view)?,
                None if packed.contains(name.rsplit_once('.').map_or("", |(path, _)| path))
                    && !name.ends_with(".bias") =>
                {
                    // Met before its weight: scales and biases sort first.
                    self.tensors[index].1 = Some(view);
                }
                None => self.plain_tensor(&name, path, view)?,
            }
        }
        for index in 0..self.tensors.len() {
            if let Some(view) = self.tensors[index].1.take() {
                let name = self.tensors[index].0.clone();
                self.copy(&name, view)?;
            }
        }
        self.check_divided()?;
        let config = self.output_config(config);
        let Self { architecture, settings, items, specs, parameters, notes, .. } = self;
        let layout = Layout::new(specs, SHARD_BYTES);
        Ok(Plan { architecture, items, layout, config, parameters, notes, settings })
    }

    fn push(&mut self, name: &str, job: Job, specs: impl IntoIterator<Item = TensorSpec>) {
        self.items.push(Item { name: name.to_owned(), job, first_output: self.specs.len() });
        self.specs.extend(specs);
    }

    /// The dtype of a floating tensor in the output.
    fn cast(&self, name: &str, dtype: Dtype) -> Option<FloatType> {
        let float = FloatType::from_dtype(dtype)?;
        let kept = self.architecture.keep_dtype.iter().any(|part| name.contains(part));
        Some(if kept { float } else { self.target.unwrap_or(float) })
    }

    fn copy(&mut self, name: &str, view: View) -> Result<(), PlanError> {
        if matches!(view.dtype, Dtype::F64 | Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F4) {
            return Err(PlanError::Dtype { tensor: name.to_owned(), dtype: view.dtype });
        }
        let float = self.cast(name, view.dtype);
        let dtype = float.map_or(view.dtype, FloatType::dtype);
        let spec = TensorSpec { name: name.to_owned(), dtype, shape: view.shape() };
        let float = float.filter(|_| dtype != view.dtype || view.add_one);
        self.push(name, Job::Copy { view, float }, [spec]);
        Ok(())
    }

    fn plain_tensor(&mut self, name: &str, path: Option<&str>, view: View) -> Result<(), PlanError> {
        // mlx-lm counts the parameters of innermost modules only (`mlx_lm/utils.py`, `get_total_parameters`).
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        if !self.inner.contains(module) {
            self.parameters += view.elements() as u64;
        }
        // Parameters of a described model that are no layer's weight or bias are vectors.
        let leaf = name.rsplit('.').next().unwrap_or(name);
        if self.architecture.described && view.shape().len() > 1 && !matches!(leaf, "weight" | "bias") {
            let family = self.architecture.family;
            return Err(PlanError::Unknown { tensor: name.to_owned(), shape: view.shape(), family });
        }
        let (Some(path), Some(base)) = (path, self.settings.quantize) else { return self.copy(name, view) };
        let float = self.cast(name, view.dtype);
        let (true, Some(float)) = (self.architecture.is_linear(path, view.shape().len()), float) else {
            return self.copy(name, view);
        };
        if view.elements() == 0 {
            return self.copy(name, view);
        }
        match self.decide(path, view.columns(), base)? {
            Decision::Keep { listed } => {
                if listed {
                    self.entries.insert(path.to_owned(), false.into());
                }
                self.copy(name, view)
            }
            Decision::Quantize { scheme, entry } => {
                if let Some(entry) = entry {
                    self.entries.insert(path.to_owned(), entry);
                }
                self.quantized += 1;
                let specs = packed_specs(path, &view.shape(), scheme, float);
                self.push(path, Job::Quantize { view, float, scheme }, specs);
                Ok(())
            }
        }
    }

    /// mlx-lm's order: divisibility by the shared group size, then recipe or else the model's own protection
    /// (`mlx_lm/utils.py`, `quantize_model`). A recipe file comes before all of it.
    fn decide(&mut self, path: &str, columns: usize, base: Scheme) -> Result<Decision, PlanError> {
        let overridden = self.settings.overrides.as_ref().and_then(|overrides| overrides.get(path));
        if let Some(choice) = overridden {
            let Some(scheme) = choice else { return Ok(Decision::Keep { listed: true }) };
            if !scheme.divides(columns) {
                let group_size = scheme.group_size();
                return Err(PlanError::OverrideDivides { path: path.to_owned(), columns, group_size });
            }
            return Ok(Decision::Quantize { scheme, entry: Some(entry(scheme)) });
        }
        if !base.divides(columns) {
            self.undivided.push((path.to_owned(), columns));
            return Ok(Decision::Keep { listed: false });
        }
        if let Some(mixed) = &self.mixed {
            let scheme = mixed.scheme(path);
            return Ok(Decision::Quantize { scheme, entry: Some(entry(scheme)) });
        }
        if let Some(protected) = self.architecture.protection(path) {
            let scheme = Scheme::affine(protected.bits, protected.group_size)?;
            if !scheme.divides(columns) {
                self.undivided.push((path.to_owned(), columns));
                return Ok(Decision::Keep { listed: false });
            }
            let mut object = Map::new();
            object.insert("group_size".to_owned(), protected.group_size.into());
            object.insert("bits".to_owned(), protected.bits.into());
            return Ok(Decision::Quantize { scheme, entry: Some(object.into()) });
        }
        // A partly packed source says in its shared object how the packed parts are made.
        let entry = self.existing.packed().map(|_| entry(base));
        Ok(Decision::Quantize { scheme: base, entry })
    }

    /// A layer that is packed in the source: decoded, or copied.
    fn packed_layer(&mut self, path: &str, weight: View) -> Result<(), PlanError> {
        let name = |leaf: &str| format!("{path}.{leaf}");
        let (Some(scales), biases) = (self.take(&name("scales")), self.take(&name("biases"))) else {
            return self.copy(&name("weight"), weight);
        };
        let outer = |view: &View| view.shape().split_last().map(|(_, outer)| outer.to_vec());
        let of = |view: &View| (view.dtype, view.shape());
        let alike = weight.shape().len() >= 2
            && outer(&weight) == outer(&scales)
            && biases.as_ref().is_none_or(|biases| of(biases) == of(&scales));
        let scheme = self.existing.scheme(path, weight.columns(), scales.columns(), scales.dtype)?;
        if !alike || biases.is_some() != scheme.has_biases() {
            let biases = biases.as_ref().map(of);
            return Err(PlanError::Packed {
                path: path.to_owned(),
                weight: of(&weight),
                scales: of(&scales),
                biases,
            });
        }
        let mut shape = weight.shape();
        if let Some(columns) = shape.last_mut() {
            *columns = scales.columns() * scheme.group_size();
        }
        self.parameters += shape.iter().product::<usize>() as u64;
        if !self.settings.dequantize {
            self.copy(&name("weight"), weight)?;
            self.copy(&name("scales"), scales)?;
            return biases.map_or(Ok(()), |biases| self.copy(&name("biases"), biases));
        }
        let float = match scheme.mode() {
            Mode::Affine => {
                let dtype = scales.dtype;
                self.cast(&name("scales"), dtype).ok_or(PlanError::Dtype { tensor: name("scales"), dtype })?
            }
            _ => self.target.unwrap_or(FloatType::Bf16),
        };
        let spec = TensorSpec { name: name("weight"), dtype: float.dtype(), shape };
        self.push(path, Job::Dequantize { weight, scales, biases, float, scheme }, [spec]);
        Ok(())
    }

    fn check_divided(&mut self) -> Result<(), PlanError> {
        let Some(base) = self.settings.quantize else { return Ok(()) };
        if self.undivided.is_empty() {
            return if self.quantized == 0 { Err(PlanError::NothingToQuantize) } else { Ok(()) };
        }
        let list = |count: usize| {
            let named: Vec<String> = self
                .undivided
                .iter()
                .take(count)
                .map(|(path, columns)| format!("{path}: {columns}"))
                .collect();
            named.join(", ")
        };
        if self.quantized == 0 {
            return Err(PlanError::NothingDivides { group_size: base.group_size(), examples: list(3) });
        }
        let more = if self.undivided.len() > 3 { ", ..." } else { "" };
        self.notes.push(format!(
            "{} layers stay unquantized, their input does not divide by the group size ({}{more})",
            self.undivided.len(),
            list(3)
        ));
        Ok(())
    }

    /// config.json as mlx-lm writes it (`mlx_lm/utils.py`, `quantize_model` and `save_config`).
    fn output_config(&mut self, config: &Config) -> Config {
        let mut config = config.clone();
        let quantization = match (self.settings.quantize, &self.existing) {
            (Some(base), existing) => {
                let shared = existing.packed().cloned().or_else(|| entry(base).as_object().cloned());
                shared.map(|mut map| {
                    map.extend(std::mem::take(&mut self.entries));
                    map
                })
            }
            (None, existing) if !self.settings.dequantize => existing.packed().cloned(),
            _ => None,
        };
        for key in ["quantization", "quantization_config"] {
            config.0.shift_remove(key);
            if let Some(map) = &quantization {
                config.0.insert(key.to_owned(), map.clone().into());
            }
        }
        if let Some(Value::Object(text)) = config.0.get_mut("text_config")
            && self.existing != Existing::None
        {
            text.shift_remove("quantization_config");
        }
        config
    }
}

/// `{"group_size": .., "bits": .., "mode": ..}`.
fn entry(scheme: Scheme) -> Value {
    let mut map = Map::new();
    map.insert("group_size".to_owned(), scheme.group_size().into());
    map.insert("bits".to_owned(), scheme.bits().into());
    map.insert("mode".to_owned(), scheme.mode().name().into());
    map.into()
}

/// Weight, scales and biases of a layer of `shape` `[.., out, in]`.
fn packed_specs(path: &str, shape: &[usize], scheme: Scheme, float: FloatType) -> Vec<TensorSpec> {
    let (outer, columns) = shape.split_at(shape.len() - 1);
    let spec = |leaf: &str, dtype, last: usize| TensorSpec {
        name: format!("{path}.{leaf}"),
        dtype,
        shape: [outer, &[last]].concat(),
    };
    let groups = scheme.groups(columns[0]);
    let mut specs = vec![
        spec("weight", Dtype::U32, scheme.words(columns[0])),
        spec("scales", scheme.scale_dtype(float), groups),
    ];
    if scheme.has_biases() {
        specs.push(spec("biases", float.dtype(), groups));
    }
    specs
}
