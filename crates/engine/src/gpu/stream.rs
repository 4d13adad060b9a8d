//! Commands in the order in which they are recorded, in few submissions.

use std::collections::VecDeque;

/// Commands of a submission at most: a card should not wait long for its first ones.
const COMMANDS: usize = 64;
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
    pub(super) fn encoder(&mut self, device: &wgpu::Device) -> &mut wgpu::CommandEncoder {
        self.encoder
            .get_or_insert_with(|| device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default()))
    }

    pub(super) fn pass(&mut self, device: &wgpu::Device) -> &mut wgpu::ComputePass<'static> {
        let begun = self.pass.take();
        let pass = begun.unwrap_or_else(|| {
            let descriptor = wgpu::ComputePassDescriptor::default();
            self.encoder(device).begin_compute_pass(&descriptor).forget_lifetime()
        });
        self.pass.insert(pass)
    }

    /// Ends the pass, so that something else can be recorded.
    pub(super) fn between(&mut self) {
        self.pass = None;
    }

    /// Submits what was recorded; the last submission, if there is any.
    pub(super) fn submit(&mut self, queue: &wgpu::Queue) -> Option<wgpu::SubmissionIndex> {
        self.pass = None;
        if let Some(encoder) = self.encoder.take() {
            self.under_way.push_back(queue.submit([encoder.finish()]));
        }
        if self.under_way.len() > UNDER_WAY + 1 {
            self.under_way.pop_front();
        }
        (self.commands, self.work, self.copied) = (0, 0, 0);
        self.under_way.back().cloned()
    }

    /// Submits if that is enough, `most` being the operations that are; the submission to wait for before anything else
    /// is recorded.
    pub(super) fn counted(
        &mut self,
        queue: &wgpu::Queue,
        (work, copied): (u64, u64),
        most: u64,
    ) -> Option<wgpu::SubmissionIndex> {
        self.commands += 1;
        self.work += work;
        self.copied += copied;
        if self.commands < COMMANDS && self.work < most && self.copied < STAGED {
            return None;
        }
        self.submit(queue);
        if self.under_way.len() > UNDER_WAY { self.under_way.pop_front() } else { None }
    }
}
