//! Commands in the order in which they are recorded, in few submissions.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;

use super::profile::Profile;

/// Commands of a submission at most: a card should not wait long for its first ones.
const COMMANDS: usize = 64;
/// Bytes on their way to the card in a submission at most: until it is done they are held twice.
const STAGED: u64 = 128 << 20;
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
    /// What brings numbers in commands that are not yet submitted, and is mapped again behind them.
    bringing: Vec<wgpu::Buffer>,
    /// Where it goes then.
    returned: Option<Sender<wgpu::Buffer>>,
    /// Where somebody wants to know.
    pub(super) profile: Option<Profile>,
}

impl Stream {
    pub(super) fn encoder(&mut self, device: &wgpu::Device) -> &mut wgpu::CommandEncoder {
        let profile = &mut self.profile;
        self.encoder.get_or_insert_with(|| {
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            if let Some(profile) = profile {
                profile.begin(device, &mut encoder);
            }
            encoder
        })
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

    /// Notes the time behind what was recorded last.
    pub(super) fn note(&mut self, command: &'static str) {
        let Some((set, at)) = self.profile.as_mut().and_then(|profile| profile.after(command)) else {
            return;
        };
        match (&mut self.pass, &mut self.encoder) {
            (Some(pass), _) => pass.write_timestamp(set, at),
            (None, Some(encoder)) => encoder.write_timestamp(set, at),
            (None, None) => {}
        }
    }

    /// Submits what was recorded; the last submission, if there is any.
    pub(super) fn submit(
        &mut self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
    ) -> Option<wgpu::SubmissionIndex> {
        self.pass = None;
        if let Some(mut encoder) = self.encoder.take() {
            if let Some(profile) = &mut self.profile {
                profile.end(device, &mut encoder);
            }
            self.under_way.push_back(queue.submit([encoder.finish()]));
            for buffer in self.bringing.drain(..) {
                let (returned, own) = (self.returned.clone(), buffer.clone());
                buffer.map_async(wgpu::MapMode::Write, .., move |result| {
                    if let (Ok(()), Some(returned)) = (result, returned) {
                        drop(returned.send(own));
                    }
                });
            }
        }
        if self.under_way.len() > UNDER_WAY + 1 {
            self.under_way.pop_front();
        }
        (self.commands, self.work, self.copied) = (0, 0, 0);
        self.under_way.back().cloned()
    }

    /// Something brings numbers in what is recorded, and goes to `returned` when it is mapped again.
    pub(super) fn brings(&mut self, buffer: wgpu::Buffer, returned: Sender<wgpu::Buffer>) {
        self.bringing.push(buffer);
        self.returned = Some(returned);
    }

    /// The first submission that is under way.
    pub(super) fn oldest(
        &mut self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
    ) -> Option<wgpu::SubmissionIndex> {
        if !self.bringing.is_empty() {
            self.submit(device, queue);
        }
        if self.under_way.len() > 1 { self.under_way.pop_front() } else { self.under_way.front().cloned() }
    }

    /// Submits if that is enough, `most` being the operations that are; the submission to wait for before anything else
    /// is recorded.
    pub(super) fn counted(
        &mut self,
        (device, queue): (&wgpu::Device, &wgpu::Queue),
        (work, copied): (u64, u64),
        most: u64,
    ) -> Option<wgpu::SubmissionIndex> {
        self.commands += 1;
        self.work += work;
        self.copied += copied;
        if self.commands < COMMANDS && self.work < most && self.copied < STAGED {
            return None;
        }
        self.submit(device, queue);
        if self.under_way.len() > UNDER_WAY { self.under_way.pop_front() } else { None }
    }
}
