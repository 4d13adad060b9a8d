//! Which adapters there are, and which one computes.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result, bail};

/// What computes behind an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterKind {
    /// A card with memory of its own.
    Discrete,
    /// A graphics unit that shares the processor's memory.
    Integrated,
    /// A card that a virtual machine lends.
    Virtual,
    /// The processor (Mesa's llvmpipe): never taken unless it is named.
    Software,
    /// What the driver does not say.
    Other,
}

impl fmt::Display for AdapterKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Discrete => "discrete",
            Self::Integrated => "integrated",
            Self::Virtual => "virtual",
            Self::Software => "software",
            Self::Other => "other",
        })
    }
}

/// One adapter of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// Its place in the list, as in `gpu:1`.
    pub index: usize,
    /// The name that the driver gives: `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// What computes behind it.
    pub kind: AdapterKind,
    /// `vulkan` or `metal`.
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// Bytes of its own memory, where the driver tells.
    pub memory: Option<u64>,
    /// Bytes of the largest buffer, and so of the largest tensor.
    pub max_buffer: u64,
    /// Bytes of a buffer that a kernel sees at once; operations on more go in parts.
    pub max_binding: u64,
    /// Bytes that the threads of a workgroup share.
    pub workgroup_memory: u32,
    /// Threads of a workgroup.
    pub workgroup_threads: u32,
}

/// Which adapter somebody asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AdapterChoice {
    /// The first discrete one, else the first that is no software.
    #[default]
    Best,
    /// By its place in the list.
    Index(usize),
    /// By a part of its name, whatever the case.
    Name(String),
}

impl FromStr for AdapterChoice {
    type Err = Error;

    /// `gpu`, `gpu:1`, `gpu:h100`.
    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            None if text == "gpu" => Ok(Self::Best),
            Some(("gpu", which)) if !which.trim().is_empty() => Ok(match which.parse() {
                Ok(index) => Self::Index(index),
                Err(_) => Self::Name(which.trim().to_owned()),
            }),
            _ => bail!("{text:?} is no adapter; hint: gpu, gpu:N or gpu:NAME"),
        }
    }
}

/// The backends that this engine computes with.
const BACKENDS: wgpu::Backends = wgpu::Backends::VULKAN.union(wgpu::Backends::METAL);

/// All adapters, as wgpu has them, and as they are told to people.
fn found() -> Vec<(wgpu::Adapter, Adapter)> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = BACKENDS;
    descriptor.flags = wgpu::InstanceFlags::empty();
    let instance = wgpu::Instance::new(descriptor);
    let all = pollster::block_on(instance.enumerate_adapters(BACKENDS));
    let numbered = all.into_iter().enumerate();
    numbered.map(|(index, adapter)| (told(index, &adapter), adapter)).map(|(told, own)| (own, told)).collect()
}

fn told(index: usize, adapter: &wgpu::Adapter) -> Adapter {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => AdapterKind::Discrete,
        wgpu::DeviceType::IntegratedGpu => AdapterKind::Integrated,
        wgpu::DeviceType::VirtualGpu => AdapterKind::Virtual,
        wgpu::DeviceType::Cpu => AdapterKind::Software,
        wgpu::DeviceType::Other => AdapterKind::Other,
    };
    Adapter {
        index,
        name: info.name,
        kind,
        backend: info.backend.to_str().to_owned(),
        driver: [info.driver, info.driver_info].join(" ").trim().to_owned(),
        memory: memory(adapter),
        max_buffer: limits.max_buffer_size,
        max_binding: limits.max_storage_buffer_binding_size,
        workgroup_memory: limits.max_compute_workgroup_storage_size,
        workgroup_threads: limits.max_compute_invocations_per_workgroup,
    }
}

/// Bytes of the heaps that are the device's own.
#[cfg(not(target_vendor = "apple"))]
fn memory(adapter: &wgpu::Adapter) -> Option<u64> {
    /// `VK_MEMORY_HEAP_DEVICE_LOCAL_BIT`.
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the raw handles are only read, while the adapter lives.
    let properties = unsafe {
        let adapter = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        let instance = adapter.shared_instance().raw_instance();
        instance.get_physical_device_memory_properties(adapter.raw_physical_device())
    };
    let heaps = properties.memory_heaps_as_slice().iter();
    Some(heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).sum())
}

/// Metal's memory is the processor's.
#[cfg(target_vendor = "apple")]
fn memory(_: &wgpu::Adapter) -> Option<u64> {
    None
}

/// All adapters of this machine; none where there is no driver.
pub fn adapters() -> Vec<Adapter> {
    found().into_iter().map(|(_, told)| told).collect()
}

/// The names of all, for messages.
fn list(all: &[(wgpu::Adapter, Adapter)]) -> String {
    let one =
        |(_, told): &(wgpu::Adapter, Adapter)| format!("gpu:{} {} ({})", told.index, told.name, told.kind);
    all.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The adapter for a choice.
pub(super) fn choose(choice: &AdapterChoice) -> Result<(wgpu::Adapter, Adapter)> {
    let mut all = found();
    if all.is_empty() {
        bail!("no graphics adapter was found; hint: {}", what_is_missing());
    }
    let at = match choice {
        AdapterChoice::Best => {
            let of = |kind| all.iter().position(|(_, told)| told.kind == kind);
            let best = of(AdapterKind::Discrete).or_else(|| of(AdapterKind::Integrated));
            best.or_else(|| all.iter().position(|(_, told)| told.kind != AdapterKind::Software))
        }
        AdapterChoice::Index(index) => Some(*index).filter(|index| *index < all.len()),
        AdapterChoice::Name(name) => {
            let name = name.to_lowercase();
            all.iter().position(|(_, told)| told.name.to_lowercase().contains(&name))
        }
    };
    match (at, choice) {
        (Some(at), _) => Ok(all.swap_remove(at)),
        (None, AdapterChoice::Best) => bail!(
            "only a software adapter was found: {}, which is slower than the CPU engine; hint: use cpu, or name the \
             adapter",
            list(&all)
        ),
        (None, AdapterChoice::Index(index)) => {
            bail!("no adapter gpu:{index}; hint: there are {}", list(&all))
        }
        (None, AdapterChoice::Name(name)) => {
            bail!("no adapter whose name has {name:?}; hint: there are {}", list(&all))
        }
    }
}

/// Why a machine may show no adapter.
fn what_is_missing() -> &'static str {
    if cfg!(target_vendor = "apple") {
        return "Metal needs macOS 10.15 or later";
    }
    "with an NVIDIA, AMD or Intel driver installed, the Vulkan loader may be missing (Debian: libvulkan1); where the \
     driver's JSON lies elsewhere, VK_DRIVER_FILES says where; in a container, the driver's graphics libraries have to \
     be passed in (NVIDIA_DRIVER_CAPABILITIES=all)"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_in_words() {
        let parsed = |text: &str| text.parse::<AdapterChoice>();
        assert_eq!(parsed("gpu"), Ok(AdapterChoice::Best));
        assert_eq!(parsed("gpu:2"), Ok(AdapterChoice::Index(2)));
        assert_eq!(parsed("gpu:H100"), Ok(AdapterChoice::Name("H100".to_owned())));
        for wrong in ["", "cpu", "gpu:", "gpu: ", "card:1"] {
            assert!(
                parsed(wrong).unwrap_err().to_string().contains("hint: gpu, gpu:N or gpu:NAME"),
                "{wrong}"
            );
        }
    }
}
