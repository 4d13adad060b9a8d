//! Causal attention in tiles of queries: products of matrices over all heads at a time, and a kernel between them.
//!
//! The scores of a tile with its keys are all that is ever in memory. The forward pass keeps each row's largest score
//! and its sum of exponentials, from which the way back has the probabilities again.

use std::sync::Arc;

use super::card::Card;
use super::elementary::reduce;
use super::launch::{Launch, Slice};
use super::linear::tensor;
use super::memory::Memory;
use super::product::{Finish, Matrix, Product};
use super::program::{Program, program};
use crate::Tensor;
use crate::elementary::Reduce;
use crate::error::Result;
use crate::plain::Shapes;
use crate::settings::AttentionSettings;

static ATTENTION: Program = program!("attention", 1, 4, "lanes");

/// Tokens of a tile: the rows of a wide tile of a product.
const TILE: usize = 128;
/// Scores in memory at a time, about: 256 MB.
const SCORES: usize = 64 << 20;

/// Sizes and settings of one call.
#[derive(Clone, Copy)]
struct Attention {
    shapes: Shapes,
    d: usize,
    dv: usize,
    /// Windows of a part.
    step: usize,
    /// Tokens of a tile.
    tile: usize,
    window: usize,
    scale: f32,
    softcap: Option<f32>,
}

/// Some windows of a batch, and some of their tokens.
#[derive(Clone, Copy)]
struct Tile {
    windows: (usize, usize),
    first: usize,
    length: usize,
    first_key: usize,
    keys: usize,
}

/// What a pass reads.
#[derive(Clone, Copy)]
struct Inputs<'t> {
    q: Slice<'t>,
    k: Slice<'t>,
    v: Slice<'t>,
    sinks: Option<Slice<'t>>,
}

impl<'t> Inputs<'t> {
    fn of(q: &'t Tensor, k: &'t Tensor, v: &'t Tensor, sinks: Option<&'t Tensor>) -> Result<Self> {
        let sinks = sinks.map(Slice::of).transpose()?;
        Ok(Self { q: Slice::of(q)?, k: Slice::of(k)?, v: Slice::of(v)?, sinks })
    }
}

impl Attention {
    fn new(card: &Card, q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Self> {
        let shapes = Shapes::of(q, k, v, settings)?;
        let Shapes { batch, tokens, heads, .. } = shapes;
        let window = settings.window.unwrap_or(tokens).min(tokens.max(1));
        let room = SCORES.min(card.binding - card.alignment as usize / 4);
        let row = heads * tokens.min(window + TILE).max(1);
        // Without the batch, so that a window's tiles are the same in any batch.
        let tile = (room / row).clamp(1, TILE);
        let step = (room / (row * tile)).clamp(1, batch.max(1));
        let (d, dv) = (q.dims()[3], v.dims()[3]);
        Ok(Self { shapes, d, dv, step, tile, window, scale: settings.scale, softcap: settings.softcap })
    }

    /// All tiles of all windows.
    fn tiles(self) -> impl Iterator<Item = Tile> {
        let Shapes { batch, tokens, .. } = self.shapes;
        (0..batch).step_by(self.step).flat_map(move |start| {
            (0..tokens).step_by(self.tile).map(move |first| {
                let length = self.tile.min(tokens - first);
                let first_key = (first + 1).saturating_sub(self.window);
                let keys = first + length - first_key;
                Tile { windows: (start, self.step.min(batch - start)), first, length, first_key, keys }
            })
        })
    }

    /// Tokens `first..` of some windows of `x [batch, tokens, heads, features]`: a matrix for each window and head.
    fn matrix<'m>(
        &self,
        x: Slice<'m>,
        heads: usize,
        features: usize,
        window: usize,
        first: usize,
    ) -> Matrix<'m> {
        let line = heads * features;
        Matrix {
            outer: self.shapes.tokens * line,
            inner: features,
            ..Matrix::of(x, line).from((window * self.shapes.tokens + first) * line)
        }
    }

    /// `[windows, heads, length, keys]`.
    fn scores<'m>(&self, tile: &Tile, memory: &'m Memory) -> Matrix<'m> {
        let each = tile.length * tile.keys;
        let outer = self.shapes.heads * each;
        Matrix { memory, first: 0, line: tile.keys, outer, inner: each }
    }

    /// `rows @ columns^T` for each query of a tile and each of its keys, over features that lie side by side.
    fn with_keys<'m>(
        &self,
        tile: &Tile,
        (rows, columns): (Slice<'m>, Slice<'m>),
        features: usize,
        scores: &'m Memory,
    ) -> Product<'m> {
        let Shapes { heads, kv_heads, .. } = self.shapes;
        Product {
            a: self.matrix(rows, heads, features, tile.windows.0, tile.first),
            a_along: true,
            b: self.matrix(columns, kv_heads, features, tile.windows.0, tile.first_key),
            b_along: true,
            c: self.scores(tile, scores),
            sizes: [tile.length, features, tile.keys],
            batch: [tile.windows.1, heads],
            share: heads / kv_heads,
            finish: Finish::Replace,
            triangle: None,
            loose: false,
            peak: None,
            grouped: None,
        }
    }

    /// `scores @ keys` for each query: what probabilities make of values, or slopes of keys.
    fn of_keys<'m>(
        &self,
        tile: &Tile,
        scores: &'m Memory,
        (keys, out): (Slice<'m>, Slice<'m>),
        features: usize,
    ) -> Product<'m> {
        let Shapes { heads, kv_heads, .. } = self.shapes;
        Product {
            a: self.scores(tile, scores),
            b: self.matrix(keys, kv_heads, features, tile.windows.0, tile.first_key),
            b_along: false,
            c: self.matrix(out, heads, features, tile.windows.0, tile.first),
            sizes: [tile.length, tile.keys, features],
            ..self.with_keys(tile, (out, keys), features, scores)
        }
    }

    /// Adds `scores^T @ queries` for each key, one head of each group after the other.
    fn for_keys(
        &self,
        card: &Arc<Card>,
        tile: &Tile,
        scores: &Memory,
        (queries, out): (Slice<'_>, Slice<'_>),
        features: usize,
    ) -> Result<()> {
        let Shapes { heads, kv_heads, .. } = self.shapes;
        let group = heads / kv_heads;
        for head in 0..group {
            let mut a = self.scores(tile, scores).from(head * tile.length * tile.keys);
            a.inner *= group;
            let mut b =
                self.matrix(queries, heads, features, tile.windows.0, tile.first).from(head * features);
            b.inner *= group;
            let product = Product {
                a,
                a_along: false,
                b,
                b_along: false,
                c: self.matrix(out, kv_heads, features, tile.windows.0, tile.first_key),
                sizes: [tile.keys, tile.length, features],
                batch: [tile.windows.1, kv_heads],
                share: 1,
                finish: Finish::Add,
                triangle: None,
                loose: false,
                peak: None,
                grouped: None,
            };
            product.run(card)?;
        }
        Ok(())
    }

    /// The kernel between products. `slopes` are there on the way back.
    fn turn(
        &self,
        card: &Arc<Card>,
        tile: &Tile,
        sinks: Option<Slice<'_>>,
        scores: &Memory,
        slopes: Option<&Memory>,
        (stats, for_sinks): (Slice<'_>, Slice<'_>),
    ) -> Result<()> {
        let heads = self.shapes.heads;
        let rows = tile.windows.1 * heads * tile.length;
        let spare = card.room(1)?;
        let sinks_there = sinks.is_some();
        let flag = |holds: bool| u8::from(holds).to_string();
        let words = [
            ("BACK", flag(slopes.is_some())),
            ("CAP", flag(self.softcap.is_some())),
            ("SINK", flag(sinks_there)),
        ];
        let none = card.room(1)?;
        let numbers = [rows, heads, tile.length, tile.keys, tile.first, tile.first_key, self.window];
        let floats = [self.scale, self.softcap.unwrap_or(1.0), f32::NEG_INFINITY].map(f32::to_bits);
        card.launch(&Launch {
            program: &ATTENTION,
            words: &words,
            slices: &[
                sinks.unwrap_or(Slice::all(&none, 1)),
                Slice::all(scores, rows * tile.keys),
                slopes.map_or(Slice::all(&spare, 1), |slopes| Slice::all(slopes, rows * tile.keys)),
                stats,
                for_sinks,
            ],
            numbers: &[&numbers.map(|number| number as u32)[..], &floats].concat(),
            groups: card.groups_for(rows),
            work: 64 * (rows * tile.keys) as u64,
        })
    }

    /// Where the rows of tiles begin in what is kept for each row, and how many there are in all.
    fn places(self) -> (Vec<usize>, usize) {
        let mut all = 0;
        let rows = |tile: Tile| tile.windows.1 * self.shapes.heads * tile.length;
        let place = |tile| {
            all += rows(tile);
            all - rows(tile)
        };
        let places = self.tiles().map(place).collect();
        (places, all)
    }

    /// The result, and what is kept for the way back: the largest score and the sum of each row.
    fn forward(self, card: &Arc<Card>, inputs: Inputs<'_>) -> Result<(Memory, Memory)> {
        let Shapes { batch, tokens, heads, .. } = self.shapes;
        let count = batch * tokens * heads * self.dv;
        let (places, rows) = self.places();
        let (out, stats, spare) = (card.room(count)?, card.room(2 * rows)?, card.room(1)?);
        for (tile, place) in self.tiles().zip(places) {
            let own = tile.windows.1 * heads * tile.length;
            let scores = card.room(own * tile.keys)?;
            self.with_keys(&tile, (inputs.q, inputs.k), self.d, &scores).run(card)?;
            let kept = (Slice::all(&stats, 2 * rows).part(2 * place, 2 * own), Slice::all(&spare, 1));
            self.turn(card, &tile, inputs.sinks, &scores, None, kept)?;
            self.of_keys(&tile, &scores, (inputs.v, Slice::all(&out, count)), self.dv).run(card)?;
        }
        Ok((out, stats))
    }

    /// Gradients of q, k, v and of the sinks' part of each row.
    fn backward(
        self,
        card: &Arc<Card>,
        inputs: Inputs<'_>,
        stats: &Memory,
        grad: Slice<'_>,
    ) -> Result<[Memory; 4]> {
        let heads = self.shapes.heads;
        let (places, rows) = self.places();
        let counts = [inputs.q.count, inputs.k.count, inputs.v.count, rows];
        let [for_q, for_k, for_v, for_sinks] = counts.map(|count| card.room(count));
        let [for_q, for_k, for_v, for_sinks] = [for_q?, for_k?, for_v?, for_sinks?];
        card.clear(for_k.buffer()?);
        card.clear(for_v.buffer()?);
        for (tile, place) in self.tiles().zip(places) {
            let own = tile.windows.1 * heads * tile.length;
            let (scores, slopes) = (card.room(own * tile.keys)?, card.room(own * tile.keys)?);
            self.with_keys(&tile, (inputs.q, inputs.k), self.d, &scores).run(card)?;
            self.with_keys(&tile, (grad, inputs.v), self.dv, &slopes).run(card)?;
            let kept = Slice::all(stats, 2 * rows).part(2 * place, 2 * own);
            let sinks = Slice::all(&for_sinks, rows).part(place, own);
            self.turn(card, &tile, inputs.sinks, &scores, Some(&slopes), (kept, sinks))?;
            let to = Slice::all(&for_q, counts[0]);
            self.of_keys(&tile, &slopes, (inputs.k, to), self.d).run(card)?;
            self.for_keys(card, &tile, &slopes, (inputs.q, Slice::all(&for_k, counts[1])), self.d)?;
            self.for_keys(card, &tile, &scores, (grad, Slice::all(&for_v, counts[2])), self.dv)?;
        }
        Ok([for_q, for_k, for_v, for_sinks])
    }

    /// The sum over rows for each head.
    fn of_heads(self, card: &Arc<Card>, for_rows: &Memory) -> Result<Memory> {
        let heads = self.shapes.heads;
        let (places, _) = self.places();
        // [windows, heads, length] of each tile: over tokens, then over tiles and windows.
        let sums = card.room(heads * self.tiles().map(|tile| tile.windows.1).sum::<usize>())?;
        let mut filled = 0;
        for (tile, place) in self.tiles().zip(places) {
            let own = tile.windows.1 * heads;
            let rows = Slice { memory: for_rows, first: place, count: own * tile.length };
            let sum = reduce(card, rows, [own, tile.length, 1], Reduce::Sum)?;
            card.copy(sum.buffer()?, 0, sums.buffer()?, 4 * filled as u64, 4 * own as u64)?;
            filled += own;
        }
        reduce(card, Slice::all(&sums, filled), [1, filled / heads, heads], Reduce::Sum)
    }
}

pub(super) fn attention(
    card: &Arc<Card>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    settings: &AttentionSettings,
) -> Result<Tensor> {
    let own = Attention::new(card, q, k, v, settings)?;
    let sinks = settings.sinks.as_ref();
    let (out, stats) = own.forward(card, Inputs::of(q, k, v, sinks)?)?;
    let Shapes { batch, tokens, heads, .. } = own.shapes;
    let inputs: Vec<&Tensor> = [q, k, v].into_iter().chain(sinks).collect();
    let card = card.clone();
    let shape = vec![batch, tokens, heads, own.dv];
    Ok(Tensor::made(q.device(), shape, out.shared(), "attention", &inputs, move |pull| {
        let [q, k, v] = [0, 1, 2].map(|at: usize| &pull.inputs[at]);
        let inputs = Inputs::of(q, k, v, pull.inputs.get(3))?;
        let [for_q, for_k, for_v, for_sinks] = own.backward(&card, inputs, &stats, Slice::of(pull.grad)?)?;
        let mut all = vec![
            Some(tensor(for_q, q.dims(), q)),
            Some(tensor(for_k, k.dims(), k)),
            Some(tensor(for_v, v.dims(), v)),
        ];
        if let Some(sinks) = pull.inputs.get(3) {
            all.push(Some(tensor(own.of_heads(&card, &for_sinks)?, sinks.dims(), sinks)));
        }
        Ok(all)
    }))
}
