//! What a description asks of the tensors, as data: for checks that report everything that is wrong and not only the
//! first of it.

use std::collections::BTreeMap;

use crate::decoder::{Decoder, Linear};

/// What a tensor must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Axes after decoding, outermost first; `None` where any length will do.
    pub shape: Vec<Option<usize>>,
    /// Whether it may be missing.
    pub optional: bool,
}

impl ExpectedTensor {
    /// Whether a tensor of this shape is one.
    pub fn fits(&self, shape: &[usize]) -> bool {
        let fits = |(found, expected): (&usize, &Option<usize>)| expected.is_none_or(|axis| axis == *found);
        shape.len() == self.shape.len() && shape.iter().zip(&self.shape).all(fits)
    }
}

impl Decoder {
    /// Every tensor that the forward pass reads, by name. The inner width of a feed-forward network is taken from the
    /// rows of its first linear, which `rows` tells by tensor name (rows are not packed).
    pub fn expected(&self, rows: impl Fn(&str) -> Option<usize>) -> BTreeMap<String, ExpectedTensor> {
        let reads = self.reads().0.into_iter();
        let mut expected: BTreeMap<String, ExpectedTensor> = reads
            .map(|(name, read)| (name, ExpectedTensor { shape: read.shape, optional: read.optional }))
            .collect();
        let name = |linear: &Linear| format!("{}.weight", linear.path);
        for network in self.networks() {
            let linears = network.gate.linears();
            let Some(found) = linears.into_iter().next().and_then(|linear| rows(&name(linear))) else { continue };
            if let Some(down) = expected.get_mut(&name(&network.down)).and_then(|down| down.shape.last_mut()) {
                *down = Some(found / network.rows_for(1));
            }
            for linear in network.gate.linears() {
                let axis = expected.get_mut(&name(linear)).and_then(|tensor| tensor.shape.iter_mut().rev().nth(1));
                if let Some(axis) = axis {
                    *axis = Some(found);
                }
            }
        }
        expected
    }
}
