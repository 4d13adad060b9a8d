//! Footers of .parquet files whose lists are no longer than what is left of them, and whose schema has no more children than elements.
//!
//! The crate parquet reserves room for as many elements as a list in the footer claims. Every element takes a byte at least (Thrift's
//! compact protocol), so a longer list is a lie.

/// Nesting that no footer has.
const DEPTH: usize = 32;

/// Whether a list in this Thrift structure claims more elements than there are bytes left.
pub(super) fn claims_too_much(bytes: &[u8]) -> bool {
    let mut footer = Footer { rest: bytes, lies: false };
    // What is malformed otherwise the parser finds.
    let _ = footer.structure(0, None);
    footer.lies
}

struct Footer<'b> {
    rest: &'b [u8],
    lies: bool,
}

impl Footer<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn skip(&mut self, count: u64) -> Option<()> {
        self.rest = self.rest.get(usize::try_from(count).ok()?..)?;
        Some(())
    }

    /// `schema` is the length of the list of schema elements that the structure stands in: none has more children.
    fn structure(&mut self, depth: usize, schema: Option<u64>) -> Option<()> {
        if depth > DEPTH {
            return None;
        }
        let mut field = 0u64;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Some(());
            }
            field = match head >> 4 {
                0 => self.number()? >> 1,
                delta => field + u64::from(delta),
            };
            match (head & 15, schema) {
                // A boolean is in the head of its field.
                (1 | 2, _) => {}
                (5, Some(count)) if field == 5 => {
                    if self.number()? >> 1 > count {
                        self.lies = true;
                        return None;
                    }
                }
                (kind, _) => self.value(kind, depth, depth == 0 && field == 2)?,
            }
        }
    }

    fn value(&mut self, kind: u8, depth: usize, schema: bool) -> Option<()> {
        match kind {
            1..=3 => self.skip(1),
            4..=6 => self.number().map(|_| ()),
            7 => self.skip(8),
            8 => {
                let length = self.number()?;
                self.skip(length)
            }
            9 | 10 => {
                let head = self.byte()?;
                let count = if head >> 4 == 15 { self.number()? } else { u64::from(head >> 4) };
                if count > self.rest.len() as u64 {
                    self.lies = true;
                    return None;
                }
                (0..count).try_for_each(|_| match head & 15 {
                    12 => self.structure(depth + 1, schema.then_some(count)),
                    kind => self.value(kind, depth + 1, false),
                })
            }
            12 => self.structure(depth + 1, None),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_fit_into_what_is_left() {
        // Field 1 is a list of three numbers; then one of 2^28.
        assert!(!claims_too_much(&[0x19, 0x35, 2, 4, 6, 0]));
        assert!(claims_too_much(&[0x19, 0xf5, 0x80, 0x80, 0x80, 0x80, 1, 2, 4, 0]));
        assert!(!claims_too_much(&[0x19]));
    }
}
