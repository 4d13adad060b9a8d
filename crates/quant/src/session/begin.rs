//! How a run begins: alone or with other devices, anew or where an interrupted one stopped.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use mlx_format::checkpoint::{Run, Writer};
use mlx_quant_model::{Forward, WeightsError};

use super::choose::Hooks;
use super::settings::saving;
use super::{Quantized, Session};
use crate::carry::ColumnWeights;
use crate::data::Windows;
use crate::observer::{Event, Quiet};
use crate::team::{Part, Team};
use crate::walks::Walk;
use crate::walks::calibrate::{Batches, States, Statistics};
use crate::{Error, threads_or_all};

impl Session<'_> {
    /// With all devices: each takes its windows through the blocks, and the first one writes.
    pub(super) fn run_together(
        self,
        writer: &mut Writer,
        windows: &Windows,
        run: Run<'_>,
    ) -> Result<Quantized, Error> {
        let Self { model, plan, recipe, settings, observer, hooks, .. } = self;
        let members = 1 + model.helpers.len();
        let threads = (threads_or_all(settings.threads) / members).max(1);
        let quiet = Quiet(observer);
        let hooks_of_others = Hooks { left: None, ..*hooks };
        let follow = |team: &Team, rank: usize| {
            let walk = Walk::open(model)?.on(&model.helpers[rank - 1]);
            let pool = crate::threads::pool(threads)?;
            let (pool, even) = (&pool, ColumnWeights::new());
            let (observer, hooks) = (&quiet, &hooks_of_others);
            let session = Session { model, plan, walk, recipe, settings, pool, observer, even, hooks, team };
            session.run(None, windows, run).map(drop)
        };
        let lead = |team: &Team| {
            let pool = crate::threads::pool(threads)?;
            Session { pool: &pool, team, ..self }.run(Some(writer), windows, run)
        };
        crate::team::together(members, lead, follow)
    }

    /// Tables, then all windows in front of the first block; or where an interrupted run left them.
    pub(super) fn begin(
        &mut self,
        mut writer: Option<&mut Writer>,
        windows: &Windows,
        run: Run<'_>,
        statistics: Option<&Statistics>,
    ) -> Result<States, Error> {
        let by_block = self.items_by_block();
        let within: BTreeSet<usize> = by_block.iter().flatten().copied().collect();
        let head = self.head_item();
        let outside = |index: &usize| !within.contains(index) && Some(*index) != head;
        let tables: Vec<usize> = (0..self.plan.items.len()).filter(outside).collect();
        let done = |writer: &Writer, items: &[usize]| {
            items.iter().all(|item| writer.done().contains(&self.plan.items[*item].first_output))
        };
        // One more than the blocks that are finished; 0 where not even the tables are.
        let count = |writer: &Writer| {
            let finished = by_block.iter().take_while(|items| done(writer, items)).count() as u64;
            if done(writer, &tables) { finished + 1 } else { 0 }
        };
        let finished = self.team.said(|| writer.as_deref().map_or(0, count))? as usize;
        let spill = self.settings.low_memory;
        let saving = self.hooks.saving.unwrap_or_else(|| saving(self.settings));
        let files = self.state_files(writer.as_deref())?;
        // With all statistics no window has to travel, and finished blocks are all that there is to know.
        let known = statistics.is_some_and(|statistics| self.has_all(statistics));
        let share = self.team.share(windows.picked.len());
        let batches = Batches { windows: share.len(), before: share.start, size: self.walk.batch() };
        if let Some(finished) = finished.checked_sub(1) {
            if known {
                return Ok(States::still(files, finished, &self.walk.device));
            }
            let how = (saving, &self.walk.device);
            let found = States::resume(batches, files.clone(), spill, finished, how, self.observer);
            let blocks = found.as_ref().map_or(0, |states| states.block() as u64 + 1);
            let found = found.filter(|_| self.team.is_alone() || share.is_empty() || blocks > 0);
            if self.team.agrees(if share.is_empty() { finished as u64 + 1 } else { blocks })?
                && let Some(states) = found
            {
                return Ok(states);
            }
            if finished > 0 {
                let text = "an earlier run's activations cannot be read any more; all blocks are done again";
                self.observer.event(Event::Warning { text });
            }
        }
        if let Some(writer) = writer.as_deref_mut().filter(|writer| !writer.done().is_empty()) {
            writer.forget(run)?;
        }
        let tied = self.tied_item();
        let lent = writer.as_deref();
        let table = tied.map(|item| self.round_tied(item, windows, statistics, lent)).transpose()?;
        let others = tables.iter().copied().filter(|item| Some(*item) != tied);
        if let Some(writer) = writer {
            self.carrier(&Quiet(self.observer)).carry(writer, others)?;
            writer.record(tables.iter().map(|item| self.plan.items[*item].first_output))?;
        }
        if known {
            return Ok(States::still(files, 0, &self.walk.device));
        }
        // Statistics are those of the full-precision model.
        if statistics.is_none() {
            self.replace_tables(windows, table.as_ref())?;
        }
        let (decoder, device) = (&self.walk.decoder, &self.walk.device);
        let forward = Forward::new(decoder, windows.sequence_length, device).map_err(WeightsError::from)?;
        let all: Vec<&[u32]> = windows.picked[share].iter().map(|window| &*window.tokens).collect();
        let own: Vec<&[&[u32]]> = all.chunks(self.walk.batch()).collect();
        let states = States::new(batches, files, spill, saving, &self.walk.device, |batch| {
            Ok(forward.embed(&self.walk.weights, own[batch])?)
        });
        self.walk.weights.restore_rows();
        self.walk.weights.release();
        states
    }

    /// How names of files begin in which states wait: beside what the leader writes.
    fn state_files(&self, writer: Option<&Writer>) -> Result<PathBuf, Error> {
        let mut part = Part::default();
        if let Some(writer) = writer {
            let path = writer.state_path("");
            if self.team.is_alone() {
                return Ok(path);
            }
            part.head.extend(path.as_os_str().as_encoded_bytes().iter().map(|byte| u64::from(*byte)));
        }
        let all = self.team.gather(part)?;
        let bytes = all[0].head.iter().map(|byte| *byte as u8).collect();
        Ok(OsString::from_vec(bytes).into())
    }

    /// Lets the leader say whether what leaves the next block is saved: clocks differ.
    pub(super) fn decide_saving(&self, states: &mut States) -> Result<(), Error> {
        if !self.team.is_alone() {
            states.save_next(self.team.said(|| u64::from(states.are_due()))? > 0);
        }
        Ok(())
    }

    /// Matrices that are kept, or are to be kept, if some are.
    pub(super) fn kept_statistics(&self, windows: &Windows) -> Result<Option<Statistics>, Error> {
        let Some(path) = &self.settings.statistics else { return Ok(None) };
        let statistics = Statistics::open(path, self.model, windows)?;
        self.check_statistics(&statistics)?;
        Ok(Some(statistics))
    }
}
