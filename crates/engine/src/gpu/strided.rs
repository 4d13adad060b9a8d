//! Elements of strided tensors, one by one: functions of them and every rearrangement, in parts that fit bindings.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::memory::Memory;
use super::program::Program;
use crate::error::Result;

static ELEMENTS: Program = Program {
    name: "elements",
    source: include_str!("wgsl/elements.wgsl"),
    checked: true,
    reads: 2,
    writes: 1,
};

/// Axes that the kernel takes.
const AXES: usize = 5;
/// Elements of a launch at most: their number and their groups fit 32 bits and two axes of groups.
const MOST: usize = 1 << 30;

/// Elements of some memory in an arrangement.
#[derive(Clone, Debug)]
pub(super) struct Strided<'m> {
    memory: &'m Memory,
    first: usize,
    strides: Vec<usize>,
}

impl<'m> Strided<'m> {
    /// Of a slice, with these strides, from element `start` on.
    pub(super) fn new(slice: Slice<'m>, start: usize, strides: &[usize]) -> Self {
        Self { memory: slice.memory, first: slice.first + start, strides: strides.to_vec() }
    }

    /// Elements from the first to the last.
    fn reach(&self, sizes: &[usize]) -> usize {
        sizes.iter().zip(&self.strides).map(|(size, stride)| (size - 1) * stride).sum::<usize>() + 1
    }

    fn slice(&self, sizes: &[usize]) -> Slice<'m> {
        Slice { memory: self.memory, first: self.first, count: self.reach(sizes) }
    }
}

/// What becomes of elements `x` and `y`: WGSL, in which `a` and `b` are numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value<'v> {
    pub(super) text: &'v str,
    pub(super) a: f32,
    pub(super) b: f32,
}

impl<'v> Value<'v> {
    pub(super) fn of(text: &'v str) -> Self {
        Self { text, a: 0.0, b: 0.0 }
    }
}

/// Takes out axes of one element, and joins neighbours that all three see as one.
fn simplified(sizes: &mut Vec<usize>, all: &mut [Strided<'_>; 3]) {
    for axis in (0..sizes.len()).rev() {
        let merges = axis + 1 < sizes.len()
            && all.iter().all(|x| x.strides[axis] == x.strides[axis + 1] * sizes[axis + 1]);
        if sizes[axis] == 1 {
            sizes.remove(axis);
            for x in &mut *all {
                x.strides.remove(axis);
            }
        } else if merges {
            let inner = sizes.remove(axis + 1);
            sizes[axis] *= inner;
            for x in &mut *all {
                x.strides.remove(axis);
            }
        }
    }
}

/// The axis to cut: of the operand that reaches too far the one that reaches furthest; the first if there are too many.
fn cut(card: &Card, sizes: &[usize], all: &[Strided<'_>; 3]) -> Option<usize> {
    let room = card.binding - card.alignment as usize / 4;
    let far = all.iter().max_by_key(|x| x.reach(sizes)).filter(|x| x.reach(sizes) > room);
    if let Some(far) = far {
        return (0..sizes.len()).max_by_key(|axis| (sizes[*axis] - 1) * far.strides[*axis]);
    }
    let many = sizes.len() > AXES || sizes.iter().product::<usize>() > MOST;
    many.then_some(0)
}

/// `out = value(x, y)` for each element of `sizes`.
pub(super) fn elements(
    card: &Arc<Card>,
    mut sizes: Vec<usize>,
    mut all: [Strided<'_>; 3],
    value: Value<'_>,
) -> Result<()> {
    if sizes.contains(&0) {
        return Ok(());
    }
    simplified(&mut sizes, &mut all);
    if let Some(axis) = cut(card, &sizes, &all) {
        let half = sizes[axis] / 2;
        let mut second = all.clone();
        for x in &mut second {
            x.first += half * x.strides[axis];
        }
        let [mut low, mut high] = [sizes.clone(), sizes];
        low[axis] = half;
        high[axis] -= half;
        elements(card, low, all, value)?;
        return elements(card, high, second, value);
    }
    let count: usize = sizes.iter().product();
    let slices = [0, 1, 2].map(|at: usize| all[at].slice(&sizes));
    let padded = |mut numbers: Vec<u32>, with| {
        numbers.resize(AXES, with);
        numbers
    };
    let mut numbers = vec![count as u32, sizes.len() as u32];
    numbers.extend(padded(sizes.iter().map(|size| *size as u32).collect(), 1));
    for x in &all {
        numbers.extend(padded(x.strides.iter().map(|stride| *stride as u32).collect(), 0));
    }
    numbers.extend([value.a.to_bits(), value.b.to_bits()]);
    card.launch(&Launch {
        program: &ELEMENTS,
        words: &[("VALUE", value.text.to_owned())],
        slices: &slices,
        numbers: &numbers,
        groups: card.row_of_groups(count),
        work: 8 * count as u64,
    })
}
