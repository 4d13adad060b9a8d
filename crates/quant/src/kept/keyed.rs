//! Directories that say what is in them.

use std::io::{ErrorKind, Write as _};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::file::{filled, sweep, sync_directory};

/// A directory with a key: its file `file`, JSON whose field `version` must be `version`.
pub(crate) struct Keyed<'k> {
    pub(crate) directory: &'k Path,
    pub(crate) file: &'static str,
    pub(crate) version: Value,
}

impl Keyed<'_> {
    /// The key in the directory; `None` if there is no directory, or nothing in it but locks and what unfinished files
    /// have left.
    ///
    /// # Errors
    /// In words that do not name the directory: somebody else's files, another version, a damaged key.
    pub(crate) fn read<K: DeserializeOwned>(&self) -> Result<Option<K>, String> {
        let path = self.directory.join(self.file);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return match self.foreign() {
                    // Another process may have made it since.
                    Some(_) if path.is_file() => self.read(),
                    Some(name) => Err(format!("it is not empty (it has {name}) and has no {}", self.file)),
                    None => Ok(None),
                };
            }
            Err(error) => return Err(format!("{}: {error}", self.file)),
        };
        let damaged = |error: serde_json::Error| format!("{} is damaged: {error}", self.file);
        let value: Value = serde_json::from_slice(&bytes).map_err(damaged)?;
        if value.get("version") != Some(&self.version) {
            return Err("it was made by another version of this program".to_owned());
        }
        let key = serde_json::from_value(value).map_err(damaged)?;
        sweep(self.directory, |_| true);
        Ok(Some(key))
    }

    /// A file or directory that was not made here.
    fn foreign(&self) -> Option<String> {
        let entries = std::fs::read_dir(self.directory).ok()?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let ours = |name: &String| name.ends_with(".lock") || name.starts_with(&format!("{}.", self.file));
        names.into_iter().find(|name| !ours(name))
    }

    /// Makes the directory and its key. Gives the key that is there afterwards, which another process may have made.
    ///
    /// # Errors
    /// In words: what the system says, or as [`Keyed::read`].
    pub(crate) fn make<K: Serialize + DeserializeOwned>(&self, key: &K) -> Result<K, String> {
        let path = self.directory.join(self.file);
        let text = serde_json::to_string_pretty(key).map_err(|error| error.to_string())? + "\n";
        let made = std::fs::create_dir_all(self.directory)
            .and_then(|()| filled(&path, |out| out.write_all(text.as_bytes())))
            .and_then(|partial| match partial.persist_noclobber(&path) {
                // Some disks cannot refuse to replace.
                Err(error) if !path.exists() => {
                    error.file.persist(&path).map(drop).map_err(|error| error.error)
                }
                _ => Ok(()),
            })
            .and_then(|()| sync_directory(self.directory));
        made.map_err(|error| error.to_string())?;
        let gone = || format!("{} was removed while it was made", self.file);
        self.read()?.ok_or_else(gone)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize)]
    struct Key {
        version: u32,
        what: usize,
    }

    fn keyed(directory: &Path) -> Keyed<'_> {
        Keyed { directory, file: "key.json", version: 3.into() }
    }

    #[test]
    fn a_key_is_made_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let own = keyed(&path);
        assert_eq!(own.read::<Key>().unwrap(), None);
        assert!(!path.exists());
        let (first, second) = (Key { version: 3, what: 1 }, Key { version: 3, what: 2 });
        assert_eq!(own.make(&first).unwrap(), first);
        assert_eq!(own.make(&second).unwrap(), first);
        assert_eq!(own.read::<Key>().unwrap(), Some(first));
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 1);
    }

    #[test]
    fn of_many_at_once_one_is_first() {
        for _ in 0..20 {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("kept");
            let barrier = Barrier::new(6);
            let all: Vec<Key> = std::thread::scope(|scope| {
                let make = |what| {
                    let (path, barrier) = (&path, &barrier);
                    scope.spawn(move || {
                        barrier.wait();
                        let own = keyed(path);
                        own.read::<Key>().unwrap();
                        own.make(&Key { version: 3, what }).unwrap()
                    })
                };
                let threads: Vec<_> = (0..6).map(make).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(all.iter().all(|key| *key == all[0]), "{all:?}");
        }
    }

    #[test]
    fn what_is_not_ours_is_refused_in_words() {
        let directory = tempfile::tempdir().unwrap();
        let own = keyed(directory.path());
        let says = |text: &str| {
            let error = own.read::<Key>().unwrap_err();
            assert!(error.contains(text), "{error}");
        };
        // What a killed process left of the key, and a lock, are nobody's.
        std::fs::write(directory.path().join("key.json.Xy12Za.partial"), "{").unwrap();
        std::fs::write(directory.path().join(".lock"), "").unwrap();
        assert_eq!(own.read::<Key>().unwrap(), None);
        std::fs::write(directory.path().join("thesis.txt"), "x").unwrap();
        says("it is not empty (it has thesis.txt) and has no key.json");
        let key = directory.path().join("key.json");
        for (content, text) in [
            ("", "key.json is damaged"),
            ("{\"version\": 3, \"wh", "key.json is damaged"),
            ("\0\0\0", "key.json is damaged"),
            ("[3]", "another version"),
            ("{\"version\": 2, \"what\": 1}", "another version"),
            ("{\"version\": 3}", "key.json is damaged"),
        ] {
            std::fs::write(&key, content).unwrap();
            says(text);
        }
        std::fs::write(&key, "{\"version\": 3, \"what\": 1}").unwrap();
        assert_eq!(own.read().unwrap(), Some(Key { version: 3, what: 1 }));
        assert!(!directory.path().join("key.json.Xy12Za.partial").exists());
        assert!(directory.path().join("thesis.txt").exists());
    }
}
