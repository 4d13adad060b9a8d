//! Commands in the order in which they are recorded, in few submissions.

use std::collections::VecDeque;

use super::card::{Card, locked};
use crate::error::{Result, bail};

/// Commands of a submission at most.
const COMMANDS: usize = 256;
/// Bytes on their way to the card in a submission at most: until it is done they are held twice.
const STAGED: u64 = 256 << 20;
/// Submissions under way at most.
const UNDER_WAY: usize = 4;

/// What is recorded and not yet submitted, and what is under way.
#[derive(Debug, Default)]
pub(super) struct Stream {
    // In front of the encoder that it writes to, so that it ends first.
    pass: Option<wgpu::ComputePass<'static>>,
    encoder: Option<wgpu::CommandEncoder>,
    commands: usize,
    work: u64,
    copied: u64,
    under_way: VecDeque<wgpu::SubmissionIndex>,
}

impl Stream {
    fn encoder(&mut self, card: &Card) -> &mut wgpu::CommandEncoder {
        self.encoder.get_or_insert_with(|| {
            card.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
        })
    }

    fn pass(&mut self, card: &Card) -> &mut wgpu::ComputePass<'static> {
        let begun = self.pass.take();
        let pass = begun.unwrap_or_else(|| {
            let descriptor = wgpu::ComputePassDescriptor::default();
            self.encoder(card).begin_compute_pass(&descriptor).forget_lifetime()
        });
        self.pass.insert(pass)
    }

    /// Submits what was recorded; the last submission, if there is any.
    fn submit(&mut self, card: &Card) -> Option<wgpu::SubmissionIndex> {
        self.pass = None;
        if let Some(encoder) = self.encoder.take() {
            self.under_way.push_back(card.queue.submit([encoder.finish()]));
        }
        (self.commands, self.work, self.copied) = (0, 0, 0);
        self.under_way.back().cloned()
    }

    /// Submits if that is enough; the submission to wait for before anything else is recorded.
    fn counted(&mut self, card: &Card, work: u64, copied: u64) -> Option<wgpu::SubmissionIndex> {
        self.commands += 1;
        self.work += work;
        self.copied += copied;
        if self.commands < COMMANDS && self.work < card.work && self.copied < STAGED {
            return None;
        }
        self.submit(card);
        if self.under_way.len() > UNDER_WAY { self.under_way.pop_front() } else { None }
    }
}

impl Card {
    /// Records a launch.
    pub(super) fn record(
        &self,
        work: u64,
        launch: impl FnOnce(&mut wgpu::ComputePass<'static>),
    ) -> Result<()> {
        let old = {
            let mut stream = locked(&self.stream);
            launch(stream.pass(self));
            stream.counted(self, work, 0)
        };
        match old {
            None => self.check(),
            Some(old) => self.wait(Some(old)),
        }
    }

    /// Records a copy.
    pub(super) fn copy(
        &self,
        from: &wgpu::Buffer,
        first: u64,
        to: &wgpu::Buffer,
        at: u64,
        size: u64,
    ) -> Result<()> {
        if size == 0 {
            return Ok(());
        }
        let old = {
            let mut stream = locked(&self.stream);
            stream.pass = None;
            stream.encoder(self).copy_buffer_to_buffer(from, first, to, at, size);
            stream.counted(self, 0, size)
        };
        match old {
            None => self.check(),
            Some(old) => self.wait(Some(old)),
        }
    }

    /// Records zeros.
    pub(super) fn clear(&self, buffer: &wgpu::Buffer) {
        let mut stream = locked(&self.stream);
        stream.pass = None;
        stream.encoder(self).clear_buffer(buffer, 0, None);
    }

    /// Submits what was recorded.
    pub(super) fn submit(&self) -> Option<wgpu::SubmissionIndex> {
        locked(&self.stream).submit(self)
    }

    /// Waits for a submission.
    pub(super) fn wait(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<()> {
        self.check()?;
        let wait = wgpu::PollType::Wait { submission_index: submission, timeout: None };
        if let Err(error) = self.device.poll(wait) {
            self.check()?;
            bail!("{} does not answer: {error}; hint: the kernel log (dmesg) may say why", self.adapter.name);
        }
        self.check()
    }

    /// Submits what was recorded and waits for it.
    pub(super) fn finish(&self) -> Result<()> {
        let last = self.submit();
        self.wait(last)
    }
}
