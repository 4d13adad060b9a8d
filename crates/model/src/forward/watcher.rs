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

#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) stop: Option<Stop>,
    pub(super) weights: Option<Vec<Tensor>>,
    pub(super) stream: Option<Tensor>,
    pub(super) tokens: Option<Vec<u32>>,
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
    /// Stops it.
    Mailbox(Mailbox),
}

impl Watcher<'_> {
    /// A stage begins on this residual stream.
    pub(super) fn begin(&mut self, stream: &Tensor) {
        if let Self::Mailbox(mailbox) = self {
            mailbox.slot().stream = Some(stream.clone());
        }
    }

    /// What follows is of an expert that these tokens were routed to, if it reads them as they are.
    pub(super) fn route(&mut self, tokens: Option<&[u32]>) {
        if let Self::Mailbox(mailbox) = self {
            mailbox.slot().tokens = tokens.map(<[u32]>::to_vec);
        }
    }

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
                {
                    let mut slot = mailbox.slot();
                    let stream = slot.stream.clone();
                    let tokens = slot.tokens.clone().filter(|_| expert.is_some());
                    slot.stop = Some(Stop { readers, expert, input: input.clone(), stream, tokens });
                }
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

/// Runs a forward pass that nothing stops.
pub(crate) fn at_once<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(Error::msg("a forward pass was stopped without a course")),
    }
}
