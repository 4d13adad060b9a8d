//! A model directory: on disk, or embedded in the binary.

use std::borrow::Cow;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use fs_err as fs;
use memmap2::{Advice, Mmap, UncheckedAdvice};

/// Files that are read whole (config, index, tokenizer) may not be larger than this.
const MAX_WHOLE_FILE: u64 = 512 << 20;

/// Where a model comes from. File names are single components; nothing outside is reachable.
#[derive(Clone, Debug)]
pub enum Directory {
    /// A directory on disk.
    Path(PathBuf),
    /// Files embedded in the binary, under a name for messages.
    Embedded {
        /// Shown instead of a path.
        name: &'static str,
        /// File name and content.
        files: &'static [(&'static str, &'static [u8])],
    },
}

/// A directory or one of its files cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The path does not exist or is no directory.
    #[error("{0} is not a directory; hint: give the directory that holds config.json and *.safetensors")]
    NotADirectory(PathBuf),
    /// An operating system error; its message names the path.
    #[error("{0}; hint: check that the file exists and that you may read it")]
    Io(String),
    /// A pipe, device or directory where a file is expected.
    #[error("{0} is not a plain file; hint: give the directory that the model was downloaded to")]
    NotAFile(PathBuf),
    /// A file that is read whole is absurdly large.
    #[error("{path} has {bytes} bytes, more than any such file needs; hint: is this the right file?")]
    TooLarge {
        /// The file.
        path: String,
        /// Its size.
        bytes: u64,
    },
    /// A file name that is no single component.
    #[error(
        "file name {name:?} (in {location}) leads out of the directory; hint: the checkpoint is damaged or hostile, download it again"
    )]
    Escapes {
        /// The name as found.
        name: String,
        /// Where it was found.
        location: String,
    },
}

impl From<std::io::Error> for DirectoryError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error.to_string())
    }
}

/// The bytes of one file: mapped, or part of the binary.
#[derive(Debug)]
pub(super) enum Bytes {
    Map(Mmap),
    Static(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Map(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

impl Bytes {
    /// Gives all pages back to the system; they are read again if touched again.
    pub(super) fn release(&self) {
        if let Self::Map(map) = self {
            // SAFETY: the mapping is read-only and file-backed, so dropped pages come back with the same bytes.
            // Failure only means that the memory stays in use.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }

    /// Asks the system to read a range ahead.
    pub(super) fn prefetch(&self, start: usize, length: usize) {
        if let Self::Map(map) = self
            && length > 0
        {
            let _ = map.advise_range(Advice::WillNeed, start, length);
        }
    }
}

/// Asks the system to drop a file's pages from its cache, so that reading it reads the disk. Only Linux is asked.
pub fn forget_cached(file: &std::fs::File) {
    #[cfg(target_os = "linux")]
    {
        let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}

impl Directory {
    /// A directory on disk.
    ///
    /// # Errors
    /// If it is none.
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        if !path.is_dir() {
            return Err(DirectoryError::NotADirectory(path.to_owned()));
        }
        Ok(Self::Path(path.to_owned()))
    }

    /// The path or name, for messages.
    pub fn display(&self) -> Cow<'_, str> {
        match self {
            Self::Path(path) => path.to_string_lossy(),
            Self::Embedded { name, .. } => Cow::Borrowed(name),
        }
    }

    /// `directory/file`, for messages.
    pub fn display_file(&self, file: &str) -> String {
        match self {
            Self::Path(path) => path.join(file).display().to_string(),
            Self::Embedded { name, .. } => format!("{name}/{file}"),
        }
    }

    /// Names of the plain files (symbolic links to files included), sorted.
    ///
    /// # Errors
    /// If the directory cannot be listed.
    pub fn files(&self) -> Result<Vec<String>, DirectoryError> {
        match self {
            Self::Path(path) => {
                let mut names = Vec::new();
                for entry in fs::read_dir(path)? {
                    let entry = entry?;
                    if let Ok(name) = entry.file_name().into_string()
                        && entry.path().is_file()
                    {
                        names.push(name);
                    }
                }
                names.sort();
                Ok(names)
            }
            Self::Embedded { files, .. } => Ok(files.iter().map(|(name, _)| (*name).to_owned()).collect()),
        }
    }

    /// The content of a small file, or `None` if there is no such file.
    ///
    /// # Errors
    /// If it cannot be read, is absurdly large, or `file` is not a single name.
    pub fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>, DirectoryError> {
        check_name(file, &self.display())?;
        match self {
            Self::Path(path) => {
                let path = path.join(file);
                let metadata = match fs::metadata(&path) {
                    Ok(metadata) => metadata,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(error.into()),
                };
                // A pipe or a device never ends.
                if !metadata.is_file() {
                    return Err(DirectoryError::NotAFile(path));
                }
                let mut content = Vec::new();
                fs::File::open(&path)?.take(MAX_WHOLE_FILE + 1).read_to_end(&mut content)?;
                if content.len() as u64 > MAX_WHOLE_FILE {
                    return Err(DirectoryError::TooLarge {
                        path: path.display().to_string(),
                        bytes: metadata.len(),
                    });
                }
                Ok(Some(Cow::Owned(content)))
            }
            Self::Embedded { files, .. } => {
                Ok(files.iter().find(|(name, _)| *name == file).map(|(_, bytes)| Cow::Borrowed(*bytes)))
            }
        }
    }

    /// Size in bytes and modification time (nanoseconds since 1970, 0 if unknown) of a file, to recognise it
    /// again.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub fn identity(&self, file: &str) -> Result<(u64, u128), DirectoryError> {
        match self {
            Self::Path(path) => {
                let metadata = fs::metadata(path.join(file))?;
                let modified = metadata.modified().ok();
                let since = modified.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
                Ok((metadata.len(), since.map_or(0, |since| since.as_nanos())))
            }
            Self::Embedded { files, .. } => Ok((
                files.iter().find(|(name, _)| *name == file).map_or(0, |(_, bytes)| bytes.len() as u64),
                0,
            )),
        }
    }

    /// Refuses a file that cannot be opened, before any work.
    ///
    /// # Errors
    /// If it is no plain file or may not be read.
    pub fn check_readable(&self, file: &str) -> Result<(), DirectoryError> {
        if let Self::Path(path) = self {
            let path = path.join(file);
            if !path.is_file() {
                return Err(DirectoryError::NotAFile(path));
            }
            fs::File::open(path)?;
        }
        Ok(())
    }

    /// Copies the content of a file of any size.
    pub(super) fn copy(&self, file: &str, to: &mut impl std::io::Write) -> std::io::Result<()> {
        match self {
            Self::Path(path) => std::io::copy(&mut fs::File::open(path.join(file))?, to).map(|_| ()),
            Self::Embedded { files, .. } => {
                files.iter().find(|(name, _)| *name == file).map_or(Ok(()), |(_, bytes)| to.write_all(bytes))
            }
        }
    }

    /// Maps a file.
    pub(super) fn map(&self, file: &str) -> Result<Bytes, DirectoryError> {
        check_name(file, &self.display())?;
        match self {
            Self::Path(path) => {
                let path = path.join(file);
                if !path.is_file() {
                    return Err(DirectoryError::NotAFile(path));
                }
                let file = fs::File::open(path)?;
                // SAFETY: the map is only read. A file that another process truncates meanwhile can end this
                // process (SIGBUS), as with every reader that maps; it cannot be made to write.
                let map = unsafe { Mmap::map(file.file())? };
                Ok(Bytes::Map(map))
            }
            Self::Embedded { files, name } => files
                .iter()
                .find(|(found, _)| *found == file)
                .map(|(_, bytes)| Bytes::Static(bytes))
                .ok_or_else(|| {
                    std::io::Error::new(std::io::ErrorKind::NotFound, format!("{name}/{file}")).into()
                }),
        }
    }
}

/// Refuses everything but a single plain file name.
pub(super) fn check_name(name: &str, location: &str) -> Result<(), DirectoryError> {
    let plain = !name.is_empty()
        && name != "."
        && name != ".."
        && !name.contains(['/', '\\', '\0', ':'])
        && Path::new(name).components().count() == 1;
    if plain {
        Ok(())
    } else {
        Err(DirectoryError::Escapes { name: name.to_owned(), location: location.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside() {
        for bad in ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "c:x", "a\0"] {
            assert!(check_name(bad, "here").is_err(), "{bad:?}");
        }
        for good in ["model.safetensors", "..model", "model-00001-of-00002.safetensors"] {
            assert!(check_name(good, "here").is_ok(), "{good:?}");
        }
    }
}
