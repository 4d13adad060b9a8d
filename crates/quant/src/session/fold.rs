//! AWQ within a block: which factors a site's features get, and what stands before the site divided by them.

use mlx_format::FloatType;
use mlx_quant_engine::Activation;
use mlx_quant_engine::{REST, Tensor};
use mlx_quant_model::decoder::{Attention, Layer, Linear, Norm, Projections};
use mlx_quant_model::{Parameters, Producer, Site, WeightsError};
use rayon::prelude::*;

use super::choose::Candidate;
use super::range::{needs_range, spans};
use super::work::{BlockWork, Stored};
use crate::Error;
use crate::methods::awq::{self, Reader};
use crate::methods::{Gram, How, Method};

/// Where a branch of the block stands.
type Place = (usize, usize);

impl BlockWork<'_> {
    /// The factors of a site's features, chosen if its turn comes now; folded into what stands before.
    pub(super) fn factors(
        &mut self,
        index: usize,
        gram: &Gram,
        sample: &[Tensor],
    ) -> Result<Option<Vec<f32>>, Error> {
        let site = &self.sites[index];
        if let Producer::Norm(Norm { path: Some(path), .. }) = site.producer {
            if !self.norms.contains_key(path) {
                self.squares.insert(path.clone(), gram.diagonal().map_err(WeightsError::from)?);
                let factors = self.choose(index, gram, sample)?;
                self.norms.insert(path.clone(), factors);
            }
            return Ok(self.norms[path].clone());
        }
        self.choose(index, gram, sample)
    }

    fn choose(&mut self, index: usize, gram: &Gram, sample: &[Tensor]) -> Result<Option<Vec<f32>>, Error> {
        let site = &self.sites[index];
        // Every reader of a norm, the experts' stacked ones once.
        let readers: Vec<&Linear> = match site.producer {
            Producer::Norm(norm) => {
                let same = |other: &&Site<'_>| matches!(other.producer, Producer::Norm(own) if own.path == norm.path);
                let sites = self.sites.iter().filter(same).filter(|site| site.has_own_readers());
                sites.flat_map(|site| site.readers.iter().copied()).collect()
            }
            _ => site.readers.clone(),
        };
        let expert = if matches!(site.producer, Producer::Norm(_)) { None } else { site.slice };
        let stored: Vec<Stored> = readers.iter().map(|reader| self.stored(reader)).collect();
        let folds = self.session.recipe.folds();
        let searches = self.session.recipe.rounding() != Method::Rtn;
        if !(folds || searches && needs_range(&stored))
            || gram.tokens == 0
            || stored.contains(&Stored::Fixed)
            || !(stored.iter().any(|stored| matches!(stored, Stored::Quantized(..)))
                || self.session.hooks.choose.always())
            || !self.can_fold(site, &stored)
        {
            return Ok(None);
        }
        self.folded.1 += 1;
        let sample_of = |reader: &&Linear| -> Result<Tensor, Error> {
            Ok(awq::sample(&self.weight(reader, expert)?).map_err(WeightsError::from)?)
        };
        let samples = readers.iter().map(sample_of).collect::<Result<Vec<_>, Error>>()?;
        let judged: Vec<Reader<'_>> = samples
            .iter()
            .zip(&stored)
            .filter_map(|(values, stored)| match *stored {
                Stored::Quantized(scheme, float) => Some(Reader { values, scheme, float }),
                _ => None,
            })
            .collect();
        let attention = match site.producer {
            Producer::Attention(attention) => Some(attention),
            _ => None,
        };
        let tie = |at: usize| attention.map_or(at, |attention| tied_feature(attention, at));
        let ties: awq::Ties<'_> = attention.is_some().then_some(&tie);
        let (rounding, settings) = (self.session.recipe.rounding(), &self.session.settings.method);
        let candidate = Candidate { gram, readers: &judged, ties, rounding, settings };
        let room = self.room(site, (&readers, &stored), expert, &candidate)?;
        let choose = self.session.hooks.choose;
        let chosen = || if folds { choose.choose(&candidate, &room) } else { Ok(None) };
        let mut chosen = self.session.pool.install(chosen).map_err(WeightsError::from)?;
        if let (Producer::Norm(norm), Some(factors)) = (site.producer, &mut chosen) {
            *factors = self.realised(norm, factors)?;
            if !choose.always() && self.helps(norm, gram, (factors, &room.base), sample)? == Some(false) {
                chosen = None;
            }
        }
        if chosen.is_none() && room.is_plain() {
            return Ok(None);
        }
        let factors = room.within(chosen.unwrap_or_else(|| room.base.clone()));
        self.fold(index, &factors)?;
        self.folded.0 += 1;
        Ok(Some(factors))
    }

    /// Whether what produces the site can take factors at all.
    fn can_fold(&self, site: &Site<'_>, readers: &[Stored]) -> bool {
        // float16 has no room for a factor: small scales would lose their last bits.
        let writable = |linear: &Linear| matches!(self.stored(linear), Stored::Quantized(_, float) | Stored::Plain(float) if float != FloatType::F16);
        match site.producer {
            Producer::Norm(norm) => {
                // A norm that stores w - 1 gives factors that bfloat16 weights cannot take exactly.
                let exact = |stored: &Stored| match stored {
                    Stored::Plain(float) => {
                        *float == FloatType::F32 || *float == FloatType::Bf16 && !norm.plus_one
                    }
                    _ => true,
                };
                // Nor can a bias of it.
                let biased = norm.path.as_ref().is_some_and(|path| {
                    let float = self.session.float_of(&format!("{path}.bias"));
                    norm.plus_one && float.is_some_and(|float| float != FloatType::F32)
                });
                let known = norm.path.as_ref().is_some_and(|path| {
                    !path.contains("{head}") && self.session.float_of(&format!("{path}.weight")).is_some()
                });
                known && !biased && readers.iter().all(exact)
            }
            // The clamp of gpt-oss' activation sees the rows of up, and so does a limit.
            Producer::Product(mlp) => {
                !matches!(mlp.activation, Activation::ClampedSwiglu { .. })
                    && mlp.limit.is_none()
                    && mlp.gate.linears().into_iter().all(writable)
            }
            Producer::Attention(attention) => {
                let norm = attention.norms.as_ref().is_some_and(|norms| norms.v.is_some());
                let own = !matches!(attention.projections, Projections::KeysAsValues { .. });
                own && !norm
                    && !attention.keep_keys
                    && attention.clip.is_none()
                    && attention.projections.linears().into_iter().all(writable)
            }
            Producer::Residual | Producer::Other => false,
        }
    }

    /// Factors that the norm's weight can take in its own dtype, exactly: `w / factor` times the factor given back is `w`. A norm
    /// that stores `w - 1` rounds there; its factors are what the stored weight makes of them.
    pub(super) fn realised(&self, norm: &Norm, factors: &[f32]) -> Result<Vec<f32>, Error> {
        let Some(path) = &norm.path else { return Ok(factors.to_vec()) };
        let float = self.session.float_of(&format!("{path}.weight")).unwrap_or(FloatType::F32);
        let weight = self.parameters.tensor(&format!("{path}.weight")).and_then(Tensor::to_vec);
        let weight = weight.map_err(WeightsError::from)?;
        let one = if norm.plus_one { 1.0 } else { 0.0 };
        let bias = self.parameters.get(&format!("{path}.bias")).map(Tensor::to_vec).transpose();
        let bias = bias.map_err(WeightsError::from)?;
        let realise = |(at, (weight, factor)): (usize, (&f32, &f32))| {
            let stored = float.round((weight + one) / factor - one);
            let bias = bias.as_ref().map_or(0.0, |bias| bias[at]);
            if norm.plus_one {
                let factor = (weight + one) / (stored + one);
                return if factor.is_finite() && factor > 0.0 { factor } else { 1.0 };
            }
            let exact = stored * factor == *weight && float.round(bias / factor) * factor == bias;
            if exact { *factor } else { 1.0 }
        };
        Ok(weight.iter().zip(factors).enumerate().map(realise).collect())
    }

    /// Whether the layers that read the norm are nearer to the true ones with the factors than with the others, on the first windows;
    /// `None` if there is nothing to be run.
    fn helps(
        &self,
        norm: &Norm,
        gram: &Gram,
        (factors, others): (&[f32], &[f32]),
        sample: &[Tensor],
    ) -> Result<Option<bool>, Error> {
        let places = self.places(norm);
        let rows: Vec<Tensor> = sample.iter().filter(|tensor| tensor.elem_count() > 0).cloned().collect();
        if places.is_empty() || rows.is_empty() {
            return Ok(None);
        }
        let pairs: Vec<(Place, &Tensor)> =
            places.iter().flat_map(|place| rows.iter().map(|input| (*place, input))).collect();
        let outputs = |parameters: &Parameters| -> Result<Vec<Tensor>, WeightsError> {
            let run = |(place, input): &(Place, &Tensor)| {
                let input = input.reshape((1, REST, gram.size))?;
                Ok(self.forward.branch(self.index, *place, parameters, &input)?)
            };
            self.session.pool.install(|| pairs.par_iter().map(run).collect())
        };
        let truths = outputs(self.parameters)?;
        // One trial at a time: each holds the norm's readers once more.
        let error = |factors: &[f32]| -> Result<f64, Error> {
            let mut sum = 0.0;
            for (truth, found) in truths.iter().zip(outputs(&self.trial(norm, gram, factors)?)?) {
                let error = (truth - found).and_then(|error| error.sqr()?.sum_all()?.read(|sum| sum[0]));
                sum += error.map_err(WeightsError::from)? as f64;
            }
            Ok(sum)
        };
        let sums = (error(factors)?, error(others)?);
        Ok(Some(sums.0 < sums.1))
    }

    /// Branches that read a norm and need nothing but its output.
    fn places(&self, norm: &Norm) -> Vec<Place> {
        let mut places = Vec::new();
        for (stage, own) in self.block.stages.iter().enumerate() {
            for (branch, own) in own.branches.iter().enumerate() {
                let alone = match &own.layer {
                    Layer::Attention(attention) => {
                        !matches!(attention.projections, Projections::Shared { .. })
                    }
                    Layer::PerLayerInput { .. } => false,
                    _ => true,
                };
                if alone && own.norm.as_ref().is_some_and(|own| own.path == norm.path) {
                    places.push((stage, branch));
                }
            }
        }
        places
    }

    /// The block's weights with the readers of a norm rounded to nearest after scaling by `factors`.
    fn trial(&self, norm: &Norm, gram: &Gram, factors: &[f32]) -> Result<Parameters, Error> {
        let mut parameters = self.parameters.clone();
        let diagonal = gram.diagonal().map_err(WeightsError::from)?;
        let weights: Vec<f32> =
            diagonal.iter().zip(factors).map(|(square, factor)| square / (factor * factor)).collect();
        let same = |site: &&Site<'_>| matches!(site.producer, Producer::Norm(own) if own.path == norm.path);
        for site in self.sites.iter().filter(same).filter(|site| site.has_own_readers()) {
            for reader in &site.readers {
                let Stored::Quantized(scheme, float) = self.stored(reader) else { continue };
                let name = format!("{}.weight", reader.path);
                let weight = self.parameters.tensor(&name).map_err(WeightsError::from)?;
                let how = match self.session.recipe.rounding() {
                    Method::Rtn => How::Plain,
                    _ => How::Nearest { weights: &weights },
                };
                let round = || -> mlx_quant_engine::Result<Tensor> {
                    let scaled = awq::times(&weight.reshape((REST, gram.size))?, factors)?;
                    let (_, decoded) = weight.device().round(&scaled, scheme, float, how)?;
                    awq::over(&decoded, factors)?.reshape(weight.dims())
                };
                let tensor = self.session.pool.install(round);
                parameters.insert(name, tensor.map_err(WeightsError::from)?);
            }
        }
        Ok(parameters)
    }

    /// Divides what produces the site by the factors.
    fn fold(&mut self, index: usize, factors: &[f32]) -> Result<(), Error> {
        let sites = self.sites;
        let site = &sites[index];
        match site.producer {
            Producer::Norm(norm) => {
                let Some(path) = &norm.path else { return Ok(()) };
                let one = if norm.plus_one { 1.0 } else { 0.0 };
                let weight = self.edit(&format!("{path}.weight"))?;
                weight
                    .iter_mut()
                    .zip(factors)
                    .for_each(|(value, factor)| *value = (*value + one) / factor - one);
                let bias = format!("{path}.bias");
                if self.parameters.get(&bias).is_some() {
                    self.edit(&bias)?.iter_mut().zip(factors).for_each(|(value, factor)| *value /= factor);
                }
                Ok(())
            }
            producer => spans(producer, factors.len()).into_iter().try_for_each(|span| {
                self.divide_rows(span.linear, site.slice, span.row, &factors[span.features])
            }),
        }
    }

    /// Divides rows `first..` of a weight and of its bias.
    fn divide_rows(
        &mut self,
        linear: &Linear,
        expert: Option<usize>,
        first: usize,
        factors: &[f32],
    ) -> Result<(), Error> {
        let inverse: Vec<f32> = factors.iter().map(|factor| 1.0 / factor).collect();
        let name = |leaf: &str| format!("{}.{leaf}", linear.path);
        let weight = self.parameters.tensor(&name("weight")).map_err(WeightsError::from)?;
        let (columns, rows) = (weight.dims()[weight.rank() - 1], weight.dims()[weight.rank() - 2]);
        let start = expert.unwrap_or(0) * rows + first;
        if let Some(rounded) = self.codes.get_mut(&(linear.path.clone(), expert)) {
            rounded.scale_rows(first, &inverse);
            if let Some(above) = self.above.get_mut(&(linear.path.clone(), expert)) {
                for (row, factor) in above[first * columns..].chunks_exact_mut(columns).zip(&inverse) {
                    for value in row {
                        *value *= factor;
                    }
                }
            }
        } else {
            let values = self.edit(&name("weight"))?;
            for (row, factor) in values[start * columns..].chunks_exact_mut(columns).zip(&inverse) {
                for value in row {
                    *value *= factor;
                }
            }
        }
        if self.parameters.get(&name("bias")).is_some() {
            let bias = self.edit(&name("bias"))?;
            bias[start..].iter_mut().zip(&inverse).for_each(|(value, factor)| *value *= factor);
        }
        Ok(())
    }
}

/// The feature of the first query head that shares a value head with feature `at`.
fn tied_feature(attention: &Attention, at: usize) -> usize {
    let (head, feature) = (at / attention.value_dim, at % attention.value_dim);
    let served = attention.heads / attention.kv_heads;
    head / served * served * attention.value_dim + feature
}
