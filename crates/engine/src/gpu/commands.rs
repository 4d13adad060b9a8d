//! What a card is told to do, in order.

use std::time::Instant;

use super::card::{Card, locked};
use super::profile::{self, Profile};
use crate::error::{Result, bail};
use crate::usage::Spent;

impl Card {
    /// Records a launch.
    pub(super) fn record(
        &self,
        (name, work): (&'static str, u64),
        launch: impl FnOnce(&mut wgpu::ComputePass<'static>),
    ) -> Result<()> {
        let old = {
            let mut stream = locked(&self.stream);
            launch(stream.pass(&self.device));
            stream.note(name);
            stream.counted((&self.device, &self.queue), (work, 0), self.work)
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
            stream.between();
            stream.encoder(&self.device).copy_buffer_to_buffer(from, first, to, at, size);
            stream.note("copy");
            stream.counted((&self.device, &self.queue), (0, size), self.work)
        };
        match old {
            None => self.check(),
            Some(old) => self.wait(Some(old)),
        }
    }

    /// Records a copy of what `staging` brings, which is used again if it is to `stay`.
    pub(super) fn copy_from(
        &self,
        staging: wgpu::Buffer,
        to: &wgpu::Buffer,
        at: u64,
        size: u64,
        stay: bool,
    ) -> Result<()> {
        let returned = locked(&self.staging).returned();
        let old = {
            let mut stream = locked(&self.stream);
            stream.between();
            stream.encoder(&self.device).copy_buffer_to_buffer(&staging, 0, to, at, size);
            stream.note("upload");
            if stay {
                stream.brings(staging, returned);
            }
            stream.counted((&self.device, &self.queue), (0, size), self.work)
        };
        match old {
            None => self.check(),
            Some(old) => self.wait(Some(old)),
        }
    }

    /// The first submission that is under way, if there is any.
    pub(super) fn oldest(&self) -> Option<wgpu::SubmissionIndex> {
        locked(&self.stream).oldest(&self.device, &self.queue)
    }

    /// Records zeros.
    pub(super) fn clear(&self, buffer: &wgpu::Buffer) {
        self.clear_some(buffer, 0, None);
    }

    /// Records zeros in some bytes of a buffer, from byte `first` on.
    pub(super) fn clear_some(&self, buffer: &wgpu::Buffer, first: u64, size: Option<u64>) {
        let mut stream = locked(&self.stream);
        stream.between();
        stream.encoder(&self.device).clear_buffer(buffer, first, size);
        stream.note("clear");
    }

    /// Notes from now on what time is spent on; whether the adapter can.
    pub(super) fn note_times(&self) -> bool {
        let able = self.device.features().contains(profile::FEATURES);
        if able {
            self.submit();
            locked(&self.stream).profile = Some(Profile::default());
        }
        able
    }

    /// What time was spent on.
    pub(super) fn profile(&self) -> Result<Vec<Spent>> {
        self.finish()?;
        let period = self.queue.get_timestamp_period();
        let mut stream = locked(&self.stream);
        Ok(stream.profile.as_mut().map(|profile| profile.spent(&self.device, period)).unwrap_or_default())
    }

    /// Submits what was recorded.
    pub(super) fn submit(&self) -> Option<wgpu::SubmissionIndex> {
        locked(&self.stream).submit(&self.device, &self.queue)
    }

    /// Waits for a submission.
    pub(super) fn wait(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<()> {
        self.check()?;
        let since = Instant::now();
        let wait = wgpu::PollType::Wait { submission_index: submission, timeout: None };
        if let Err(error) = self.device.poll(wait) {
            self.check()?;
            bail!("{} does not answer: {error}; hint: the kernel log (dmesg) may say why", self.adapter.name);
        }
        self.spent("wait", since);
        self.check()
    }

    /// Counts time spent in front of the card, where somebody wants to know.
    pub(super) fn spent(&self, what: &'static str, since: Instant) {
        if let Some(profile) = &mut locked(&self.stream).profile {
            profile.host(what, since);
        }
    }

    /// Submits what was recorded and waits for it.
    pub(super) fn finish(&self) -> Result<()> {
        let last = self.submit();
        self.wait(last)
    }
}
