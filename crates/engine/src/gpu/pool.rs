//! Buffers that nobody holds, for whoever needs one next.

use std::collections::BTreeMap;
use std::sync::mpsc;

/// Bytes of the smallest buffer.
const SMALLEST: u64 = 256;
/// Bytes of a buffer through which numbers go to the card and come back.
pub(super) const STAGED: u64 = 32 << 20;

/// Buffers that nobody holds, by size.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: BTreeMap<u64, Vec<wgpu::Buffer>>,
    bytes: u64,
}

impl Pool {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn take(&mut self, size: u64) -> Option<wgpu::Buffer> {
        let buffer = self.free.get_mut(&size)?.pop()?;
        self.bytes -= size;
        Some(buffer)
    }

    pub(super) fn give(&mut self, buffer: wgpu::Buffer) {
        self.bytes += buffer.size();
        self.free.entry(buffer.size()).or_default().push(buffer);
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// The size of the buffer for so many bytes: at most an eighth more, so that few sizes serve all.
pub(super) fn class(bytes: u64, largest: u64) -> u64 {
    let bytes = bytes.max(SMALLEST);
    let step = (bytes.next_power_of_two() / 16).max(SMALLEST);
    bytes.next_multiple_of(step).min(largest.max(bytes))
}

/// Buffers that numbers go through.
#[derive(Debug)]
pub(super) struct Staging {
    /// Mapped buffers for numbers on their way to the card.
    pub(super) ready: (mpsc::Sender<wgpu::Buffer>, mpsc::Receiver<wgpu::Buffer>),
    /// Such buffers, wherever they are.
    pub(super) made: usize,
    /// Unmapped buffers for numbers that come back.
    pub(super) back: Vec<wgpu::Buffer>,
}

impl Default for Staging {
    fn default() -> Self {
        Self { ready: mpsc::channel(), made: 0, back: Vec::new() }
    }
}

impl Staging {
    /// What tells that a buffer that brought numbers is mapped again.
    pub(super) fn returned(&self) -> mpsc::Sender<wgpu::Buffer> {
        self.ready.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_buffers() {
        for bytes in [1, 255, 256, 257, 5000, 1 << 20, (1 << 20) + 1, 123_456_789] {
            let size = class(bytes, 1 << 40);
            assert!(size >= bytes && size.is_multiple_of(SMALLEST), "{bytes} {size}");
            assert!(bytes < 4096 || size <= bytes + bytes / 8 + SMALLEST, "{bytes} {size}");
        }
        assert_eq!(class(1_000_000, 1_000_000), 1_000_000);
    }
}
