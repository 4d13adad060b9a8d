//! Memory of a device: buffers that return to a pool when nobody holds them, numbers that go there and come back.
//!
//! All commands go through one queue in the order in which they were recorded. So a buffer may be given to somebody
//! else as soon as nobody holds it, even while commands that read it are still under way.

use std::sync::Arc;
use std::time::Instant;

use super::card::{Card, locked};
use super::pool::{STAGED, class};
use crate::elementary::{Buffer, Opaque};
use crate::error::{Result, bail};

/// Numbers on a device.
pub(super) struct Memory {
    card: Arc<Card>,
    /// There until it is dropped.
    buffer: Option<wgpu::Buffer>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory of {:?}", self.card)
    }
}

impl Opaque for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        let Some(buffer) = self.buffer.take() else { return };
        self.card.count(0, buffer.size());
        let mut pool = locked(&self.card.pool);
        // What is kept and what is in use together stay within twice the peak.
        if pool.bytes() + buffer.size() <= self.card.peak() {
            pool.give(buffer);
        }
    }
}

impl Memory {
    pub(super) fn card(&self) -> &Arc<Card> {
        &self.card
    }

    /// # Errors
    /// None in practice: the buffer is there as long as the memory is.
    pub(super) fn buffer(&self) -> Result<&wgpu::Buffer> {
        match &self.buffer {
            Some(buffer) => Ok(buffer),
            None => bail!("memory of {} was given back", self.card.adapter.name),
        }
    }

    /// As a tensor's buffer.
    pub(super) fn shared(self) -> Buffer {
        Buffer::Device(Arc::new(self))
    }
}

impl Card {
    /// Memory for so many numbers, whose values are not known.
    pub(super) fn room(self: &Arc<Self>, count: usize) -> Result<Memory> {
        let bytes = count as u64 * 4;
        if bytes > self.largest {
            bail!(
                "a tensor of {} where a buffer of {} has at most {}; hint: compute this model with cpu",
                gigabytes(bytes),
                self.adapter.name,
                gigabytes(self.largest)
            );
        }
        let size = class(bytes, self.largest);
        let kept = locked(&self.pool).take(size);
        let buffer = match kept {
            Some(buffer) => buffer,
            None => self.new_buffer(size)?,
        };
        self.count(size, 0);
        Ok(Memory { card: self.clone(), buffer: Some(buffer) })
    }

    /// A new buffer; where there is no room, once more without what is kept for reuse.
    fn new_buffer(&self, size: u64) -> Result<wgpu::Buffer> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        if let Some(buffer) = self.try_buffer(size, usage, false) {
            return Ok(buffer);
        }
        locked(&self.pool).clear();
        self.finish()?;
        if let Some(buffer) = self.try_buffer(size, usage, false) {
            return Ok(buffer);
        }
        let memory = self.memory();
        bail!(
            "{} has no room for {} more beside {} in use; hint: fewer or shorter windows at a time, or another adapter",
            self.adapter.name,
            gigabytes(size),
            gigabytes(memory.in_use)
        )
    }

    pub(super) fn try_buffer(
        &self,
        size: u64,
        usage: wgpu::BufferUsages,
        mapped: bool,
    ) -> Option<wgpu::Buffer> {
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: mapped };
        let buffer = self.device.create_buffer(&descriptor);
        match pollster::block_on(scope.pop()) {
            None => Some(buffer),
            Some(_) => None,
        }
    }

    /// Brings bytes to new memory of the device.
    pub(super) fn put(self: &Arc<Self>, bytes: &[u8]) -> Result<Memory> {
        let since = Instant::now();
        let memory = self.room(bytes.len().div_ceil(4))?;
        self.bring(bytes, &memory, 0)?;
        self.spent("uploads", since);
        Ok(memory)
    }

    /// Numbers that lie on another card, piece by piece through memory that processor and cards see.
    pub(super) fn adopt(self: &Arc<Self>, x: &Memory, first: usize, count: usize) -> Result<Memory> {
        let since = Instant::now();
        let memory = self.room(count)?;
        let (mut at, mut brought) = (0u64, Ok(()));
        x.card().fetch(x, first, count, &mut |part| {
            if brought.is_ok() {
                brought = self.bring(bytemuck::cast_slice(part), &memory, at);
            }
            at += 4 * part.len() as u64;
        })?;
        brought?;
        self.spent("exchanges", since);
        Ok(memory)
    }

    /// Calls `to` with `count` numbers of memory, from number `first` on.
    pub(super) fn get(
        &self,
        memory: &Memory,
        first: usize,
        count: usize,
        to: &mut dyn FnMut(&[f32]),
    ) -> Result<()> {
        let since = Instant::now();
        if count as u64 * 4 <= STAGED {
            let mut seen = false;
            self.fetch(memory, first, count, &mut |numbers| {
                seen = true;
                to(numbers);
            })?;
            if !seen {
                to(&[]);
            }
        } else {
            let mut all = Vec::with_capacity(count);
            self.fetch(memory, first, count, &mut |part| all.extend_from_slice(part))?;
            to(&all);
        }
        self.spent("fetching", since);
        Ok(())
    }
}

/// For people.
pub(super) fn gigabytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{bytes} bytes"),
        1_000_000..1_000_000_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
