//! Packing: the codes of a row form one little-endian bit stream.
//!
//! Code i occupies stream bits `[i * bits, (i + 1) * bits)`, least significant first; stream bit k is bit
//! `k % 8` of byte `k / 8`; the stored uint32 words are those bytes read little-endian. 32 codes are exactly
//! `bits` words, so rows never share a word, and one call may pack any number of whole rows.
//!
//! The fast form folds 8 codes, one per byte of a `u64`, together in three steps (1, 2, then 4 at a time);
//! it is plain integer code that compilers vectorise, and the same for every width.

/// The rule above, a bit at a time. `out` holds `codes.len() * bits / 8` bytes.
pub fn pack_reference(codes: &[u8], bits: u32, out: &mut [u8]) {
    out.fill(0);
    for (index, code) in codes.iter().enumerate() {
        for bit in 0..bits {
            let position = index * bits as usize + bit as usize;
            out[position / 8] |= (code >> bit & 1) << (position % 8);
        }
    }
}

/// Code number `index` of a packed stream, a bit at a time.
pub fn code_at(packed: &[u8], index: usize, bits: u32) -> u8 {
    let start = index * bits as usize;
    (0..bits as usize).fold(0, |code, bit| {
        let position = start + bit;
        code | (packed[position / 8] >> (position % 8) & 1) << bit
    })
}

/// Repeats the `width` low bits of every `lane`-bit lane over a `u64`.
const fn mask(width: u32, lane: u32) -> u64 {
    let mut mask = 0;
    let mut at = 0;
    while at < 64 {
        mask |= ((1u64 << width) - 1) << at;
        at += lane;
    }
    mask
}

/// Moves the odd of the `lane / 2`-bit halves, `width` bits of each in use, down beside the even ones.
#[inline(always)]
const fn join(x: u64, width: u32, lane: u32) -> u64 {
    let even = mask(width, lane);
    x & even | x >> (lane / 2 - width) & even << width
}

/// Inverse of [`join`].
#[inline(always)]
const fn part(x: u64, width: u32, lane: u32) -> u64 {
    let even = mask(width, lane);
    x & even | (x & even << width) << (lane / 2 - width)
}

/// Eight codes, one per byte, to `8 * BITS` contiguous bits.
#[inline(always)]
const fn fold<const BITS: u32>(codes: u64) -> u64 {
    if BITS == 8 {
        return codes;
    }
    join(join(join(codes, BITS, 16), 2 * BITS, 32), 4 * BITS, 64)
}

/// Inverse of [`fold`].
#[inline(always)]
const fn unfold<const BITS: u32>(stream: u64) -> u64 {
    if BITS == 8 {
        return stream;
    }
    part(part(part(stream, 4 * BITS, 64), 2 * BITS, 32), BITS, 16)
}

/// Packs whole groups of 8 codes; every code is below 2^BITS.
#[inline(always)]
pub(crate) fn pack<const BITS: u32>(codes: &[u8], out: &mut [u8]) {
    let bytes = BITS as usize;
    // Two steps, so that the folding vectorises: eight words at a time, then their bytes.
    let (blocks, tail) = codes.as_chunks::<64>();
    let (out_blocks, out_tail) = out.split_at_mut(blocks.len() * 8 * bytes);
    for (block, out) in blocks.iter().zip(out_blocks.chunks_exact_mut(8 * bytes)) {
        let mut words = [0u64; 8];
        for (word, raw) in words.iter_mut().zip(block.as_chunks::<8>().0) {
            *word = fold::<BITS>(u64::from_le_bytes(*raw));
        }
        for (out, word) in out.chunks_exact_mut(bytes).zip(words) {
            out.copy_from_slice(&word.to_le_bytes()[..bytes]);
        }
    }
    for (out, raw) in out_tail.chunks_exact_mut(bytes).zip(tail.as_chunks::<8>().0) {
        out.copy_from_slice(&fold::<BITS>(u64::from_le_bytes(*raw)).to_le_bytes()[..bytes]);
    }
}

/// Inverse of [`pack`].
#[inline(always)]
pub(crate) fn unpack<const BITS: u32>(packed: &[u8], codes: &mut [u8]) {
    let bytes = BITS as usize;
    for (raw, out) in packed.chunks_exact(bytes).zip(codes.as_chunks_mut::<8>().0) {
        let mut word = [0u8; 8];
        word[..bytes].copy_from_slice(raw);
        *out = unfold::<BITS>(u64::from_le_bytes(word)).to_le_bytes();
    }
}

/// Evaluates `$body` with the constant `$name` set from a run-time number of bits.
macro_rules! with_bits {
    ($bits:expr, $name:ident => $body:expr) => {
        $crate::affine::pack::with_bits!(@ $bits, $name, $body, 1 2 3 4 5 6)
    };
    (@ $bits:expr, $name:ident, $body:expr, $($literal:literal)*) => {
        match $bits {
            $($literal => { const $name: u32 = $literal; $body })*
            _ => { const $name: u32 = 8; $body }
        }
    };
}
pub(crate) use with_bits;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WIDTHS: [u32; 7] = [1, 2, 3, 4, 5, 6, 8];

    #[test]
    fn worked_examples_of_the_format() {
        let cases: [(u32, &[u8], u32); 6] = [
            (2, &[3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2], 0x9393_9393),
            (3, &[3, 0, 5, 2, 7, 4, 1, 6, 3, 0, 5, 2, 7, 4, 1, 6], 0x43c6_7543),
            (4, &[3, 8, 13, 2, 7, 12, 1, 6], 0x61c7_2d83),
            (5, &[3, 8, 13, 18, 23, 28, 1, 6], 0x7979_3503),
            (6, &[3, 8, 13, 18, 23, 28, 33, 38], 0x1748_d203),
            (8, &[3, 8, 13, 18, 0, 0, 0, 0], 0x120d_0803),
        ];
        for (bits, codes, word) in cases {
            let mut out = [0u8; 64];
            let length = codes.len() * bits as usize / 8;
            pack_reference(codes, bits, &mut out[..length]);
            assert_eq!(u32::from_le_bytes([out[0], out[1], out[2], out[3]]), word, "{bits} bits");
        }
    }

    proptest! {
        #[test]
        fn fast_equals_reference_and_inverts(seed in proptest::collection::vec(any::<u8>(), 8 * 40), blocks in 1usize..40) {
            for bits in WIDTHS {
                let codes: Vec<u8> = seed[..8 * blocks].iter().map(|byte| (*byte as u32 & ((1 << bits) - 1)) as u8).collect();
                let (mut fast, mut reference) = (vec![0u8; blocks * bits as usize], vec![0u8; blocks * bits as usize]);
                with_bits!(bits, BITS => pack::<BITS>(&codes, &mut fast));
                pack_reference(&codes, bits, &mut reference);
                prop_assert_eq!(&fast, &reference);
                let mut back = vec![0u8; codes.len()];
                with_bits!(bits, BITS => unpack::<BITS>(&fast, &mut back));
                prop_assert_eq!(&back, &codes);
                for (index, code) in codes.iter().enumerate() {
                    prop_assert_eq!(code_at(&fast, index, bits), *code);
                }
            }
        }
    }
}
