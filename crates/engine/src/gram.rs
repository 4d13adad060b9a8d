//! Second moments of a site's inputs, and what GPTQ makes of them.
//!
//! With inputs `X [tokens, in]` the error of a linear's output under a change `dW` of its weight is `tr(dW H dW^T)`,
//! `H = X^T X / tokens`: whatever is judged by it needs no further pass over the tokens.

use std::ops::Range;

use crate::error::{Result, bail};
use crate::{Device, Tensor};

/// `X^T X / tokens` of a site, float32.
#[derive(Clone, Debug)]
pub struct Gram {
    /// Input features.
    pub size: usize,
    /// Tokens summed over.
    pub tokens: u64,
    /// `[size, size]`, symmetric.
    pub values: Tensor,
}

/// A Gram matrix while windows are added to it, in their order.
#[derive(Clone, Debug)]
pub struct GramSum {
    /// Input features.
    size: usize,
    tokens: u64,
    /// `[size, size]`; only the diagonal and what lies below it have a meaning. Of some rows alone these, with as many
    /// columns as the last one has.
    values: Tensor,
}

impl GramSum {
    /// Of no window yet, for inputs with `size` features.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(size: usize, device: &Device) -> Result<Self> {
        Self::of_rows(size, 0..size, device)
    }

    /// Of no window yet, of these rows of the matrix alone.
    ///
    /// # Errors
    /// If the device has no room; rows that no such matrix has.
    pub fn of_rows(size: usize, rows: Range<usize>, device: &Device) -> Result<Self> {
        if rows.end > size || rows.start > rows.end {
            bail!("rows {rows:?} of a Gram matrix of {size} features");
        }
        Ok(Self { size, tokens: 0, values: Tensor::full(0.0, (rows.len(), rows.end), device)? })
    }

    /// Adds inputs `[.., size]` of a window.
    ///
    /// # Errors
    /// Another number of features; what goes wrong on a device.
    pub fn add(&mut self, input: &Tensor) -> Result<()> {
        if input.dims().last() != Some(&self.size) {
            bail!("inputs {:?} where {} features are summed", input.dims(), self.size);
        }
        self.tokens += (input.elem_count() / self.size.max(1)) as u64;
        input.device().clone().gram_add(&mut self.values, input)
    }

    /// Adds the sum over other windows, which come after these.
    ///
    /// # Errors
    /// Another number of features; what goes wrong on a device.
    pub fn merge(&mut self, right: &Self) -> Result<()> {
        self.tokens += right.tokens;
        self.values = self.values.device().add(&self.values, &right.values, 1.0)?;
        Ok(())
    }

    /// A sum that another device has made ([`GramSum::values`]), over `tokens` tokens.
    ///
    /// # Errors
    /// Rows that no such matrix has; if a device has no room or does not answer.
    pub fn of_values(size: usize, tokens: u64, values: &Tensor, device: &Device) -> Result<Self> {
        let (rows, end) = values.dims2()?;
        if end > size || rows > end {
            bail!("rows [{rows}, {end}] of a Gram matrix of {size} features");
        }
        Ok(Self { size, tokens, values: values.on(device)? })
    }

    /// Tokens summed over.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// What another device goes on with ([`GramSum::of_values`]).
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// Puts the mean over all tokens into a matrix: the rows that were summed, and the columns that mirror them.
    ///
    /// # Errors
    /// Another number of features; what goes wrong on a device.
    pub fn place(self, whole: &mut Gram) -> Result<()> {
        let Self { size, tokens, values } = self;
        if whole.size != size {
            bail!("rows of {size} features in a Gram matrix of {}", whole.size);
        }
        whole.tokens = tokens;
        values.device().gram_place(&mut whole.values, &values, 1.0 / tokens.max(1) as f32)
    }

    /// The mean over all tokens; nothing but zeros if there were none.
    ///
    /// # Errors
    /// A sum of some rows alone; what goes wrong on a device.
    pub fn finish(self) -> Result<Gram> {
        let Self { size, tokens, values } = self;
        if values.dims() != [size, size] {
            bail!("rows {:?} are no Gram matrix of {size} features", values.dims());
        }
        let device = values.device().clone();
        Ok(Gram { size, tokens, values: device.gram_finish(values, 1.0 / tokens.max(1) as f32)? })
    }
}

/// Tokens of a text that count as one independent token: neighbours are alike.
const TOKENS_FOR_ONE: f64 = 8.0;

/// How many strengths of damping are tried.
const TRIES: usize = 6;

impl Gram {
    /// Of no token: nothing but zeros.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn empty(size: usize, device: &Device) -> Result<Self> {
        Ok(Self { size, tokens: 0, values: Tensor::full(0.0, (size, size), device)? })
    }

    /// A diagonal matrix of mean squares: for features of which products are not known.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn of_squares(squares: &[f32], device: &Device) -> Result<Self> {
        let size = squares.len();
        let mut values = vec![0.0; size * size];
        squares.iter().enumerate().for_each(|(at, square)| values[at * size + at] = *square);
        Ok(Self { size, tokens: 0, values: Tensor::from_vec(values, (size, size), device)? })
    }

    /// Mean square of each input feature.
    ///
    /// # Errors
    /// If the device does not answer.
    pub fn diagonal(&self) -> Result<Vec<f32>> {
        self.note_diagonal();
        self.values.diagonal()?.to_vec()
    }

    /// [`Gram::diagonal`] of several matrices: the device is waited for once.
    ///
    /// # Errors
    /// As there.
    pub fn diagonals(all: &[&Self]) -> Result<Vec<Vec<f32>>> {
        let [first, _, ..] = all else { return all.iter().map(|gram| gram.diagonal()).collect() };
        first.note_diagonal();
        let own = all.iter().map(|gram| gram.values.diagonal()).collect::<Result<Vec<_>>>()?;
        let numbers = Tensor::cat(&own.iter().collect::<Vec<_>>(), 0)?.to_vec()?;
        let mut rest = &numbers[..];
        let part = |gram: &&Self| {
            let (own, behind) = rest.split_at(gram.size);
            rest = behind;
            own.to_vec()
        };
        Ok(all.iter().map(part).collect())
    }

    fn note_diagonal(&self) {
        let device = self.values.device();
        device.leave("factors, orders and searches by a Gram matrix's diagonal", "it is a vector");
    }

    /// The factor of off-diagonal elements, from 0 to 1. With few tokens for many features, products of two features
    /// are large by chance; shrinking them is Ledoit and Wolf's remedy (2004). Tokens of a text are not independent of
    /// each other, so only one in [`TOKENS_FOR_ONE`] counts. Measured at 32 windows of 512 (KL, factor 0 / 1 / 3 / 8
    /// / 20): SmolLM2-135M dithered at 4 bits 0.122 / 0.107 / 0.099 / 0.094 / 0.097, the demo model at 3 bits 0.172
    /// / 0.175 / 0.170 / 0.166 / 0.168.
    fn reliability(&self) -> f32 {
        (self.tokens as f64 / (self.size as f64 * TOKENS_FOR_ONE + self.tokens as f64)) as f32
    }

    /// The Gram matrix of the same inputs divided by `factors`, feature by feature.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn scaled(&self, factors: &[f32]) -> Result<Self> {
        Ok(Self { values: self.values.device().gram_scaled(&self.values, factors)?, ..*self })
    }

    /// `tr(D H D^T)` of changes `D [rows, size]`: the mean squared error that they cause, summed over rows.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn loss(&self, changes: &Tensor) -> Result<f64> {
        if changes.rank() != 2 || changes.dims()[1] != self.size {
            bail!("changes {:?} under a Gram matrix of {} features", changes.dims(), self.size);
        }
        self.values.device().quadratic(&self.values, changes)
    }
}

/// What GPTQ needs of a Hessian, in the order in which columns are rounded.
#[derive(Clone, Debug)]
pub struct Factor {
    /// Input features.
    pub size: usize,
    /// Columns in the order in which they are rounded. Those of a group stay together.
    pub order: Vec<usize>,
    /// `U` with `H^-1 = U^T U`, `[size, size]`, upper triangular.
    pub upper: Tensor,
    /// The damped Hessian, `[size, size]`.
    pub hessian: Tensor,
    /// What was added to the diagonal, as a part of its mean.
    pub damping: f32,
}

impl Factor {
    /// Of a Gram matrix, with `damping` times the mean of its diagonal added to the diagonal; ten times as much
    /// whenever that is not positive definite. `None` if it never is. A dead column (an input that is always zero)
    /// keeps the damping alone, so that its weights are rounded to nearest and take part in nothing.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(gram: &Gram, order: Vec<usize>, damping: f32) -> Result<Option<Self>> {
        Self::of(gram.clone(), order, damping)
    }

    /// As [`Factor::new`], and lets go of the Gram matrix as soon as it can be missed: where nobody else holds it, its
    /// memory is free while the factor is made.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn of(gram: Gram, order: Vec<usize>, damping: f32) -> Result<Option<Self>> {
        let Some(mean) = mean_of(&gram.diagonal()?) else { return Ok(None) };
        let device = gram.values.device().clone();
        let hessian = device.permuted(&gram.values, &order, gram.reliability())?;
        drop(gram);
        Self::damped(hessian, order, mean, damping.max(1e-6), TRIES)
    }

    /// Of a Hessian whose diagonal has this mean, with up to so many strengths of damping.
    fn damped(
        mut hessian: Tensor,
        order: Vec<usize>,
        mean: f64,
        mut damping: f32,
        tries: usize,
    ) -> Result<Option<Self>> {
        let device = hessian.device().clone();
        for _ in 0..tries {
            if let Some(upper) = device.factor(&mut hessian, added(mean, damping))? {
                return Ok(Some(Self { size: order.len(), order, upper, hessian, damping }));
            }
            damping *= 10.0;
        }
        Ok(None)
    }

    /// [`Factor::of`] of matrices of one size, whose diagonals are known already: what an engine makes of all of them at
    /// once.
    ///
    /// # Errors
    /// If the device has no room; matrices of different sizes.
    pub fn of_all(all: Vec<(Gram, Vec<f32>, Vec<usize>)>, damping: f32) -> Result<Vec<Option<Self>>> {
        let damping = damping.max(1e-6);
        let mut factors: Vec<Option<Self>> = all.iter().map(|_| None).collect();
        let (mut known, mut hessians) = (Vec::new(), Vec::new());
        for (at, (gram, diagonal, order)) in all.into_iter().enumerate() {
            let Some(mean) = mean_of(&diagonal) else { continue };
            hessians.push(gram.values.device().permuted(&gram.values, &order, gram.reliability())?);
            known.push((at, mean, order));
        }
        if hessians.is_empty() {
            return Ok(factors);
        }
        let device = hessians[0].device().clone();
        let mut stack = Tensor::stack(&hessians.iter().collect::<Vec<_>>(), 0)?;
        drop(hessians);
        let more: Vec<f32> = known.iter().map(|(_, mean, _)| added(*mean, damping)).collect();
        let uppers = device.factors(&mut stack, &more)?;
        for (own, ((at, mean, order), upper)) in known.into_iter().zip(uppers).enumerate() {
            let hessian = stack.get(own)?;
            factors[at] = match upper {
                Some(upper) => Some(Self { size: order.len(), order, upper, hessian, damping }),
                None => Self::damped(hessian, order, mean, damping * 10.0, TRIES - 1)?,
            };
        }
        Ok(factors)
    }
}

/// The mean of a diagonal; `None` if that is not positive.
fn mean_of(diagonal: &[f32]) -> Option<f64> {
    let mean = diagonal.iter().map(|value| f64::from(*value)).sum::<f64>() / diagonal.len().max(1) as f64;
    (mean.is_finite() && mean > 0.0).then_some(mean)
}

/// What damping adds to a diagonal.
fn added(mean: f64, damping: f32) -> f32 {
    (mean * f64::from(damping)) as f32
}
