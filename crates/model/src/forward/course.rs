//! The forward pass as a coroutine: it stops at every site, is looked at, and goes on.
//!
//! Calibration wants all windows to arrive at a site before any of them passes it, and to pass it with weights that were
//! chosen there. So the interpreter's functions are `async`: what a window holds at a site is what the next
//! site needs and nothing else, each matrix product runs once, and any number of threads take turns in moving windows.
//! There is no executor; [`Course::advance`] polls.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use mlx_quant_engine::{Error, Result, Tensor};

use super::{Forward, Pass, State, Tap};
use crate::decoder::{Block, Linear};
use crate::parameters::Parameters;

/// What stands before a site.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Who reads it.
    pub readers: Vec<Linear>,
    /// Which expert of stacked readers.
    pub expert: Option<usize>,
    /// `[.., in]`; of experts only the tokens routed to them.
    pub input: Tensor,
}

/// How far a window came.
#[derive(Debug)]
pub enum Progress {
    /// Before a site.
    At(Stop),
    /// Through the block.
    Done(State),
}

#[derive(Debug, Default)]
struct Slot {
    stop: Option<Stop>,
    weights: Option<Vec<Tensor>>,
}

/// Shared between a course and its forward pass.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mailbox(Arc<Mutex<Slot>>);

impl Mailbox {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        // A panic elsewhere leaves nothing half-done in here.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who watches a forward pass.
pub(crate) enum Watcher<'p> {
    /// Sees and lets pass.
    Tap(&'p mut (dyn Tap + 'p)),
    /// Stops it.
    Mailbox(Mailbox),
}

impl Watcher<'_> {
    /// Weights to be used instead of the block's own, one of each reader, if any.
    pub(crate) async fn see(
        &mut self,
        readers: &[&Linear],
        expert: Option<usize>,
        input: &Tensor,
    ) -> Result<Option<Vec<Tensor>>> {
        match self {
            Self::Tap(tap) => tap.see(readers, expert, input).map(|()| None),
            Self::Mailbox(mailbox) => {
                let readers = readers.iter().copied().cloned().collect();
                mailbox.slot().stop = Some(Stop { readers, expert, input: input.clone() });
                let mut asked = false;
                std::future::poll_fn(|_| {
                    if std::mem::replace(&mut asked, true) { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
                Ok(mailbox.slot().weights.take())
            }
        }
    }
}

/// The way of one batch of windows through a block.
pub struct Course<'f> {
    future: Pin<Box<dyn Future<Output = Result<State>> + Send + 'f>>,
    mailbox: Mailbox,
}

impl std::fmt::Debug for Course<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Course").field("mailbox", &self.mailbox).finish_non_exhaustive()
    }
}

impl Course<'_> {
    /// Goes on to the next site, or to the end. `weights` are used at the site where it stands instead of
    /// the block's own: `[out, in]` of each reader, in their order.
    ///
    /// # Errors
    /// As [`Forward::block`]; a course that is over.
    pub fn advance(&mut self, weights: Option<Vec<Tensor>>) -> Result<Progress> {
        self.mailbox.slot().weights = weights;
        match self.future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(state) => {
                self.future = Box::pin(std::future::ready(Err(Error::msg("the course is over"))));
                state.map(Progress::Done)
            }
            Poll::Pending => {
                let stop = self.mailbox.slot().stop.take();
                stop.map(Progress::At).ok_or_else(|| Error::msg("a forward pass waits for nothing"))
            }
        }
    }
}

impl<'d> Forward<'d> {
    /// Sets out through block `index`; nothing is computed before [`Course::advance`].
    pub fn course<'f>(&'f self, index: usize, parameters: &'f Parameters, state: State) -> Course<'f>
    where
        'd: 'f,
    {
        let mailbox = Mailbox::default();
        let watcher = Watcher::Mailbox(mailbox.clone());
        Course { future: Box::pin(self.take(index, parameters, state, watcher)), mailbox }
    }

    /// What one branch of a block makes of its (normed) input `[batch, tokens, hidden]`, before its post-norm.
    ///
    /// # Errors
    /// As [`Forward::block`]; a branch that needs more than its input (keys of another block, inputs of its own).
    pub fn branch(
        &self,
        index: usize,
        (stage, branch): (usize, usize),
        parameters: &Parameters,
        input: &Tensor,
    ) -> Result<Tensor> {
        let block: &Block = &self.decoder.blocks[index];
        let layer = &block.stages[stage].branches[branch].layer;
        let mut tap = ();
        let mut pass = Pass {
            engine: &self.device,
            parameters,
            tables: &self.tables.all,
            watcher: Watcher::Tap(&mut tap),
        };
        at_once(async move { pass.layer(layer, index, input, None, &mut super::Keys::new()).await })
    }
}

/// Runs a forward pass that nothing stops.
pub(crate) fn at_once<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(Error::msg("a forward pass was stopped without a course")),
    }
}
