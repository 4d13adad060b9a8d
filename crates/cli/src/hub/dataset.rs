//! Data from the hub: text files of a dataset repository, as few as will do.

use std::path::PathBuf;

use mlx_quant::Observer;
use mlx_quant::data::DataFile;

use super::explain::Trouble;
use super::{Address, Hub, Kind, RemoteFile};

/// Once the chosen files have this many bytes together no further one is taken: calibration needs megabytes, and datasets have
/// thousands of files.
const ENOUGH: u64 = 32 << 20;

/// Words of a path, as splits are named.
fn says(path: &str, words: &[&str]) -> bool {
    let lower = path.to_ascii_lowercase();
    lower.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| words.contains(&word))
}

/// The files to read: those under `path`, else of the split for training (else of any but the ones for tests), in order, until there is
/// enough.
fn choose(files: Vec<RemoteFile>, path: Option<&str>) -> Vec<RemoteFile> {
    let mut files: Vec<RemoteFile> =
        files.into_iter().filter(|file| DataFile::of(&file.path).is_some()).collect();
    if let Some(path) = path {
        let folder = format!("{}/", path.trim_end_matches('/'));
        files.retain(|file| file.path == path || file.path.starts_with(&folder));
    }
    // Prose about the data is not the data, and most .json files are settings.
    let likely = |file: &RemoteFile| DataFile::of(&file.path);
    let best = files.iter().map(likely).max().flatten();
    files.retain(|file| likely(file) == best || path == Some(&file.path));
    if files.iter().any(|file| says(&file.path, &["train"])) {
        files.retain(|file| says(&file.path, &["train"]));
    } else if files.iter().any(|file| !says(&file.path, &["test", "valid", "validation", "dev", "eval"])) {
        files.retain(|file| !says(&file.path, &["test", "valid", "validation", "dev", "eval"]));
    }
    let mut sum = 0;
    let wanted = |file: &RemoteFile| {
        let enough = sum >= ENOUGH;
        sum += file.size;
        !enough
    };
    files.into_iter().take_while(wanted).collect()
}

impl Hub {
    /// Text files of a dataset, brought here.
    pub(crate) fn dataset(
        &self,
        address: &Address,
        observer: &dyn Observer,
    ) -> Result<Vec<PathBuf>, Trouble> {
        let (snapshot, online) = self.find(Kind::Dataset, address, observer)?;
        let (id, path) = (address.id(), address.path.as_deref());
        let files = if online {
            self.list(&snapshot, observer)?
        } else {
            let root = snapshot.cache.snapshot(&snapshot.commit);
            let mut files = Vec::new();
            collect(&root, "", &mut files);
            files
        };
        let chosen = choose(files, path);
        if chosen.is_empty() {
            let place = path.map_or_else(String::new, |path| format!(" under {path:?}"));
            return Err(Trouble::Refused(format!(
                "dataset {id} has no .parquet, .jsonl, .json, .csv, .tsv or .txt file{place}{}; hint: name one of its files, as in {id}/data/train-00000.parquet",
                if online { "" } else { " in the cache, and the hub is out of reach" }
            )));
        }
        if !online {
            let root = snapshot.cache.snapshot(&snapshot.commit);
            return Ok(chosen.iter().map(|file| root.join(&file.path)).collect());
        }
        let paths = self.fetch_all(&snapshot, &chosen, observer)?;
        self.note(&snapshot)?;
        Ok(paths)
    }
}

/// Files of a snapshot in the cache, by their paths in it, sorted.
fn collect(root: &std::path::Path, below: &str, files: &mut Vec<RemoteFile>) {
    let Ok(entries) = std::fs::read_dir(root.join(below)) else { return };
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    for name in names {
        let path = if below.is_empty() { name } else { format!("{below}/{name}") };
        match std::fs::metadata(root.join(&path)) {
            Ok(found) if found.is_dir() => collect(root, &path, files),
            Ok(found) => files.push(RemoteFile { path, size: found.len(), id: String::new(), large: false }),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(files: &[(&str, u64)], path: Option<&str>) -> Vec<String> {
        let file = |(path, size): &(&str, u64)| RemoteFile {
            path: (*path).to_owned(),
            size: *size,
            id: String::new(),
            large: false,
        };
        choose(files.iter().map(file).collect(), path).into_iter().map(|file| file.path).collect()
    }

    #[test]
    fn training_data_until_there_is_enough() {
        let files = [
            ("README.md", 1),
            ("data/test-0.parquet", 5),
            ("data/train-0.parquet", 20 << 20),
            ("data/train-1.parquet", 20 << 20),
            ("data/train-2.parquet", 20 << 20),
            ("notes.txt", 3),
        ];
        assert_eq!(chosen(&files, None), ["data/train-0.parquet", "data/train-1.parquet"]);
        assert_eq!(chosen(&files, Some("data/test-0.parquet")), ["data/test-0.parquet"]);
        assert_eq!(chosen(&files, Some("notes.txt")), ["notes.txt"]);
        assert_eq!(chosen(&[("a.jsonl", 5), ("test.jsonl", 5)], None), ["a.jsonl"]);
        assert_eq!(chosen(&[("trainable.jsonl", 5), ("b.jsonl", 5)], None), ["trainable.jsonl", "b.jsonl"]);
        assert!(chosen(&[("a.bin", 5)], None).is_empty());
    }

    #[test]
    fn rows_go_before_settings_and_prose() {
        for (files, expected) in [
            (&["dataset_infos.json", "state.json", "a.jsonl.gz", "notes.txt"][..], &["a.jsonl.gz"][..]),
            (&["dataset_infos.json", "data/train.json", "README.txt"], &["data/train.json"]),
            (&["a.csv", "b.TSV.zst", "config.json", "other.json"], &["a.csv", "b.TSV.zst"]),
            (&["dataset_info.json", "one.txt", "two.txt.gz"], &["one.txt", "two.txt.gz"]),
            (&["a.parquet", "a.csv"], &["a.parquet"]),
        ] {
            let files: Vec<_> = files.iter().map(|name| (*name, 5)).collect();
            assert_eq!(chosen(&files, None), expected);
        }
        let both = [("data/x.json", 5), ("data/y.jsonl", 5)];
        assert_eq!(chosen(&both, Some("data/x.json")), ["data/x.json"]);
    }
}
