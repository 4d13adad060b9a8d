//! An opened adapter: its device and queue, what went wrong on it, and how much of its memory is in use.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::adapter::{Adapter, AdapterChoice, AdapterKind, choose};
use super::kernel::Kernel;
use super::pool::{Pool, Staging};
use super::profile;
use super::squares;
use super::stream::Stream;
use super::tiles::Tiles;
use crate::error::{Error, Result, bail};
use crate::settings::Precision;
use crate::usage::MemoryUse;

/// Threads of the workgroups of most kernels.
pub(super) const THREADS: u32 = 256;
/// Bytes that the threads of a workgroup of any kernel share at most: what WebGPU promises.
const WORKGROUP_MEMORY: u32 = 16_384;
/// Bytes of the numbers that a kernel is launched with: what Vulkan promises.
const IMMEDIATES: u32 = 128;

/// An opened adapter.
pub(super) struct Card {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) adapter: Adapter,
    /// Elements that a kernel may see through one binding.
    pub(super) binding: usize,
    /// Bytes of the largest buffer.
    pub(super) largest: u64,
    /// Bytes to which the start of a binding is a multiple.
    pub(super) alignment: u64,
    /// Workgroups along one axis of a launch.
    pub(super) groups: u32,
    /// Operations of a submission at most, about: what also draws a screen must not be busy for long, and drivers end
    /// what takes seconds.
    pub(super) work: u64,
    /// Whether the tiles of products may be 128 wide.
    pub(super) wide_tiles: bool,
    /// How products are computed that keep the card busy.
    pub(super) tiles: Tiles,
    /// How exactly products are computed that may be less exact.
    pub(super) precision: Precision,
    pub(super) stream: Mutex<Stream>,
    pub(super) pool: Mutex<Pool>,
    pub(super) staging: Mutex<Staging>,
    pub(super) kernels: Mutex<HashMap<String, Arc<Kernel>>>,
    in_use: AtomicU64,
    peak: AtomicU64,
    /// The first thing that went wrong and that nobody waited for.
    fault: Arc<Mutex<Option<String>>>,
}

impl std::fmt::Debug for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Card {}", self.adapter.name)
    }
}

/// A lock, also after a panic elsewhere: what it guards is whole between statements.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Card {
    /// Opens an adapter. `binding` lowers the bytes that a kernel sees at once, for tests.
    pub(super) fn open(choice: &AdapterChoice, precision: Precision, binding: Option<u64>) -> Result<Self> {
        let (adapter, told) = choose(choice)?;
        let fast = precision == Precision::Fast;
        if let Some(why) = squares::lacking(&adapter).filter(|_| fast) {
            bail!("{} computes in float32 alone: {why}; hint: leave --precision out", told.name);
        }
        let mut limits = adapter.limits();
        check(&adapter, &limits, &told)?;
        if let Some(binding) = binding {
            limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(binding);
        }
        let noted = adapter.features() & profile::FEATURES;
        let (wanted, experimental) = if fast {
            // SAFETY: of what is experimental only our own kernel of products is made, whose places lie within its arrays.
            (squares::FEATURES, unsafe { wgpu::ExperimentalFeatures::enabled() })
        } else {
            (wgpu::Features::empty(), wgpu::ExperimentalFeatures::disabled())
        };
        let descriptor = wgpu::DeviceDescriptor {
            label: None,
            required_features: wgpu::Features::IMMEDIATES | noted | wanted,
            required_limits: limits.clone(),
            experimental_features: experimental,
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Off,
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|error| cannot_open(&told, &error))?;
        let work = match told.kind {
            AdapterKind::Discrete => 4_000_000_000_000,
            _ => 200_000_000_000,
        };
        let tiles = match told.kind {
            AdapterKind::Discrete => Tiles::Turns,
            _ => Tiles::Plain,
        };
        let fault = Arc::new(Mutex::new(None));
        let first = fault.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            locked(&first).get_or_insert_with(|| error.to_string());
        }));
        let first = fault.clone();
        device.set_device_lost_callback(move |reason, message| {
            if reason != wgpu::DeviceLostReason::Destroyed {
                locked(&first).get_or_insert_with(|| format!("the device was lost: {message}"));
            }
        });
        Ok(Self {
            device,
            queue,
            adapter: told,
            binding: (limits.max_storage_buffer_binding_size.min(1 << 32) / 4) as usize,
            largest: limits.max_buffer_size,
            alignment: u64::from(limits.min_storage_buffer_offset_alignment.max(16)),
            groups: limits.max_compute_workgroups_per_dimension,
            work,
            tiles,
            precision,
            wide_tiles: limits.max_compute_workgroup_storage_size >= 2 * WORKGROUP_MEMORY,
            stream: Mutex::default(),
            pool: Mutex::default(),
            staging: Mutex::default(),
            kernels: Mutex::default(),
            in_use: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            fault,
        })
    }

    /// What went wrong on the device since it was opened, if anything did. Nothing can be computed after that.
    pub(super) fn check(&self) -> Result<()> {
        match &*locked(&self.fault) {
            None => Ok(()),
            Some(fault) => bail!(
                "{} failed: {}; hint: the kernel log (dmesg) may say more; cpu works in any case",
                self.adapter.name,
                fault.trim()
            ),
        }
    }

    /// Counts bytes that were taken, or given back.
    pub(super) fn count(&self, taken: u64, given_back: u64) {
        let before = self.in_use.fetch_add(taken, Ordering::Relaxed);
        self.peak.fetch_max(before + taken, Ordering::Relaxed);
        self.in_use.fetch_sub(given_back, Ordering::Relaxed);
    }

    /// Bytes in use at most so far.
    pub(super) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// Forgets what was in use before.
    pub(super) fn reset_peak(&self) {
        self.peak.store(self.in_use.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Bytes in use now, at most so far, and kept for reuse.
    pub(super) fn memory(&self) -> MemoryUse {
        MemoryUse {
            in_use: self.in_use.load(Ordering::Relaxed),
            peak: self.peak(),
            kept: locked(&self.pool).bytes(),
        }
    }
}

fn cannot_open(adapter: &Adapter, error: &wgpu::RequestDeviceError) -> Error {
    Error::msg(format!(
        "{} cannot be opened: {error}; hint: another program may hold it, or its driver and its libraries are of \
         different versions",
        adapter.name
    ))
}

/// Refuses an adapter that no kernel of this engine fits.
fn check(adapter: &wgpu::Adapter, limits: &wgpu::Limits, told: &Adapter) -> Result<()> {
    let needed = [
        ("threads of a workgroup", limits.max_compute_invocations_per_workgroup, THREADS),
        ("bytes of workgroup memory", limits.max_compute_workgroup_storage_size, WORKGROUP_MEMORY),
        ("storage buffers of a kernel", limits.max_storage_buffers_per_shader_stage, 8),
        ("bytes of immediates", limits.max_immediate_size, IMMEDIATES),
    ];
    for (what, has, needs) in needed {
        if has < needs {
            bail!("{} has {has} {what}, {needs} are needed; hint: a newer driver, or cpu", told.name);
        }
    }
    if !adapter.features().contains(wgpu::Features::IMMEDIATES) {
        bail!("{} takes no immediates; hint: a newer driver, or cpu", told.name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any adapter; without one there is nothing to test.
    fn card() -> Option<Arc<Card>> {
        Some(Arc::new(Card::open(&AdapterChoice::Index(0), Precision::Float32, None).ok()?))
    }

    /// What nobody waits for comes back as an error of the next operation, and names the adapter.
    #[test]
    fn faults_are_errors() {
        let Some(card) = card() else { return };
        let memory = card.put(&[1, 2, 3, 4]).unwrap();
        let size = u64::MAX / 2;
        let usage = wgpu::BufferUsages::STORAGE;
        let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        drop(card.device.create_buffer(&descriptor));
        let error = card.get(&memory, 0, 1, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(&card.adapter.name) && error.contains("hint: "), "{error}");
    }

    #[test]
    fn a_lost_device_is_an_error() {
        let Some(card) = card() else { return };
        let memory = card.put(&[1, 2, 3, 4]).unwrap();
        card.finish().unwrap();
        card.device.destroy();
        let error = card.get(&memory, 0, 1, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(&card.adapter.name) && error.contains("hint: "), "{error}");
        assert!(card.put(&[1, 2, 3, 4]).is_err());
    }
}
