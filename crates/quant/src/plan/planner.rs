//! Named tensors to items, output tensors and config, one at a time.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use mlx_format::checkpoint::{Config, Layout, SHARD_BYTES, TensorSpec};
use mlx_format::{Dtype, FloatType, Mode, Scheme};
use serde_json::{Map, Value};

use super::bulk::unquantized;
use super::check::{takes_over, target_dtype};
use super::decide::{Decision, decide};
use super::end_of_turn::EndOfTurn;
use super::head::repeated;
use super::ids::Paths;
use super::mixed::Mixed;
use super::packed::PackedLayers;
use super::specs::{check_together, entry, packed_specs, settle_entry, spread};
use super::{Item, Job, PackedSource, Plan, PlanError, Settings, Towers};
use crate::parameters::OuterModules;
use mlx_quant_model::{Architecture, Existing, Named, Taken, View, arch};

pub(super) struct Planner {
    architecture: Architecture,
    existing: Existing,
    settings: Settings,
    target: Option<FloatType>,
    tensors: Vec<(String, Option<View>)>,
    /// Where among the tensors those of towers begin.
    first_tower: usize,
    towers: Towers,
    prediction_heads: usize,
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
    packed: PackedLayers,
}

impl Planner {
    pub(super) fn new(named: Named, settings: Settings, config: &Config) -> Result<Self, PlanError> {
        let columns = named.tensors.iter().filter_map(|(name, _)| {
            let path = name.strip_suffix(".weight")?;
            Some((path.to_owned(), named.columns(path)?))
        });
        let columns = columns.collect();
        let packed = PackedLayers::new(&named, &settings);
        let Named {
            architecture,
            existing,
            mut tensors,
            mut towers,
            dropped,
            undescribed,
            untied,
            notes: found,
            ..
        } = named;
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
        let first_tower = tensors.len();
        let repeated = architecture.place.name("lm_head.");
        towers.retain(|(name, _)| !name.starts_with(&repeated));
        let (kept, left_out) = if settings.text_only { (Vec::new(), towers) } else { (towers, Vec::new()) };
        let is_part = |name: &&String| kept.is_empty() && architecture.is_tower(name);
        let (mut unkept, others): (Vec<&String>, Vec<&String>) = dropped.iter().partition(is_part);
        unkept.extend(left_out.iter().map(|(name, _)| name));
        if let Some(first) = unkept.first() {
            notes.push(format!(
                "{} tensors of vision or audio ({first}, ...) are dropped, as mlx_lm drops them: the output is the language model alone",
                unkept.len()
            ));
        }
        let (heads, others): (Vec<&String>, Vec<&String>) =
            others.into_iter().partition(|name| architecture.is_prediction_head(name));
        let prediction_heads = heads.len();
        if let Some(first) = heads.first() {
            notes.push(if settings.mtp {
                format!(
                    "{prediction_heads} tensors of a multi-token-prediction head ({first}, ...) go into a drafter beside the model"
                )
            } else {
                format!(
                    "{prediction_heads} tensors of a multi-token-prediction head ({first}, ...) are dropped: mlx_lm predicts a token at a time; \
                     --mtp keeps heads that mlx_vlm can use"
                )
            });
        }
        if !others.is_empty() {
            notes.push(format!("{} tensors that MLX does not load are dropped", others.len()));
        }
        tensors.extend(kept);
        let mut planner = Self {
            architecture,
            existing,
            settings,
            target,
            modules: OuterModules::of(tensors.iter().map(|(name, _)| name.as_str())),
            positions: tensors.iter().enumerate().map(|(index, (name, _))| (name.clone(), index)).collect(),
            tensors: tensors.into_iter().map(|(name, view)| (name, Some(view))).collect(),
            first_tower,
            towers: Towers::default(),
            prediction_heads,
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
            packed,
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

    /// Whether config.json's shared object is that of layers which the source has packed.
    fn has_packed(&self) -> bool {
        self.existing.packed().is_some() || self.packed.shared.is_some()
    }

    fn linear_paths(&self) -> impl Iterator<Item = &str> + Clone {
        self.tensors[..self.first_tower].iter().filter_map(|(name, view)| {
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
        self.take_all(0..self.first_tower, &packed)?;
        let (items, tensors, weights) = (self.items.len(), self.specs.len(), self.parameters);
        self.take_all(self.first_tower..self.tensors.len(), &packed)?;
        self.repeat_head();
        self.towers = Towers {
            items: self.items.len() - items,
            tensors: self.specs.len() - tensors,
            weights: self.parameters - weights,
            bytes: self.specs[tensors..].iter().map(TensorSpec::bytes).sum(),
        };
        self.check_divided()?;
        let mut config = self.output_config(config);
        let EndOfTurn { value, generation_config, notes } = eos;
        self.notes.extend(notes);
        if let Some(value) = value {
            config.0.insert("eos_token_id".to_owned(), value);
        }
        self.notes.extend(self.packed.notes());
        let Self {
            architecture,
            settings,
            items,
            specs,
            parameters,
            towers,
            prediction_heads,
            mut notes,
            ..
        } = self;
        let language = (&items[..items.len() - towers.items], &specs[..specs.len() - towers.tensors]);
        notes.extend(unquantized(language, parameters - towers.weights));
        let layout = Layout::new(specs, SHARD_BYTES);
        let paths = Paths::of(&items);
        Ok(Plan {
            architecture,
            items,
            layout,
            config,
            generation_config,
            parameters,
            towers,
            prediction_heads,
            drafter: None,
            notes,
            settings,
            paths,
        })
    }

    /// Makes items of these tensors; those at `packed` paths with their scales and biases.
    fn take_all(&mut self, range: Range<usize>, packed: &BTreeSet<String>) -> Result<(), PlanError> {
        for index in range.clone() {
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
                None if index >= self.first_tower => {
                    self.parameters += self.modules.plain(&name, view.elements());
                    self.copy(&name, view)?;
                }
                None => self.plain_tensor(&name, path, view)?,
            }
        }
        for index in range {
            if let Some(view) = self.tensors[index].1.take() {
                let name = self.tensors[index].0.clone();
                self.copy(&name, view)?;
            }
        }
        Ok(())
    }

    fn push(&mut self, name: &str, job: Job, specs: impl IntoIterator<Item = TensorSpec>) {
        self.items.push(Item { name: name.to_owned(), job, first_output: self.specs.len() });
        self.specs.extend(specs);
    }

    /// Writes the table once more as a head, where mlx-vlm wants one and towers are kept.
    fn repeat_head(&mut self) {
        let has_towers = self.first_tower < self.tensors.len();
        let own = |name: &str| self.positions.contains_key(name);
        let Some((table, head)) = repeated(&self.architecture).filter(|_| has_towers) else { return };
        if own(&format!("{head}.weight")) {
            return;
        }
        let columns = self.columns.get(&table).copied().unwrap_or(0);
        for index in 0..self.specs.len() {
            let Some(leaf) = self.specs[index].name.strip_prefix(&format!("{table}.")) else { continue };
            let name = format!("{head}.{leaf}");
            if leaf == "weight" {
                self.parameters += (self.specs[index].shape[0] * columns) as u64;
            }
            let spec = TensorSpec { name: name.clone(), ..self.specs[index].clone() };
            self.push(&name, Job::Repeat { of: index }, [spec]);
        }
        self.entries.extend(self.entries.get(&table).cloned().map(|entry| (head.clone(), entry)));
        if let Existing::Mlx(map) | Existing::HubMx(map) = &mut self.existing {
            map.extend(map.get(&table).cloned().map(|entry| (head, entry)));
        }
    }

    /// The dtype of a floating tensor in the output.
    fn cast(&self, name: &str, dtype: Dtype) -> Option<FloatType> {
        let float = FloatType::from_dtype(dtype)?;
        if self.architecture.float32.iter().any(|end| name.ends_with(end)) {
            return Some(FloatType::F32);
        }
        let kept = self.architecture.keep_dtype.iter().any(|part| name.contains(part));
        let own = || if self.settings.keep_dtypes { float } else { self.packed.usual(name).unwrap_or(float) };
        Some(if kept { float } else { self.target.unwrap_or_else(own) })
    }

    fn copy(&mut self, name: &str, view: View) -> Result<(), PlanError> {
        if matches!(view.dtype, Dtype::F64 | Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F4) {
            return Err(PlanError::Dtype { tensor: name.to_owned(), dtype: view.dtype });
        }
        let float = self.cast(name, view.dtype);
        self.push_copy(name, view, float);
        Ok(())
    }

    /// Copies a tensor, in the dtype of `float` where one is given.
    fn push_copy(&mut self, name: &str, view: View, float: Option<FloatType>) {
        let dtype = float.map_or(view.dtype, FloatType::dtype);
        let spec = TensorSpec { name: name.to_owned(), dtype, shape: view.shape() };
        let float = float.filter(|_| dtype != view.dtype || view.change.is_some());
        self.push(name, Job::Copy { view, float }, [spec]);
    }

    fn plain_tensor(&mut self, name: &str, path: Option<&str>, view: View) -> Result<(), PlanError> {
        if takes_over(&self.settings)
            && let Some((path, taken)) = path.and_then(|path| Some((path, self.packed.take(path)?)))
        {
            self.parameters += OuterModules::packed(&view.shape());
            self.take_over(path, taken);
            return Ok(());
        }
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
        let (mixed, has_packed) = (self.mixed.as_ref(), self.has_packed());
        let columns = view.columns();
        match decide(path, columns, base, &self.settings, &self.architecture, mixed, has_packed)? {
            Decision::Undivided => {
                self.undivided.push((path.to_owned(), columns));
                self.copy(name, view)
            }
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
                if self.settings.packed == PackedSource::Match
                    && let Some(taken) = self.packed.take_if(path, scheme)
                {
                    self.take_over(path, taken);
                    return Ok(());
                }
                self.packed.rounded(path);
                self.quantized += 1;
                let mut specs = packed_specs(path, &view.shape(), scheme, float);
                let experts = self.settings.global_scale && self.architecture.is_experts(path, axes);
                self.entries.extend(spread(path, experts.then(|| view.shape()[0]), scheme, &mut specs));
                self.push(path, Job::Quantize { view, float, scheme }, specs);
                Ok(())
            }
        }
    }

    /// A layer that another quantizer has packed, in MLX's form: scales and biases in the dtype that holds them exactly, or in the
    /// one that is asked for.
    fn take_over(&mut self, path: &str, taken: Taken) {
        let Taken { scheme, weight, scales, biases } = taken;
        self.quantized += 1;
        if self.packed.shared.is_some_and(|shared| shared != scheme) {
            self.entries.insert(path.to_owned(), entry(scheme));
        }
        self.push_copy(&format!("{path}.weight"), weight, None);
        for (leaf, view) in [("scales", Some(scales)), ("biases", biases)] {
            let Some(view) = view else { continue };
            let held = FloatType::from_dtype(view.dtype).filter(|_| scheme.has_biases());
            let asked = held.and(self.settings.dtype);
            if let Some(held) = held {
                self.packed.scales(held, asked.unwrap_or(held), self.target);
            }
            self.push_copy(&format!("{path}.{leaf}"), view, asked);
        }
    }

    /// A layer that is packed in the source: decoded, or copied.
    fn packed_layer(&mut self, path: &str, weight: View) -> Result<(), PlanError> {
        let name = |leaf: &str| format!("{path}.{leaf}");
        let (Some(scales), biases) = (self.take(&name("scales")), self.take(&name("biases"))) else {
            return self.copy(&name("weight"), weight);
        };
        let row = (weight.columns(), scales.columns());
        let scheme = self.existing.scheme(path, row, scales.dtype, self.columns.get(path).copied())?;
        check_together(path, (&weight, &scales, biases.as_ref()), scheme)?;
        let mut shape = weight.shape();
        if let Some(columns) = shape.last_mut() {
            *columns = scales.columns() * scheme.group_size();
        }
        self.parameters += OuterModules::packed(&shape);
        // Stays float32 whatever dtype is asked for.
        if let Some(global) = self.take(&name("global_scale")) {
            if self.settings.dequantize {
                return Err(PlanError::GlobalScale(path.to_owned()));
            }
            self.push_copy(&name("global_scale"), global, None);
        }
        if !self.settings.dequantize {
            self.notes.extend(settle_entry(&mut self.existing, path, scheme));
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

    /// Whether parts that see or hear are carried along, which need their settings.
    fn keeps_tower(&self) -> bool {
        self.towers.tensors > 0 || self.items.iter().any(|item| self.architecture.is_tower(&item.name))
    }

    /// config.json as mlx-lm writes it (`mlx_lm/utils.py`, `quantize_model` and `save_config`).
    fn output_config(&mut self, config: &Config) -> Config {
        let mut config = arch::settled(config);
        let object = |scheme: Scheme| entry(scheme).as_object().cloned();
        let own = self.packed.shared.and_then(object);
        let quantization = match (self.settings.quantize, &self.existing) {
            (quantize, existing) if quantize.is_some() || own.is_some() => {
                let shared = existing.packed().cloned().or(own).or_else(|| quantize.and_then(object));
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
