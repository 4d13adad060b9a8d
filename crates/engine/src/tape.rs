//! The tape: what a tensor was made of, and the way back.
//!
//! There is no list that operations are written to. Each tensor that depends on a variable holds the inputs of the
//! operation that made it, and that operation's vjp: the product of a vector with its Jacobian, which turns a gradient
//! with respect to the result into gradients with respect to the inputs. So a graph lives exactly as long as its
//! results.

use std::collections::{HashMap, HashSet};

use crate::Tensor;
use crate::error::{Result, bail};

/// What a vjp is given.
#[derive(Debug)]
pub struct Pull<'p> {
    /// The operation's inputs; what is computed with them is not recorded.
    pub inputs: &'p [Tensor],
    /// Its result.
    pub output: &'p Tensor,
    /// The gradient with respect to the result, of its shape.
    pub grad: &'p Tensor,
    /// Which inputs' gradients are asked for.
    pub wanted: &'p [bool],
}

/// Gradients with respect to the inputs, `None` where there is none.
pub(crate) type Vjp = Box<dyn Fn(&Pull<'_>) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

/// An operation that was done.
pub(crate) struct Node {
    pub(crate) name: &'static str,
    pub(crate) inputs: Vec<Tensor>,
    pub(crate) vjp: Vjp,
}

/// Where a tensor comes from.
pub(crate) enum Origin {
    /// Nothing that gradients reach.
    Constant,
    /// A tensor whose gradient is asked for.
    Variable,
    /// An operation on something that gradients reach.
    Made(Node),
}

/// Gradients of variables.
#[derive(Debug, Default)]
pub struct Gradients(HashMap<usize, (Tensor, Tensor)>);

impl Gradients {
    /// The gradient with respect to a variable; `None` where the result does not depend on it.
    pub fn get(&self, variable: &Tensor) -> Option<&Tensor> {
        self.0.get(&variable.address()).map(|(_, gradient)| gradient)
    }

    fn add(&mut self, to: &Tensor, gradient: Tensor) -> Result<()> {
        if gradient.dims() != to.dims() {
            bail!("a gradient {:?} for {:?}", gradient.dims(), to.dims());
        }
        let sum = match self.0.remove(&to.address()) {
            None => gradient,
            Some((_, sum)) => sum.device().add(&sum, &gradient, 1.0)?,
        };
        // The tensor is held, so that nothing else gets its address.
        self.0.insert(to.address(), (to.clone(), sum));
        Ok(())
    }

    fn take(&mut self, of: &Tensor) -> Option<Tensor> {
        self.0.remove(&of.address()).map(|(_, gradient)| gradient)
    }
}

/// `last` and all tensors that it was made of and that gradients reach; each comes after those that it was made of.
fn in_order(last: &Tensor) -> Vec<Tensor> {
    let mut order = Vec::new();
    let mut seen: HashSet<usize> = HashSet::new();
    let mut under_way: Vec<(Tensor, usize)> = Vec::new();
    let mut enter = |tensor: &Tensor, under_way: &mut Vec<(Tensor, usize)>| {
        if tensor.is_tracked() && seen.insert(tensor.address()) {
            under_way.push((tensor.clone(), 0));
        }
    };
    enter(last, &mut under_way);
    while let Some((tensor, next)) = under_way.last_mut() {
        let input = match tensor.origin() {
            Origin::Made(node) => node.inputs.get(*next).cloned(),
            _ => None,
        };
        *next += 1;
        match input {
            Some(input) => enter(&input, &mut under_way),
            None => order.extend(under_way.pop().map(|(tensor, _)| tensor)),
        }
    }
    order
}

impl Tensor {
    /// Gradients of the sum of `self * seed` with respect to all variables that it depends on.
    ///
    /// # Errors
    /// A seed of another shape; what goes wrong in a vjp.
    pub fn gradients(&self, seed: &Tensor) -> Result<Gradients> {
        Self::gradients_of(&[(self, seed)])
    }

    /// Gradients of the sum over all `tensor * seed`. It continues a backward pass that was cut at these tensors: seeds
    /// are the gradients that arrived there.
    ///
    /// # Errors
    /// As [`Tensor::gradients`].
    pub fn gradients_of(seeded: &[(&Tensor, &Tensor)]) -> Result<Gradients> {
        let mut gradients = Gradients::default();
        let mut order: Vec<Tensor> = Vec::new();
        let mut known: HashSet<usize> = HashSet::new();
        for (tensor, seed) in seeded {
            gradients.add(tensor, seed.detach())?;
            let all = in_order(tensor);
            order.extend(all.into_iter().filter(|tensor| known.insert(tensor.address())));
        }
        for tensor in order.iter().rev() {
            let Origin::Made(node) = tensor.origin() else { continue };
            let Some(grad) = gradients.take(tensor) else { continue };
            let inputs: Vec<Tensor> = node.inputs.iter().map(Tensor::detach).collect();
            let wanted: Vec<bool> = node.inputs.iter().map(Tensor::is_tracked).collect();
            let output = tensor.detach();
            let pull = Pull { inputs: &inputs, output: &output, grad: &grad, wanted: &wanted };
            let own = (node.vjp)(&pull)?;
            for ((input, wanted), gradient) in node.inputs.iter().zip(&wanted).zip(own) {
                match (wanted, gradient) {
                    (true, Some(gradient)) => gradients.add(input, gradient)?,
                    (true, None) => bail!("{} drops the gradient of an input", node.name),
                    (false, _) => {}
                }
            }
        }
        gradients.0.retain(|_, (tensor, _)| matches!(tensor.origin(), Origin::Variable));
        Ok(gradients)
    }
}
