//! Files that are there whole or not at all.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{BufWriter, ErrorKind, Result, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use mlx_format::checkpoint::{Lock, try_lock};
use tempfile::NamedTempFile;

const PARTIAL: &str = ".partial";
/// Random letters and digits before that.
const RANDOM: usize = 6;

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// An empty file beside `path` that no other process has, `NAME.RANDOM.partial`. It is locked, so that [`sweep`] leaves
/// it alone; it goes when it is dropped.
pub(super) fn partial(path: &Path) -> Result<NamedTempFile> {
    let mut prefix = path.file_name().map_or_else(OsString::new, OsString::from);
    prefix.push(".");
    loop {
        let mut builder = tempfile::Builder::new();
        // As of any file that is made: what the umask leaves.
        builder.prefix(&prefix).suffix(PARTIAL).rand_bytes(RANDOM).permissions(Permissions::from_mode(0o666));
        let made = builder.tempfile_in(parent(path))?;
        // Another process may have met it before it was locked.
        if try_lock(made.as_file())? != Lock::Busy && made.path().exists() {
            return Ok(made);
        }
    }
}

/// Fills a partial file and syncs it.
pub(super) fn filled(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&mut File>) -> Result<()>,
) -> Result<NamedTempFile> {
    let mut made = partial(path)?;
    let mut out = BufWriter::new(made.as_file_mut());
    fill(&mut out)?;
    out.flush()?;
    drop(out);
    made.as_file().sync_all()?;
    Ok(made)
}

/// Writes a file whose content is on the disk before it has its name. For one of many files, after which
/// [`sync_directory`] follows: until then a power failure may take the name.
///
/// # Errors
/// What the system says; what was at `path` before is still there then.
pub(crate) fn write_part(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&mut File>) -> Result<()>,
) -> Result<()> {
    filled(path, fill)?.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Writes a file that survives a power failure from here on.
///
/// # Errors
/// As [`write_part`].
pub(crate) fn write_with(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&mut File>) -> Result<()>,
) -> Result<()> {
    write_part(path, fill)?;
    sync_directory(parent(path))
}

/// Writes bytes as a file that is there whole or not at all, whatever happens on the way: a power failure, a full disk,
/// a second process that writes the same file.
///
/// # Errors
/// What the system says; what was at `path` before is still there then.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |out| out.write_all(bytes))
}

/// Brings the names in a directory to the disk.
///
/// # Errors
/// What the system says.
pub(crate) fn sync_directory(directory: &Path) -> Result<()> {
    match File::open(directory)?.sync_all() {
        // Some network disks do not know it for directories.
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        other => other,
    }
}

/// Removes partial files that ended processes left, of files whose names are `ours`. What cannot be removed stays.
pub(crate) fn sweep(directory: &Path, ours: impl Fn(&str) -> bool) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name();
        let own = name.to_str().and_then(|name| name.strip_suffix(PARTIAL)?.rsplit_once('.'));
        let random =
            |part: &str| part.len() == RANDOM && part.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !own.is_some_and(|(own, part)| random(part) && ours(own))
            || !entry.file_type().is_ok_and(|kind| kind.is_file())
        {
            continue;
        }
        if let Ok(file) = OpenOptions::new().write(true).open(entry.path())
            && try_lock(&file).is_ok_and(|lock| lock == Lock::Held)
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut all: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        all.sort();
        all
    }

    #[test]
    fn nothing_but_the_whole_file_is_ever_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kept.json");
        write(&path, b"first").unwrap();
        let failed = write_with(&path, |out| {
            out.write_all(&vec![7; 1 << 20])?;
            assert_eq!(std::fs::read(&path)?, b"first");
            Err(std::io::Error::other("full"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "full");
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
        assert_eq!(names(directory.path()), ["kept.json"]);
        write(&path, b"second").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        // Others may read it, as any file.
        assert_ne!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o044, 0);
    }

    #[test]
    fn what_the_dead_left_goes_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["a.json", "a.json.Xy12Za.partial", "mine.Xy12Za.partial", "a.json.partial"] {
            std::fs::write(at(name), "x").unwrap();
        }
        let alive = partial(&at("a.json")).unwrap();
        sweep(directory.path(), |name| name == "a.json");
        let mut left = vec!["a.json", "a.json.partial", "mine.Xy12Za.partial"];
        let own = alive.path().file_name().unwrap().to_str().unwrap();
        left.push(own);
        left.sort_unstable();
        assert_eq!(names(directory.path()), left);
        alive.persist(at("a.json")).unwrap();
        sweep(directory.path(), |_| true);
        assert_eq!(names(directory.path()), ["a.json", "a.json.partial"]);
    }

    /// Eight writers and a sweeper: nobody loses a file to anybody.
    #[test]
    fn writers_do_not_meet() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kept");
        std::thread::scope(|scope| {
            for writer in 0u8..8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..40 {
                        write_part(path, |out| out.write_all(&vec![writer; 10_000])).unwrap();
                        sweep(path.parent().unwrap(), |_| true);
                        let read = std::fs::read(path).unwrap();
                        assert!(read.len() == 10_000 && read.iter().all(|byte| *byte == read[0]));
                    }
                });
            }
        });
        assert_eq!(names(directory.path()), ["kept"]);
    }
}
