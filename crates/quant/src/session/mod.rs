//! Carrying out a plan with a recipe that looks at calibration text.
//!
//! checkpoint -> plan -> calibrate and quantize, block by block -> write -> evaluate. Tables (embeddings) come first,
//! so that the first block sees what it will see in use; then each block is read, calibrated, quantized, written and
//! forgotten; then the head, on the final hidden states of the quantized blocks. Finished blocks are files: an
//! interrupted run goes on behind the last of them.

mod aim;
mod begin;
mod block;
mod card;
mod choose;
mod conclude;
mod context;
mod distill;
mod effort;
mod fold;
mod head;
mod identity;
mod learned;
mod memory;
mod range;
mod readers;
mod report;
mod settings;
mod shared;
mod steps;
#[cfg(test)]
mod tests;
mod work;
mod writing;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Instant;

use mlx_format::checkpoint::{Destination, Run, Writer};
use mlx_format::{FloatType, Mode};
use mlx_quant_engine::Tensor;
use mlx_quant_model::decoder::Linear;
use mlx_quant_model::{Forward, WeightsError};

pub(crate) use self::aim::aims;
use self::choose::Hooks;
use self::conclude::conclude;
use self::context::Session;
pub use self::distill::{distill, steps_of_distilling, targets};
use self::distill::{lessons, train};
pub use self::effort::operations;
pub(crate) use self::effort::{SEARCH, rounding_operations};
pub(crate) use self::head::HEAD_ROWS;
use self::identity::run_line;
use self::learned::Teacher;
pub use self::memory::{QuantizeMemory, quantize_memory};
pub(crate) use self::readers::experts_at_once;
pub use self::report::{Computed, ExpertTokens, Quantized};
pub use self::settings::QuantizeSettings;
use self::settings::wave;
pub use self::steps::{rounding_phase, steps};
use self::work::BlockWork;
use self::writing::Writing;
use crate::carry::{Carrier, ColumnWeights, plain};
use crate::convert::{is_within, open_writer, write_companions};
use crate::data::Windows;
use crate::methods::{How, Method};
use crate::observer::{Event, Observer, Unit, Within};
use crate::plan::{Job, Plan};
use crate::team::Team;
use crate::walks::calibrate::{Collector, Passage, Second, States, Statistics, Visitor as _};
use crate::walks::{Walk, in_turn};
use crate::{Error, Model, threads_or_all};

/// Quantizes `model` as `plan` says, with the methods of a recipe on calibration windows, into the directory `target`.
///
/// An unfinished run of the same plan, recipe and windows on the same source is resumed. Reports [`Event::Job`], then
/// [`Event::Phase`] and [`Event::Progress`] in blocks.
///
/// # Errors
/// As [`crate::convert()`]; a model type without a decoder description.
pub fn quantize<'d>(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    target: impl Into<Destination<'d>>,
    settings: &QuantizeSettings,
    observer: &dyn Observer,
) -> Result<Quantized, Error> {
    observer.event(Event::Job { steps: &steps(settings) });
    quantize_with(model, plan, windows, target.into(), settings, (&Within(observer), &Hooks::USUAL))
}

fn quantize_with(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    target: Destination<'_>,
    settings: &QuantizeSettings,
    (observer, hooks): (&dyn Observer, &Hooks<'_>),
) -> Result<Quantized, Error> {
    let start = Instant::now();
    crate::convert::keep_apart(target, [model])?;
    let companions = model.companions()?;
    for file in &companions {
        model.checkpoint.directory().check_readable(file)?;
    }
    let threads = threads_or_all(settings.threads);
    let pool = crate::threads::pool(threads)?;
    let alone = Team::alone();
    let session = Session {
        model,
        plan,
        walk: Walk::open(model)?,
        recipe: &settings.recipe,
        settings,
        pool: &pool,
        observer,
        even: ColumnWeights::new(),
        hooks,
        team: &alone,
    };
    session.check(windows, target.path)?;
    if settings.recipe.trains() {
        let (training, held_out) = lessons(windows, settings)?;
        let trained = |item: &crate::Item| matches!(item.job, Job::Quantize { scheme, .. } if scheme.mode() == Mode::Affine && scheme.bits() < 8);
        if !plan.items.iter().any(trained) {
            return Err(Error::NothingToTrain("this plan".to_owned()));
        }
        crate::dwq::preflight(
            Some(model),
            &session.walk,
            (&training, &held_out),
            target.path,
            &settings.dwq,
        )?;
    }
    let run = run_line(model, plan, windows, settings)?;
    let mut writer = open_writer(target, plan, run.run(), observer)?;
    let worked = if !settings.recipe.walks() {
        session.carry_all(&mut writer)
    } else if model.helpers.is_empty() {
        session.run(Some(&mut writer), windows, run.run())
    } else {
        session.run_together(&mut writer, windows, run.run())
    };
    let mut made = match worked {
        Ok(made) => made,
        Err(error) => {
            // What went wrong in the middle of the work leaves it resumable.
            if error.is_refusal() && !matches!(error, Error::Weights(WeightsError::Tensor(_))) {
                writer.discard_if_fresh()?;
            }
            return Err(error);
        }
    };
    write_companions(&writer, model, plan, companions)?;
    if settings.recipe.trains() {
        made.distilled =
            Some(train(Some(model), &model.device, &writer, windows, settings, &pool, observer)?);
    }
    made.quantize_seconds = start.elapsed().as_secs_f64();
    conclude(Some(model), plan, windows, settings, (made, start), writer, observer)
}

impl Session<'_> {
    /// Refuses before any work what would fail later.
    fn check(&self, windows: &Windows, target: &Path) -> Result<(), Error> {
        if let Some(statistics) = &self.settings.statistics
            && is_within(statistics, target)?
        {
            let reason = "it lies in the output directory".to_owned();
            return Err(Error::Statistics { path: statistics.display().to_string(), reason });
        }
        if let (Some(path), true) = (&self.settings.statistics, self.recipe.learns()) {
            let reason =
                "learn lets windows pass the blocks, and kept matrices are there so that none have to"
                    .to_owned();
            return Err(Error::Statistics { path: path.display().to_string(), reason });
        }
        if !self.model.helpers.is_empty() && (self.recipe.learns() || self.settings.statistics.is_some()) {
            return Err(Error::OneDevice(if self.recipe.learns() { "learn" } else { "--statistics" }));
        }
        if !self.model.helpers.is_empty() && self.aims() {
            return Err(Error::OneDevice("--correction"));
        }
        // Tokens and positions that the model does not have.
        let (decoder, device) = (&self.walk.decoder, &self.walk.device);
        let forward = Forward::new(decoder, windows.sequence_length, device).map_err(WeightsError::from)?;
        if let Some(window) = windows.picked.first() {
            forward.embed(&self.walk.weights, &[&window.tokens])?;
        }
        Ok(())
    }

    /// Without a walk: every item as it is met, those that are quantized on grids searched under known column weights.
    fn carry_all(self, writer: &mut Writer) -> Result<Quantized, Error> {
        let search = (self.recipe.rounding() != Method::Rtn).then_some(&self.settings.columns);
        let carrier = Carrier { search, ..self.carrier(self.observer) };
        carrier.carry(writer, 0..self.plan.items.len())?;
        let all = self.plan.items.iter().map(|item| item.first_output);
        writer.record(all.collect::<Vec<_>>())?;
        Ok(Quantized { engines: Computed::of(writer, &[]), ..Quantized::default() })
    }

    /// Takes windows through the blocks. Without a writer this is a member of a team that does not lead.
    fn run(
        mut self,
        mut writer: Option<&mut Writer>,
        windows: &Windows,
        run: Run<'_>,
    ) -> Result<Quantized, Error> {
        let observer = self.observer;
        let blocks = self.walk.decoder.blocks.len();
        let statistics = self.kept_statistics(windows)?;
        let statistics = statistics.as_ref();
        self.tell_phase(windows);
        let mut states = self.begin(writer.as_deref_mut(), windows, run, statistics)?;
        let tokens = windows.sequence_length;
        let forward =
            Forward::new(&self.walk.decoder, tokens, &self.walk.device).map_err(WeightsError::from)?;
        let wave = wave(self.settings, self.pool.current_num_threads(), windows);
        let mut made = Quantized { resumed_blocks: states.block(), ..Quantized::default() };
        if states.block() > 0 {
            observer.event(Event::Resumed { done: states.block() as u64 });
        }
        let (own, pool) = (&self, self.pool);
        let aims = self.aims();
        let mut teacher = if (self.recipe.learns() || aims) && states.block() < blocks {
            Some(Teacher::in_front(own, &forward, windows, states.block())?)
        } else {
            None
        };
        let load = |index| pool.install(|| own.walk.block(index));
        let team = self.team;
        let share = team.share(windows.picked.len());
        let files = states.files().to_owned();
        let shared = RwLock::new(writer.as_deref_mut());
        let written = std::thread::scope(|scope| -> Result<_, Error> {
            let mut writing = Writing::new(scope, &shared);
            in_turn(&self.walk.device, states.block()..blocks, &load, |index, parameters| {
                let block = &own.walk.decoder.blocks[index];
                observer.event(Event::Working { name: block.prefix.trim_end_matches('.') });
                let sites = block.sites();
                let (rounded, others) = block::round_others(own, block, &sites, &parameters)?;
                let mut work = BlockWork::new(own, &forward, index, &sites, &rounded, others);
                let batch = own.walk.batch();
                let second = teacher.as_mut().filter(|_| aims).map(|teacher| Second {
                    parameters: &parameters,
                    states: Mutex::new(teacher.depart()),
                    writes: aim::writes(block, &sites),
                });
                let passage = Passage {
                    forward: &forward,
                    index,
                    sites: &sites,
                    parameters: &rounded,
                    wave,
                    experts: experts_at_once(&own.walk, &sites, own.recipe.is_second_order() && !aims),
                    batch,
                    pool,
                    team,
                    windows: (share.start, windows.picked.len()),
                    second: second.as_ref(),
                };
                own.decide_saving(&mut states)?;
                let lesson = own.recipe.learns().then(|| states.all()).transpose()?;
                match statistics {
                    None if lesson.is_some() => passage.visit(&mut states, &mut work)?,
                    None => passage.take(&mut states, &mut work)?,
                    Some(statistics) => {
                        let passage = Passage { parameters: &parameters, ..passage };
                        own.with_statistics(passage, statistics, &mut states, &mut work)?;
                    }
                }
                let passed = second.map(|second| second.states.into_inner());
                if let Some(teacher) = &mut teacher {
                    match passed {
                        Some(passed) => teacher.arrive(passed.unwrap_or_else(PoisonError::into_inner)),
                        None => teacher.pass(index, &parameters)?,
                    }
                    if let Some(inputs) = lesson {
                        states.put(0, work.learn(&inputs, &teacher.aim(index), &files)?)?;
                    }
                }
                made.add(work.folded, &mut work.experts);
                work.note_losses();
                let outputs = work.outputs(own)?;
                drop((parameters, rounded));
                // What leaves the block lies in files of all before it counts as done.
                if !team.is_alone() && states.is_saved() {
                    team.agrees(index as u64)?;
                }
                // Blocks behind which no states lie would be done again.
                if team.leads() {
                    writing.block(own, outputs, states.is_saved())?;
                }
                states.passed();
                observer.event(Event::Progress { done: index as u64 + 1 });
                Ok(())
            })?;
            writing.finish()
        })?;
        if let Some(head) = self.head_item() {
            self.head(head, &forward, &states, (share.start, statistics), writer.as_deref_mut())?;
        }
        let Some(writer) = writer else { return Ok(made) };
        writer.record(written)?;
        observer.event(Event::Progress { done: blocks as u64 + 1 });
        made.engines = self.engines(writer);
        if let Some(left) = self.hooks.left {
            left(states.all()?);
        }
        Ok(made)
    }

    fn tell_phase(&self, windows: &Windows) {
        let tokens = (windows.picked.len() * windows.sequence_length) as u64;
        let total = self.walk.decoder.blocks.len() as u64 + 1;
        self.observer.event(Event::Phase { name: steps::ROUNDING, unit: Unit::Blocks, total, tokens });
    }

    /// What computed each block.
    fn engines(&self, writer: &Writer) -> Vec<Computed> {
        let outputs = |items: Vec<usize>| items.into_iter().map(|item| self.plan.items[item].first_output);
        let by_block: Vec<Vec<usize>> =
            self.items_by_block().into_iter().map(|items| outputs(items).collect()).collect();
        Computed::of(writer, &by_block)
    }

    /// Items of each block.
    fn items_by_block(&self) -> Vec<Vec<usize>> {
        self.walk.decoder.blocks.iter().map(|block| self.items_below(&block.prefix)).collect()
    }

    /// Whether statistics of all blocks, and of the final hidden states where they are needed, are there.
    fn has_all(&self, statistics: &Statistics) -> bool {
        let blocks = self.walk.decoder.blocks.len();
        (0..blocks).all(|block| statistics.has(block))
            && (self.head_item().is_none() || statistics.has(blocks))
    }

    /// Refuses kept matrices of another size than the inputs that they are said to be of.
    fn check_statistics(&self, statistics: &Statistics) -> Result<(), Error> {
        for (index, block) in self.walk.decoder.blocks.iter().enumerate() {
            for (site, of) in block.sites().iter().enumerate() {
                if let Some(size) = self.columns(&of.readers[0].path) {
                    statistics.check(index, site, size)?;
                }
            }
        }
        let (blocks, hidden) = (self.walk.decoder.blocks.len(), self.walk.decoder.hidden_size);
        statistics.check(blocks, 0, hidden)?;
        statistics.check(blocks + 1, 0, hidden)
    }

    /// Inputs of a linear layer; `None` where its stored weight does not say.
    pub(self) fn columns(&self, path: &str) -> Option<usize> {
        let item = self.item(path).or_else(|| self.item(&format!("{path}.weight")))?;
        match &self.plan.items[item].job {
            Job::Copy { view, .. } | Job::Quantize { view, .. } => {
                FloatType::from_dtype(view.dtype).map(|_| view.columns())
            }
            Job::Dequantize { .. } | Job::Repeat { .. } => None,
        }
    }

    /// A block from kept statistics; windows pass it, as it is in full precision, only where those are not complete.
    fn with_statistics(
        &self,
        passage: Passage<'_>,
        statistics: &Statistics,
        states: &mut States,
        work: &mut BlockWork<'_>,
    ) -> Result<(), Error> {
        let Passage { index, sites, parameters, .. } = passage;
        if !states.is_still() {
            let mut collector =
                Collector { statistics, block: index, sites, parameters, observer: self.observer };
            passage.take(states, &mut collector)?;
            collector.finish()?;
        }
        for (site, of) in sites.iter().enumerate() {
            let reader = format!("{}.weight", of.readers[0].path);
            let weight = parameters.tensor(&reader).map_err(WeightsError::from)?;
            let size = weight.dims().last().copied().unwrap_or(0);
            if let Some(gram) = statistics.load(index, site, size)? {
                work.visit(site, gram, &[])?;
            }
        }
        Ok(())
    }

    /// The item of an embedding that is the head too, where it is quantized.
    fn tied_item(&self) -> Option<usize> {
        let decoder = &self.walk.decoder;
        let tied = decoder.head.linear.is_none() && self.recipe.rounding() != Method::Rtn;
        let item = self.item(&decoder.embedding.path).filter(|_| tied)?;
        matches!(&self.plan.items[item].job, Job::Quantize { .. }).then_some(item)
    }

    /// Lets the embedding give what its quantized rows decode to.
    fn replace_tables(&mut self, windows: &Windows, table: Option<&head::Head>) -> Result<(), Error> {
        let embedding = &self.walk.decoder.embedding;
        let tokens: BTreeSet<u32> =
            windows.picked.iter().flat_map(|window| window.tokens.iter().copied()).collect();
        let positions = (0..windows.sequence_length as u32).collect::<BTreeSet<u32>>();
        let mut tables: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
        tables.insert(embedding.path.clone(), tokens.clone());
        tables.extend(embedding.positions.clone().map(|path| (path, positions)));
        let streams = &self.walk.decoder.streams;
        let beside = streams.iter().flat_map(|streams| streams.spread.iter().chain(&streams.gather));
        let mut whole: Vec<&Linear> = beside.collect();
        if let Some(inputs) = &embedding.per_layer {
            let tokens: Vec<u32> = tokens.into_iter().collect();
            tables.insert(inputs.path.clone(), inputs.ids(&tokens).into_iter().collect());
            whole.push(&inputs.projection);
        }
        for Linear { path } in whole {
            let rows = self.walk.weights.shape(&format!("{path}.weight")).map_or(0, |shape| shape[0]);
            tables.insert(path.clone(), (0..rows as u32).collect());
        }
        for (path, ids) in tables {
            let Some(item) = self.item(&path) else { continue };
            let Job::Quantize { view, float, scheme } = &self.plan.items[item].job else { continue };
            let (ids, columns): (Vec<u32>, usize) = (ids.into_iter().collect(), view.columns());
            let rows = self.pool.install(|| self.walk.weights.rows(&path, &ids, &self.walk.device))?;
            let table = table.filter(|_| path == self.walk.decoder.embedding.path);
            let decode = || -> mlx_quant_engine::Result<Vec<f32>> {
                let round = |rows: &Tensor, how| rows.device().round(rows, *scheme, *float, how)?.1.to_vec();
                match table {
                    Some(table) => round(&rows, table.how(self)),
                    None if self.recipe.rounding() == Method::Rtn => {
                        Ok(plain(&rows.to_vec()?, columns, *scheme, *float).1)
                    }
                    // As they are carried: in the output's dtype.
                    None => round(&rows.rounded(*float)?, How::Blind { weights: &vec![1.0; columns] }),
                }
            };
            let decoded = self.pool.install(decode).map_err(WeightsError::from)?;
            self.walk.weights.replace_rows(&path, ids, decoded);
        }
        Ok(())
    }
}
