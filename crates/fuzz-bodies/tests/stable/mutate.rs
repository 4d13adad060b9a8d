//! Changed seeds.
//!
//! What libfuzzer does without its coverage. No library does only this on stable Rust: bolero's runner draws inputs and does not change
//! seeds, mutatis changes one element of a vector at a time and needs a newer Rust than we do, LibAFL is a fuzzer whole.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

/// Longest input.
const MAX_BYTES: usize = 1 << 17;

/// Numbers at the edges of what programs expect, as they are written and as they are stored.
const NUMBERS: [i128; 18] = [
    0,
    1,
    -1,
    2,
    7,
    64,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    i32::MAX as i128,
    u32::MAX as i128,
    1 << 32,
    i64::MAX as i128,
    u64::MAX as i128,
    i64::MIN as i128,
];

/// Makes inputs of seeds.
#[derive(Debug)]
pub(crate) struct Mutator {
    generator: ChaCha8Rng,
    seeds: Vec<Vec<u8>>,
    words: Vec<Vec<u8>>,
}

impl Mutator {
    /// `words` are put in beside those that stand in the seeds.
    pub(crate) fn new(seed: u64, seeds: Vec<Vec<u8>>, mut words: Vec<Vec<u8>>) -> Self {
        for seed in &seeds {
            let letters = seed.split(|byte| !(byte.is_ascii_alphanumeric() || *byte == b'_'));
            words.extend(letters.filter(|word| (2..32).contains(&word.len())).map(<[u8]>::to_vec));
        }
        words.sort();
        words.dedup();
        Self { generator: ChaCha8Rng::seed_from_u64(seed), seeds, words }
    }

    pub(crate) fn seeds(&self) -> &[Vec<u8>] {
        &self.seeds
    }

    /// A seed with one change or several.
    pub(crate) fn change(&mut self) -> Vec<u8> {
        let mut input = self.seed();
        for _ in 0..1 << self.below(4) {
            self.change_once(&mut input);
        }
        input.truncate(MAX_BYTES);
        input
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.generator.next_u64() % bound.max(1) as u64) as usize
    }

    fn seed(&mut self) -> Vec<u8> {
        let index = self.below(self.seeds.len());
        self.seeds.get(index).cloned().unwrap_or_default()
    }

    /// A range within `length`, short more often than long.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length);
        let longest = 1 << self.below(12);
        start..length.min(start + 1 + self.below(longest))
    }

    fn change_once(&mut self, input: &mut Vec<u8>) {
        let at = self.below(input.len() + 1);
        match self.below(10) {
            0 if at < input.len() => input[at] ^= 1 << self.below(8),
            1 if at < input.len() => input[at] = self.below(256) as u8,
            2 => self.store_number(input, at),
            3 => self.write_number(input, at),
            4 => {
                let range = self.range(input.len());
                input.drain(range);
            }
            5 => {
                let range = self.range(input.len());
                let copy = input[range].to_vec();
                input.splice(at..at, copy);
            }
            6 => {
                let other = self.seed();
                input.truncate(at);
                let from = self.below(other.len() + 1);
                input.extend_from_slice(&other[from..]);
            }
            7 => {
                let other = self.seed();
                let range = self.range(other.len());
                input.splice(at..at, other[range].iter().copied());
            }
            8 => {
                let bytes: Vec<u8> = (0..=self.below(8)).map(|_| self.below(256) as u8).collect();
                input.splice(at..at, bytes);
            }
            _ => self.put_word(input, at),
        }
    }

    /// A number over the bytes at a place, little-endian.
    fn store_number(&mut self, input: &mut [u8], at: usize) {
        let number = NUMBERS[self.below(NUMBERS.len())].to_le_bytes();
        let width = 1 << self.below(4);
        for (byte, new) in input[at..].iter_mut().zip(&number[..width]) {
            *byte = *new;
        }
    }

    /// A number for the next digits behind a place.
    fn write_number(&mut self, input: &mut Vec<u8>, at: usize) {
        let number = NUMBERS[self.below(NUMBERS.len())].to_string();
        let digit = |byte: &u8| byte.is_ascii_digit();
        let Some(start) = input[at..].iter().position(digit).map(|offset| at + offset) else { return };
        let end =
            input[start..].iter().position(|byte| !digit(byte)).map_or(input.len(), |length| start + length);
        input.splice(start..end, number.bytes());
    }

    /// A word in between, or for the next one behind a place.
    fn put_word(&mut self, input: &mut Vec<u8>, at: usize) {
        let index = self.below(self.words.len());
        let Some(word) = self.words.get(index).cloned() else { return };
        let letter = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
        let start = input[at..].iter().position(letter).map_or(input.len(), |offset| at + offset);
        let end =
            input[start..].iter().position(|byte| !letter(byte)).map_or(input.len(), |length| start + length);
        let replaced = if self.below(2) == 0 { at..at } else { start..end };
        input.splice(replaced, word);
    }
}
