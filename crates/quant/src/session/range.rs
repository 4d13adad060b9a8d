//! Ranges of nvfp4: a site's readers times a power of two, what stands before the site divided by it.
//!
//! nvfp4 stores scales as e4m3, whose steps stop being in proportion below 2^-6 and which end at 2^-9: of a group with
//! magnitudes around 0.02 the scale is off by up to a quarter, and below 0.006 the group is lost. A fold by a power of
//! two moves all scales up to where e4m3 has its full precision; the model stays what it is, exactly. mx modes have
//! powers of two as scales, which need none of this.
//!
//! What produces a site may be rounded already. Then its scales have to stay numbers of its own mode, which limits each
//! feature ([`Room`]).

use std::ops::Range;

use mlx_format::{FloatType, Mode};
use mlx_quant_model::decoder::{Attention, Gate, Linear, Mlp, Projections};
use mlx_quant_model::{Producer, Site, WeightsError};

use super::choose::{Candidate, Room};
use super::work::{BlockWork, Stored};
use crate::Error;
use crate::methods::Method;
use crate::methods::awq;

/// The largest scale after a fold: compensation may raise it 14 times, and what is 2^11 below it has full precision.
const TOP: f32 = 32.0;
/// The largest element of e2m1.
const LARGEST: f32 = 6.0;
/// Powers of two that a fold has at most.
const MOST: i32 = 14;

/// Rows of a linear that make features of a site.
pub(super) struct Span<'b> {
    pub(super) linear: &'b Linear,
    pub(super) row: usize,
    pub(super) features: Range<usize>,
}

/// What produces a site of `size` features, where these are rows of linears. Query heads that share a value head share its
/// rows: the first of them stands for all.
pub(super) fn spans(producer: Producer<'_>, size: usize) -> Vec<Span<'_>> {
    match producer {
        Producer::Product(mlp) => of_product(mlp, size),
        Producer::Attention(attention) => of_values(attention),
        Producer::Norm(_) | Producer::Residual | Producer::Other => Vec::new(),
    }
}

fn of_product(mlp: &Mlp, size: usize) -> Vec<Span<'_>> {
    let (linear, row) = match &mlp.gate {
        Gate::Separate { up, .. } => (up, 0),
        Gate::Fused(both) => (both, size),
        Gate::None(_) | Gate::Xielu { .. } => return Vec::new(),
    };
    vec![Span { linear, row, features: 0..size }]
}

fn of_values(attention: &Attention) -> Vec<Span<'_>> {
    let &Attention { heads, kv_heads, head_dim, value_dim, .. } = attention;
    let served = heads / kv_heads;
    let (linear, first, step) = match &attention.projections {
        Projections::Separate { v, .. } => (v, 0, value_dim),
        Projections::Concatenated(linear) => {
            let gates = if attention.gated_with_queries() { 2 } else { 1 };
            (linear, (gates * heads + kv_heads) * head_dim, value_dim)
        }
        Projections::Interleaved(linear) => {
            let before = (served + 1) * head_dim;
            (linear, before, before + value_dim)
        }
        Projections::Shared { .. } | Projections::KeysAsValues { .. } => return Vec::new(),
    };
    let span = |head: usize| {
        let start = head * served * value_dim;
        Span { linear, row: first + head * step, features: start..start + value_dim }
    };
    (0..kv_heads).map(span).collect()
}

impl BlockWork<'_> {
    /// How far features of a site may be scaled, and the range that its readers need: `readers` are all that read what
    /// produces it, `candidate` is what is known of them.
    pub(super) fn room(
        &self,
        site: &Site<'_>,
        (readers, stored): (&[&Linear], &[Stored]),
        expert: Option<usize>,
        candidate: &Candidate<'_>,
    ) -> Result<Room, Error> {
        let size = candidate.gram.size;
        let mut room = Room::new(size);
        for Span { linear, row, features } in spans(site.producer, size) {
            let codes = self.codes.get(&(linear.path.clone(), expert));
            let Some(rows) = codes.and_then(|codes| codes.room(row)) else { continue };
            for (limit, (least, most)) in room.limits[features].iter_mut().zip(rows) {
                *limit = (1.0 / most, 1.0 / least);
            }
        }
        if let Some(tie) = candidate.ties {
            room.limits = (0..size).map(|at| room.limits[tie(at)]).collect();
        }
        let power = self.power(site, (readers, stored), expert)?;
        if power == 0 {
            return Ok(room);
        }
        if let Producer::Norm(norm) = site.producer {
            let wanted = vec![f32::exp2(power as f32); size];
            // Only where all features take it: others would be lost among them.
            if self.realised(norm, &wanted)? == wanted {
                room.base = wanted;
            }
            return Ok(room);
        }
        // Features whose producer has no room stay behind, so that the most is not always the best.
        let diagonal = candidate.gram.diagonal().map_err(WeightsError::from)?;
        let judge = |power: i32| -> Result<(Vec<f32>, f64), Error> {
            let factors = room.within(vec![f32::exp2(power as f32); size]);
            let search = candidate.rounding != Method::Rtn;
            let loss = || awq::loss(candidate.gram, &diagonal, candidate.readers, &factors, search);
            let loss = self.session.pool.install(loss).map_err(WeightsError::from)?;
            Ok((factors, loss))
        };
        let mut best = judge(0)?;
        for power in 1..=power {
            let tried = judge(power)?;
            if tried.1 <= best.1 {
                best = tried;
            }
        }
        room.base = best.0;
        Ok(room)
    }

    /// The power of two by which readers in nvfp4 have to be multiplied, so that the largest scale is [`TOP`].
    fn power(
        &self,
        site: &Site<'_>,
        (readers, stored): (&[&Linear], &[Stored]),
        expert: Option<usize>,
    ) -> Result<i32, Error> {
        if let Producer::Norm(norm) = site.producer {
            let name = norm.path.as_ref().map(|path| format!("{path}.weight"));
            let float = name.and_then(|name| self.session.float_of(&name));
            // What it gives would lose precision in float16; `1 + w` near 0 has none in bfloat16.
            if norm.plus_one || float.is_none_or(|float| float == FloatType::F16) {
                return Ok(0);
            }
        }
        let mut largest = 0f32;
        for (reader, stored) in readers.iter().zip(stored) {
            if matches!(stored, Stored::Quantized(scheme, _) if scheme.mode() == Mode::Nvfp4) {
                let weight = self.weight(reader, expert)?;
                let own = weight.read(|values| values.iter().fold(0f32, |most, value| most.max(value.abs())));
                largest = largest.max(own.map_err(WeightsError::from)?);
            }
        }
        if largest == 0.0 || !largest.is_finite() {
            return Ok(0);
        }
        Ok(((TOP * LARGEST / largest).log2().floor() as i32).clamp(0, MOST))
    }
}

/// Whether folds have something to do that is no search of factors.
pub(super) fn needs_range(stored: &[Stored]) -> bool {
    let narrow =
        |stored: &Stored| matches!(stored, Stored::Quantized(scheme, _) if scheme.mode() == Mode::Nvfp4);
    stored.iter().any(narrow)
}
