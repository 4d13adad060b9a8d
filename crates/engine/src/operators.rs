//! Arithmetic of tensors as operators and short names.

use std::ops::{Add, Div, Mul, Sub};

use crate::Tensor;
use crate::elementary::{Combine, Map};
use crate::error::{Result, bail};

macro_rules! maps {
    ($($(#[$doc:meta])* $name:ident => $function:expr;)*) => {
        impl Tensor {$(
            $(#[$doc])*
            ///
            /// # Errors
            /// If the device has no room.
            pub fn $name(&self) -> Result<Self> {
                self.map($function)
            }
        )*}
    };
}

maps! {
    /// `e^x` of each element.
    exp => Map::Exp;
    /// The natural logarithm of each element.
    log => Map::Log;
    /// The root of each element.
    sqrt => Map::Sqrt;
    /// The hyperbolic tangent of each element.
    tanh => Map::Tanh;
    /// The error function of each element.
    erf => Map::Erf;
    /// `1 / x` of each element.
    recip => Map::Reciprocal;
    /// The size of each element.
    abs => Map::Absolute;
    /// `-x` of each element.
    neg => Map::Affine { factor: -1.0, offset: 0.0 };
    /// `max(x, 0)` of each element.
    relu => Map::Clamp { low: 0.0, high: f32::INFINITY };
}

impl Tensor {
    /// `x^2` of each element.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn sqr(&self) -> Result<Self> {
        self.combine(self, Combine::Multiply)
    }

    /// Each element within bounds.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn clamp(&self, low: f32, high: f32) -> Result<Self> {
        self.map(Map::Clamp { low, high })
    }

    /// Each element as the nearest number of a dtype. No gradient passes it.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn rounded(&self, float: mlx_format::FloatType) -> Result<Self> {
        self.detach().map(Map::Rounded(float))
    }

    /// `factor * x + offset` of each element.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn affine(&self, factor: f64, offset: f64) -> Result<Self> {
        self.map(Map::Affine { factor, offset })
    }

    /// The sum, both repeated to a common shape.
    ///
    /// # Errors
    /// If there is none.
    pub fn broadcast_add(&self, other: &Self) -> Result<Self> {
        self.combine(other, Combine::Add)
    }

    /// The difference, both repeated to a common shape.
    ///
    /// # Errors
    /// If there is none.
    pub fn broadcast_sub(&self, other: &Self) -> Result<Self> {
        self.combine(other, Combine::Subtract)
    }

    /// The product, both repeated to a common shape.
    ///
    /// # Errors
    /// If there is none.
    pub fn broadcast_mul(&self, other: &Self) -> Result<Self> {
        self.combine(other, Combine::Multiply)
    }

    /// The quotient, both repeated to a common shape.
    ///
    /// # Errors
    /// If there is none.
    pub fn broadcast_div(&self, other: &Self) -> Result<Self> {
        self.combine(other, Combine::Divide)
    }

    fn same_shape(&self, other: &Self, function: Combine) -> Result<Self> {
        if self.dims() != other.dims() {
            bail!("{function:?}: {:?} and {:?} differ", self.dims(), other.dims());
        }
        self.combine(other, function)
    }
}

macro_rules! operators {
    ($($trait:ident, $method:ident, $combine:expr, |$number:ident| $map:expr;)*) => {$(
        operators!(@pair $trait, $method, $combine; Tensor, Tensor);
        operators!(@pair $trait, $method, $combine; Tensor, &Tensor);
        operators!(@pair $trait, $method, $combine; &Tensor, Tensor);
        operators!(@pair $trait, $method, $combine; &Tensor, &Tensor);
        operators!(@number $trait, $method, |$number| $map; Tensor);
        operators!(@number $trait, $method, |$number| $map; &Tensor);
    )*};
    (@pair $trait:ident, $method:ident, $combine:expr; $x:ty, $y:ty) => {
        impl $trait<$y> for $x {
            type Output = Result<Tensor>;

            fn $method(self, other: $y) -> Self::Output {
                self.same_shape(std::borrow::Borrow::borrow(&other), $combine)
            }
        }
    };
    (@number $trait:ident, $method:ident, |$number:ident| $map:expr; $x:ty) => {
        impl $trait<f64> for $x {
            type Output = Result<Tensor>;

            fn $method(self, $number: f64) -> Self::Output {
                self.map($map)
            }
        }
    };
}

operators! {
    Add, add, Combine::Add, |number| Map::Affine { factor: 1.0, offset: number };
    Sub, sub, Combine::Subtract, |number| Map::Affine { factor: 1.0, offset: -number };
    Mul, mul, Combine::Multiply, |number| Map::Affine { factor: number, offset: 0.0 };
    Div, div, Combine::Divide, |number| Map::Affine { factor: 1.0 / number, offset: 0.0 };
}
