//! Hollow shards: files with a shard's header and size of which only some tensors are here.
//!
//! What is missing is a hole, which takes no room on the disk, so that a checkpoint larger than the disk opens like
//! any other, is planned from its headers, and is filled and emptied shard by shard (`convert --stream`).

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::Path;

use fs_err as fs;

/// Longest header that safetensors allows, in bytes.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Makes the file `path` of `size` bytes that begins with `head`, the length and the header of a shard; all else is a hole.
///
/// # Errors
/// What the system says, with the path.
pub fn make_hollow(path: &Path, head: &[u8], size: u64) -> std::io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(head)?;
    file.set_len(size)
}

/// Replaces the shard `path` by a hollow one of which only the header and the bytes in `kept` (from the start of the
/// file) are left. The file is replaced whole, so that an interruption leaves the old one or the new one; maps of the old one
/// keep its bytes, and its room on the disk, until they are dropped.
///
/// # Errors
/// What the system says, with the path.
pub fn hollow_out(path: &Path, kept: &[Range<u64>]) -> std::io::Result<()> {
    let mut whole = fs::File::open(path)?;
    let size = whole.metadata()?.len();
    let mut length = [0u8; 8];
    whole.read_exact(&mut length)?;
    let head = u64::from_le_bytes(length).min(MAX_HEADER_BYTES) + 8;
    let emptied = path.with_extension("hollow");
    let mut file = fs::File::create(&emptied)?;
    for range in std::iter::once(&(0..head)).chain(kept) {
        whole.seek(SeekFrom::Start(range.start))?;
        file.seek(SeekFrom::Start(range.start))?;
        std::io::copy(&mut (&mut whole).take(range.end - range.start), &mut file)?;
    }
    file.set_len(size)?;
    file.sync_data()?;
    fs::rename(emptied, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_is_asked_for_and_the_size() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let header = br#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header);
        let head = bytes.clone();
        bytes.extend_from_slice(&[1, 2, 3, 4]);
        std::fs::write(&path, &bytes).unwrap();
        let start = head.len() as u64;
        hollow_out(&path, &[start..start + 1, start + 2..start + 3]).unwrap();
        let mut expected = head.clone();
        expected.extend_from_slice(&[1, 0, 3, 0]);
        assert_eq!(std::fs::read(&path).unwrap(), expected);

        make_hollow(&path, &head, start + 4).unwrap();
        expected = head;
        expected.extend_from_slice(&[0; 4]);
        assert_eq!(std::fs::read(&path).unwrap(), expected);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
