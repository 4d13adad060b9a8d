//! Sums over windows whose result does not depend on who computes what.
//!
//! Floating-point sums depend on their order. So whatever is summed over windows is summed in order within fixed chunks
//! of [`CHUNK`] windows, and chunks are added in a fixed binary tree: chunks 0 and 1, 2 and 3, then these pairs, and so
//! on; what has no partner at the end is added from the right. Threads, cards and processes decide who computes which
//! chunk and when, never the result.

use std::collections::BTreeMap;

use mlx_quant_engine::Tensor;

use serde::{Deserialize, Serialize};

/// Windows that are summed in order before the tree begins. Another number would give other bytes, and so raise
/// `ALGORITHM` (`device.rs`).
pub const CHUNK: usize = 16;

/// What can be added to another of its kind.
pub trait Sum {
    /// Adds the sum of what comes after.
    fn add(&mut self, right: Self);
}

impl Sum for f64 {
    fn add(&mut self, right: Self) {
        *self += right;
    }
}

impl<T: Copy + std::ops::AddAssign> Sum for Vec<T> {
    /// Element by element; what only the longer one has stays.
    fn add(&mut self, right: Self) {
        if self.len() < right.len() {
            let shorter = std::mem::replace(self, right);
            self.iter_mut().zip(shorter).for_each(|(sum, other)| *sum = other_plus(other, *sum));
        } else {
            self.iter_mut().zip(right).for_each(|(sum, other)| *sum += other);
        }
    }
}

fn other_plus<T: std::ops::AddAssign>(mut left: T, right: T) -> T {
    left += right;
    left
}

impl Sum for mlx_quant_engine::Result<Tensor> {
    /// Where they lie; of what went wrong the first stays.
    fn add(&mut self, right: Self) {
        let sum = match (&*self, right) {
            (Ok(left), Ok(right)) => left.device().add(left, &right, 1.0),
            (Ok(_), Err(error)) => Err(error),
            (Err(_), _) => return,
        };
        *self = sum;
    }
}

impl<K: Ord, T: Sum> Sum for BTreeMap<K, T> {
    /// Key by key.
    fn add(&mut self, right: Self) {
        for (key, other) in right {
            match self.entry(key) {
                std::collections::btree_map::Entry::Vacant(place) => drop(place.insert(other)),
                std::collections::btree_map::Entry::Occupied(mut place) => place.get_mut().add(other),
            }
        }
    }
}

/// The tree over chunks, which may come in any order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tree<T> {
    /// Sums that wait for their partner: level of the tree, place in the level, sum.
    nodes: Vec<(u32, usize, T)>,
}

impl<T> Default for Tree<T> {
    fn default() -> Self {
        Self { nodes: Vec::new() }
    }
}

impl<T: Sum> Tree<T> {
    /// Takes the sum of chunk `index`; of each chunk once.
    pub fn put(&mut self, index: usize, sum: T) {
        self.put_node((0, index), sum);
    }

    /// Takes a sum of all chunks below a node: its level, and its place in the level.
    pub fn put_node(&mut self, (level, place): (u32, usize), sum: T) {
        let (mut level, mut place, mut sum) = (level, place, sum);
        let partner = |nodes: &Vec<(u32, usize, T)>, level, place: usize| {
            nodes.iter().position(|node| (node.0, node.1) == (level, place ^ 1))
        };
        while let Some(at) = partner(&self.nodes, level, place) {
            let (_, _, other) = self.nodes.swap_remove(at);
            sum = if place % 2 == 0 { joined(sum, other) } else { joined(other, sum) };
            (level, place) = (level + 1, place / 2);
        }
        self.nodes.push((level, place, sum));
    }

    /// Sums that wait for their partners, with level and place: what another tree goes on with ([`Tree::put_node`]).
    pub fn into_nodes(self) -> Vec<((u32, usize), T)> {
        self.nodes.into_iter().map(|(level, place, sum)| ((level, place), sum)).collect()
    }

    /// The sum of all chunks; `None` if there are none. A chunk may be left out only if its windows have nothing to
    /// add, so that it is left out whoever computes.
    pub fn finish(self) -> Option<T> {
        // From the left: larger nodes stand before smaller ones.
        let mut nodes = self.nodes;
        nodes.sort_by_key(|(level, place, _)| place << level);
        nodes.into_iter().map(|(_, _, sum)| sum).rev().reduce(|right, left| joined(left, right))
    }
}

fn joined<T: Sum>(mut left: T, right: T) -> T {
    left.add(right);
    left
}

/// A sum over windows that come in their order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InOrder<T> {
    tree: Tree<T>,
    /// The chunk that is being summed, and its sum so far.
    open: Option<(usize, T)>,
}

impl<T> Default for InOrder<T> {
    fn default() -> Self {
        Self { tree: Tree::default(), open: None }
    }
}

impl<T: Sum> InOrder<T> {
    /// Lets `add` add window `window` to the sum of its chunk. `fresh` makes the sum that a chunk begins with.
    pub fn window<R>(
        &mut self,
        window: usize,
        fresh: impl FnOnce() -> T,
        add: impl FnOnce(&mut T) -> R,
    ) -> R {
        let chunk = window / CHUNK;
        if let Some((index, sum)) = self.open.take_if(|(index, _)| *index != chunk) {
            self.tree.put(index, sum);
        }
        add(&mut self.open.get_or_insert_with(|| (chunk, fresh())).1)
    }

    /// Adds what one window brings.
    pub fn add(&mut self, window: usize, part: T) {
        let chunk = window / CHUNK;
        match &mut self.open {
            Some((index, sum)) if *index == chunk => sum.add(part),
            _ => {
                if let Some((index, sum)) = self.open.replace((chunk, part)) {
                    self.tree.put(index, sum);
                }
            }
        }
    }

    /// The sum over all windows; `None` if there are none.
    pub fn finish(self) -> Option<T> {
        self.into_tree().finish()
    }

    /// The tree over all chunks that have come.
    pub fn into_tree(mut self) -> Tree<T> {
        if let Some((index, sum)) = self.open.take() {
            self.tree.put(index, sum);
        }
        self.tree
    }
}

/// Sums that are alive at once while `windows` windows come in order: one of the open chunk and one of each level of
/// the tree.
pub const fn alive(windows: usize) -> usize {
    let chunks = windows.div_ceil(CHUNK);
    1 + if chunks > 1 { (chunks - 1).ilog2() as usize + 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What it stands for, written out: the tree itself.
    #[derive(Clone, Debug, PartialEq)]
    struct Written(String);

    impl Sum for Written {
        fn add(&mut self, right: Self) {
            self.0 = format!("({}+{})", self.0, right.0);
        }
    }

    fn tree(order: &[usize]) -> String {
        let mut tree = Tree::default();
        for chunk in order {
            tree.put(*chunk, Written(chunk.to_string()));
        }
        tree.finish().unwrap().0
    }

    #[test]
    fn the_tree_is_fixed_whatever_comes_first() {
        assert_eq!(tree(&[0]), "0");
        assert_eq!(tree(&[0, 1, 2]), "((0+1)+2)");
        assert_eq!(tree(&[0, 1, 2, 3, 4, 5, 6]), "(((0+1)+(2+3))+((4+5)+6))");
        for seed in 1..40usize {
            let count = 1 + seed % 13;
            let mut order: Vec<usize> = (0..count).collect();
            let in_order = tree(&order);
            order.sort_by_key(|chunk| (chunk + 1).wrapping_mul(seed.wrapping_mul(2_654_435_761)) % 1009);
            assert_eq!(tree(&order), in_order, "{order:?}");
        }
    }

    /// Members that have neighbouring chunks each hand on what waits for a partner.
    #[test]
    fn a_tree_goes_on_with_nodes_of_others() {
        for chunks in 1..20 {
            let whole = tree(&(0..chunks).collect::<Vec<_>>());
            for members in 1..5 {
                let mut all = Tree::default();
                for member in (0..members).rev() {
                    let mut own = Tree::default();
                    for chunk in chunks * member / members..chunks * (member + 1) / members {
                        own.put(chunk, Written(chunk.to_string()));
                    }
                    own.into_nodes().into_iter().for_each(|(node, sum)| all.put_node(node, sum));
                }
                assert_eq!(all.finish().unwrap().0, whole, "{chunks} by {members}");
            }
        }
    }

    #[test]
    fn windows_are_summed_in_order_within_chunks() {
        let mut sum = InOrder::default();
        for window in 0..2 * CHUNK + 2 {
            sum.add(window, Written(window.to_string()));
        }
        let mut by_window = InOrder::default();
        for window in 0..2 * CHUNK + 2 {
            let part = Written(window.to_string());
            by_window.window(window, || Written("0".to_owned()), |sum| sum.add(part));
        }
        let text = sum.finish().unwrap().0;
        let chunk = |windows: std::ops::Range<usize>| {
            windows
                .map(|window| window.to_string())
                .reduce(|sum, window| format!("({sum}+{window})"))
                .unwrap()
        };
        let chunks = [0..16, 16..32, 32..34].map(chunk);
        assert_eq!(text, format!("(({}+{})+{})", chunks[0], chunks[1], chunks[2]));
        assert!(by_window.finish().unwrap().0.ends_with("+((0+32)+33))"));
    }

    #[test]
    fn floats_do_not_depend_on_who_computes_a_chunk() {
        let number = |at: usize| ((at * 7919 % 1000) as f32 - 500.0) * (1.0 + at as f32 / 1e4);
        let chunk = |chunk: usize| {
            let mut sum = vec![0f32; 3];
            for window in chunk * CHUNK..(chunk + 1) * CHUNK {
                sum.add(vec![number(window), number(window + 1), number(window + 2)]);
            }
            sum
        };
        let of = |order: &[usize]| {
            let mut tree = Tree::default();
            for index in order {
                tree.put(*index, chunk(*index));
            }
            tree.finish().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(of(&[0, 1, 2, 3, 4]), of(&[4, 2, 0, 3, 1]));
    }

    #[test]
    fn as_many_are_alive_as_is_said() {
        for windows in [1, 16, 17, 32, 33, 64, 100, 128, 129, 500] {
            let mut most = 0;
            let mut sum = InOrder::default();
            for window in 0..windows {
                sum.add(window, 1.0);
                most = most.max(sum.tree.nodes.len() + 1);
            }
            assert!(most <= alive(windows) && alive(windows) <= most + 1, "{windows}: {most}");
        }
    }

    #[test]
    fn lists_and_maps_are_added_piece_by_piece() {
        let mut short = vec![1.0, 2.0];
        short.add(vec![10.0, 20.0, 30.0]);
        assert_eq!(short, [11.0, 22.0, 30.0]);
        let mut map = BTreeMap::from([("a", 1.0)]);
        map.add(BTreeMap::from([("a", 2.0), ("b", 5.0)]));
        assert_eq!(map, BTreeMap::from([("a", 3.0), ("b", 5.0)]));
    }
}
