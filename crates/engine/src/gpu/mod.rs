//! The engine of graphics cards: Vulkan (NVIDIA, AMD, Intel) or Metal (Apple) through wgpu, a WGSL file for each
//! kernel.
//!
//! * [`adapter`]: which card; `card`: an opened one; `pool`, `memory`, `staging`: its memory; `stream`, `commands`: the order of
//!   what it is told; `program`, `kernel`, `launch`: what it runs.
//! * `strided`, `elementary`: elementary operations. `product`: the product of matrices, on which the rest is built.
//! * A file for each family of coarse operations.
//!
//! Tensors stay on the card; [`Engine::read`] fetches one. Commands of all threads go through one queue in the order in
//! which they were recorded, many in a submission; so memory is given to the next tensor as soon as nobody holds it.
//! What is larger than a binding may be goes in parts.
//!
//! The order of every sum depends on the sizes that are summed over alone, not on the rows beside them nor on the tile
//! they lie in: a window in a batch gets the bits that it gets alone. Drivers compile kernels each in their own way, so
//! bits belong to an adapter and a driver, which [`Engine::name`] tells.

mod activation;
pub mod adapter;
mod attention;
mod card;
mod commands;
mod delta;
mod elementary;
mod factor;
mod grouped;
mod kernel;
mod launch;
mod learning;
mod linear;
mod linear_attention;
mod losses;
mod memory;
mod norm;
mod open;
mod parts;
mod pool;
mod product;
mod profile;
mod program;
mod rotary;
mod rounded;
mod rounding;
mod routing;
mod second_order;
mod softmax;
mod square;
mod squares;
mod staging;
mod stream;
mod strided;
mod tiles;
mod trained;
mod training;
mod transposed;
mod units;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use mlx_format::FloatType;

pub use self::adapter::{Adapter, AdapterChoice, AdapterKind, adapters};
use self::card::{Card, locked};
use self::launch::Slice;
use self::product::Product;
use self::profile::Operation;
use self::strided::Value;
pub use self::tiles::Tiles;
use crate::Tensor;
use crate::elementary::{Buffer, Combine, Map, Reduce};
use crate::engine::Engine;
use crate::error::Result;
use crate::losses::{Candidates, Labels, Likeliest};
use crate::plain::{check_linears, check_same};
use crate::routing::Selection;
use crate::running::{RunningDivergence, RunningScore};
use crate::settings::{
    Activation, AdamInputs, AdamStep, AttentionSettings, Codes, GridSlopes, Held, Notebook, Pairing,
    Precision,
};
use crate::shape::View;
use crate::usage::{Capacity, MemoryUse, Spent};

/// Experts of a layer that a forward pass takes at once.
const EXPERTS: usize = 32;

/// The engine of one card.
#[derive(Clone, Debug)]
pub struct Gpu {
    card: Arc<Card>,
    /// Operations that are left to the processor, and why.
    left: Arc<Mutex<BTreeMap<&'static str, &'static str>>>,
}

impl Engine for Gpu {
    fn name(&self) -> String {
        let Adapter { name, backend, driver, .. } = &self.card.adapter;
        let precision = match self.card.precision {
            Precision::Float32 => "",
            Precision::Fast => ", fast",
        };
        format!("gpu {name}, {backend}, {driver}{precision}")
    }

    /// Few enough for the graph of a block to have room, enough rows for products to run at their rate.
    fn batch(&self) -> usize {
        8
    }

    fn memory(&self) -> Option<MemoryUse> {
        Some(self.card.memory())
    }

    fn leave(&self, operation: &'static str, why: &'static str) {
        locked(&self.left).insert(operation, why);
    }

    fn left(&self) -> Vec<(&'static str, &'static str)> {
        locked(&self.left).iter().map(|(operation, why)| (*operation, *why)).collect()
    }

    fn reset_peak(&self) {
        self.card.reset_peak();
    }

    fn note_times(&self) -> bool {
        self.card.note_times()
    }

    fn profile(&self) -> Result<Vec<Spent>> {
        self.card.profile()
    }

    fn capacity(&self) -> Option<Capacity> {
        Some(Capacity { memory: self.card.adapter.memory, largest: self.card.largest })
    }

    fn upload(&self, values: Vec<f32>) -> Result<Buffer> {
        Ok(self.card.put(bytemuck::cast_slice(&values))?.shared())
    }

    fn fill(&self, value: f32, count: usize) -> Result<Buffer> {
        Ok(elementary::fill(&self.card, value, count)?.shared())
    }

    fn adopt(&self, x: &Tensor) -> Result<Buffer> {
        let _operation = Operation::new("exchange");
        match Slice::of(x) {
            Ok(other) => Ok(self.card.adopt(other.memory, other.first, other.count)?.shared()),
            Err(_) => self.upload(x.to_vec()?),
        }
    }

    fn read(&self, x: &Tensor, to: &mut dyn FnMut(&[f32])) -> Result<()> {
        let Slice { memory, first, count } = Slice::of(x)?;
        self.card.get(memory, first, count, to)
    }

    fn map(&self, x: &Tensor, function: Map) -> Result<Buffer> {
        Ok(elementary::map(&self.card, x, function)?.shared())
    }

    fn combine(&self, x: &Tensor, y: &Tensor, shape: &[usize], function: Combine) -> Result<Buffer> {
        Ok(elementary::combine(&self.card, x, y, shape, function)?.shared())
    }

    fn arrange(&self, x: &Tensor, view: &View) -> Result<Buffer> {
        Ok(elementary::arrange(&self.card, x, view)?.shared())
    }

    fn scatter(&self, x: &Tensor, view: &View, count: usize) -> Result<Buffer> {
        Ok(elementary::scatter(&self.card, x, view, count)?.shared())
    }

    fn join(&self, parts: &[&Tensor], widths: &[usize]) -> Result<Buffer> {
        Ok(elementary::join(&self.card, parts, widths)?.shared())
    }

    fn reduce(&self, x: &Tensor, sizes: [usize; 3], how: Reduce) -> Result<Buffer> {
        Ok(elementary::reduce(&self.card, Slice::of(x)?, sizes, how)?.shared())
    }

    fn multiply(&self, x: &Tensor, y: &Tensor, [batch, m, k, n]: [usize; 4]) -> Result<Buffer> {
        let out = self.card.room(batch * m * n)?;
        let (x, y, all) = (Slice::of(x)?, Slice::of(y)?, Slice::all(&out, batch * m * n));
        let mut product = Product::new(x, y, all, [m, k, n]);
        (product.b.line, product.b_along, product.batch[1]) = (n, false, batch);
        (product.a.inner, product.b.inner, product.c.inner) = (m * k, k * n, m * n);
        product.run(&self.card)?;
        Ok(out.shared())
    }

    fn rows(&self, x: &Tensor, width: usize, ids: &[u32]) -> Result<Buffer> {
        Ok(elementary::rows(&self.card, x, width, ids)?.shared())
    }

    fn add_rows(&self, x: &Tensor, width: usize, ids: &[u32], count: usize) -> Result<Buffer> {
        Ok(elementary::add_rows(&self.card, x, width, ids, count)?.shared())
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let _operation = Operation::new("linear");
        linear::linear(&self.card, x, weight, bias)
    }

    fn experts_at_once(&self) -> usize {
        EXPERTS
    }

    fn linears(&self, x: &Tensor, rows: &[usize], weights: &[Tensor]) -> Result<Tensor> {
        check_linears(x, rows, weights)?;
        let grouped = {
            let _operation = Operation::new("linear");
            grouped::linears(&self.card, x, rows, weights)?
        };
        grouped.map_or_else(|| crate::plain::linears(x, rows, weights), Ok)
    }

    fn observed_linear(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        notebook: &Notebook,
    ) -> Result<Tensor> {
        let _operation = Operation::new("linear");
        trained::observed_linear(&self.card, x, weight, bias, notebook)
    }

    fn hold(&self, codes: Vec<u8>) -> Result<Held> {
        Ok(Held::Device(Arc::new(self.card.put(&codes)?)))
    }

    fn decode(
        &self,
        codes: &Held,
        (group_size, middle): (usize, f32),
        scales: &Tensor,
        biases: &Tensor,
    ) -> Result<Arc<Codes>> {
        let _operation = Operation::new("packed linear");
        trained::decode(&self.card, codes, (group_size, middle), scales, biases)
    }

    fn packed_linear(
        &self,
        x: &Tensor,
        codes: &Arc<Codes>,
        scales: &Tensor,
        centers: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let _operation = Operation::new("packed linear");
        trained::packed_linear(&self.card, x, codes, (scales, centers), bias)
    }

    fn stored_grid(
        &self,
        scales: &Tensor,
        centers: &Tensor,
        middle: f32,
        float: FloatType,
    ) -> Result<[Tensor; 2]> {
        let _operation = Operation::new("packed linear");
        training::stored_grid(&self.card, scales, centers, middle, float)
    }

    fn grid_squares(&self, grids: &[GridSlopes<'_>]) -> Result<Vec<f64>> {
        let _operation = Operation::new("Adam");
        training::grid_squares(&self.card, grids)
    }

    fn adam(&self, step: &AdamStep, inputs: AdamInputs<'_>) -> Result<[Tensor; 3]> {
        let _operation = Operation::new("Adam");
        training::adam(&self.card, step, inputs)
    }

    fn rms_norm(&self, x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        norm::rms_norm(&self.card, x, weight, eps)
    }

    fn layer_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        norm::layer_norm(&self.card, x, weight, bias, eps)
    }

    fn add(&self, x: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
        check_same(x, y, "add")?;
        let value = Value { text: "x + a * y", a: factor as f32, b: 0.0 };
        let sum = elementary::pairs(&self.card, x, y, value)?;
        Ok(Tensor::made(x.device(), x.dims().to_vec(), sum.shared(), "add", &[x, y], move |pull| {
            let for_y = if factor == 1.0 { pull.grad.clone() } else { (pull.grad * factor)? };
            Ok(vec![Some(pull.grad.clone()), Some(for_y)])
        }))
    }

    fn rotary(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, pairing: Pairing) -> Result<Tensor> {
        rotary::rotary(&self.card, x, cos, sin, pairing)
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, settings: &AttentionSettings) -> Result<Tensor> {
        let _operation = Operation::new("attention");
        attention::attention(&self.card, q, k, v, settings)
    }

    fn gated_delta(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        decay: &Tensor,
        beta: &Tensor,
    ) -> Result<Tensor> {
        if !delta::fits(k) {
            self.leave(
                "the gated delta rule",
                "keys of more than 512 features do not fit a kernel's registers",
            );
            return crate::plain::gated_delta(q, k, v, decay, beta);
        }
        delta::gated_delta(&self.card, [q, k, v, decay, beta])
    }

    fn linear_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        if !linear_attention::fits(k, v) {
            self.leave(
                "linear attention",
                "keys or values of more than 512 features do not fit a kernel's registers",
            );
            return crate::plain::linear_attention(q, k, v, log_decay);
        }
        linear_attention::linear_attention(&self.card, [q, k, v, log_decay])
    }

    fn activate(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        activation::activate(&self.card, x, activation)
    }

    fn glu(&self, gate: &Tensor, up: &Tensor, glu: Activation) -> Result<Tensor> {
        activation::glu(&self.card, gate, up, glu)
    }

    fn softmax(&self, x: &Tensor) -> Result<Tensor> {
        softmax::softmax(&self.card, x)
    }

    fn route(&self, scores: &Tensor, selection: &Selection) -> Result<Vec<Vec<u32>>> {
        let _operation = Operation::new("routing");
        routing::route(&self.card, scores, selection)
    }

    fn score(
        &self,
        logits: &Tensor,
        first: u32,
        targets: &[u32],
        running: &mut [RunningScore],
    ) -> Result<()> {
        let _operation = Operation::new("losses");
        losses::score(&self.card, logits, first, targets, running)
    }

    fn compare(
        &self,
        reference: &Tensor,
        logits: &Tensor,
        first: u32,
        targets: &[u32],
        running: &mut [RunningDivergence],
    ) -> Result<()> {
        let _operation = Operation::new("losses");
        losses::compare(&self.card, reference, logits, first, targets, running)
    }

    fn keep_likeliest(
        &self,
        logits: &Tensor,
        first: u32,
        kept: usize,
        candidates: &mut [Candidates],
    ) -> Result<()> {
        let _operation = Operation::new("losses");
        losses::keep_likeliest(&self.card, logits, first, kept, candidates)
    }

    fn label_slopes(
        &self,
        logits: &Tensor,
        lse: &[f64],
        softcap: Option<f64>,
        last: bool,
        labels: &mut Labels,
    ) -> Result<(Tensor, Vec<f64>)> {
        let _operation = Operation::new("losses");
        losses::label_slopes(&self.card, logits, lse, softcap, last, labels)
    }

    fn divergence_slopes(
        &self,
        reference: &Tensor,
        logits: &Tensor,
        lses: (&[f64], &[f64]),
        factors: (f64, f32),
        loss: &mut f64,
    ) -> Result<Tensor> {
        let _operation = Operation::new("losses");
        losses::divergence_slopes(&self.card, reference, logits, lses, factors, loss)
    }

    fn likeliest_slopes(
        &self,
        logits: &Tensor,
        first: u32,
        likeliest: &[Likeliest<'_>],
        tokens: (&[f64], &[f32]),
        factors: (f64, f32),
        loss: &mut f64,
    ) -> Result<Tensor> {
        let _operation = Operation::new("losses");
        losses::likeliest_slopes(&self.card, logits, first, likeliest, tokens, factors, loss)
    }

    fn likeliest_probability(
        &self,
        logits: &Tensor,
        first: u32,
        likeliest: &[Likeliest<'_>],
        rows: (&[f64], f64),
        known: &mut [f64],
    ) -> Result<()> {
        let _operation = Operation::new("losses");
        losses::likeliest_probability(&self.card, logits, first, likeliest, rows, known)
    }
}
