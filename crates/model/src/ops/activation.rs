//! Activations and gated linear units in one pass over memory.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::exp::{exp, normal, sigmoid, softplus};
use super::slices::{Held, map_pairs, values};

/// An elementwise function of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x` times the normal distribution function of `x`.
    Gelu,
    /// The approximation of [`Activation::Gelu`] with tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    ReluSquared,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `ln(1 + exp(x))`.
    Softplus,
    /// `x`.
    Identity,
    /// gpt-oss, of a gate and an up: `gate * sigmoid(alpha * gate) * (up + 1)`, with the gate clamped to at most
    /// `limit` and up to `-limit..=limit`.
    ClampedSwiglu {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Bound of the inputs.
        limit: f32,
    },
}

pub(super) fn check(gate: &Tensor, up: &Tensor) -> Result<()> {
    if gate.dims() == up.dims() {
        return Ok(());
    }
    bail!("glu: gate {:?} and up {:?} differ", gate.dims(), up.dims())
}

fn plain_sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

pub(super) fn plain(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
        Activation::ReluSquared => x.relu()?.sqr(),
        Activation::Sigmoid => plain_sigmoid(x),
        Activation::Softplus => x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?,
        Activation::Identity => Ok(x.clone()),
        Activation::ClampedSwiglu { .. } => bail!("ClampedSwiglu takes a gate and an up"),
    }
}

pub(super) fn glu_plain(gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
    if let Activation::ClampedSwiglu { alpha, limit } = glu {
        let gate = gate.minimum(f64::from(limit))?;
        let up = up.clamp(-limit, limit)?;
        return (&gate * plain_sigmoid(&(&gate * f64::from(alpha))?)?)? * (up + 1.0)?;
    }
    plain(gate, glu)? * up
}

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

pub(super) fn fused(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Identity => Ok(x.clone()),
        Activation::ClampedSwiglu { .. } => bail!("ClampedSwiglu takes a gate and an up"),
        _ => x.contiguous()?.apply_op1(Activate(activation)),
    }
}

pub(super) fn glu_fused(gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, Glu(glu))
}

struct Activate(Activation);

impl CustomOp1 for Activate {
    fn name(&self) -> &'static str {
        "activate"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let out = with_curve!(self.0, curve => map_pairs(x, x, #[inline(always)] |x, _| curve.value(x)),
            Activation::ClampedSwiglu { .. } => bail!("ClampedSwiglu takes a gate and an up"));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (x_values, grad_values) = (Held::new(x), Held::new(&grad));
        let (x_values, grad_values) = (x_values.values()?, grad_values.values()?);
        let out = with_curve!(self.0,
            curve => map_pairs(x_values, grad_values, #[inline(always)] |x, grad| grad * curve.slope(x)),
            Activation::ClampedSwiglu { .. } => bail!("ClampedSwiglu takes a gate and an up"));
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}

struct Glu(Activation);

/// The gate and the up that [`Activation::ClampedSwiglu`] goes on with.
#[inline(always)]
fn limited(gate: f32, up: f32, limit: f32) -> (f32, f32) {
    let up = if up < -limit { -limit } else { up };
    (if gate > limit { limit } else { gate }, if up > limit { limit } else { up })
}

impl CustomOp2 for Glu {
    fn name(&self) -> &'static str {
        "glu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gl: &Layout,
        up: &CpuStorage,
        ul: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (values(gate, gl)?, values(up, ul)?);
        let out = with_curve!(self.0,
        curve => map_pairs(gate, up, #[inline(always)] |gate, up| curve.value(gate) * up),
        Activation::ClampedSwiglu { alpha, limit } => map_pairs(gate, up, #[inline(always)] |gate, up| {
            let (gate, up) = limited(gate, up, limit);
            gate * sigmoid(alpha * gate) * (up + 1.0)
        }));
        Ok((CpuStorage::F32(out), gl.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let held = (Held::new(gate), Held::new(up), Held::new(&grad));
        let (gates, ups, grads) = (held.0.values()?, held.1.values()?, held.2.values()?);
        // Slopes first, then times the gradient: three inputs as two passes over two.
        let (for_gate, for_up) = with_curve!(self.0,
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
        Ok((
            Some(Tensor::from_vec(for_gate, gate.shape(), gate.device())?),
            Some(Tensor::from_vec(for_up, up.shape(), up.device())?),
        ))
    }
}
