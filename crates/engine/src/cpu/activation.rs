//! Activations and gated linear units in one pass over memory.

use super::made::{buffer, map_pairs, tensor};
use crate::Tensor;
use crate::error::{Result, bail};
use crate::exp::{exp, normal, sigmoid, softplus};
use crate::settings::Activation;

/// A function of one number and its derivative.
trait Curve: Copy + Send + Sync {
    fn value(self, x: f32) -> f32;
    fn slope(self, x: f32) -> f32;
}

macro_rules! curves {
    ($($name:ident: $x:ident => $value:expr, $slope:expr;)*) => {$(
        #[derive(Clone, Copy)]
        struct $name;

        impl Curve for $name {
            #[inline(always)]
            fn value(self, $x: f32) -> f32 {
                $value
            }

            #[inline(always)]
            fn slope(self, $x: f32) -> f32 {
                $slope
            }
        }
    )*};
}

/// `sqrt(2 / pi)` times two: the argument of the sigmoid that stands for `(1 + tanh) / 2`.
const TANH_SCALE: f32 = 1.595_769;
const TANH_CUBE: f32 = 0.044_715;
/// `1 / sqrt(2 * pi)`.
const NORMAL_PEAK: f32 = 0.398_942_3;

curves! {
    Silu: x => x / (1.0 + exp(-x)), { let s = sigmoid(x); s + x * s * (1.0 - s) };
    Gelu: x => x * normal(x), normal(x) + x * NORMAL_PEAK * exp(-0.5 * x * x);
    GeluTanh: x => x * sigmoid(TANH_SCALE * (x + TANH_CUBE * x * x * x)), {
        let s = sigmoid(TANH_SCALE * (x + TANH_CUBE * x * x * x));
        s + x * s * (1.0 - s) * TANH_SCALE * (1.0 + 3.0 * TANH_CUBE * x * x)
    };
    Relu: x => if x < 0.0 { 0.0 } else { x }, if x > 0.0 { 1.0 } else { 0.0 };
    ReluSquared: x => if x < 0.0 { 0.0 } else { x * x }, if x > 0.0 { 2.0 * x } else { 0.0 };
    Sigmoid: x => sigmoid(x), { let s = sigmoid(x); s * (1.0 - s) };
    Softplus: x => softplus(x), sigmoid(x);
    Identity: x => x, { let _ = x; 1.0 };
}

macro_rules! with_curve {
    ($activation:expr, $curve:ident => $body:expr, $clamped:pat => $otherwise:expr) => {
        match $activation {
            Activation::Silu => {
                let $curve = Silu;
                $body
            }
            Activation::Gelu => {
                let $curve = Gelu;
                $body
            }
            Activation::GeluTanh => {
                let $curve = GeluTanh;
                $body
            }
            Activation::Relu => {
                let $curve = Relu;
                $body
            }
            Activation::ReluSquared => {
                let $curve = ReluSquared;
                $body
            }
            Activation::Sigmoid => {
                let $curve = Sigmoid;
                $body
            }
            Activation::Softplus => {
                let $curve = Softplus;
                $body
            }
            Activation::Identity => {
                let $curve = Identity;
                $body
            }
            $clamped => $otherwise,
        }
    };
}

pub(super) fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if activation == Activation::Identity {
        return Ok(x.clone());
    }
    let values = x.host()?;
    let out = with_curve!(activation,
        curve => map_pairs(values, values, #[inline(always)] |x, _| curve.value(x)),
        Activation::ClampedSwiglu { .. } => bail!("ClampedSwiglu takes a gate and an up"));
    Ok(Tensor::made(x.device(), x.dims().to_vec(), buffer(out), "activate", &[x], move |pull| {
        let (x, grad) = (pull.inputs[0].host()?, pull.grad.host()?);
        let out = with_curve!(activation,
            curve => map_pairs(x, grad, #[inline(always)] |x, grad| grad * curve.slope(x)),
            Activation::ClampedSwiglu { .. } => bail!("ClampedSwiglu takes a gate and an up"));
        Ok(vec![Some(tensor(out, pull.grad.dims(), pull.grad)?)])
    }))
}

/// The gate and the up that [`Activation::ClampedSwiglu`] goes on with.
#[inline(always)]
fn limited(gate: f32, up: f32, limit: f32) -> (f32, f32) {
    let up = if up < -limit { -limit } else { up };
    (if gate > limit { limit } else { gate }, if up > limit { limit } else { up })
}

pub(super) fn glu(gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
    let (gates, ups) = (gate.host()?, up.host()?);
    let out = with_curve!(glu,
    curve => map_pairs(gates, ups, #[inline(always)] |gate, up| curve.value(gate) * up),
    Activation::ClampedSwiglu { alpha, limit } => map_pairs(gates, ups, #[inline(always)] |gate, up| {
        let (gate, up) = limited(gate, up, limit);
        gate * sigmoid(alpha * gate) * (up + 1.0)
    }));
    Ok(Tensor::made(gate.device(), gate.dims().to_vec(), buffer(out), "glu", &[gate, up], move |pull| {
        let (gate, up) = (&pull.inputs[0], &pull.inputs[1]);
        let (for_gate, for_up) = slopes(gate.host()?, up.host()?, pull.grad.host()?, glu);
        Ok(vec![Some(tensor(for_gate, gate.dims(), gate)?), Some(tensor(for_up, up.dims(), up)?)])
    }))
}

/// The slopes in one pass, then times the gradient in another: a pass takes two inputs, and there are three.
fn slopes(gates: &[f32], ups: &[f32], grads: &[f32], glu: Activation) -> (Vec<f32>, Vec<f32>) {
    let (for_gate, for_up) = with_curve!(glu,
    curve => (
        map_pairs(gates, ups, #[inline(always)] |gate, up| curve.slope(gate) * up),
        map_pairs(gates, grads, #[inline(always)] |gate, grad| curve.value(gate) * grad),
    ),
    Activation::ClampedSwiglu { alpha, limit } => {
        let for_gate = map_pairs(gates, ups, #[inline(always)] |gate, up| {
            let (inner, up) = limited(gate, up, limit);
            let s = sigmoid(alpha * inner);
            let slope = (s + alpha * inner * s * (1.0 - s)) * (up + 1.0);
            if gate > limit { 0.0 } else { slope }
        });
        let slope = map_pairs(gates, ups, #[inline(always)] |gate, up| {
            let (inner, _) = limited(gate, up, limit);
            let slope = inner * sigmoid(alpha * inner);
            if up > limit || up < -limit { 0.0 } else { slope }
        });
        (for_gate, map_pairs(&slope, grads, #[inline(always)] |slope, grad| slope * grad))
    });
    let for_gate = map_pairs(
        &for_gate,
        grads,
        #[inline(always)]
        |slope, grad| slope * grad,
    );
    (for_gate, for_up)
}
