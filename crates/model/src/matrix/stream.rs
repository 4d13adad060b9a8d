//! Codes of 1 to 8 bits in 32-bit words, least significant first.

/// How codes lie in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream {
    pub(crate) bits: u32,
    /// Whether a code never crosses into the next word, so that upper bits of a word may be spare.
    pub(crate) padded: bool,
}

impl Stream {
    /// Words that `count` codes take.
    pub(crate) fn words(self, count: usize) -> Option<usize> {
        if self.padded {
            Some(count.div_ceil((32 / self.bits) as usize))
        } else {
            Some(count.checked_mul(self.bits as usize)?.div_ceil(32))
        }
    }

    /// Code number `index`; `word` gives words by position.
    pub(crate) fn code(self, index: usize, word: impl Fn(usize) -> u32) -> u8 {
        let mask = (1u64 << self.bits) - 1;
        let bits = self.bits as usize;
        let code = if self.padded {
            let own = 32 / bits;
            u64::from(word(index / own)) >> (index % own * bits)
        } else {
            let (at, shift) = (index * bits / 32, index * bits % 32);
            let low = u64::from(word(at)) >> shift;
            if shift + bits > 32 { low | u64::from(word(at + 1)) << (32 - shift) } else { low }
        };
        (code & mask) as u8
    }
}

/// Word number `index` of little-endian bytes; 0 behind their end.
pub(super) fn word(bytes: &[u8], index: usize) -> u32 {
    bytes.get(index * 4..).and_then(|rest| rest.first_chunk::<4>()).map_or(0, |raw| u32::from_le_bytes(*raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_cross_words_or_not() {
        for bits in 1..=8u32 {
            let codes: Vec<u64> = (0..70u64).map(|i| (i * 37 + 11) & ((1 << bits) - 1)).collect();
            for padded in [false, true] {
                let stream = Stream { bits, padded };
                let mut words = vec![0u32; stream.words(codes.len()).unwrap()];
                for (index, code) in codes.iter().enumerate() {
                    for bit in 0..bits as usize {
                        let own = (32 / bits) as usize;
                        let place = if padded {
                            index / own * 32 + index % own * bits as usize + bit
                        } else {
                            index * bits as usize + bit
                        };
                        words[place / 32] |= ((code >> bit & 1) as u32) << (place % 32);
                    }
                }
                let read: Vec<u64> =
                    (0..codes.len()).map(|index| u64::from(stream.code(index, |at| words[at]))).collect();
                assert_eq!(read, codes, "{bits} bits, padded: {padded}");
            }
        }
    }
}
