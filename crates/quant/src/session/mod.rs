//! Carrying out a plan with a recipe that looks at calibration text.
//!
//! checkpoint -> plan -> calibrate and quantize, block by block -> write -> evaluate. Tables (embeddings) come first, so that the
//! first block sees what it will see in use; then each block is read, calibrated, quantized, written and forgotten; then
//! the head, on the final hidden states of the quantized blocks. Finished blocks are files: an interrupted run goes on
//! behind the last of them.

mod block;
mod head;
mod report;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use mlx_format::checkpoint::Writer;
use mlx_format::{FloatType, Mode};
use mlx_quant_model::{Forward, WeightsError};
use sha2::{Digest as _, Sha256};

use self::block::BlockWork;
pub use self::report::{ExpertTokens, Quantized};
use crate::calibrate::{States, through_block};
use crate::carry::{Carrier, ColumnWeights};
use crate::convert::{column_weights, fingerprint};
use crate::data::Windows;
use crate::evaluate::{EvaluationSettings, evaluate};
use crate::methods::{How, Method, MethodSettings, Recipe, round};
use crate::observer::{Event, Observer, Quiet};
use crate::plan::{Job, Plan};
use crate::walk::Walk;
use crate::{Error, Model, card, threads_or_all};

/// How a calibrated recipe is carried out.
#[derive(Clone, Debug)]
pub struct QuantizeSettings {
    /// The methods.
    pub recipe: Recipe,
    /// Their figures.
    pub method: MethodSettings,
    /// Threads, 0 for one per core; nothing depends on it.
    pub threads: usize,
    /// Activations wait in files, and windows pass a block a few at a time.
    pub low_memory: bool,
    /// Held-out windows on which the result is measured against the source, for the model card.
    pub evaluate: Option<Windows>,
}

impl QuantizeSettings {
    /// A recipe with the usual figures.
    pub fn new(recipe: Recipe) -> Self {
        Self { recipe, method: MethodSettings::default(), threads: 0, low_memory: false, evaluate: None }
    }
}

/// What a run works with.
struct Session<'a> {
    model: &'a Model,
    plan: &'a Plan,
    walk: Walk<'a>,
    recipe: &'a Recipe,
    settings: &'a QuantizeSettings,
    pool: &'a rayon::ThreadPool,
    observer: &'a dyn Observer,
    /// Items of the plan by name.
    items: HashMap<&'a str, usize>,
    /// Weights of columns that are known without data.
    weights: &'a ColumnWeights,
}

/// Quantizes `model` as `plan` says, with the methods of a recipe on calibration windows, into the directory `target`.
///
/// An unfinished run of the same plan, recipe and windows on the same source is resumed. Reports [`Event::Phase`] and
/// [`Event::Progress`] in blocks.
///
/// # Errors
/// As [`crate::convert`]; a model type without a decoder description.
pub fn quantize(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    target: &Path,
    settings: &QuantizeSettings,
    observer: &dyn Observer,
) -> Result<Quantized, Error> {
    let start = Instant::now();
    let companions = model.companions()?;
    for file in &companions {
        model.checkpoint.directory().check_readable(file)?;
    }
    let threads = threads_or_all(settings.threads);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Error::Threads { threads, reason: error.to_string() })?;
    let weights = column_weights(model, plan);
    let session = Session {
        model,
        plan,
        walk: Walk::open(model)?,
        recipe: &settings.recipe,
        settings,
        pool: &pool,
        observer,
        items: plan.items.iter().enumerate().map(|(index, item)| (item.name.as_str(), index)).collect(),
        weights: &weights,
    };
    let run = run_line(model, plan, windows, settings)?;
    let mut writer = Writer::open(target, plan.layout.clone(), &run)?;
    let mut made = match session.run(&mut writer, windows, &run) {
        Ok(made) => made,
        Err(error) => {
            if error.is_refusal() {
                writer.discard_if_fresh()?;
            }
            return Err(error);
        }
    };
    observer.event(Event::Finishing);
    for file in companions {
        writer.copy_file(model.checkpoint.directory(), &file)?;
    }
    if let Some(overrides) = &plan.settings.overrides {
        writer.write_file("recipe.toml", overrides.text.as_bytes())?;
    }
    writer.write_file("model.safetensors.index.json", plan.layout.index_json(plan.parameters).as_bytes())?;
    writer.write_file("config.json", plan.config.to_mlx_json().as_bytes())?;
    made.quantize_seconds = start.elapsed().as_secs_f64();
    if let Some(held_out) = &settings.evaluate {
        let written = crate::open(&mlx_format::checkpoint::Directory::open(writer.partial())?)?;
        let quality = EvaluationSettings { threads, low_memory: settings.low_memory, cache: None };
        made.evaluation = Some(evaluate(&written, Some(model), held_out, &quality, observer)?);
        observer.event(Event::Finishing);
    }
    let card = card::calibrated_card(plan, &model.name(), windows, settings, &made);
    writer.write_file("README.md", card.as_bytes())?;
    writer.finish()?;
    made.seconds = start.elapsed().as_secs_f64();
    Ok(made)
}

/// A line that stands for everything that decides bytes.
fn run_line(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    settings: &QuantizeSettings,
) -> Result<String, Error> {
    let mut line = fingerprint(model, plan)?;
    let all = format!("{} {:?}", settings.recipe, settings.method);
    let _ = write!(line, " {} ", all.replace('\n', " "));
    let mut hash = Sha256::new();
    for id in windows.picked.iter().flat_map(|window| &window.tokens) {
        hash.update(id.to_le_bytes());
    }
    hash.update(windows.sequence_length.to_le_bytes());
    for byte in hash.finalize() {
        let _ = write!(line, "{byte:02x}");
    }
    Ok(line)
}

impl Session<'_> {
    /// The item of a module or tensor.
    fn item(&self, name: &str) -> Option<usize> {
        self.items.get(name).copied()
    }

    /// The dtype in which a tensor that is not quantized is written.
    fn float_of(&self, tensor: &str) -> Option<FloatType> {
        let item = &self.plan.items[self.item(tensor)?];
        match item.job {
            Job::Copy { .. } => FloatType::from_dtype(self.plan.layout.specs()[item.first_output].dtype),
            _ => None,
        }
    }

    /// Items whose names begin with `prefix`.
    fn items_below(&self, prefix: &str) -> Vec<usize> {
        let items = self.plan.items.iter().enumerate();
        items.filter(|(_, item)| item.name.starts_with(prefix)).map(|(index, _)| index).collect()
    }

    /// Windows within a block at a time.
    fn wave(&self, windows: &Windows) -> usize {
        if self.settings.low_memory { self.pool.current_num_threads() } else { windows.picked.len() }
    }

    fn run(mut self, writer: &mut Writer, windows: &Windows, run: &str) -> Result<Quantized, Error> {
        let observer = self.observer;
        let blocks = self.walk.decoder.blocks.len();
        let by_block: Vec<Vec<usize>> =
            self.walk.decoder.blocks.iter().map(|block| self.items_below(&block.prefix)).collect();
        let within: BTreeSet<usize> = by_block.iter().flatten().copied().collect();
        let head = self.head_item();
        let tables: Vec<usize> = (0..self.plan.items.len())
            .filter(|index| !within.contains(index) && Some(*index) != head)
            .collect();

        let done = |writer: &Writer, items: &[usize]| {
            items.iter().all(|item| writer.done().contains(&self.plan.items[*item].first_output))
        };
        let finished = by_block.iter().take_while(|items| done(writer, items)).count();
        let (count, tokens) = (windows.picked.len(), windows.sequence_length);
        let spill = self.settings.low_memory;
        let files = writer.state_path("");
        let resumed =
            done(writer, &tables).then(|| States::resume(count, files.clone(), spill, finished)).flatten();
        observer.event(Event::Phase { name: "quantize", total: blocks as u64 + 1 });
        let known = resumed.is_some();
        if !known && !writer.done().is_empty() {
            writer.forget(run)?;
        }
        self.carrier(&Quiet(observer)).carry(writer, tables.iter().copied())?;
        writer.record(tables.iter().map(|item| self.plan.items[*item].first_output))?;
        if !known {
            self.replace_tables(windows)?;
        }
        let forward =
            Forward::new(&self.walk.decoder, tokens, &self.walk.device).map_err(WeightsError::from)?;
        let mut states = match resumed {
            Some(states) => states,
            None => States::new(count, files, spill, |window| {
                Ok(forward.embed(&self.walk.weights, &[&windows.picked[window].tokens])?)
            })?,
        };
        self.walk.weights.release();
        let mut made = Quantized { resumed_blocks: states.block(), ..Quantized::default() };
        observer.event(Event::Progress { done: states.block() as u64 });
        for index in states.block()..blocks {
            let block = &self.walk.decoder.blocks[index];
            observer.event(Event::Working { name: block.prefix.trim_end_matches('.') });
            let parameters = self.pool.install(|| self.walk.block(index))?;
            let sites = block.sites();
            let mut work = BlockWork::new(&self, &forward, index, &sites, &parameters);
            let wave = self.wave(windows);
            through_block(&forward, index, &sites, &parameters, &mut states, wave, self.pool, &mut work)?;
            made.add(&mut work);
            let (done, left) = work.write(writer)?;
            drop(parameters);
            self.carrier(&Quiet(observer)).carry(writer, left.iter().copied())?;
            writer.record(
                done.into_iter().chain(left.iter().map(|item| self.plan.items[*item].first_output)),
            )?;
            states.passed();
            states.forget_before()?;
            observer.event(Event::Progress { done: index as u64 + 1 });
        }
        if let Some(head) = head {
            self.head(head, &forward, &states, writer)?;
        }
        observer.event(Event::Progress { done: blocks as u64 + 1 });
        Ok(made)
    }

    fn carrier<'s>(&'s self, observer: &'s dyn Observer) -> Carrier<'s> {
        let search = (self.recipe.rounding() != Method::Rtn).then_some(self.weights);
        Carrier { model: self.model, plan: self.plan, pool: self.pool, observer, search }
    }

    /// Lets the embedding give what its quantized rows decode to.
    fn replace_tables(&mut self, windows: &Windows) -> Result<(), Error> {
        let embedding = &self.walk.decoder.embedding;
        let tokens: BTreeSet<u32> =
            windows.picked.iter().flat_map(|window| window.tokens.iter().copied()).collect();
        let positions = (0..windows.sequence_length as u32).collect::<BTreeSet<u32>>();
        let mut tables: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
        tables.insert(embedding.path.clone(), tokens.clone());
        tables.extend(embedding.positions.clone().map(|path| (path, positions)));
        tables.extend(embedding.per_layer.as_ref().map(|inputs| (inputs.path.clone(), tokens)));
        for (path, ids) in tables {
            let Some(item) = self.item(&path) else { continue };
            let Job::Quantize { view, float, scheme } = &self.plan.items[item].job else { continue };
            if scheme.mode() != Mode::Affine {
                continue;
            }
            let (ids, columns): (Vec<u32>, usize) = (ids.into_iter().collect(), view.columns());
            let rows = self.pool.install(|| self.walk.weights.rows(&path, &ids, &self.walk.device))?;
            let mut values =
                rows.flatten_all().and_then(|rows| rows.to_vec1::<f32>()).map_err(WeightsError::from)?;
            values.iter_mut().for_each(|value| *value = float.round(*value));
            let even = vec![1.0; columns];
            let weights = self.weights.get(&path).unwrap_or(&even);
            let how = match self.recipe.rounding() {
                Method::Rtn => How::Plain,
                _ => How::Nearest { weights },
            };
            let decoded = self.pool.install(|| round(&values, columns, *scheme, *float, how).decoded());
            self.walk.weights.replace_rows(&path, ids, decoded);
        }
        Ok(())
    }
}
