//! The forward pass as a coroutine: it stops at every site, is looked at, and goes on.
//!
//! Calibration wants all windows to arrive at a site before any of them passes it, and to pass it with weights that were
//! chosen there. So the interpreter's functions are `async`: what a window holds at a site is what the next
//! site needs and nothing else, each matrix product runs once, and any number of threads take turns in moving windows.
//! There is no executor; [`Course::advance`] polls.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use mlx_quant_engine::{Error, Result, Tensor};

use super::Forward;
use super::pass::Pass;
use super::state::{Keys, State};
use super::watcher::{Mailbox, Stop, Watcher, at_once};
use crate::decoder::{Block, Mlp};
use crate::parameters::Parameters;

/// How far a window came.
#[derive(Debug)]
pub enum Progress {
    /// Before a site, or before those of several experts.
    At(Vec<Stop>),
    /// Through the block.
    Done(State),
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
    /// Goes on to the next site, or to the end. `weights` are used at each of the sites where it stands instead of
    /// the block's own: `[out, in]` of each reader, in their order. For sites that are left out the block's own are used.
    ///
    /// # Errors
    /// As [`Forward::block`]; a course that is over.
    pub fn advance(&mut self, weights: Vec<Option<Vec<Tensor>>>) -> Result<Progress> {
        self.mailbox.slot().weights = weights;
        match self.future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(state) => {
                self.future = Box::pin(std::future::ready(Err(Error::msg("the course is over"))));
                state.map(Progress::Done)
            }
            Poll::Pending => {
                let stops = std::mem::take(&mut self.mailbox.slot().stops);
                if stops.is_empty() {
                    return Err(Error::msg("a forward pass waits for nothing"));
                }
                Ok(Progress::At(stops))
            }
        }
    }
}

impl<'d> Forward<'d> {
    /// Sets out through block `index`; nothing is computed before [`Course::advance`]. It stops at `experts` experts of a
    /// layer at once, first at what they all read, then at what they read next: experts `0..experts`, then those behind
    /// them.
    pub fn course<'f>(
        &'f self,
        index: usize,
        parameters: &'f Parameters,
        state: State,
        experts: usize,
    ) -> Course<'f>
    where
        'd: 'f,
    {
        let mailbox = Mailbox::default();
        let watcher = Watcher::Mailbox(mailbox.clone(), experts);
        Course { future: Box::pin(self.take(index, parameters, state, watcher)), mailbox }
    }

    /// What the last linear of an expert reads, `[tokens, inner]`, where the expert reads `input` `[tokens, hidden]`.
    ///
    /// # Errors
    /// As [`Forward::block`].
    pub fn inner(
        &self,
        parameters: &Parameters,
        mlp: &Mlp,
        slice: Option<usize>,
        input: &Tensor,
    ) -> Result<Tensor> {
        let mut tap = ();
        let pass = Pass {
            engine: &self.device,
            parameters,
            tables: &self.tables.all,
            watcher: Watcher::Tap(&mut tap),
        };
        pass.inner(mlp, slice, input)
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
        at_once(async move { pass.layer(layer, index, (input, input), None, &mut Keys::new()).await })
    }
}
