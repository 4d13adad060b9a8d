//! Who watches a forward pass: one who sees and lets pass, or one who stops it at every site.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use mlx_quant_engine::{Error, Result, Tensor};

use crate::decoder::Linear;

/// Sees what linears read.
pub trait Tap: Send {
    /// `input` `[.., in]` is about to be read by `readers`; of stacked readers by that expert, which sees only the
    /// tokens that were routed to it.
    ///
    /// # Errors
    /// Whatever went wrong; the pass ends with it.
    fn see(&mut self, readers: &[&Linear], expert: Option<usize>, input: &Tensor) -> Result<()>;
}

/// Sees nothing.
impl Tap for () {
    fn see(&mut self, _: &[&Linear], _: Option<usize>, _: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// What stands before a site.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Who reads it.
    pub readers: Vec<Linear>,
    /// Which expert of stacked readers.
    pub expert: Option<usize>,
    /// `[.., in]`; of experts only the tokens routed to them.
    pub input: Tensor,
    /// The residual stream that the stage reads and adds to, `[batch, tokens, hidden]`.
    pub stream: Option<Tensor>,
    /// Of experts: the tokens of the batch that were routed to it, a row of `input` each; `None` where rows are more than
    /// tokens, as inputs times what routing makes of them.
    pub tokens: Option<Vec<u32>>,
}

/// What some linears are about to read.
pub(super) struct Reading<'r> {
    pub(super) readers: Vec<&'r Linear>,
    /// Which expert of stacked readers.
    pub(super) expert: Option<usize>,
    /// `[.., in]`
    pub(super) input: &'r Tensor,
    /// As [`Stop::tokens`].
    pub(super) tokens: Option<&'r [u32]>,
}

/// Weights to be used instead of the block's own, one of each reader.
pub(super) type Given = Option<Vec<Tensor>>;

#[derive(Debug, Default)]
pub(super) struct Slot {
    /// One, or those of several experts.
    pub(super) stops: Vec<Stop>,
    /// One of each stop; of those at the end that are left out, none.
    pub(super) weights: Vec<Given>,
    pub(super) stream: Option<Tensor>,
}

/// Shared between a course and its forward pass.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mailbox(Arc<Mutex<Slot>>);

impl Mailbox {
    pub(super) fn slot(&self) -> MutexGuard<'_, Slot> {
        // A panic elsewhere leaves nothing half-done in here.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who watches a forward pass.
pub(crate) enum Watcher<'p> {
    /// Sees and lets pass.
    Tap(&'p mut (dyn Tap + 'p)),
    /// Stops it, at so many experts of a layer at once.
    Mailbox(Mailbox, usize),
}

impl Watcher<'_> {
    /// How many experts of a layer it sees at once; as many as `usual` where it lets pass.
    pub(super) fn experts(&self, usual: usize) -> usize {
        match self {
            Self::Tap(_) => usual.max(1),
            Self::Mailbox(_, experts) => (*experts).max(1),
        }
    }

    /// A stage begins on this residual stream.
    pub(super) fn begin(&mut self, stream: &Tensor) {
        if let Self::Mailbox(mailbox, _) = self {
            mailbox.slot().stream = Some(stream.clone());
        }
    }

    /// Shows it what is about to be read; gives the weights that are to be used, one of each reading.
    pub(super) async fn see(&mut self, readings: &[Reading<'_>]) -> Result<Vec<Given>> {
        let mut given = match self {
            Self::Tap(tap) => {
                readings.iter().try_for_each(|own| tap.see(&own.readers, own.expert, own.input))?;
                Vec::new()
            }
            Self::Mailbox(mailbox, _) => {
                let stream = mailbox.slot().stream.clone();
                let stop = |own: &Reading<'_>| Stop {
                    readers: own.readers.iter().copied().cloned().collect(),
                    expert: own.expert,
                    input: own.input.clone(),
                    stream: stream.clone(),
                    tokens: own.tokens.map(<[u32]>::to_vec),
                };
                let stops = readings.iter().map(stop).collect();
                mailbox.slot().stops = stops;
                let mut asked = false;
                std::future::poll_fn(|_| {
                    if std::mem::replace(&mut asked, true) { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
                std::mem::take(&mut mailbox.slot().weights)
            }
        };
        given.resize(readings.len(), None);
        Ok(given)
    }
}

/// Runs a forward pass that nothing stops.
pub(crate) fn at_once<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(Error::msg("a forward pass was stopped without a course")),
    }
}
