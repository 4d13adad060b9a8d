//! Which processor computes.

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

/// What computes. It decides bytes, because another order of sums rounds differently; so it stands in the identity of a
/// run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
}

impl Device {
    /// The device for a choice, before any work.
    ///
    /// # Errors
    /// A card: this version cannot use one.
    pub fn choose(choice: DeviceChoice) -> Result<Self, SettingError> {
        match choice {
            DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Self::Cpu),
            DeviceChoice::Gpu => Err(SettingError {
                setting: Setting::Device,
                value: "gpu".to_owned(),
                problem: "is not supported by this version, which computes on the processor alone".to_owned(),
                hint: "use cpu, or auto for the best that there is",
            }),
        }
    }

    /// Its engine.
    pub fn engine(self) -> mlx_quant_engine::Device {
        match self {
            Self::Cpu => mlx_quant_engine::cpu(),
        }
    }

    /// What decides the bits of whatever is computed from windows: the order of sums, the engine and its instruction
    /// set. It stands in the identity of runs and in the keys of what they keep.
    pub fn identity(self) -> String {
        format!("algorithm {ALGORITHM}, {}", self.engine().name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_refused_in_words() {
        assert_eq!(Device::choose(DeviceChoice::Auto), Ok(Device::Cpu));
        assert_eq!(Device::choose(DeviceChoice::Cpu), Ok(Device::Cpu));
        let error = Device::choose(DeviceChoice::Gpu).unwrap_err();
        assert_eq!(error.setting, Setting::Device);
        assert!(error.to_string().starts_with("device gpu is not supported"), "{error}");
    }
}
