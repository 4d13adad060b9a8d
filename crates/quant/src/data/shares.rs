//! How many windows of a calibration text go where: calibration, the training of dwq, and the judging of its steps.
//!
//! One rule for whoever reads a text and for whoever foresees what that will take. Windows are drawn in a fixed order
//! ([`super::Pick::Sampled`]: a larger number with the same seed begins with the same windows), so that calibration and
//! training begin alike and the windows that steps are judged on, which come last, are none of them.

use std::ops::Range;

use super::DataError;

/// Calibration windows where nothing is said.
pub const CALIBRATION_WINDOWS: usize = 128;
/// Windows on which the steps of a training are judged, where nothing is said.
pub const VALIDATION_WINDOWS: usize = 16;

/// What is asked of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Windows that methods calibrate on; 0: all but the validation windows.
    pub calibration: usize,
    /// What dwq takes; `None`: nothing is trained.
    pub training: Option<TrainingShares>,
}

/// What a training takes of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainingShares {
    /// Windows that are trained on; 0: all but the validation windows.
    pub windows: usize,
    /// Windows on which its steps are judged; of few windows no more than a quarter is taken.
    pub validation: usize,
}

/// Which of the drawn windows go where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// To calibration.
    pub calibration: Range<usize>,
    /// To the training, and to the judging of its steps.
    pub training: Option<(Range<usize>, Range<usize>)>,
}

impl Shares {
    /// For calibration alone: what was asked for, or [`CALIBRATION_WINDOWS`].
    pub fn new(asked: Option<usize>) -> Self {
        Self { calibration: asked.unwrap_or(CALIBRATION_WINDOWS), training: None }
    }

    /// With a training: on as many windows as were asked for, or as its steps take.
    #[must_use]
    pub fn with_training(
        self,
        asked: Option<usize>,
        steps: usize,
        batch_size: usize,
        validation: usize,
    ) -> Self {
        let windows = asked.unwrap_or_else(|| steps.saturating_mul(batch_size).max(1));
        Self { training: Some(TrainingShares { windows, validation }), ..self }
    }

    /// Windows to draw; 0: all that there are.
    pub fn wanted(&self) -> usize {
        match (self.calibration, self.training) {
            (0, _) | (_, Some(TrainingShares { windows: 0, .. })) => 0,
            (calibration, None) => calibration,
            (calibration, Some(training)) => {
                calibration.max(training.windows).saturating_add(training.validation)
            }
        }
    }

    /// Shares out so many windows, however few were found.
    ///
    /// # Errors
    /// A single window, which cannot be trained on and judged by at once ([`DataError::OneWindow`]).
    pub fn split(&self, found: usize) -> Result<Split, DataError> {
        let Some(training) = self.training else {
            return Ok(Split { calibration: first(self.calibration, found), training: None });
        };
        let validation = training.validation.min((found / 4).max(1));
        let rest = found.saturating_sub(validation);
        if rest == 0 {
            return Err(DataError::OneWindow);
        }
        Ok(Split {
            calibration: first(self.calibration, rest),
            training: Some((first(training.windows, rest), rest..found)),
        })
    }
}

/// The first `count` of so many, 0 for all.
fn first(count: usize, of: usize) -> Range<usize> {
    0..if count == 0 { of } else { count.min(of) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(calibration: usize, training: Option<(usize, usize)>) -> Shares {
        let training = training.map(|(windows, validation)| TrainingShares { windows, validation });
        Shares { calibration, training }
    }

    #[test]
    fn what_is_not_asked_for_is_usual() {
        assert_eq!(Shares::new(None), shares(128, None));
        assert_eq!(Shares::new(Some(3)), shares(3, None));
        assert_eq!(Shares::new(None).with_training(None, 50, 4, 16), shares(128, Some((200, 16))));
        assert_eq!(Shares::new(Some(8)).with_training(Some(8), 50, 4, 2), shares(8, Some((8, 2))));
        assert_eq!(Shares::new(None).with_training(None, 0, 4, 1), shares(128, Some((1, 1))));
    }

    #[test]
    fn as_many_are_drawn_as_both_need() {
        assert_eq!(shares(128, None).wanted(), 128);
        assert_eq!(shares(128, Some((400, 16))).wanted(), 416);
        assert_eq!(shares(128, Some((8, 16))).wanted(), 144);
        assert_eq!(shares(0, None).wanted(), 0);
        assert_eq!(shares(128, Some((0, 16))).wanted(), 0);
        assert_eq!(shares(usize::MAX, Some((8, 16))).wanted(), usize::MAX);
    }

    #[test]
    fn validation_windows_come_last_and_are_a_quarter_at_most() {
        let split = |shares: Shares, found| shares.split(found).unwrap();
        let both =
            |calibration, training, validation| Split { calibration, training: Some((training, validation)) };
        assert_eq!(split(shares(128, Some((400, 16))), 416), both(0..128, 0..400, 400..416));
        assert_eq!(split(shares(128, Some((400, 16))), 10), both(0..8, 0..8, 8..10));
        assert_eq!(split(shares(1, Some((1, 16))), 2), both(0..1, 0..1, 1..2));
        assert_eq!(split(shares(0, Some((0, 16))), 100), both(0..84, 0..84, 84..100));
        assert_eq!(split(shares(128, None), 5), Split { calibration: 0..5, training: None });
        assert_eq!(split(shares(0, None), 5), Split { calibration: 0..5, training: None });
        assert!(matches!(shares(1, Some((1, 1))).split(1), Err(DataError::OneWindow)));
        assert!(matches!(shares(0, Some((0, 16))).split(0), Err(DataError::OneWindow)));
    }
}
