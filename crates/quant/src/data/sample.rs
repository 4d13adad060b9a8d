//! How much of a data set is read.
//!
//! Calibration takes some hundred thousand tokens, and data sets have gigabytes. What fits into [`WHOLE`] is read
//! whole, so that a file's windows are the same whatever number of them is asked for. Of more text only a sample is
//! read: at places spread evenly over a file where it can be entered anywhere, else from its beginning. Everything here
//! is a function of sizes and of what is asked for, so that the same command sees the same text again.

use super::Pick;

/// Text in bytes up to which a data set is read whole.
pub(super) const WHOLE: u64 = 64 << 20;

/// The smallest sample in bytes of text: enough for 500 windows of 512 tokens, so that most runs on a data set share
/// one.
const SAMPLE: u64 = 8 << 20;

/// Bytes of text that are read for a token that is wanted; four or five would be used.
const BYTES_PER_TOKEN: u64 = 32;

/// Bytes of text that are read at one place.
const PLACE: u64 = 32 << 10;

/// Places in a file: powers of two between these, see [`spread`].
const PLACES: (u64, u64) = (8, 4096);

/// Row groups of a table that are entered.
#[cfg_attr(not(feature = "parquet"), allow(dead_code, reason = "only parquet files have row groups"))]
pub(super) const GROUPS: usize = 32;

/// How much of a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Portion {
    /// All of it. Once it turns out to hold more text than that it is sampled after all.
    All {
        /// Bytes of text.
        at_most: u64,
    },
    /// A part.
    Sample {
        /// Bytes of text.
        bytes: u64,
    },
}

impl Portion {
    /// After how many bytes of text reading from the beginning stops.
    pub(super) fn limit(self) -> u64 {
        match self {
            Self::All { at_most } => at_most,
            Self::Sample { bytes } => bytes,
        }
    }
}

/// What windows take of a data set.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand {
    /// Tokens of a window.
    pub(super) sequence_length: usize,
    pub(super) pick: Pick,
}

impl Demand {
    /// How many windows are wanted, and whether of each file; 0 means all.
    pub(super) fn windows(&self) -> (usize, bool) {
        match self.pick {
            Pick::EvenlySpaced { windows } => (windows, true),
            Pick::Sampled { windows, .. } => (windows, false),
        }
    }

    /// Bytes of text for that many windows.
    fn bytes(&self, windows: usize) -> u64 {
        (windows as u64).saturating_mul(self.sequence_length as u64).saturating_mul(BYTES_PER_TOKEN)
    }

    /// Up to how much text a data set of that many files is read whole.
    pub(super) fn whole(&self, files: usize) -> u64 {
        let (windows, each) = self.windows();
        if windows == 0 {
            return u64::MAX;
        }
        WHOLE.max(self.bytes(windows).saturating_mul(if each { files as u64 } else { 1 }))
    }

    /// What is read of each file of a data set, by their sizes in bytes of text. The sample is shared out in proportion
    /// to size, but each file gets what its windows need.
    pub(super) fn portions(&self, sizes: &[u64]) -> Vec<Portion> {
        let (windows, each) = self.windows();
        let whole = self.whole(sizes.len());
        let total = sizes.iter().fold(0_u64, |sum, size| sum.saturating_add(*size));
        if total <= whole {
            return vec![Portion::All { at_most: whole }; sizes.len()];
        }
        let needed = self.bytes(windows);
        let least = if each { needed } else { self.bytes(2).max(PLACE) };
        let share = |size: u64| {
            let part = u128::from(SAMPLE.max(needed)) * u128::from(size) / u128::from(total);
            (part as u64).max(least)
        };
        sizes
            .iter()
            .map(|&size| match share(size) {
                bytes if bytes >= size => Portion::All { at_most: whole },
                bytes => Portion::Sample { bytes },
            })
            .collect()
    }

    /// How many windows a file that gave `portion` of a sample is to hold, so that it need not be read further.
    pub(super) fn enough(&self, bytes: u64, all: u64) -> usize {
        let (windows, each) = self.windows();
        if each || windows == 0 {
            return windows.max(1);
        }
        let part = (windows as u128 * u128::from(bytes)).div_ceil(u128::from(all.max(1)));
        (part as usize).clamp(1, windows)
    }
}

/// A stretch of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    /// Its first byte.
    pub(super) start: u64,
    /// Behind its last.
    pub(super) end: u64,
    /// How many bytes of text are read of it.
    pub(super) bytes: u64,
}

/// The stretches of a file of `size` bytes at whose beginnings `bytes` of text are read.
pub(super) fn stretches(size: u64, bytes: u64) -> impl Iterator<Item = Stretch> {
    let count = (bytes / PLACE).clamp(PLACES.0, PLACES.1).next_power_of_two();
    let place = move |index: u64| (u128::from(size) * u128::from(index) / u128::from(count)) as u64;
    spread(count as usize).into_iter().map(move |index| Stretch {
        start: place(index as u64),
        end: place(index as u64 + 1),
        bytes: bytes.div_ceil(count),
    })
}

/// `0..count` for a power of two in an order in which all beginnings are spread evenly: bits of the numbers reversed.
/// So reading can stop early where rows are large.
pub(super) fn spread(count: usize) -> Vec<usize> {
    let bits = count.trailing_zeros();
    (0..count).map(|index| index.reverse_bits().checked_shr(usize::BITS - bits).unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(windows: usize) -> Demand {
        Demand { sequence_length: 512, pick: Pick::Sampled { windows, seed: 1 } }
    }

    #[test]
    fn beginnings_are_spread() {
        assert_eq!(spread(1), [0]);
        assert_eq!(spread(8), [0, 4, 2, 6, 1, 5, 3, 7]);
        let mut all = spread(4096);
        all.sort_unstable();
        assert_eq!(all, (0..4096).collect::<Vec<_>>());
    }

    #[test]
    fn stretches_cover_a_file() {
        for (size, bytes) in [(3_000_000_001, 8 << 20), (100, 1 << 20), (7, 3), (0, 1), (u64::MAX, 1 << 40)] {
            let mut all: Vec<Stretch> = stretches(size, bytes).collect();
            all.sort_by_key(|stretch| stretch.start);
            assert_eq!((all[0].start, all[all.len() - 1].end), (0, size));
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(all.iter().map(|stretch| stretch.bytes).sum::<u64>() >= bytes);
        }
    }

    #[test]
    fn what_fits_is_read_whole() {
        let all = Portion::All { at_most: WHOLE };
        assert_eq!(sampled(128).portions(&[WHOLE]), [all]);
        assert_eq!(sampled(128).portions(&[WHOLE - 5, 5]), [all, all]);
        assert_eq!(sampled(128).portions(&[WHOLE + 1]), [Portion::Sample { bytes: SAMPLE }]);
        assert_eq!(sampled(0).portions(&[1 << 40]), [Portion::All { at_most: u64::MAX }]);
        // 10 000 windows of 512 tokens: 164 MB.
        assert_eq!(sampled(10_000).portions(&[2 * WHOLE]), [Portion::All { at_most: 163_840_000 }]);
        assert_eq!(sampled(10_000).portions(&[3 * WHOLE]), [Portion::Sample { bytes: 163_840_000 }]);
    }

    #[test]
    fn files_share_a_sample() {
        let (large, small) = (3 << 30, 1 << 30);
        let portions = sampled(128).portions(&[large, small, 1000]);
        let [Portion::Sample { bytes }, Portion::Sample { bytes: fewer }, Portion::All { .. }] = portions[..]
        else {
            panic!("{portions:?}")
        };
        assert!(bytes.abs_diff(3 * fewer) < 4 && bytes + fewer <= SAMPLE && bytes + fewer > SAMPLE - 100);
        // Evaluation takes its windows of each.
        let each = Demand { sequence_length: 512, pick: Pick::EvenlySpaced { windows: 1024 } };
        let needed = 1024 * 512 * 32;
        assert_eq!(each.portions(&[large, small]), [Portion::Sample { bytes: needed }; 2]);
    }
}
