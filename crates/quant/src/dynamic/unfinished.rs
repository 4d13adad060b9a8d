//! A measurement under way, kept by the clock beside the file that it is for: a killed run goes on behind the last
//! window that was kept.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Key;
use crate::{Error, kept};

/// The file of a measurement under way, and what it measures.
pub(super) struct Unfinished {
    path: PathBuf,
    key: Key,
    /// Time between two writes.
    pub(super) every: Duration,
}

#[derive(Serialize, Deserialize)]
struct Form<T> {
    key: Key,
    windows: usize,
    sums: T,
}

/// `FILE.unfinished`.
pub(super) fn path(file: &Path) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(".unfinished");
    path.into()
}

impl Unfinished {
    /// For a measurement that will lie at `file`: `FILE.unfinished`.
    pub(super) fn beside(file: &Path, key: &Key, every: Duration) -> Self {
        Self { path: path(file), key: key.clone(), every }
    }

    /// The number of windows that were summed, and their sums. `None` if there is no file of this measurement, or a
    /// damaged one.
    pub(super) fn load<T: DeserializeOwned>(&self, windows: usize) -> Option<(usize, T)> {
        let text = std::fs::read(&self.path).ok()?;
        let form: Form<T> = serde_json::from_slice(&text).ok()?;
        (form.key == self.key && form.windows <= windows).then_some((form.windows, form.sums))
    }

    /// Keeps the sums of the first `windows` windows.
    pub(super) fn save<T: Serialize>(&self, windows: usize, sums: T) -> Result<(), Error> {
        let form = Form { key: self.key.clone(), windows, sums };
        let text = serde_json::to_vec(&form).map_err(|error| Error::state(&self.path, &error))?;
        kept::write(&self.path, &text).map_err(|error| Error::state(&self.path, &error))
    }

    /// The measurement is finished: removes the file.
    pub(super) fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_only_with_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let key = Key { seed: 3, ..Key::default() };
        let file = Unfinished::beside(&directory.path().join("figures.json"), &key, Duration::ZERO);
        assert!(file.load::<Vec<f64>>(9).is_none());
        // Sums are taken up bit for bit.
        let sums = vec![0.1 + 0.2, 1.0 / 3.0, 1e-300, f64::MAX];
        file.save(4, &sums).unwrap();
        assert_eq!(file.load(9), Some((4, sums)));
        assert!(file.load::<Vec<f64>>(3).is_none(), "more windows than there are");
        let other = Unfinished {
            key: Key { seed: 4, ..key.clone() },
            ..Unfinished::beside(&directory.path().join("figures.json"), &key, Duration::ZERO)
        };
        assert!(other.load::<Vec<f64>>(9).is_none());
        let bytes = std::fs::read(&file.path).unwrap();
        std::fs::write(&file.path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(file.load::<Vec<f64>>(9).is_none());
        file.remove();
        assert!(!file.path.exists());
    }
}
