//! Which processor computes.

pub use mlx_quant_engine::Device;

use crate::setting::{Setting, SettingError};

/// Raised whenever the same input, settings and engine give other bytes than before. 2: windows are summed in chunks
/// and a tree ([`crate::reduce`]).
pub(crate) const ALGORITHM: u32 = 2;

/// What somebody asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best that this build can use here.
    Auto,
    /// The processor.
    #[default]
    Cpu,
    /// A graphics card.
    Gpu,
}

impl DeviceChoice {
    /// What will compute, before any work.
    ///
    /// # Errors
    /// A card: this version cannot use one.
    pub fn device(self) -> Result<Device, SettingError> {
        match self {
            Self::Auto | Self::Cpu => Ok(mlx_quant_engine::cpu()),
            Self::Gpu => Err(SettingError {
                setting: Setting::Device,
                value: "gpu".to_owned(),
                problem: "is not supported by this version, which computes on the processor alone".to_owned(),
                hint: "use cpu, or auto for the best that there is",
            }),
        }
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
    fn a_card_is_refused_in_words() {
        let name = |choice: DeviceChoice| choice.device().map(|device| device.name());
        assert_eq!(name(DeviceChoice::Auto), Ok(mlx_quant_engine::cpu().name()));
        assert_eq!(name(DeviceChoice::Cpu), name(DeviceChoice::Auto));
        let error = DeviceChoice::Gpu.device().unwrap_err();
        assert_eq!(error.setting, Setting::Device);
        assert!(error.to_string().starts_with("device gpu is not supported"), "{error}");
    }
}
