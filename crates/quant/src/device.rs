//! Which processor computes, and what there is to choose from.

use std::fmt;
use std::str::FromStr;

pub use mlx_quant_engine::{Device, Precision};
use serde::Serialize;

use crate::setting::{Setting, SettingError};

/// Raised whenever the same input, settings and engine give other bytes than before. 2: windows are summed in chunks
/// and a tree ([`crate::reduce`]). 3: layers in an fp mode are rounded by the recipe. 4: sweeps and dwq on cards. 5: dwq
/// trains norms at 2 and 3 bits, and what learns does so on the card. 6: searched grids without data at 3 bits.
pub(crate) const ALGORITHM: u32 = 6;

/// What somebody asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best that this build can use here: a graphics card if there is one, never a software adapter.
    Auto,
    /// The processor.
    #[default]
    Cpu,
    /// A graphics card: `gpu`, `gpu:1` or `gpu:h100`.
    Gpu(String),
    /// Several devices of one kind, which share out windows: `gpu:0,gpu:1`.
    Several(Vec<DeviceChoice>),
    /// All graphics cards like the best one: `gpu:all`.
    All,
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Gpu(which) => which,
            Self::All => "gpu:all",
            Self::Several(all) => {
                let all: Vec<String> = all.iter().map(ToString::to_string).collect();
                return f.write_str(&all.join(","));
            }
        })
    }
}

impl FromStr for DeviceChoice {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "gpu:all" => Ok(Self::All),
            _ if text.contains(',') => {
                text.split(',').map(one_of_several).collect::<Result<_, _>>().map(Self::Several)
            }
            _ if text == "gpu" || text.starts_with("gpu:") => Ok(Self::Gpu(text.to_owned())),
            _ => Err(refused(text, "is no device; hint: auto, cpu, gpu, gpu:N or gpu:NAME")),
        }
    }
}

impl DeviceChoice {
    /// All that will compute, before any work, the one that leads first.
    ///
    /// # Errors
    /// As [`DeviceChoice::device_with`]; several that are not of one kind, whose bits would differ.
    pub fn devices_with(&self, precision: Precision) -> Result<Vec<Device>, SettingError> {
        let all = match self {
            Self::All => cards_like_the_best()?,
            Self::Several(all) => all.clone(),
            one => vec![one.clone()],
        };
        let devices = all.iter().map(|one| one.device_with(precision)).collect::<Result<Vec<_>, _>>()?;
        let name = devices[0].name();
        match devices.iter().position(|device| device.name() != name) {
            None => Ok(devices),
            Some(other) => Err(refused(
                &self.to_string(),
                &format!(
                    "names devices of different kinds, {name} and {}; hint: what they compute has other bits, name some of \
                     one kind",
                    devices[other].name()
                ),
            )),
        }
    }

    /// What will compute, before any work.
    ///
    /// # Errors
    /// A card that is not there, that cannot be opened, or that this build has no engine for.
    pub fn device(&self) -> Result<Device, SettingError> {
        self.device_with(Precision::Float32)
    }

    /// [`DeviceChoice::device`] with products of a precision.
    ///
    /// # Errors
    /// As there; a precision that what is chosen does not have. `auto` takes no other card for it.
    pub fn device_with(&self, precision: Precision) -> Result<Device, SettingError> {
        let exact = precision == Precision::Float32;
        match self {
            Self::Cpu if exact => Ok(mlx_quant_engine::cpu()),
            Self::Cpu => Err(SettingError {
                setting: Setting::Precision,
                value: precision.to_string(),
                problem: "is for cards with matrix units, and the processor was chosen".to_owned(),
                hint: "add `--device gpu`, or leave it out".into(),
            }),
            Self::Auto => card("gpu", precision)
                .or_else(|why| if exact { Ok(mlx_quant_engine::cpu()) } else { Err(why) }),
            Self::Gpu(which) => card(which, precision),
            Self::All | Self::Several(_) => Err(refused(
                &self.to_string(),
                "names several devices, and this computes on one; hint: name one of them",
            )),
        }
    }
}

/// A device of a list.
fn one_of_several(text: &str) -> Result<DeviceChoice, SettingError> {
    match text.parse()? {
        one @ (DeviceChoice::Cpu | DeviceChoice::Gpu(_)) => Ok(one),
        _ => Err(refused(text, "cannot be one of several devices; hint: a list has gpu:N, gpu:NAME or cpu")),
    }
}

/// All cards of the name that the best one has.
fn cards_like_the_best() -> Result<Vec<DeviceChoice>, SettingError> {
    let (adapters, best) = found();
    let best = best.map_err(|why| refused("gpu:all", &format!("cannot be used: {why}")))?;
    let name = adapters.iter().find(|adapter| adapter.device == best).map(|adapter| adapter.name.clone());
    let like = adapters.into_iter().filter(|adapter| Some(&adapter.name) == name.as_ref());
    Ok(like.map(|adapter| DeviceChoice::Gpu(adapter.device)).collect())
}

/// What a graphics driver offers to compute with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Adapter {
    /// The word for it: `gpu:0`.
    pub device: String,
    /// The name that the driver gives.
    pub name: String,
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub kind: String,
    /// `vulkan` or `metal`.
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// Bytes of its own memory, where the driver tells.
    pub memory: Option<u64>,
    /// Bytes of the largest tensor.
    pub largest_buffer: u64,
    /// Bytes that a kernel sees of one at once; operations on more go in parts.
    pub largest_binding: u64,
}

/// What can compute on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Engines {
    /// The name of the processor's engine, with its instruction set.
    pub cpu: String,
    /// All adapters, in the order of their numbers.
    pub adapters: Vec<Adapter>,
    /// What `auto` comes to: `cpu` or `gpu:N`.
    pub auto: String,
    /// Why `auto` takes no card, with what to do.
    pub no_card: Option<String>,
}

impl Engines {
    /// Asks the drivers, and opens the card that `auto` takes.
    pub fn here() -> Self {
        let (adapters, best) = found();
        let (auto, no_card) = match best {
            Ok(device) => (device, None),
            Err(why) => ("cpu".to_owned(), Some(why)),
        };
        Self { cpu: mlx_quant_engine::cpu().name(), adapters, auto, no_card }
    }
}

/// All adapters, and which of them `gpu` opens.
#[cfg(feature = "gpu")]
fn found() -> (Vec<Adapter>, Result<String, String>) {
    use mlx_quant_engine::gpu::{AdapterChoice, Gpu, adapters};
    let all = adapters().into_iter().map(told).collect();
    let best = Gpu::open(&AdapterChoice::Best).map(|gpu| told(gpu.adapter().clone()).device);
    (all, best.map_err(|error| error.to_string()))
}

#[cfg(not(feature = "gpu"))]
fn found() -> (Vec<Adapter>, Result<String, String>) {
    (Vec::new(), Err(format!("this build computes on the processor alone; hint: {BUILD}")))
}

#[cfg(feature = "gpu")]
fn told(adapter: mlx_quant_engine::gpu::Adapter) -> Adapter {
    Adapter {
        device: format!("gpu:{}", adapter.index),
        name: adapter.name,
        kind: adapter.kind.to_string(),
        backend: adapter.backend,
        driver: adapter.driver,
        memory: adapter.memory,
        largest_buffer: adapter.max_buffer,
        largest_binding: adapter.max_binding,
    }
}

/// What to do where a build has no engine for cards.
#[cfg(not(feature = "gpu"))]
const BUILD: &str = "build with `--features gpu`";

#[cfg(feature = "gpu")]
fn card(which: &str, precision: Precision) -> Result<Device, SettingError> {
    let open = || mlx_quant_engine::gpu::Gpu::with_precision(&which.parse()?, precision);
    open().map(Device::new).map_err(|error| refused(which, &format!("cannot be used: {error}")))
}

#[cfg(not(feature = "gpu"))]
fn card(which: &str, _: Precision) -> Result<Device, SettingError> {
    let why = "is not supported by this build, which computes on the processor alone";
    Err(refused(which, &format!("{why}; hint: use cpu, or {BUILD}")))
}

/// A device that cannot be; `why` is the rest of a sentence, with a hint.
fn refused(value: &str, why: &str) -> SettingError {
    let (problem, hint) = why.split_once("; hint: ").unwrap_or((why, "use cpu"));
    SettingError {
        setting: Setting::Device,
        value: value.to_owned(),
        problem: problem.to_owned(),
        hint: hint.to_owned().into(),
    }
}

/// What decides the bits of whatever is computed from windows: the order of sums, the engine and its instruction set. It
/// stands in the identity of runs and in the keys of what they keep.
pub fn identity(device: &Device) -> String {
    format!("algorithm {ALGORITHM}, {}", engine(device))
}

/// Bytes of the memory that a card has of its own; none where the processor computes, or a driver does not tell.
pub(crate) fn card_bytes(device: &Device) -> u64 {
    device.capacity().and_then(|capacity| capacity.memory).unwrap_or(0)
}

/// The engine's name as one line; drivers say what they like.
pub(crate) fn engine(device: &Device) -> String {
    device.name().replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_listed_can_be_chosen() {
        let engines = Engines::here();
        let named = |device: &str| device.parse::<DeviceChoice>().unwrap().device();
        assert_eq!(engines.cpu, named("cpu").unwrap().name());
        let auto = DeviceChoice::Auto.device().unwrap().name();
        assert_eq!(auto, named(&engines.auto).unwrap().name());
        assert_eq!(engines.auto == "cpu", engines.no_card.is_some());
        assert!(engines.no_card.is_none_or(|why| why.contains("; hint: ")));
        for adapter in &engines.adapters {
            let opened = named(&adapter.device).unwrap().name();
            assert!(opened.starts_with(&format!("gpu {}, {}", adapter.name, adapter.backend)), "{opened}");
            assert!(adapter.largest_binding <= adapter.largest_buffer, "{adapter:?}");
        }
    }

    #[test]
    fn devices_are_chosen_by_name() {
        let choice = |text: &str| text.parse::<DeviceChoice>();
        assert_eq!(choice("auto"), Ok(DeviceChoice::Auto));
        assert_eq!(choice("gpu:1"), Ok(DeviceChoice::Gpu("gpu:1".to_owned())));
        assert_eq!(choice("cpu").unwrap().device().unwrap().name(), mlx_quant_engine::cpu().name());
        for wrong in ["tpu", "", "GPU", "gpus"] {
            assert!(choice(wrong).unwrap_err().to_string().contains("gpu:NAME"), "{wrong}");
        }
        let error = choice("gpu:no such card").unwrap().device().unwrap_err();
        assert_eq!(error.setting, Setting::Device);
        let text = error.to_string();
        assert!(text.starts_with("device gpu:no such card ") && text.contains("; hint: "), "{text}");
        let error = DeviceChoice::Cpu.device_with(Precision::Fast).unwrap_err();
        assert_eq!(error.setting, Setting::Precision);
        assert!(error.to_string().contains("; hint: add `--device gpu`"), "{error}");
        // Whatever is here, something computes.
        assert!(DeviceChoice::Auto.device().is_ok());
    }
}
