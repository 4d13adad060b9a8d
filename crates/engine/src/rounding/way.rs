//! How a task rounds, as slices of numbers.

/// Rows of a task.
pub const ROWS: usize = 64;

/// A [`Factor`](crate::Factor) in this process's memory.
#[derive(Clone, Copy)]
pub(crate) struct Held<'h> {
    pub(super) order: &'h [usize],
    pub(super) upper: &'h [f32],
    pub(super) hessian: &'h [f32],
}

impl Held<'_> {
    /// What an error of one unit in each column costs if later columns make up for it as well as they can:
    /// `1 / U_jj^2` (Frantar and Alistarh 2022, arXiv 2208.11580, equation 3).
    pub(super) fn weights(&self) -> Vec<f32> {
        let size = self.order.len();
        (0..size).map(|at| self.upper[at * size + at]).map(|diagonal| 1.0 / (diagonal * diagonal)).collect()
    }
}

/// [`How`](super::How), with everything at hand.
#[derive(Clone, Copy)]
pub(crate) enum Way<'h> {
    Plain,
    Blind { weights: &'h [f32] },
    Careful { weights: &'h [f32], blind: bool },
    Nearest { weights: &'h [f32] },
    Refined { factor: Held<'h>, block_size: usize, sweeps: usize },
    Compensated { factor: Held<'h>, block_size: usize, sweeps: usize },
}
