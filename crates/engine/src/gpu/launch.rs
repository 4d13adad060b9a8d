//! Launches of kernels, which are built once.

use std::sync::Arc;
use std::time::Instant;

use super::card::{Card, THREADS, locked};
use super::kernel::Kernel;
use super::memory::Memory;
use super::program::{Program, Words};
use crate::Tensor;
use crate::elementary::Buffer;
use crate::error::{Result, bail};

/// Neighbouring numbers of some memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slice<'m> {
    pub(super) memory: &'m Memory,
    pub(super) first: usize,
    pub(super) count: usize,
}

impl<'m> Slice<'m> {
    /// A tensor's numbers.
    pub(super) fn of(x: &'m Tensor) -> Result<Self> {
        let (buffer, first) = x.buffer();
        let Buffer::Device(opaque) = buffer else { bail!("a tensor {:?} of another engine", x.dims()) };
        let any: &dyn std::any::Any = &**opaque;
        let Some(memory) = any.downcast_ref::<Memory>() else {
            bail!("a tensor {:?} of another engine", x.dims())
        };
        Ok(Self { memory, first, count: x.elem_count() })
    }

    /// All of some memory, `count` numbers.
    pub(super) fn all(memory: &'m Memory, count: usize) -> Self {
        Self { memory, first: 0, count }
    }

    /// Some of these numbers.
    pub(super) fn part(self, first: usize, count: usize) -> Self {
        Self { first: self.first + first, count, ..self }
    }
}

/// One launch.
#[derive(Debug)]
pub(super) struct Launch<'l> {
    pub(super) program: &'static Program,
    pub(super) words: Words<'l>,
    /// What the program reads, then what it writes.
    pub(super) slices: &'l [Slice<'l>],
    /// What follows the places of the slices in the program's parameters.
    pub(super) numbers: &'l [u32],
    pub(super) groups: [u32; 3],
    /// Operations, about.
    pub(super) work: u64,
}

impl Card {
    /// Workgroups for so many threads in a row, in two axes: kernels count through both.
    pub(super) fn row_of_groups(&self, threads: usize) -> [u32; 3] {
        self.groups_for(threads.div_ceil(THREADS as usize))
    }

    /// So many workgroups, in two axes.
    pub(super) fn groups_for(&self, groups: usize) -> [u32; 3] {
        let along = groups.clamp(1, self.groups as usize);
        [along as u32, groups.div_ceil(along) as u32, 1]
    }

    /// Launches a kernel.
    pub(super) fn launch(self: &Arc<Self>, launch: &Launch<'_>) -> Result<()> {
        let Launch { program, words, slices, numbers, groups, work } = launch;
        if groups.iter().any(|count| *count > self.groups) {
            bail!("{}: {groups:?} workgroups, more than {} starts at once", program.name, self.adapter.name);
        }
        let kernel = self.kernel(program, words)?;
        let mut immediates: Vec<u32> = Vec::with_capacity(slices.len() + numbers.len());
        let mut entries = Vec::with_capacity(slices.len());
        for (binding, slice) in (0u32..).zip(slices.iter()) {
            if !Arc::ptr_eq(slice.memory.card(), self) {
                bail!("{}: numbers that lie on another device", program.name);
            }
            let first = slice.first as u64 * 4;
            let offset = first - first % self.alignment;
            let bytes = first - offset + slice.count.max(1) as u64 * 4;
            if bytes > self.binding as u64 * 4 {
                bail!("{}: {} numbers in one binding of {}", program.name, slice.count, self.adapter.name);
            }
            immediates.push(((first - offset) / 4) as u32);
            let resource = wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: slice.memory.buffer()?,
                offset,
                size: std::num::NonZeroU64::new(bytes),
            });
            entries.push(wgpu::BindGroupEntry { binding, resource });
        }
        immediates.extend_from_slice(numbers);
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(program.name),
            layout: &kernel.layout,
            entries: &entries,
        });
        let [x, y, z] = *groups;
        self.record((program.name, *work), |pass| {
            pass.set_pipeline(&kernel.pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.set_immediates(0, bytemuck::cast_slice(&immediates));
            pass.dispatch_workgroups(x, y, z);
        })
    }

    fn kernel(&self, program: &'static Program, words: Words<'_>) -> Result<Arc<Kernel>> {
        let mut key = program.name.to_owned();
        for (name, value) in words {
            key.extend([" ", *name, "=", value.as_str()]);
        }
        if let Some(kernel) = locked(&self.kernels).get(&key) {
            return Ok(kernel.clone());
        }
        // Two threads may build the same one; the first stays.
        let since = Instant::now();
        let kernel = Arc::new(Kernel::build(&self.device, &self.adapter.name, program, words)?);
        self.spent("building kernels", since);
        Ok(locked(&self.kernels).entry(key).or_insert(kernel).clone())
    }
}
