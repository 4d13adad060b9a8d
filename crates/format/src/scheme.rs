//! How one weight is stored: mode, bits, group size.

use std::fmt;

use safetensors::Dtype;

use crate::FloatType;

/// MLX's quantization modes (`mlx/ops.cpp`, `quantize`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Integer codes with a scale and a bias per group.
    Affine,
    /// e2m1 elements, e8m0 scales, groups of 32 (OCP microscaling).
    Mxfp4,
    /// e4m3 elements, e8m0 scales, groups of 32 (OCP microscaling).
    Mxfp8,
    /// e2m1 elements, e4m3 scales, groups of 16.
    Nvfp4,
}

impl Mode {
    /// All modes, in the order of MLX's documentation.
    pub const ALL: [Self; 4] = [Self::Affine, Self::Mxfp4, Self::Mxfp8, Self::Nvfp4];

    /// The name in config.json and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Affine => "affine",
            Self::Mxfp4 => "mxfp4",
            Self::Mxfp8 => "mxfp8",
            Self::Nvfp4 => "nvfp4",
        }
    }

    /// Inverse of [`Mode::name`]; `None` for every other string.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// mlx-lm's default `(bits, group size)` (`mlx_lm/utils.py`, `defaults_for_mode`); for the fp modes the
    /// only ones there are.
    pub const fn defaults(self) -> (u32, usize) {
        match self {
            Self::Affine => (4, 64),
            Self::Mxfp4 => (4, 32),
            Self::Mxfp8 => (8, 32),
            Self::Nvfp4 => (4, 16),
        }
    }
}

/// A validated combination of mode, bits and group size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scheme {
    mode: Mode,
    bits: u32,
    group_size: usize,
}

/// A combination that MLX does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SchemeError {
    /// Affine bits outside 1, 2, 3, 4, 5, 6, 8.
    #[error("{0} bits are not supported; hint: affine takes 2, 3, 4, 5, 6 or 8 bits")]
    Bits(u32),
    /// Affine group size outside 32, 64, 128.
    #[error("group size {0} is not supported; hint: affine takes group size 32, 64 or 128")]
    GroupSize(usize),
    /// An fp mode with other bits or group size than its own.
    #[error("mode {mode} has {bits} bits and group size {group_size} only; hint: leave bits and group size out", mode = .0.name(), bits = .0.defaults().0, group_size = .0.defaults().1)]
    Fixed(Mode),
}

impl Scheme {
    /// `bits` and `group_size` default to [`Mode::defaults`].
    ///
    /// # Errors
    /// [`SchemeError`] when MLX has no such combination. One bit is accepted (MLX 0.32.4 reads and writes it).
    pub const fn new(mode: Mode, bits: Option<u32>, group_size: Option<usize>) -> Result<Self, SchemeError> {
        let (default_bits, default_group) = mode.defaults();
        let bits = match bits {
            Some(bits) => bits,
            None => default_bits,
        };
        let group_size = match group_size {
            Some(group_size) => group_size,
            None => default_group,
        };
        match mode {
            Mode::Affine => {
                if !matches!(bits, 1..=6 | 8) {
                    return Err(SchemeError::Bits(bits));
                }
                if !matches!(group_size, 32 | 64 | 128) {
                    return Err(SchemeError::GroupSize(group_size));
                }
            }
            _ if bits != default_bits || group_size != default_group => return Err(SchemeError::Fixed(mode)),
            _ => {}
        }
        Ok(Self { mode, bits, group_size })
    }

    /// [`Scheme::new`] for the affine mode.
    ///
    /// # Errors
    /// As [`Scheme::new`].
    pub const fn affine(bits: u32, group_size: usize) -> Result<Self, SchemeError> {
        Self::new(Mode::Affine, Some(bits), Some(group_size))
    }

    /// Refuses one bit: MLX has it since 0.32.4, and older versions do not load such a model.
    ///
    /// # Errors
    /// [`SchemeError::Bits`].
    pub const fn widely_loaded(self) -> Result<Self, SchemeError> {
        if self.bits == 1 { Err(SchemeError::Bits(1)) } else { Ok(self) }
    }

    /// The mode.
    pub const fn mode(self) -> Mode {
        self.mode
    }

    /// Bits of one code.
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// Consecutive elements of a row that share a scale.
    pub const fn group_size(self) -> usize {
        self.group_size
    }

    /// Whether rows of `columns` elements can be stored: whole groups and whole 32-bit words.
    pub const fn divides(self, columns: usize) -> bool {
        // A group of any scheme is whole words.
        columns > 0 && columns.is_multiple_of(self.group_size)
    }

    /// 32-bit words of one packed row.
    pub const fn words(self, columns: usize) -> usize {
        columns / self.group_size * (self.group_size * self.bits as usize / 32)
    }

    /// Groups of one row.
    pub const fn groups(self, columns: usize) -> usize {
        columns / self.group_size
    }

    /// Whether a biases tensor exists.
    pub const fn has_biases(self) -> bool {
        matches!(self.mode, Mode::Affine)
    }

    /// dtype of the scales for weights of dtype `float`.
    pub const fn scale_dtype(self, float: FloatType) -> Dtype {
        match self.mode {
            Mode::Affine => float.dtype(),
            _ => Dtype::U8,
        }
    }

    /// Bytes of the scales of one row (and of its biases, where there are any).
    pub const fn scale_bytes(self, columns: usize, float: FloatType) -> usize {
        let size = match self.mode {
            Mode::Affine => float.size(),
            _ => 1,
        };
        self.groups(columns) * size
    }

    /// Stored bits per weight, scales and biases of dtype `float` included.
    pub fn bits_per_weight(self, float: FloatType) -> f64 {
        let scale_bits = self.scale_bytes(self.group_size, float) * 8 * (1 + usize::from(self.has_biases()));
        self.bits as f64 + scale_bits as f64 / self.group_size as f64
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            Mode::Affine => write!(f, "{} bits, group size {}", self.bits, self.group_size),
            mode => f.write_str(mode.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_mlx_accepts_and_nothing_else() {
        for bits in 0..=9 {
            for group_size in [0, 1, 16, 32, 48, 64, 128, 256] {
                let expected =
                    matches!(bits, 1 | 2 | 3 | 4 | 5 | 6 | 8) && matches!(group_size, 32 | 64 | 128);
                assert_eq!(Scheme::affine(bits, group_size).is_ok(), expected, "{bits} {group_size}");
            }
        }
        assert!(Scheme::new(Mode::Nvfp4, None, None).is_ok());
        assert_eq!(Scheme::new(Mode::Mxfp4, Some(4), Some(64)), Err(SchemeError::Fixed(Mode::Mxfp4)));
        assert_eq!(Scheme::new(Mode::Mxfp8, Some(4), None), Err(SchemeError::Fixed(Mode::Mxfp8)));
    }

    #[test]
    fn sizes() -> Result<(), SchemeError> {
        let scheme = Scheme::affine(3, 64)?;
        assert!(scheme.divides(128) && !scheme.divides(96) && !scheme.divides(0));
        assert_eq!(
            (scheme.words(128), scheme.groups(128), scheme.scale_bytes(128, FloatType::Bf16)),
            (12, 2, 4)
        );
        assert!((Scheme::affine(4, 64)?.bits_per_weight(FloatType::Bf16) - 4.5).abs() < 1e-12);
        assert!((Scheme::new(Mode::Nvfp4, None, None)?.bits_per_weight(FloatType::F32) - 4.5).abs() < 1e-12);
        Ok(())
    }
}
