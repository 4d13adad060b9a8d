//! Which processor computes.

use std::str::FromStr;

pub use mlx_quant_engine::Device;

use crate::setting::{Setting, SettingError};

/// Raised whenever the same input, settings and engine give other bytes than before. 2: windows are summed in chunks
/// and a tree ([`crate::reduce`]).
pub(crate) const ALGORITHM: u32 = 2;

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
}

impl FromStr for DeviceChoice {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            _ if text == "gpu" || text.starts_with("gpu:") => Ok(Self::Gpu(text.to_owned())),
            _ => Err(refused(text, "is no device; hint: auto, cpu, gpu, gpu:N or gpu:NAME")),
        }
    }
}

impl DeviceChoice {
    /// What will compute, before any work.
    ///
    /// # Errors
    /// A card that is not there, that cannot be opened, or that this build has no engine for.
    pub fn device(&self) -> Result<Device, SettingError> {
        match self {
            Self::Cpu => Ok(mlx_quant_engine::cpu()),
            Self::Auto => Ok(card("gpu").unwrap_or_else(|_| mlx_quant_engine::cpu())),
            Self::Gpu(which) => card(which),
        }
    }
}

#[cfg(feature = "gpu")]
fn card(which: &str) -> Result<Device, SettingError> {
    let open = || mlx_quant_engine::gpu::Gpu::open(&which.parse()?);
    open().map(Device::new).map_err(|error| refused(which, &format!("cannot be used: {error}")))
}

#[cfg(not(feature = "gpu"))]
fn card(which: &str) -> Result<Device, SettingError> {
    Err(refused(
        which,
        "is not supported by this build, which computes on the processor alone; hint: use cpu, or build with \
         `--features gpu`",
    ))
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
    format!("algorithm {ALGORITHM}, {}", device.name())
}

#[cfg(test)]
mod tests {
    use super::*;

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
        // Whatever is here, something computes.
        assert!(DeviceChoice::Auto.device().is_ok());
    }
}
