//! Memory that processor and card both see, through which numbers go to the card and come back.
//!
//! A driver needs milliseconds to make such memory known to a card, more than the numbers are under way; so buffers of
//! one size are made once and used again. Those that bring numbers are mapped again as soon as the card has copied them.

use std::sync::mpsc;
use std::time::Duration;

use super::card::{Card, locked};
use super::memory::{Memory, gigabytes};
use super::pool::STAGED;
use crate::error::{Result, bail};

/// Buffers that bring numbers, and buffers that numbers come back in, at most.
const MOST: usize = 8;
/// Fewer bytes go through a buffer of their own size, which is given back at once.
const FEW: u64 = 1 << 18;
/// How long the word that memory may be used waits, at most, after the work is done.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes that one thread copies; what lies on a card takes more than one thread brings.
const COPIED: usize = 2 << 20;

/// Copies bytes, on all threads of the current pool if they are many.
fn copied(to: wgpu::WriteOnly<'_, [u8]>, from: &[u8]) {
    let (pieces, mut rest) = to.into_chunks::<COPIED>();
    let whole = from.chunks_exact(COPIED);
    rest.copy_from_slice(whole.remainder());
    let pieces: Vec<_> = pieces.into_iter().zip(whole).collect();
    rayon::scope(|scope| {
        for (piece, from) in pieces {
            scope.spawn(move |_| wgpu::WriteOnly::<[u8]>::from(piece).copy_from_slice(from));
        }
    });
}

impl Card {
    /// A mapped buffer of [`STAGED`] bytes; waits until one is free where enough are under way.
    fn outward(&self) -> Result<wgpu::Buffer> {
        loop {
            {
                let mut staging = locked(&self.staging);
                if let Ok(buffer) = staging.ready.1.try_recv() {
                    return Ok(buffer);
                }
                if staging.made < MOST {
                    let usage = wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::MAP_WRITE;
                    let Some(buffer) = self.try_buffer(STAGED, usage, true) else {
                        bail!("no room to bring {} to {}", gigabytes(STAGED), self.adapter.name)
                    };
                    staging.made += 1;
                    return Ok(buffer);
                }
            }
            // All are under way, or are being filled by others.
            match self.oldest() {
                Some(submission) => self.wait(Some(submission))?,
                None => std::thread::yield_now(),
            }
        }
    }

    /// Brings bytes to memory of the device, from byte `first` of it on.
    pub(super) fn bring(&self, bytes: &[u8], to: &Memory, first: u64) -> Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            let left = (bytes.len() - at) as u64;
            let few = left <= FEW;
            let staging = if few {
                let usage = wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::MAP_WRITE;
                let Some(staging) = self.try_buffer(left.next_multiple_of(4), usage, true) else {
                    bail!("no room to bring {} to {}", gigabytes(left), self.adapter.name)
                };
                staging
            } else {
                self.outward()?
            };
            let own = &bytes[at..at + left.min(STAGED) as usize];
            match staging.get_mapped_range_mut(..own.len().next_multiple_of(4) as u64) {
                Ok(mut range) => copied(range.slice(..own.len()), own),
                Err(error) => bail!("{} lends no memory: {error}", self.adapter.name),
            }
            staging.unmap();
            let size = own.len().next_multiple_of(4) as u64;
            self.copy_from(staging, to.buffer()?, first + at as u64, size, !few)?;
            at += own.len();
        }
        Ok(())
    }

    /// An unmapped buffer of [`STAGED`] bytes.
    fn homeward(&self, size: u64) -> Result<wgpu::Buffer> {
        let size = if size <= FEW { FEW } else { STAGED };
        let kept = {
            let mut staging = locked(&self.staging);
            let at = staging.back.iter().rposition(|buffer| buffer.size() == size);
            at.map(|at| staging.back.swap_remove(at))
        };
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
        match kept.or_else(|| self.try_buffer(size, usage, false)) {
            Some(buffer) => Ok(buffer),
            None => bail!("no room to read {} of {}", gigabytes(size), self.adapter.name),
        }
    }

    /// Calls `to` with parts of `count` numbers of memory, from number `first` on, in their order: at most
    /// [`STAGED`] bytes each. Some are under way while one is looked at.
    pub(super) fn fetch(
        &self,
        memory: &Memory,
        first: usize,
        count: usize,
        to: &mut dyn FnMut(&[f32]),
    ) -> Result<()> {
        let part = STAGED as usize / 4;
        let mut starts = (0..count).step_by(part);
        let mut under_way = std::collections::VecDeque::new();
        loop {
            while under_way.len() < MOST / 2
                && let Some(start) = starts.next()
            {
                let size = (part.min(count - start) * 4) as u64;
                let buffer = self.homeward(size)?;
                self.copy(memory.buffer()?, (first + start) as u64 * 4, &buffer, 0, size)?;
                let (done, waiting) = mpsc::channel();
                let last = self.submit();
                buffer.map_async(wgpu::MapMode::Read, ..size, move |result| drop(done.send(result)));
                under_way.push_back((buffer, size, last, waiting));
            }
            let Some((buffer, size, last, waiting)) = under_way.pop_front() else { return self.check() };
            self.wait(last)?;
            // Another thread that polls may be about to say it.
            match waiting.recv_timeout(PATIENCE) {
                Ok(Ok(())) => {}
                _ => bail!("{} does not answer; hint: the kernel log (dmesg) may say why", self.adapter.name),
            }
            match buffer.get_mapped_range(..size) {
                Ok(range) => to(bytemuck::cast_slice(&range)),
                Err(error) => bail!("{} lends no memory: {error}", self.adapter.name),
            }
            buffer.unmap();
            let mut staging = locked(&self.staging);
            if staging.back.len() < MOST {
                staging.back.push(buffer);
            }
        }
    }
}
