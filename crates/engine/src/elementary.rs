//! What elementary operations are made of: a buffer of numbers, and functions of one number, of two, and of an axis.

use std::any::Any;
use std::sync::Arc;

use mlx_format::FloatType;

/// Where a tensor's float32 numbers lie.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// In this process's memory.
    Host(Arc<Vec<f32>>),
    /// Somewhere that only its engine knows.
    Device(Arc<dyn Opaque>),
}

/// A buffer of an engine's own.
pub trait Opaque: Any + std::fmt::Debug + Send + Sync {}

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Map {
    Exp,
    Log,
    Sqrt,
    Tanh,
    /// `2 / sqrt(pi)` times the integral of `exp(-t^2)` from 0 to `x`.
    Erf,
    Reciprocal,
    Absolute,
    /// -1, 0 or 1.
    Sign,
    /// `factor * x + offset`.
    Affine {
        factor: f64,
        offset: f64,
    },
    /// `x` within bounds.
    Clamp {
        low: f32,
        high: f32,
    },
    /// The nearest number of a dtype.
    Rounded(FloatType),
    /// 1 strictly within bounds, 0 elsewhere.
    Within {
        low: f32,
        high: f32,
    },
}

/// A function of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Combine {
    Add,
    Subtract,
    Multiply,
    Divide,
}

/// What the numbers along an axis become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Reduce {
    Sum,
    Largest,
}
