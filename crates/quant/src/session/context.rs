//! What a run works with.

use mlx_format::FloatType;

use super::QuantizeSettings;
use super::choose::Hooks;
use crate::Model;
use crate::carry::{Carrier, ColumnWeights};
use crate::methods::{Method, Recipe};
use crate::observer::Observer;
use crate::plan::{Job, Plan, TensorId};
use crate::team::Team;
use crate::walks::Walk;

/// What a run works with.
pub(super) struct Session<'a> {
    pub(super) model: &'a Model,
    pub(super) plan: &'a Plan,
    pub(super) walk: Walk<'a>,
    pub(super) recipe: &'a Recipe,
    pub(super) settings: &'a QuantizeSettings,
    pub(super) pool: &'a rayon::ThreadPool,
    pub(super) observer: &'a dyn Observer,
    /// What is rounded without data here (tables of untied models, inputs beside the residual stream) stands behind no norm.
    pub(super) even: ColumnWeights,
    pub(super) hooks: &'a Hooks<'a>,
    /// Who else computes.
    pub(super) team: &'a Team,
}

impl Session<'_> {
    /// The item of a module or tensor.
    pub(super) fn item(&self, name: &str) -> Option<usize> {
        self.plan.by_path(name).map(TensorId::index)
    }

    /// The dtype in which a tensor that is not quantized is written.
    pub(super) fn float_of(&self, tensor: &str) -> Option<FloatType> {
        let item = &self.plan.items[self.item(tensor)?];
        match item.job {
            Job::Copy { .. } => FloatType::from_dtype(self.plan.layout.specs()[item.first_output].dtype),
            _ => None,
        }
    }

    /// Items whose names begin with `prefix`.
    pub(super) fn items_below(&self, prefix: &str) -> Vec<usize> {
        self.plan.below(prefix).into_iter().map(TensorId::index).collect()
    }

    pub(super) fn carrier<'s>(&'s self, observer: &'s dyn Observer) -> Carrier<'s> {
        let search = (self.recipe.rounding() != Method::Rtn).then_some(&self.even);
        Carrier { model: self.model, plan: self.plan, pool: self.pool, observer, search, careful: None }
    }
}
