//! Layers as a grid: kinds of module below each other, blocks side by side; what belongs to no block has a row of its own.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

/// Figures by kind of module and block.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Grid<T> {
    /// Numbers of the blocks.
    pub(super) blocks: Vec<usize>,
    /// Kind (`self_attn.q_proj`) and a figure for each block, where there is one.
    pub(super) rows: Vec<(String, Vec<Option<T>>)>,
    /// Layers that belong to no block (embedding, head).
    pub(super) others: Vec<(String, T)>,
}

/// The path around its first segment that is a number.
fn split(path: &str) -> (Option<usize>, &str) {
    let mut start = 0;
    for segment in path.split('.') {
        let end = start + segment.len();
        if let Ok(number) = segment.parse() {
            return (Some(number), path[end..].trim_start_matches('.'));
        }
        start = end + 1;
    }
    (None, path)
}

impl<T: Clone> Grid<T> {
    /// From paths with figures; kinds keep the order in which they first come.
    pub(super) fn of(layers: impl IntoIterator<Item = (String, T)>) -> Self {
        let mut kinds: Vec<String> = Vec::new();
        let mut cells: BTreeMap<(String, usize), T> = BTreeMap::new();
        let mut others = Vec::new();
        for (path, figure) in layers {
            match split(&path) {
                (Some(block), kind) => {
                    if !kinds.iter().any(|known| known == kind) {
                        kinds.push(kind.to_owned());
                    }
                    cells.insert((kind.to_owned(), block), figure);
                }
                (None, path) => others.push((path.to_owned(), figure)),
            }
        }
        let blocks: BTreeSet<usize> = cells.keys().map(|(_, block)| *block).collect();
        let blocks: Vec<usize> = blocks.into_iter().collect();
        let row = |kind: String| {
            let figures = blocks.iter().map(|block| cells.get(&(kind.clone(), *block)).cloned()).collect();
            (kind, figures)
        };
        Self { rows: kinds.into_iter().map(row).collect(), blocks, others }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_blocks() {
        let layers = [
            ("model.embed_tokens", 6),
            ("model.layers.0.mlp.up_proj", 4),
            ("model.layers.10.mlp.up_proj", 3),
            ("model.layers.2.mlp.up_proj", 2),
            ("model.layers.2.self_attn.q_proj", 8),
        ];
        let grid = Grid::of(layers.map(|(path, bits)| (path.to_owned(), bits)));
        assert_eq!(grid.blocks, [0, 2, 10]);
        assert_eq!(grid.rows[0], ("mlp.up_proj".to_owned(), vec![Some(4), Some(2), Some(3)]));
        assert_eq!(grid.rows[1], ("self_attn.q_proj".to_owned(), vec![None, Some(8), None]));
        assert_eq!(grid.others, [("model.embed_tokens".to_owned(), 6)]);
    }
}
