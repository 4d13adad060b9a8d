//! Kernels, as the driver has built them.

use super::program::{Program, Words};
use crate::error::{Result, bail};

/// A built kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
}

impl Kernel {
    /// Builds a program.
    ///
    /// # Errors
    /// What the driver, named `adapter`, says of it.
    pub(super) fn build(
        device: &wgpu::Device,
        adapter: &str,
        program: &Program,
        words: Words<'_>,
    ) -> Result<Self> {
        let text = program.text(words)?;
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let checks = wgpu::ShaderRuntimeChecks {
            force_loop_bounding: false,
            bounds_checks: program.checked,
            ..wgpu::ShaderRuntimeChecks::checked()
        };
        let source = wgpu::ShaderSource::Wgsl(text.into());
        let descriptor = wgpu::ShaderModuleDescriptor { label: Some(program.name), source };
        // SAFETY: loops of our kernels end by their counters; a kernel without checks says why its places are right.
        let module = unsafe { device.create_shader_module_trusted(descriptor, checks) };
        let entries: Vec<wgpu::BindGroupLayoutEntry> = (0..program.reads + program.writes)
            .map(|binding| wgpu::BindGroupLayoutEntry {
                binding: binding as u32,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: binding < program.reads },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(program.name),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(program.name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 128,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(program.name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..wgpu::PipelineCompilationOptions::default()
            },
            cache: None,
        });
        match pollster::block_on(scope.pop()) {
            None => Ok(Self { pipeline, layout }),
            Some(error) => bail!("{} does not take the kernel {}: {error}", adapter, program.name),
        }
    }
}
