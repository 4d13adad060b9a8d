//! Bytes of a data file: counted and hashed on their way, unpacked, in lines of bounded length.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};

use super::DataError;
use super::digest::hexadecimal;
use super::kind::Packing;

/// The longest row in bytes. Longer ones are no documents but files in which line ends or brackets are missing.
pub(super) const LONGEST_ROW: u64 = 64 << 20;

/// The largest window of a packed file: what zstd itself asks at most of those who do not say otherwise.
const ZSTD_WINDOW: u32 = 27;

/// What was read of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally(Arc<Mutex<(Sha256, u64)>>);

impl Tally {
    pub(super) fn add(&self, bytes: &[u8]) {
        let mut tally = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tally.0.update(bytes);
        tally.1 += bytes.len() as u64;
    }

    /// How many bytes they were.
    pub(super) fn bytes(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// Their SHA-256.
    pub(super) fn sha256(&self) -> String {
        let tally = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        hexadecimal(&tally.0.clone().finalize())
    }
}

/// A reader that tallies what it gives.
#[derive(Debug)]
pub(super) struct Tallied<R> {
    pub(super) inner: R,
    pub(super) tally: Tally,
}

impl<R: Read> Read for Tallied<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.tally.add(&buffer[..read]);
        Ok(read)
    }
}

/// A data file. It is opened as often as it is read.
#[derive(Clone, Debug)]
pub(super) struct Input {
    pub(super) path: PathBuf,
    /// The path as given, for messages.
    pub(super) file: String,
    pub(super) packing: Packing,
    /// Size in bytes as it lies there.
    pub(super) size: u64,
}

impl Input {
    /// Looks at a file.
    pub(super) fn new(path: &Path, packing: Packing) -> Result<Self, DataError> {
        let file = path.display().to_string();
        let metadata = fs_err::metadata(path)?;
        // A pipe or a device never ends.
        if !metadata.is_file() {
            return Err(DataError::NotAFile { file });
        }
        Ok(Self { path: path.to_owned(), file, packing, size: metadata.len() })
    }

    /// The file as it lies there.
    pub(super) fn open(&self) -> Result<File, DataError> {
        Ok(fs_err::File::open(&self.path)?.into_file())
    }

    /// What is in the file from its beginning, without a byte order mark. Bytes of the file itself go into `tally`.
    pub(super) fn stream(&self, tally: &Tally) -> Result<Box<dyn BufRead>, DataError> {
        let tallied =
            BufReader::with_capacity(1 << 16, Tallied { inner: self.open()?, tally: tally.clone() });
        let mut stream: Box<dyn BufRead> = match self.packing {
            Packing::None => Box::new(tallied),
            Packing::Gzip => {
                Box::new(BufReader::with_capacity(1 << 16, flate2::bufread::MultiGzDecoder::new(tallied)))
            }
            Packing::Zstd => {
                let mut decoder =
                    zstd::stream::read::Decoder::with_buffer(tallied).map_err(|error| self.unread(&error))?;
                decoder.window_log_max(ZSTD_WINDOW).map_err(|error| self.unread(&error))?;
                Box::new(BufReader::with_capacity(1 << 16, decoder))
            }
        };
        self.skip_mark(&mut *stream)?;
        Ok(stream)
    }

    /// The file from a place on; for files that are not packed.
    pub(super) fn at(&self, offset: u64) -> Result<BufReader<File>, DataError> {
        let mut file = self.open()?;
        file.seek(SeekFrom::Start(offset)).map_err(|error| self.unread(&error))?;
        let mut reader = BufReader::with_capacity(1 << 14, file);
        if offset == 0 {
            self.skip_mark(&mut reader)?;
        }
        Ok(reader)
    }

    /// Without the byte order mark that some editors put in front.
    fn skip_mark(&self, reader: &mut dyn BufRead) -> Result<(), DataError> {
        let buffer = reader.fill_buf().map_err(|error| self.unread(&error))?;
        if buffer.starts_with(b"\xef\xbb\xbf") {
            reader.consume(3);
        }
        Ok(())
    }

    /// The line in which a byte of the file stands, counted from 1. Reads everything before it.
    pub(super) fn line_of(&self, offset: u64) -> Result<usize, DataError> {
        let mut reader = self.at(0)?.take(offset);
        let mut lines = 1;
        loop {
            let buffer = reader.fill_buf().map_err(|error| self.unread(&error))?;
            if buffer.is_empty() {
                return Ok(lines);
            }
            lines += buffer.split(|byte| *byte == b'\n').count() - 1;
            let length = buffer.len();
            reader.consume(length);
        }
    }

    /// How much is in the file, unpacked; a number beyond `limit` if it is more than that.
    pub(super) fn unpacked_size(&self, limit: u64) -> Result<u64, DataError> {
        if self.packing == Packing::None {
            return Ok(self.size);
        }
        let mut reader = self.stream(&Tally::default())?.take(limit + 1);
        let found = std::io::copy(&mut reader, &mut std::io::sink()).map_err(|error| self.unread(&error))?;
        // Text shrinks to a third or a quarter.
        Ok(if found > limit { (limit + 1).max(self.size.saturating_mul(4)) } else { found })
    }

    /// What the system or the unpacker says, with the file's name.
    pub(super) fn unread(&self, error: &std::io::Error) -> DataError {
        let (file, reason) = (self.file.clone(), error.to_string());
        match self.packing {
            Packing::None => DataError::Io(format!("{file}: {reason}")),
            _ => DataError::Packed { file, reason },
        }
    }

    /// Reads a line with its line feed into `line`, whatever was in it before; false at the end of the file. `place`
    /// names it.
    pub(super) fn line(
        &self,
        reader: &mut dyn BufRead,
        line: &mut Vec<u8>,
        place: impl FnOnce() -> String,
    ) -> Result<bool, DataError> {
        line.clear();
        reader.take(LONGEST_ROW + 1).read_until(b'\n', line).map_err(|error| self.unread(&error))?;
        if line.len() as u64 > LONGEST_ROW {
            return Err(DataError::LongRow { file: self.file.clone(), place: place(), limit: LONGEST_ROW });
        }
        Ok(!line.is_empty())
    }
}
