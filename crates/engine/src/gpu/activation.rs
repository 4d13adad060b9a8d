//! Activations and gated linear units, whose functions are filled into kernels as WGSL.

use std::sync::Arc;

use super::card::Card;
use super::elementary::pairs;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::parts::row_parts;
use super::program::Program;
use super::strided::Value;
use crate::Tensor;
use crate::error::{Result, bail};
use crate::plain::check_same;
use crate::settings::Activation;

static GLU: Program =
    Program { name: "glu", source: include_str!("wgsl/glu.wgsl"), checked: true, reads: 3, writes: 2 };

/// A function of `x` and its derivative, in WGSL. `None` for what takes two inputs.
fn curve(activation: Activation) -> Option<(&'static str, &'static str)> {
    /// `sqrt(2 / pi)` times two stands in front of the cubic: the argument of the sigmoid that stands for
    /// `(1 + tanh) / 2`. `1 / sqrt(2 * pi)` is the normal distribution's peak.
    const TANH: (&str, &str) = (
        "x * sigmoid(1.595769 * (x + 0.044715 * x * x * x))",
        "(sigmoid(1.595769 * (x + 0.044715 * x * x * x)) + x * sigmoid(1.595769 * (x + 0.044715 * x * x * x)) * (1.0 - \
         sigmoid(1.595769 * (x + 0.044715 * x * x * x))) * 1.595769 * (1.0 + 3.0 * 0.044715 * x * x))",
    );
    Some(match activation {
        Activation::Silu => ("x * sigmoid(x)", "(sigmoid(x) + x * sigmoid(x) * (1.0 - sigmoid(x)))"),
        Activation::Gelu => ("x * normal(x)", "(normal(x) + x * 0.3989423 * exponential(-0.5 * x * x))"),
        Activation::GeluTanh => TANH,
        Activation::Relu => ("above_zero(x)", "select(0.0, 1.0, x > 0.0)"),
        Activation::ReluSquared => ("above_zero(x) * x", "select(0.0, 2.0 * x, x > 0.0)"),
        Activation::Sigmoid => ("sigmoid(x)", "(sigmoid(x) * (1.0 - sigmoid(x)))"),
        Activation::Softplus => ("softplus(x)", "sigmoid(x)"),
        Activation::Identity => ("x", "1.0"),
        Activation::ClampedSwiglu { .. } => return None,
    })
}

pub(super) fn activate(card: &Arc<Card>, x: &Tensor, activation: Activation) -> Result<Tensor> {
    let Some((value, slope)) = curve(activation) else { bail!("ClampedSwiglu takes a gate and an up") };
    if activation == Activation::Identity {
        return Ok(x.clone());
    }
    let out = pairs(card, x, x, Value::of(value))?;
    let card = card.clone();
    Ok(Tensor::made(x.device(), x.dims().to_vec(), out.shared(), "activate", &[x], move |pull| {
        let product = format!("{slope} * y");
        let for_x = pairs(&card, &pull.inputs[0], pull.grad, Value::of(&product))?;
        Ok(vec![Some(tensor(for_x, pull.grad.dims(), pull.grad))])
    }))
}

/// A gated product as WGSL of a gate `x`, an up `y` and two numbers.
struct Gated {
    value: String,
    /// What functions of the gate are of; `gate` and `up` are the inputs.
    inner: &'static str,
    for_gate: String,
    for_up: String,
    numbers: [f32; 2],
}

fn gated(glu: Activation) -> Gated {
    if let Activation::ClampedSwiglu { alpha, limit } = glu {
        return Gated {
            value: "select(x, b, x > b) * sigmoid(a * select(x, b, x > b)) * (clamped(y, -b, b) + 1.0)".to_owned(),
            inner: "select(gate, b, gate > b)",
            for_gate: "select((sigmoid(a * x) + a * x * sigmoid(a * x) * (1.0 - sigmoid(a * x))) * (clamped(up, -b, b) \
                       + 1.0), 0.0, gate > b)"
                .to_owned(),
            for_up: "select(x * sigmoid(a * x), 0.0, up > b || up < -b)".to_owned(),
            numbers: [alpha, limit],
        };
    }
    let (value, slope) = curve(glu).unwrap_or(("x", "1.0"));
    Gated {
        value: format!("({value}) * y"),
        inner: "gate",
        for_gate: format!("{slope} * up"),
        for_up: format!("({value})"),
        numbers: [0.0; 2],
    }
}

pub(super) fn glu(card: &Arc<Card>, gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
    check_same(gate, up, "glu: gate and up")?;
    let Gated { value, inner, for_gate, for_up, numbers: [a, b] } = gated(glu);
    let out = pairs(card, gate, up, Value { text: &value, a, b })?;
    let card = card.clone();
    Ok(Tensor::made(gate.device(), gate.dims().to_vec(), out.shared(), "glu", &[gate, up], move |pull| {
        let (gate, count) = (&pull.inputs[0], pull.grad.elem_count());
        let (gates, ups, grads) = (Slice::of(gate)?, Slice::of(&pull.inputs[1])?, Slice::of(pull.grad)?);
        let [out_gate, out_up] = [card.room(count)?, card.room(count)?];
        let words = [("INNER", inner.to_owned()), ("FOR_GATE", for_gate.clone()), ("FOR_UP", for_up.clone())];
        for part in row_parts(&card, count, 1) {
            let (first, length) = (part.start, part.len());
            card.launch(&Launch {
                program: &GLU,
                words: &words,
                slices: &[
                    gates.part(first, length),
                    ups.part(first, length),
                    grads.part(first, length),
                    Slice::all(&out_gate, count).part(first, length),
                    Slice::all(&out_up, count).part(first, length),
                ],
                numbers: &[length as u32, a.to_bits(), b.to_bits()],
                groups: card.row_of_groups(length),
                work: 64 * length as u64,
            })?;
        }
        Ok(vec![Some(tensor(out_gate, gate.dims(), gate)), Some(tensor(out_up, gate.dims(), gate))])
    }))
}
