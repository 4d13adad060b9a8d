//! Pages of a .parquet file that speak of no more values than they can hold.
//!
//! The crate parquet reserves room for as many values as a page says, before it looks for them: a file of a kilobyte can ask for
//! hundreds of gigabytes that way. Counts are looked at here first (the format: parquet-format, `Encodings.md`).

use parquet::basic::Encoding;
use parquet::bloom_filter::Sbbf;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::RowGroupReader;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;

/// Values of one page. Writers end a page at a megabyte or some ten thousand rows.
const MOST: u64 = 1 << 24;

/// A row group whose pages are looked at before they are decoded.
pub(super) struct Checked<'a>(pub(super) &'a dyn RowGroupReader);

impl RowGroupReader for Checked<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        self.0.metadata()
    }

    fn num_columns(&self) -> usize {
        self.0.num_columns()
    }

    fn get_column_page_reader(&self, column: usize) -> Result<Box<dyn PageReader>> {
        let levels = self.metadata().column(column).column_descr();
        let levels = usize::from(levels.max_rep_level() > 0) + usize::from(levels.max_def_level() > 0);
        Ok(Box::new(Pages { inner: self.0.get_column_page_reader(column)?, levels }))
    }

    fn get_column_bloom_filter(&self, column: usize) -> Option<&Sbbf> {
        self.0.get_column_bloom_filter(column)
    }

    fn get_row_iter(&self, projection: Option<Type>) -> Result<RowIter<'_>> {
        self.0.get_row_iter(projection)
    }
}

struct Pages {
    inner: Box<dyn PageReader>,
    /// How many runs of levels stand before the values of a page of the first version.
    levels: usize,
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.inner.get_next_page()?;
        page.as_ref().map_or(Ok(()), |page| check(page, self.levels))?;
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.inner.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.inner.skip_next_page()
    }

    fn supports_deferred_dictionary(&self) -> bool {
        self.inner.supports_deferred_dictionary()
    }

    fn take_deferred_dictionary(&mut self) -> Result<Option<Page>> {
        let page = self.inner.take_deferred_dictionary()?;
        page.as_ref().map_or(Ok(()), |page| check(page, self.levels))?;
        Ok(page)
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        self.inner.at_record_boundary()
    }
}

impl Iterator for Pages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

fn wrong(what: &str) -> ParquetError {
    ParquetError::General(format!("a page {what}"))
}

/// Refuses a page whose counts cannot be.
fn check(page: &Page, levels: usize) -> Result<()> {
    let values = u64::from(page.num_values());
    let bytes: &[u8] = page.buffer();
    let (encoding, before) = match page {
        // Each value of a dictionary takes a byte at least.
        Page::DictionaryPage { .. } if values > bytes.len() as u64 => {
            return Err(wrong("of a dictionary speaks of more values than it has bytes"));
        }
        Page::DictionaryPage { .. } => return Ok(()),
        Page::DataPage { encoding, .. } => (*encoding, level_bytes(bytes, levels)?),
        Page::DataPageV2 { encoding, def_levels_byte_len, rep_levels_byte_len, .. } => {
            (*encoding, *def_levels_byte_len as usize + *rep_levels_byte_len as usize)
        }
    };
    if values > MOST {
        return Err(wrong(&format!("speaks of {values} values, more than any writer makes")));
    }
    let streams = match encoding {
        Encoding::DELTA_BINARY_PACKED | Encoding::DELTA_LENGTH_BYTE_ARRAY => 1,
        Encoding::DELTA_BYTE_ARRAY => 2,
        _ => 0,
    };
    let mut rest = bytes.get(before..).ok_or_else(|| wrong("ends within its levels"))?;
    for _ in 0..streams {
        let (count, end) = deltas(rest).ok_or_else(|| wrong("ends within its differences"))?;
        if count > values {
            return Err(wrong(&format!("of {values} values speaks of {count} differences")));
        }
        rest = &rest[end..];
    }
    Ok(())
}

/// Bytes of `levels` runs of levels, each behind its length.
fn level_bytes(bytes: &[u8], levels: usize) -> Result<usize> {
    let mut at = 0usize;
    for _ in 0..levels {
        let length = bytes
            .get(at..)
            .and_then(<[u8]>::first_chunk::<4>)
            .ok_or_else(|| wrong("ends within its levels"))?;
        at = at.saturating_add(4).saturating_add(u32::from_le_bytes(*length) as usize);
    }
    Ok(at)
}

/// How many numbers a stream of differences speaks of, and where it ends; nothing if it is cut off.
fn deltas(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut at = 0;
    let (block, miniblocks) = (number(bytes, &mut at)?, number(bytes, &mut at)?);
    let (count, _first) = (number(bytes, &mut at)?, number(bytes, &mut at)?);
    let mut left = count.saturating_sub(1);
    if count > MOST || left == 0 {
        return Some((count, at));
    }
    let values = block.checked_div(miniblocks).filter(|values| *values > 0)?;
    while left > 0 {
        number(bytes, &mut at)?;
        let widths = bytes.get(at..at.checked_add(usize::try_from(miniblocks).ok()?)?)?;
        at += widths.len();
        for width in widths {
            if left == 0 {
                break;
            }
            let size = values.checked_mul(u64::from(*width))?.div_ceil(8);
            at = at.checked_add(usize::try_from(size).ok()?)?;
            left = left.saturating_sub(values);
        }
        if at > bytes.len() {
            return None;
        }
    }
    Some((count, at))
}

/// A number in seven bits a byte.
fn number(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_differences() {
        assert_eq!(number(&[0xac, 0x02], &mut 0), Some(300));
        assert_eq!(number(&[0x80], &mut 0), None);
        // 128 values a block in 4 miniblocks; 1, 2, 3 are a first number and two differences of width 0.
        assert_eq!(deltas(&[0x80, 0x01, 4, 3, 2, 2, 0, 0, 0, 0, 9]), Some((3, 10)));
        assert_eq!(deltas(&[0x80, 0x01, 4, 3, 2, 2, 1, 0, 0, 0]), None, "a miniblock of 4 bytes is cut off");
        assert_eq!(deltas(&[0x80, 0x01, 0, 3, 2]), None);
    }
}
