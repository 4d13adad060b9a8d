//! Blocks on their way to their files. What a card made of one is fetched and written while it works on the next one.

use std::sync::{PoisonError, RwLock};
use std::thread::{Scope, ScopedJoinHandle};

use mlx_format::checkpoint::Writer;

use super::Session;
use super::block::Outputs;
use crate::Error;
use crate::observer::Quiet;

/// A writer that one thread writes with, and another one records; none where another member of a team writes.
type Shared<'w> = RwLock<Option<&'w mut Writer>>;

/// Writes blocks, the last one on a thread of its own.
pub(super) struct Writing<'s, 'e, 'w> {
    scope: &'s Scope<'s, 'e>,
    writer: &'s Shared<'w>,
    /// The block that is being written.
    under_way: Option<ScopedJoinHandle<'s, Result<Vec<usize>, Error>>>,
    /// Tensors that are written and not yet recorded.
    written: Vec<usize>,
}

impl<'s, 'e, 'w> Writing<'s, 'e, 'w> {
    pub(super) fn new(scope: &'s Scope<'s, 'e>, writer: &'s Shared<'w>) -> Self {
        Self { scope, writer, under_way: None, written: Vec::new() }
    }

    /// Waits for the block that is being written.
    fn join(&mut self) -> Result<(), Error> {
        let Some(thread) = self.under_way.take() else { return Ok(()) };
        match thread.join() {
            Ok(written) => self.written.extend(written?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
        Ok(())
    }

    /// Writes what was made of a block. If it is to be `recorded`, it is in its files before this returns.
    pub(super) fn block(
        &mut self,
        session: &'s Session<'s>,
        outputs: Outputs<'s>,
        recorded: bool,
    ) -> Result<(), Error> {
        self.join()?;
        let left = outputs.left();
        {
            let mut writer = self.writer.write().unwrap_or_else(PoisonError::into_inner);
            let Some(writer) = writer.as_deref_mut() else { return Ok(()) };
            session.carrier(&Quiet(session.observer)).carry(writer, left.iter().copied())?;
        }
        self.written.extend(left.iter().map(|item| session.plan.items[*item].first_output));
        let shared = self.writer;
        let write = move || {
            let writer = shared.read().unwrap_or_else(PoisonError::into_inner);
            writer.as_deref().map_or_else(|| Ok(Vec::new()), |writer| outputs.write(writer))
        };
        if session.walk.device.memory().is_none() {
            self.written.extend(write()?);
        } else {
            self.under_way = Some(self.scope.spawn(write));
        }
        if recorded {
            self.join()?;
            let mut writer = shared.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(writer) = writer.as_deref_mut() {
                writer.record(std::mem::take(&mut self.written))?;
            }
        }
        Ok(())
    }

    /// Waits for all; gives the tensors that are not yet recorded.
    pub(super) fn finish(mut self) -> Result<Vec<usize>, Error> {
        self.join()?;
        Ok(self.written)
    }
}
