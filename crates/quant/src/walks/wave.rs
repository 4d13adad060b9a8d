//! How many windows pass together.

use std::time::Duration;

/// About how much work a kill may cost.
const TIME: Duration = Duration::from_secs(90);

/// Windows that pass together and then are on the disk. With many, weights are read seldom; with few, a kill costs
/// little.
#[derive(Debug)]
pub(crate) struct Wave {
    windows: usize,
    least: usize,
    most: usize,
}

impl Wave {
    /// At least one window for each thread, and `most` at most.
    pub(crate) fn new(threads: usize, most: usize) -> Self {
        let least = threads.clamp(1, most.max(1));
        Self { windows: least, least, most: most.max(1) }
    }

    pub(crate) const fn windows(&self) -> usize {
        self.windows
    }

    /// Told how long the last wave took, sets how many windows the next one may have.
    pub(crate) fn took(&mut self, time: Duration) {
        if time > TIME {
            self.windows = (self.windows / 2).max(self.least);
        } else if time * 4 < TIME {
            self.windows = (self.windows * 4).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waves_keep_to_the_clock() {
        let mut wave = Wave::new(2, 20);
        assert_eq!(wave.windows(), 2);
        let mut take = |seconds| {
            wave.took(Duration::from_secs(seconds));
            wave.windows()
        };
        assert_eq!([1, 4, 20, 30, 95, 200].map(&mut take), [8, 20, 20, 20, 10, 5]);
        assert_eq!([200, 200, 200, 50, 10].map(take), [2, 2, 2, 2, 8]);
        assert_eq!((Wave::new(16, 4).windows(), Wave::new(0, 0).windows()), (4, 1));
    }
}
