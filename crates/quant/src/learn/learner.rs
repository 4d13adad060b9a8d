//! The linears of a block that learns.

use mlx_quant_engine::Tensor;

use super::layer::Layer;

/// A linear of a block; of stacked ones one layer an expert.
pub(crate) struct Learner {
    pub(crate) path: String,
    /// Each with its place among those of its site.
    pub(crate) experts: Vec<(Option<usize>, Expert)>,
}

impl Learner {
    /// A linear whose first (or only) weight is `expert`.
    pub(crate) fn new(path: &str, expert: (Option<usize>, Expert)) -> Self {
        Self { path: path.to_owned(), experts: vec![expert] }
    }

    /// What has learned: path, expert, layer.
    pub(crate) fn layers(self) -> impl Iterator<Item = (String, Option<usize>, Layer)> {
        let Self { path, experts } = self;
        experts.into_iter().filter_map(move |(expert, own)| match own {
            Expert::Learns(layer) => Some((path.clone(), expert, layer)),
            Expert::Stays(_) => None,
        })
    }
}

/// A linear, or an expert of stacked ones.
pub(crate) enum Expert {
    Learns(Layer),
    /// Its weight `[out, in]`.
    Stays(Tensor),
}

/// Squared differences on held-out windows, a mean over their numbers: before, and of the best step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Learned {
    pub(crate) before: f64,
    pub(crate) best: f64,
    pub(crate) step: usize,
}

/// What learns, in the order of its variables.
pub(super) fn layers(learners: &mut [Learner]) -> impl Iterator<Item = &mut Layer> {
    learners.iter_mut().flat_map(|learner| &mut learner.experts).filter_map(|(_, expert)| match expert {
        Expert::Learns(layer) => Some(layer),
        Expert::Stays(_) => None,
    })
}
