//! What unit tests share.

#[path = "../tests/common/seeds.rs"]
pub(crate) mod seeds;

use crate::Model;
use crate::data::{Pick, Window, Windows};

/// Windows of tokens that look random; a seed's windows are the same everywhere.
pub(crate) fn random_windows(model: &Model, seed: u64, count: usize, tokens: usize) -> Windows {
    let vocabulary = model.vocabulary().unwrap() as u64;
    let mut state = seed;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocabulary) as u32
    };
    let window = |index| Window { source: 0, index, tokens: (0..tokens).map(|_| token()).collect() };
    let picked = (0..count).map(window).collect();
    let pick = Pick::Sampled { windows: count, seed };
    Windows { sequence_length: tokens, pick, picked, sources: Vec::new(), data_hash: seed.to_string() }
}
