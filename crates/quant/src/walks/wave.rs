//! How many windows pass together.

use std::time::Duration;

/// About how much work a kill may cost.
const TIME: Duration = Duration::from_secs(90);

/// Windows that pass together and then are on the disk. With many, weights are read seldom; with few, a kill costs
/// little. It holds whole batches.
#[derive(Debug)]
pub(crate) struct Wave {
    batches: usize,
    least: usize,
    most: usize,
    batch: usize,
}

impl Wave {
    /// At least one batch of `batch` windows for each thread, and about `most` windows at most.
    pub(crate) fn new(threads: usize, most: usize, batch: usize) -> Self {
        let most = (most / batch).max(1);
        let least = threads.clamp(1, most);
        Self { batches: least, least, most, batch }
    }

    pub(crate) const fn windows(&self) -> usize {
        self.batches * self.batch
    }

    /// Told how long the last wave took, sets how many windows the next one may have.
    pub(crate) fn took(&mut self, time: Duration) {
        if time > TIME {
            self.batches = (self.batches / 2).max(self.least);
        } else if time * 4 < TIME {
            self.batches = (self.batches * 4).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waves_keep_to_the_clock() {
        let mut wave = Wave::new(2, 20, 1);
        assert_eq!(wave.windows(), 2);
        let mut take = |seconds| {
            wave.took(Duration::from_secs(seconds));
            wave.windows()
        };
        assert_eq!([1, 4, 20, 30, 95, 200].map(&mut take), [8, 20, 20, 20, 10, 5]);
        assert_eq!([200, 200, 200, 50, 10].map(take), [2, 2, 2, 2, 8]);
        assert_eq!((Wave::new(16, 4, 1).windows(), Wave::new(0, 0, 1).windows()), (4, 1));
        assert_eq!(
            [(1, 20), (2, 20), (2, 3), (8, 64)].map(|(threads, most)| Wave::new(threads, most, 8).windows()),
            [8, 16, 8, 64]
        );
    }
}
