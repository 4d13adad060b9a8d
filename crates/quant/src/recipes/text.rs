//! The text of a run: read once, then shared out to calibration, training and the judging of training steps.

use crate::data::{DataSource, OnRefusal, Pick, Shares, SourceInfo, Windows};
use crate::{Error, Model};

/// Text that windows are taken from.
#[derive(Clone, Debug)]
pub struct Text {
    /// Where it is.
    pub data: DataSource,
    /// Tokens a window.
    pub sequence_length: usize,
    /// What is done with rows that the model's chat template does not take.
    pub on_refusal: OnRefusal,
}

/// A calibration text, shared out.
#[derive(Clone, Debug)]
pub struct SharedText {
    /// Windows that methods calibrate on.
    pub calibration: Windows,
    /// Windows that are trained on, and windows on which steps are judged, if something is trained.
    pub training: Option<(Windows, Windows)>,
    /// What was read, before it was shared out.
    pub sources: Vec<SourceInfo>,
    /// Windows that the text holds, where that is fewer than are asked for.
    pub short: Option<usize>,
    /// Windows that were asked for; 0: all.
    pub wanted: usize,
}

impl Text {
    /// Rows that the chat template does not take are left out.
    pub fn new(data: DataSource, sequence_length: usize) -> Self {
        Self { data, sequence_length, on_refusal: OnRefusal::LeaveOut }
    }

    /// The built-in text on which results are measured.
    pub fn held_out(sequence_length: usize) -> Self {
        Self::new(DataSource::BuiltinHeldOut, sequence_length).strict(true)
    }

    /// `strict` stops at the first row that the chat template does not take.
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.on_refusal = if strict { OnRefusal::Stop } else { OnRefusal::LeaveOut };
        self
    }

    /// Windows, tokenized for a model.
    ///
    /// # Errors
    /// A model without tokenizer or decoder description; as [`Windows::read_with`].
    pub fn windows(&self, model: &Model, pick: Pick) -> Result<Windows, Error> {
        let (tokenizer, vocabulary) = (model.tokenizer()?, model.vocabulary()?);
        let length = self.sequence_length;
        Ok(Windows::read_with(&self.data, &tokenizer, vocabulary, length, pick, self.on_refusal)?)
    }

    /// Windows drawn by `seed`, shared out.
    ///
    /// # Errors
    /// As [`Self::windows`] and [`Shares::split`].
    pub fn share_out(&self, model: &Model, seed: u64, shares: &Shares) -> Result<SharedText, Error> {
        let wanted = shares.wanted();
        let all = self.windows(model, Pick::Sampled { windows: wanted, seed })?;
        let found = all.picked.len();
        let split = shares.split(found)?;
        Ok(SharedText {
            calibration: all.part(split.calibration),
            training: split.training.map(|(training, validation)| (all.part(training), all.part(validation))),
            sources: all.sources,
            short: (found < wanted).then_some(found),
            wanted,
        })
    }
}

#[cfg(all(test, feature = "demo"))]
mod tests {
    use super::*;

    #[test]
    fn validation_windows_are_none_of_the_others() {
        let model = crate::open(&crate::demo()).unwrap();
        let text = Text::new(DataSource::BuiltinCalibration, 32);
        let shares = Shares::new(Some(5)).with_training(None, 3, 3, 3);
        let shared = text.share_out(&model, 123, &shares).unwrap();
        let (training, validation) = shared.training.unwrap();
        let numbers = |windows: &Windows| windows.picked.iter().map(|one| one.index).collect::<Vec<_>>();
        assert_eq!((training.picked.len(), validation.picked.len(), shared.short), (9, 3, None));
        assert_eq!(numbers(&shared.calibration)[..], numbers(&training)[..5]);
        assert!(numbers(&validation).iter().all(|one| !numbers(&training).contains(one)));
        // More of the same seed begin with the same windows.
        let more = text.share_out(&model, 123, &Shares::new(Some(40))).unwrap();
        assert_eq!(numbers(&more.calibration)[..9], numbers(&training)[..]);
        // What the text does not hold is said.
        let long = Text::new(DataSource::BuiltinCalibration, 100_000);
        let short = long.share_out(&model, 123, &Shares::new(Some(10_000))).unwrap();
        assert_eq!(short.short, Some(short.calibration.picked.len()));
    }
}
