//! Words of the engine that decoder descriptions use.

pub(crate) use mlx_quant_engine::{Activation, Pairing};
