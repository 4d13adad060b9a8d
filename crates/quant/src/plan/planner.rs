//! Named tensors to items, output tensors and config, one at a time.

use std::collections::{BTreeSet, HashMap};

use mlx_format::checkpoint::{Config, Layout, SHARD_BYTES, TensorSpec};
use mlx_format::{Dtype, FloatType, Mode, Scheme};
use serde_json::{Map, Value};

use super::check::target_dtype;
use super::end_of_turn::EndOfTurn;
use super::ids::Paths;
use super::mixed::Mixed;
use super::{Item, Job, Plan, PlanError, Settings};
use crate::parameters::OuterModules;
use mlx_quant_model::{Architecture, Existing, Named, SourceError, View, arch, without_numbers};

/// A linear or embedding layer's decision.
enum Decision {
    Keep { listed: bool },
    Quantize { scheme: Scheme, entry: Option<Value> },
}

pub(super) struct Planner {
    architecture: Architecture,
    existing: Existing,
    settings: Settings,
    target: Option<FloatType>,
    tensors: Vec<(String, Option<View>)>,
    /// Position of a name among the tensors.
    positions: HashMap<String, usize>,
    modules: OuterModules,
    mixed: Option<Mixed>,
    items: Vec<Item>,
    specs: Vec<TensorSpec>,
    parameters: u64,
    entries: Map<String, Value>,
    undivided: Vec<(String, usize)>,
    quantized: usize,
    notes: Vec<String>,
    /// Inputs of linears by path, where the decoder tells.
    columns: HashMap<String, usize>,
    untied: bool,
}

impl Planner {
    pub(super) fn new(named: Named, settings: Settings, config: &Config) -> Result<Self, PlanError> {
        let columns = named.tensors.iter().filter_map(|(name, _)| {
            let path = name.strip_suffix(".weight")?;
            Some((path.to_owned(), named.columns(path)?))
        });
        let columns = columns.collect();
        let Named { architecture, existing, tensors, dropped, undescribed, untied, notes: found, .. } = named;
        let target = if settings.keep_dtypes { None } else { target_dtype(&settings, config) };
        if tensors.is_empty() {
            return Err(PlanError::NoTensors { dropped: dropped.len() });
        }
        let mut notes = found;
        if !architecture.described {
            notes.push(format!(
                "model type {:?} has no description here: every two-dimensional *.weight that is not a norm, a router or part of a \
                 tower is taken for a linear or embedding layer, names stay as they are; check that mlx_lm loads the result",
                config.model_type()?
            ));
        }
        if let Some(reason) = undescribed {
            notes
                .push(format!("{reason}: whether all tensors are there, each of its shape, was not checked"));
        }
        let (towers, others): (Vec<&String>, Vec<&String>) =
            dropped.iter().partition(|name| architecture.is_tower(name));
        if !towers.is_empty() {
            notes.push(format!(
                "{} tensors of vision or audio ({}, ...) are dropped, as mlx_lm drops them: the output is the language model alone",
                towers.len(),
                towers[0]
            ));
        }
        if !others.is_empty() {
            notes.push(format!("{} tensors that MLX does not load are dropped", others.len()));
        }
        let mut planner = Self {
            architecture,
            existing,
            settings,
            target,
            modules: OuterModules::of(tensors.iter().map(|(name, _)| name.as_str())),
            positions: tensors.iter().enumerate().map(|(index, (name, _))| (name.clone(), index)).collect(),
            tensors: tensors.into_iter().map(|(name, view)| (name, Some(view))).collect(),
            mixed: None,
            items: Vec::new(),
            specs: Vec::new(),
            parameters: 0,
            entries: Map::new(),
            undivided: Vec::new(),
            quantized: 0,
            notes,
            columns,
            untied,
        };
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

    pub(super) fn finish(mut self, config: &Config, eos: EndOfTurn) -> Result<Plan, PlanError> {
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
        let mut config = self.output_config(config);
        let EndOfTurn { value, generation_config, notes } = eos;
        self.notes.extend(notes);
        if let Some(value) = value {
            config.0.insert("eos_token_id".to_owned(), value);
        }
        let Self { architecture, settings, items, specs, parameters, mut notes, .. } = self;
        notes.extend(unquantized(&items, &specs, parameters));
        let layout = Layout::new(specs, SHARD_BYTES);
        let paths = Paths::of(&items);
        Ok(Plan {
            architecture,
            items,
            layout,
            config,
            generation_config,
            parameters,
            notes,
            settings,
            paths,
        })
    }

    fn push(&mut self, name: &str, job: Job, specs: impl IntoIterator<Item = TensorSpec>) {
        self.items.push(Item { name: name.to_owned(), job, first_output: self.specs.len() });
        self.specs.extend(specs);
    }

    /// The dtype of a floating tensor in the output.
    fn cast(&self, name: &str, dtype: Dtype) -> Option<FloatType> {
        let float = FloatType::from_dtype(dtype)?;
        if self.architecture.float32.iter().any(|end| name.ends_with(end)) {
            return Some(FloatType::F32);
        }
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
        let float = float.filter(|_| dtype != view.dtype || view.change.is_some());
        self.push(name, Job::Copy { view, float }, [spec]);
        Ok(())
    }

    fn plain_tensor(&mut self, name: &str, path: Option<&str>, view: View) -> Result<(), PlanError> {
        self.parameters += self.modules.plain(name, view.elements());
        let axes = view.shape().len();
        let linear = path.is_some_and(|path| self.architecture.is_linear(path, axes));
        if !linear && !self.architecture.has_place(name, axes) {
            let family = self.architecture.family;
            return Err(PlanError::Unknown { tensor: name.to_owned(), shape: view.shape(), family });
        }
        let (Some(path), Some(base)) = (path, self.settings.quantize) else { return self.copy(name, view) };
        let float = self.cast(name, view.dtype);
        let (true, Some(float)) = (linear, float) else {
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
        if let Some(&scheme) = self.settings.schemes.get(path)
            && scheme.divides(columns)
        {
            let entry = (scheme != base || self.existing.packed().is_some()).then(|| entry(scheme));
            return Ok(Decision::Quantize { scheme, entry });
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
        if self.architecture.is_unquantized(path) {
            return Ok(Decision::Keep { listed: false });
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
        let row = (weight.columns(), scales.columns());
        let scheme = self.existing.scheme(path, row, scales.dtype, self.columns.get(path).copied())?;
        if !alike || biases.is_some() != scheme.has_biases() {
            let biases = biases.as_ref().map(of);
            return Err(SourceError::Packed {
                path: path.to_owned(),
                weight: of(&weight),
                scales: of(&scales),
                biases,
            }
            .into());
        }
        let mut shape = weight.shape();
        if let Some(columns) = shape.last_mut() {
            *columns = scales.columns() * scheme.group_size();
        }
        self.parameters += OuterModules::packed(&shape);
        if !self.settings.dequantize {
            self.settle_entry(path, scheme);
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

    /// Puts the scheme that a packed layer really has in the place of an entry that says something else: mlx_lm believes it.
    fn settle_entry(&mut self, path: &str, scheme: Scheme) {
        let (Existing::Mlx(map) | Existing::HubMx(map)) = &mut self.existing else { return };
        let Some(said) = map.get(path) else { return };
        let right = match said {
            Value::Bool(true) => true,
            Value::Object(fields) => {
                let known =
                    |key: &String| matches!(key.as_str(), "bits" | "group_size" | "mode" | "global_scale");
                !fields.is_empty()
                    && fields.keys().all(known)
                    && mlx_quant_model::listed(fields) == Some(scheme)
            }
            _ => false,
        };
        if right {
            return;
        }
        self.notes.push(format!(
            "config.json says {said} of {path}, which is packed as {scheme}: that is written instead"
        ));
        map.insert(path.to_owned(), entry(scheme));
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

    /// Whether parts that see or hear are carried along, which need their settings.
    fn keeps_tower(&self) -> bool {
        self.items.iter().any(|item| self.architecture.is_tower(&item.name))
    }

    /// config.json as mlx-lm writes it (`mlx_lm/utils.py`, `quantize_model` and `save_config`).
    fn output_config(&mut self, config: &Config) -> Config {
        let mut config = arch::settled(config);
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
        if self.existing == Existing::None {
            config.0.shift_remove("compression_config");
        }
        if let Some(Value::Object(text)) = config.0.get_mut("text_config") {
            for key in ["quantization_config", "quantization"] {
                text.shift_remove(key);
            }
            if self.untied {
                text.insert("tie_word_embeddings".to_owned(), false.into());
            }
        } else if self.untied {
            config.0.insert("tie_word_embeddings".to_owned(), false.into());
        }
        if !self.keeps_tower() {
            config.0.shift_remove("vision_config");
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

/// Says so if a good part of a quantized model's bytes is not quantized, and what they are.
fn unquantized(items: &[Item], specs: &[TensorSpec], parameters: u64) -> Option<String> {
    const MOST: f64 = 0.2;
    const SHOWN: usize = 3;
    if !items.iter().any(|item| matches!(item.job, Job::Quantize { .. })) {
        return None;
    }
    let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
    let mut kinds: HashMap<String, u64> = HashMap::new();
    for item in items.iter().filter(|item| matches!(item.job, Job::Copy { .. })) {
        let spec = &specs[item.first_output];
        // What the source has packed is copied, too.
        if FloatType::from_dtype(spec.dtype).is_some()
            && !item.name.ends_with(".scales")
            && !item.name.ends_with(".biases")
        {
            *kinds.entry(without_numbers(&item.name)).or_default() += spec.bytes();
        }
    }
    let plain: u64 = kinds.values().sum();
    if plain as f64 <= MOST * total as f64 {
        return None;
    }
    let mut kinds: Vec<(String, u64)> = kinds.into_iter().collect();
    kinds.sort_by(|left, right| right.1.cmp(&left.1).then_with(|| left.0.cmp(&right.0)));
    let named: Vec<String> = kinds
        .iter()
        .take(SHOWN)
        .map(|(name, bytes)| format!("{name}: {}", crate::numbers::bytes(*bytes)))
        .collect();
    let more = if kinds.len() > SHOWN { ", ..." } else { "" };
    Some(format!(
        "{:.0} % of the bytes stay unquantized, which makes {:.2} bits per weight ({}{more})",
        100.0 * plain as f64 / total as f64,
        crate::parameters::bits_per_weight(total, parameters),
        named.join(", ")
    ))
}
