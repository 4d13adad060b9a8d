//! Which windows of a data set are used.
//!
//! A choice is a pure function of few numbers, so that any worker can make it by itself and a seed means the same
//! windows in every version of this program; tests pin it with literal indices.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

/// Which windows to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Pick {
    /// That many windows of each source, evenly spaced from its first to its last, in order. 0 takes all, and so does a
    /// number beyond what there is. For evaluation: the same as NumPy's `unique(linspace(0, total - 1, n).round())`.
    EvenlySpaced {
        /// Windows of each source.
        windows: usize,
    },
    /// That many windows, drawn without repetition from all windows of all sources alike, so that a source takes part in
    /// proportion to its length. A larger number with the same seed begins with the same windows. 0 takes all
    /// (in drawn order), and so does a number beyond what there is. For calibration.
    Sampled {
        /// Windows of all sources together.
        windows: usize,
        /// Any number.
        seed: u64,
    },
}

/// Indices of `count` of `total` windows, ascending: `round(i * ((total - 1) / (count - 1)))` in float64, ties to even.
pub(super) fn evenly_spaced(total: usize, count: usize) -> Vec<usize> {
    let count = limited(total, count);
    if count < 2 {
        return (0..count).collect();
    }
    let last = total - 1;
    let step = last as f64 / (count - 1) as f64;
    let mut picked: Vec<usize> =
        (0..count - 1).map(|index| (index as f64 * step).round_ties_even() as usize).collect();
    picked.push(last);
    picked.dedup();
    picked
}

/// The first `count` of a permutation of `0..total`.
///
/// The generator is ChaCha with 20 rounds, its key the seed as 8 little-endian bytes and 24 zero bytes, stream
/// and counter 0, read as little-endian `u64`. A number below `bound` is a draw modulo `bound`, draws at or above the
/// largest multiple of `bound` up to 2^64 being thrown away. The permutation is the forward Fisher-Yates shuffle: for
/// i = 0, 1, ... place i is exchanged with place i + (a number below total - i).
pub(super) fn sampled(total: usize, count: usize, seed: u64) -> Vec<usize> {
    let count = limited(total, count);
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut generator = ChaCha20Rng::from_seed(key);
    let mut places: Vec<usize> = (0..total).collect();
    for index in 0..count {
        let other = index + below((total - index) as u64, || generator.next_u64()) as usize;
        places.swap(index, other);
    }
    places.truncate(count);
    places
}

/// All of `0..total` in an order of that seed.
pub(crate) fn permutation(total: usize, seed: u64) -> Vec<usize> {
    sampled(total, 0, seed)
}

fn limited(total: usize, count: usize) -> usize {
    if count == 0 { total } else { count.min(total) }
}

/// A number below `bound`, every one equally likely.
fn below(bound: u64, mut draw: impl FnMut() -> u64) -> u64 {
    // 2^64 mod bound: how many draws at the top are one incomplete round.
    let incomplete = (u64::MAX % bound + 1) % bound;
    loop {
        let drawn = draw();
        if drawn <= u64::MAX - incomplete {
            return drawn % bound;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incomplete_rounds_are_thrown_away() {
        let mut draws = [u64::MAX, u64::MAX - 1, 7].into_iter();
        // 2^64 is 1 modulo 3 and modulo 5, so only the very last draw is thrown away.
        assert_eq!(below(5, || draws.next().unwrap()), (u64::MAX - 1) % 5);
        let mut draws = [u64::MAX, 12].into_iter();
        assert_eq!(below(1 << 32, || draws.next().unwrap()), (1 << 32) - 1);
        assert_eq!(below(1, || 99), 0);
    }

    #[test]
    fn samples_are_permutations_with_common_beginnings() {
        for total in [0, 1, 2, 7, 100] {
            let mut all = sampled(total, 0, 123);
            assert_eq!(sampled(total, total / 2 + 1, 123), all[..(total / 2 + 1).min(total)]);
            all.sort_unstable();
            assert_eq!(all, (0..total).collect::<Vec<_>>());
        }
    }
}
