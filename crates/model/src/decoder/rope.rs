//! Rotary position embeddings: inverse frequencies as config.json defines them.

use crate::ops::Pairing;

/// Inverse frequencies, radians a token.
#[derive(Clone, Debug, PartialEq)]
pub enum Frequencies {
    /// The same for every length.
    Fixed(Vec<f32>),
    /// Others beyond the length of the original training (longrope).
    ByLength {
        /// Up to `original` tokens.
        short: Vec<f32>,
        /// Beyond.
        long: Vec<f32>,
        /// Tokens.
        original: usize,
    },
}

/// A rotary embedding of the first `2 * frequencies` features of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Inverse frequencies.
    pub frequencies: Frequencies,
    /// Which features make a pair.
    pub pairing: Pairing,
    /// Factor on cosine and sine.
    pub magnitude: f32,
}

/// `theta^(-2i / dims)` for the pairs of `dims` features.
pub(crate) fn inverse_frequencies(theta: f64, dims: usize) -> Vec<f32> {
    (0..dims / 2).map(|i| theta.powf(-((2 * i) as f64) / dims as f64) as f32).collect()
}

impl Rope {
    /// Plain rotary embedding of the first `dims` features.
    pub fn plain(theta: f64, dims: usize) -> Self {
        Self {
            frequencies: Frequencies::Fixed(inverse_frequencies(theta, dims)),
            pairing: Pairing::Halves,
            magnitude: 1.0,
        }
    }

    /// With pairs of neighbours.
    #[must_use]
    pub fn interleaved(mut self) -> Self {
        self.pairing = Pairing::Interleaved;
        self
    }

    /// Inverse frequencies for a sequence of that many tokens.
    pub fn frequencies(&self, tokens: usize) -> &[f32] {
        match &self.frequencies {
            Frequencies::Fixed(frequencies) => frequencies,
            Frequencies::ByLength { short, long, original } => {
                if tokens > *original {
                    long
                } else {
                    short
                }
            }
        }
    }

    /// Cosines and sines `[tokens, frequencies]`, row-major.
    pub fn tables(&self, tokens: usize) -> (Vec<f32>, Vec<f32>) {
        let frequencies = self.frequencies(tokens);
        let angles = (0..tokens).flat_map(|position| {
            // In float32, as transformers computes them.
            frequencies.iter().map(move |frequency| f64::from(position as f32 * frequency))
        });
        angles.map(|angle| (angle.cos() as f32 * self.magnitude, angle.sin() as f32 * self.magnitude)).unzip()
    }
}
