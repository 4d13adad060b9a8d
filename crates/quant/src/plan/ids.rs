//! Numbers for the items of a plan, so that names are looked up once.

use std::collections::BTreeMap;

use super::Item;

/// An item of a plan: given out once, in the order of [`super::Plan::items`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorId(u32);

impl TensorId {
    /// Position in [`super::Plan::items`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// The items of a plan by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Paths(BTreeMap<String, TensorId>);

impl Paths {
    /// Numbers `items` in their order.
    pub(super) fn of(items: &[Item]) -> Self {
        Self((0..).map(TensorId).zip(items).map(|(id, item)| (item.name.clone(), id)).collect())
    }

    pub(super) fn find(&self, path: &str) -> Option<TensorId> {
        self.0.get(path).copied()
    }

    /// Items whose names begin with `prefix`, in the order of the plan.
    pub(super) fn below(&self, prefix: &str) -> Vec<TensorId> {
        let from = self.0.range(prefix.to_owned()..);
        let mut ids: Vec<_> =
            from.take_while(|(name, _)| name.starts_with(prefix)).map(|(_, id)| *id).collect();
        ids.sort_unstable();
        ids
    }
}
