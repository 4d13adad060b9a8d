//! One block: what is done at its sites, and what of it is written.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;
use mlx_format::checkpoint::Writer;
use mlx_format::{FloatType, Mode, PackedMut, PackedRef, Scheme};
use mlx_quant_model::decoder::{Attention, Block, Gate, Layer, Linear, Mlp, Norm, Projections};
use mlx_quant_model::ops::Activation;
use mlx_quant_model::{Forward, Parameters, Producer, Site, View, WeightsError};
use rayon::prelude::*;

use super::{ExpertTokens, Session};
use crate::Error;
use crate::calibrate::Visitor;
use crate::carry::write_rounded;
use crate::methods::awq::{self, Reader};
use crate::methods::{Factor, Gram, How, Method, Rounded, round};
use crate::plan::Job;

/// An expert that saw fewer tokens than this part of its input features has no Hessian worth the name.
const FEW_TOKENS: f64 = 0.25;

/// How a reader is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stored {
    /// Affine: scales and biases are chosen here.
    Affine(Scheme, FloatType),
    /// mxfp4, mxfp8, nvfp4: as MLX rounds.
    Float(Scheme, FloatType),
    /// Not quantized.
    Plain(FloatType),
    /// Packed in the source, copied.
    Fixed,
}

/// The codes of a reader (of an expert).
#[derive(Debug)]
pub(super) enum Codes {
    Affine(Rounded),
    /// weight, scales, biases
    Float([Vec<u8>; 3]),
}

/// By path and expert.
pub(super) type AllCodes = BTreeMap<(String, Option<usize>), Codes>;

/// Where a branch of the block stands.
type Place = (usize, usize);

/// A block under way.
pub(super) struct BlockWork<'b> {
    session: &'b Session<'b>,
    forward: &'b Forward<'b>,
    index: usize,
    block: &'b Block,
    sites: &'b [Site<'b>],
    parameters: &'b Parameters,
    codes: AllCodes,
    /// Tensors that are stored with other values than the source's.
    edited: BTreeMap<String, Vec<f32>>,
    /// Chosen for a norm's output, by the norm's path.
    norms: BTreeMap<String, Option<Vec<f32>>>,
    /// Mean squares of a norm's output, by the norm's path; for experts that saw no token.
    squares: BTreeMap<String, Vec<f32>>,
    /// Tokens that each expert saw, by the path of its linear.
    pub(super) experts: BTreeMap<String, ExpertTokens>,
    /// Sites at which a fold was applied, and at which one was possible.
    pub(super) folded: (usize, usize),
}

impl<'b> BlockWork<'b> {
    pub(super) fn new(
        session: &'b Session<'b>,
        forward: &'b Forward<'b>,
        index: usize,
        sites: &'b [Site<'b>],
        parameters: &'b Parameters,
        codes: AllCodes,
    ) -> Self {
        let block = &session.walk.decoder.blocks[index];
        Self {
            session,
            forward,
            index,
            block,
            sites,
            parameters,
            codes,
            edited: BTreeMap::new(),
            norms: BTreeMap::new(),
            squares: BTreeMap::new(),
            experts: BTreeMap::new(),
            folded: (0, 0),
        }
    }

    fn stored(&self, linear: &Linear) -> Stored {
        let session = self.session;
        if session.walk.weights.scheme(&linear.path).is_some() {
            return Stored::Fixed;
        }
        match session.item(&linear.path).map(|item| &session.plan.items[item].job) {
            Some(Job::Quantize { scheme, float, .. }) if scheme.mode() == Mode::Affine => {
                Stored::Affine(*scheme, *float)
            }
            Some(Job::Quantize { scheme, float, .. }) => Stored::Float(*scheme, *float),
            _ => session.float_of(&format!("{}.weight", linear.path)).map_or(Stored::Fixed, Stored::Plain),
        }
    }

    /// A reader's weight `[out, in]`; all experts' below each other if none is named.
    fn weight(&self, linear: &Linear, expert: Option<usize>) -> Result<Tensor, Error> {
        let weight =
            self.parameters.tensor(&format!("{}.weight", linear.path)).map_err(WeightsError::from)?;
        let weight = match (expert, weight.rank()) {
            (Some(expert), 3) => weight.get(expert),
            (_, rank) => weight.reshape(((), weight.dims()[rank - 1])),
        };
        Ok(weight.map_err(WeightsError::from)?)
    }

    fn edit(&mut self, name: &str) -> Result<&mut Vec<f32>, Error> {
        if !self.edited.contains_key(name) {
            let tensor = self.parameters.tensor(name).and_then(Tensor::flatten_all);
            let values = tensor.and_then(|tensor| tensor.to_vec1::<f32>()).map_err(WeightsError::from)?;
            self.edited.insert(name.to_owned(), values);
        }
        Ok(self.edited.entry(name.to_owned()).or_default())
    }

    /// The factors of a site's features, chosen if its turn comes now; folded into what stands before.
    fn factors(&mut self, index: usize, gram: &Gram, sample: &[Tensor]) -> Result<Option<Vec<f32>>, Error> {
        let site = &self.sites[index];
        if let Producer::Norm(Norm { path: Some(path), .. }) = site.producer {
            if !self.norms.contains_key(path) {
                self.squares.insert(path.clone(), gram.diagonal());
                let factors =
                    if self.session.recipe.folds() { self.choose(index, gram, sample)? } else { None };
                self.norms.insert(path.clone(), factors);
            }
            return Ok(self.norms[path].clone());
        }
        if self.session.recipe.folds() { self.choose(index, gram, sample) } else { Ok(None) }
    }

    fn choose(&mut self, index: usize, gram: &Gram, sample: &[Tensor]) -> Result<Option<Vec<f32>>, Error> {
        let site = &self.sites[index];
        // Every reader of a norm, the experts' stacked ones once.
        let readers: Vec<&Linear> = match site.producer {
            Producer::Norm(norm) => {
                let same = |other: &&Site<'_>| matches!(other.producer, Producer::Norm(own) if own.path == norm.path);
                let sites = self
                    .sites
                    .iter()
                    .filter(same)
                    .filter(|site| site.expert.is_none_or(|expert| expert == 0));
                sites.flat_map(|site| site.readers.iter().copied()).collect()
            }
            _ => site.readers.clone(),
        };
        let expert = if matches!(site.producer, Producer::Norm(_)) { None } else { site.expert };
        let stored: Vec<Stored> = readers.iter().map(|reader| self.stored(reader)).collect();
        if gram.tokens == 0
            || stored.contains(&Stored::Fixed)
            || !(stored.iter().any(|stored| matches!(stored, Stored::Affine(..))) || self.session.is_drawn())
            || !self.can_fold(site)
        {
            return Ok(None);
        }
        self.folded.1 += 1;
        let weights = readers
            .iter()
            .map(|reader| {
                Ok(self
                    .weight(reader, expert)?
                    .flatten_all()
                    .and_then(|w| w.to_vec1::<f32>())
                    .map_err(WeightsError::from)?)
            })
            .collect::<Result<Vec<Vec<f32>>, Error>>()?;
        let judged: Vec<Reader<'_>> = weights
            .iter()
            .zip(&stored)
            .filter_map(|(values, stored)| match *stored {
                Stored::Affine(scheme, float) => Some(Reader { values, scheme, float }),
                _ => None,
            })
            .collect();
        let attention = match site.producer {
            Producer::Attention(attention) => Some(attention),
            _ => None,
        };
        let tie = |at: usize| attention.map_or(at, |attention| tied_feature(attention, at));
        let ties: awq::Ties<'_> = attention.is_some().then_some(&tie);
        let search = self.session.recipe.rounding() != Method::Rtn;
        let n_grid = self.session.settings.method.n_grid;
        #[cfg(test)]
        if self.session.drawn {
            let factors = super::tests::draw(gram.size, &tie);
            let factors = match site.producer {
                Producer::Norm(norm) => self.realised(norm, &factors)?,
                _ => factors,
            };
            self.fold(index, &factors)?;
            self.folded.0 += 1;
            return Ok(Some(factors));
        }
        let chosen = self.session.pool.install(|| awq::choose(gram, &judged, n_grid, search, ties));
        drop(judged);
        let Some(mut factors) = chosen else { return Ok(None) };
        if let Producer::Norm(norm) = site.producer {
            factors = self.realised(norm, &factors)?;
            if self.helps(norm, gram, &factors, sample)? == Some(false) {
                return Ok(None);
            }
        }
        self.fold(index, &factors)?;
        self.folded.0 += 1;
        Ok(Some(factors))
    }

    /// Whether what produces the site can take factors at all.
    fn can_fold(&self, site: &Site<'_>) -> bool {
        let writable = |linear: &Linear| matches!(self.stored(linear), Stored::Affine(..) | Stored::Plain(_));
        match site.producer {
            Producer::Norm(norm) => {
                // A norm that stores w - 1 gives factors that bfloat16 weights cannot take exactly.
                let exact = |linear: &&Linear| match self.stored(linear) {
                    Stored::Plain(float) => !norm.plus_one || float == FloatType::F32,
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
                known && !biased && site.readers.iter().all(exact)
            }
            // The clamp of gpt-oss' activation sees the rows of up.
            Producer::Product(mlp) => {
                !matches!(mlp.activation, Activation::ClampedSwiglu { .. })
                    && mlp.gate.linears().into_iter().all(writable)
            }
            Producer::Attention(attention) => {
                let norm = attention.norms.as_ref().is_some_and(|norms| norms.v.is_some());
                !norm && !attention.keep_keys && attention.projections.linears().into_iter().all(writable)
            }
            Producer::Residual | Producer::Other => false,
        }
    }

    /// Factors that the norm's weight can take in its own dtype, exactly: `w / factor` times the factor given back is `w`. A norm
    /// that stores `w - 1` rounds there; its factors are what the stored weight makes of them.
    fn realised(&self, norm: &Norm, factors: &[f32]) -> Result<Vec<f32>, Error> {
        let Some(path) = &norm.path else { return Ok(factors.to_vec()) };
        let float = self.session.float_of(&format!("{path}.weight")).unwrap_or(FloatType::F32);
        let weight = self.parameters.tensor(&format!("{path}.weight")).and_then(Tensor::to_vec1::<f32>);
        let weight = weight.map_err(WeightsError::from)?;
        let one = if norm.plus_one { 1.0 } else { 0.0 };
        let realise = |(weight, factor): (&f32, &f32)| {
            let stored = float.round((weight + one) / factor - one);
            let factor = (weight + one) / (stored + one);
            if factor.is_finite() && factor > 0.0 { factor } else { 1.0 }
        };
        Ok(weight.iter().zip(factors).map(realise).collect())
    }

    /// Whether the layers that read the norm are nearer to the true ones with the factors than without, on the first windows;
    /// `None` if there is nothing to be run.
    fn helps(
        &self,
        norm: &Norm,
        gram: &Gram,
        factors: &[f32],
        sample: &[Tensor],
    ) -> Result<Option<bool>, Error> {
        let places = self.places(norm);
        let rows: Vec<Tensor> = sample.iter().filter(|tensor| tensor.elem_count() > 0).cloned().collect();
        if places.is_empty() || rows.is_empty() {
            return Ok(None);
        }
        let ones = vec![1.0; gram.size];
        let with = self.trial(norm, gram, factors)?;
        let without = self.trial(norm, gram, &ones)?;
        let pairs: Vec<(Place, &Tensor)> =
            places.iter().flat_map(|place| rows.iter().map(|input| (*place, input))).collect();
        let errors = |(place, input): &(Place, &Tensor)| -> Result<(f64, f64), WeightsError> {
            let input = input.reshape((1, (), gram.size))?;
            let run = |parameters| self.forward.branch(self.index, *place, parameters, &input);
            let truth = run(self.parameters)?;
            let error = |parameters| -> candle_core::Result<f64> {
                Ok((&truth - run(parameters)?)?.sqr()?.sum_all()?.to_scalar::<f32>()? as f64)
            };
            Ok((error(&with)?, error(&without)?))
        };
        let errors =
            self.session.pool.install(|| pairs.par_iter().map(errors).collect::<Result<Vec<_>, _>>())?;
        let sums = errors.iter().fold((0.0, 0.0), |sum, error| (sum.0 + error.0, sum.1 + error.1));
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
        let diagonal = gram.diagonal();
        let weights: Vec<f32> =
            diagonal.iter().zip(factors).map(|(square, factor)| square / (factor * factor)).collect();
        let same = |site: &&Site<'_>| matches!(site.producer, Producer::Norm(own) if own.path == norm.path);
        for site in self.sites.iter().filter(same).filter(|site| site.expert.is_none_or(|expert| expert == 0))
        {
            for reader in &site.readers {
                let Stored::Affine(scheme, float) = self.stored(reader) else { continue };
                let name = format!("{}.weight", reader.path);
                let weight = self.parameters.tensor(&name).map_err(WeightsError::from)?;
                let mut values =
                    weight.flatten_all().and_then(|w| w.to_vec1::<f32>()).map_err(WeightsError::from)?;
                awq::times(&mut values, factors);
                let how = match self.session.recipe.rounding() {
                    Method::Rtn => How::Plain,
                    _ => How::Nearest { weights: &weights },
                };
                let mut values =
                    self.session.pool.install(|| round(&values, gram.size, scheme, float, how).decoded());
                awq::over(&mut values, factors);
                let tensor = Tensor::from_vec(values, weight.shape(), weight.device());
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
            Producer::Product(mlp) => self.fold_product(mlp, site.expert, factors),
            Producer::Attention(attention) => self.fold_values(attention, factors),
            Producer::Residual | Producer::Other => Ok(()),
        }
    }

    fn fold_product(&mut self, mlp: &Mlp, expert: Option<usize>, factors: &[f32]) -> Result<(), Error> {
        let (linear, first) = match &mlp.gate {
            Gate::Separate { up, .. } => (up, 0),
            Gate::Fused(both) => (both, factors.len()),
            Gate::None(_) => return Ok(()),
        };
        self.divide_rows(linear, expert, first, factors)
    }

    fn fold_values(&mut self, attention: &Attention, factors: &[f32]) -> Result<(), Error> {
        let &Attention { heads, kv_heads, head_dim, value_dim, .. } = attention;
        let served = heads / kv_heads;
        // The factors of each value head are those of the first query head that it serves.
        let by_head = |head: usize| &factors[head * served * value_dim..][..value_dim];
        let all: Vec<f32> = (0..kv_heads).flat_map(|head| by_head(head).iter().copied()).collect();
        match &attention.projections {
            Projections::Separate { v, .. } => self.divide_rows(v, None, 0, &all),
            Projections::Concatenated(linear) => {
                let gates = if attention.output_gate { 2 } else { 1 };
                self.divide_rows(linear, None, (gates * heads + kv_heads) * head_dim, &all)
            }
            Projections::Interleaved(linear) => (0..heads).try_for_each(|head| {
                let first = head * (2 * head_dim + value_dim) + 2 * head_dim;
                self.divide_rows(linear, None, first, by_head(head))
            }),
            Projections::Shared { .. } => Ok(()),
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
        match self.codes.get_mut(&(linear.path.clone(), expert)) {
            Some(Codes::Affine(rounded)) => rounded.scale_rows(first, &inverse),
            _ => {
                let values = self.edit(&name("weight"))?;
                for (row, factor) in values[start * columns..].chunks_exact_mut(columns).zip(&inverse) {
                    row.iter_mut().for_each(|value| *value *= factor);
                }
            }
        }
        if self.parameters.get(&name("bias")).is_some() {
            let bias = self.edit(&name("bias"))?;
            bias[start..].iter_mut().zip(&inverse).for_each(|(value, factor)| *value *= factor);
        }
        Ok(())
    }

    /// Order in which columns are rounded: groups stay together.
    fn order(&self, diagonal: &[f32], group: usize) -> Vec<usize> {
        let mut groups: Vec<Vec<usize>> =
            (0..diagonal.len() / group).map(|at| (at * group..(at + 1) * group).collect()).collect();
        if self.session.settings.method.act_order {
            let loud = |group: &Vec<usize>| group.iter().map(|at| diagonal[*at]).sum::<f32>();
            groups.sort_by(|a, b| loud(b).total_cmp(&loud(a)));
            for group in &mut groups {
                group.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
            }
        }
        groups.concat()
    }

    /// Rounds one site's readers; gives what their stored form computes with.
    fn round_readers(
        &mut self,
        site: &Site<'_>,
        gram: &Gram,
        factors: Option<&[f32]>,
    ) -> Result<Vec<Tensor>, Error> {
        let session = self.session;
        let scaled = factors.map(|factors| gram.scaled(factors));
        let own = scaled.as_ref().unwrap_or(gram);
        let diagonal = own.diagonal();
        let few = site.expert.is_some() && (gram.tokens as f64) < FEW_TOKENS * gram.size as f64;
        let stored: Vec<Stored> = site.readers.iter().map(|reader| self.stored(reader)).collect();
        let group = stored.iter().find_map(|stored| match stored {
            Stored::Affine(scheme, _) => Some(scheme.group_size()),
            _ => None,
        });
        let compensate = session.recipe.rounding() == Method::Gptq && !few;
        let method = &session.settings.method;
        let factor = match group.filter(|_| compensate) {
            None => None,
            Some(_) => session.pool.install(|| {
                let largest = stored.iter().filter_map(|stored| match stored {
                    Stored::Affine(scheme, _) => Some(scheme.group_size()),
                    _ => None,
                });
                Factor::new(own, self.order(&diagonal, largest.max().unwrap_or(1)), method.damping)
            }),
        };
        if let Some(expert) = site.expert {
            let fell_back = session.recipe.rounding() == Method::Gptq && factor.is_none();
            for reader in &site.readers {
                let tokens = self.experts.entry(reader.path.clone()).or_default();
                tokens.set(expert, gram.tokens, fell_back);
            }
        }
        let how = match (&factor, session.recipe.rounding()) {
            (Some(factor), _) => {
                How::Compensated { factor, block_size: method.block_size, sweeps: method.sweeps }
            }
            (None, Method::Rtn) => How::Plain,
            (None, _) => How::Nearest { weights: &diagonal },
        };
        let weights = site
            .readers
            .iter()
            .map(|reader| self.weight(reader, site.expert))
            .collect::<Result<Vec<_>, _>>()?;
        let done = session.pool.install(|| {
            weights
                .par_iter()
                .zip(&stored)
                .map(|(weight, stored)| round_one(weight, *stored, factors, how))
                .collect::<Result<Vec<_>, WeightsError>>()
        })?;
        let mut passed = Vec::new();
        for (reader, (codes, weight)) in site.readers.iter().zip(done) {
            passed.push(weight);
            match codes {
                Some(codes) => {
                    self.codes.insert((reader.path.clone(), site.expert), codes);
                }
                None => {
                    if let Some(factors) = factors {
                        let name = format!("{}.weight", reader.path);
                        let columns = factors.len();
                        let rows = passed[passed.len() - 1].elem_count() / columns;
                        let start = site.expert.unwrap_or(0) * rows * columns;
                        let values = self.edit(&name)?;
                        awq::times(&mut values[start..start + rows * columns], factors);
                    }
                }
            }
        }
        Ok(passed)
    }

    /// Readers that no token reached: experts that were never chosen.
    fn round_the_rest(&mut self) -> Result<(), Error> {
        let sites = self.sites;
        for site in sites {
            let missing = |reader: &&Linear| {
                matches!(self.stored(reader), Stored::Affine(..) | Stored::Float(..))
                    && !self.codes.contains_key(&(reader.path.clone(), site.expert))
            };
            if !site.readers.iter().copied().any(|reader| missing(&reader)) {
                continue;
            }
            let weight = self.weight(site.readers[0], site.expert)?;
            let size = weight.dims()[1];
            let (mut squares, mut factors) = (vec![1.0; size], None);
            if let Producer::Norm(Norm { path: Some(path), .. }) = site.producer {
                squares = self.squares.get(path).cloned().unwrap_or(squares);
                factors = self.norms.get(path).cloned().flatten();
            }
            let mut gram = Gram { size, tokens: 0, values: vec![0.0; size * size] };
            squares.iter().enumerate().for_each(|(at, square)| gram.values[at * size + at] = *square);
            self.round_readers(site, &gram, factors.as_deref())?;
        }
        Ok(())
    }

    /// Writes everything of the block. Gives the tensors of the layout that are done.
    pub(super) fn write(mut self, writer: &Writer) -> Result<(Vec<usize>, Vec<usize>), Error> {
        self.round_the_rest()?;
        let session = self.session;
        let (mut done, mut left) = (Vec::new(), Vec::new());
        for index in session.items_below(&self.block.prefix) {
            let item = &session.plan.items[index];
            let first = item.first_output;
            match &item.job {
                Job::Quantize { float, scheme, view } => {
                    let columns = view.columns();
                    let mut row = 0;
                    let experts: Vec<_> = self
                        .codes
                        .range((item.name.clone(), None)..)
                        .take_while(|((path, _), _)| *path == item.name)
                        .map(|(_, codes)| codes)
                        .collect();
                    if experts.is_empty() {
                        left.push(index);
                        continue;
                    }
                    for codes in experts {
                        match codes {
                            Codes::Affine(rounded) => {
                                write_rounded(writer, first, row, *float, rounded)?;
                                row += rounded.rows();
                            }
                            Codes::Float([weight, scales, biases]) => {
                                let rows = weight.len() / (scheme.words(columns) * 4);
                                for (leaf, bytes) in [weight, scales, biases].into_iter().enumerate() {
                                    if !bytes.is_empty() {
                                        writer.write_at(
                                            first + leaf,
                                            (row * bytes.len() / rows) as u64,
                                            bytes,
                                        )?;
                                    }
                                }
                                row += rows;
                            }
                        }
                    }
                    done.push(first);
                }
                Job::Copy { .. } | Job::Dequantize { .. } => match self.edited.get(&item.name) {
                    None => left.push(index),
                    Some(values) => {
                        let float = session.float_of(&item.name).unwrap_or(FloatType::F32);
                        let mut bytes = vec![0u8; values.len() * float.size()];
                        float.narrow(values, &mut bytes);
                        writer.write_at(first, 0, &bytes)?;
                        done.push(first);
                    }
                },
            }
        }
        Ok((done, left))
    }
}

impl Visitor for BlockWork<'_> {
    fn visit(&mut self, index: usize, gram: Gram, sample: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let sites = self.sites;
        let factors = self.factors(index, &gram, sample)?;
        self.round_readers(&sites[index], &gram, factors.as_deref())
    }

    fn cancelled(&self) -> bool {
        self.session.observer.cancelled()
    }
}

/// What of a block is no reader of a site, as it will be written: quantized matrices (parts of latent attention that lie between
/// heads), and tensors that change their dtype. Gives the block with these as they decode, and the codes.
pub(super) fn round_others(
    session: &Session<'_>,
    block: &Block,
    sites: &[Site<'_>],
    parameters: &Parameters,
) -> Result<(Parameters, AllCodes), Error> {
    let read: BTreeSet<&str> =
        sites.iter().flat_map(|site| &site.readers).map(|reader| reader.path.as_str()).collect();
    let (mut parameters, mut all) = (parameters.clone(), AllCodes::new());
    for index in session.items_below(&block.prefix) {
        let item = &session.plan.items[index];
        if let Job::Copy { view, float: Some(float) } = &item.job {
            as_written(&mut parameters, &item.name, view, *float)?;
        }
        let Job::Quantize { scheme, float, .. } = &item.job else { continue };
        if read.contains(item.name.as_str()) {
            continue;
        }
        let name = format!("{}.weight", item.name);
        let weight = parameters.tensor(&name).map_err(WeightsError::from)?.clone();
        let columns = weight.dims()[weight.rank() - 1];
        let flat = weight.reshape(((), columns)).map_err(WeightsError::from)?;
        let stored = match scheme.mode() {
            Mode::Affine => Stored::Affine(*scheme, *float),
            _ => Stored::Float(*scheme, *float),
        };
        let even = vec![1.0; columns];
        let how = match session.recipe.rounding() {
            Method::Rtn => How::Plain,
            _ => How::Nearest { weights: &even },
        };
        let (codes, decoded) = session.pool.install(|| round_one(&flat, stored, None, how))?;
        parameters.insert(name, decoded.reshape(weight.shape()).map_err(WeightsError::from)?);
        all.extend(codes.map(|codes| ((item.name.clone(), None), codes)));
    }
    Ok((parameters, all))
}

/// A tensor that is not quantized, in the dtype in which it is written.
fn as_written(
    parameters: &mut Parameters,
    name: &str,
    view: &View,
    float: FloatType,
) -> Result<(), WeightsError> {
    let Some(tensor) = parameters.get(name) else { return Ok(()) };
    let from = FloatType::from_dtype(view.dtype).unwrap_or(float);
    let mut values = tensor.flatten_all()?.to_vec1::<f32>()?;
    // One is added in the dtype of the source.
    values
        .iter_mut()
        .for_each(|value| *value = float.round(if view.add_one { from.round(*value) } else { *value }));
    let tensor = Tensor::from_vec(values, tensor.shape(), tensor.device())?;
    parameters.insert(name.to_owned(), tensor);
    Ok(())
}

/// The feature of the first query head that shares a value head with feature `at`.
fn tied_feature(attention: &Attention, at: usize) -> usize {
    let (head, feature) = (at / attention.value_dim, at % attention.value_dim);
    let served = attention.heads / attention.kv_heads;
    head / served * served * attention.value_dim + feature
}

/// Codes of one weight after scaling, and the weight that they stand for on the unscaled input.
fn round_one(
    weight: &Tensor,
    stored: Stored,
    factors: Option<&[f32]>,
    how: How<'_>,
) -> Result<(Option<Codes>, Tensor), WeightsError> {
    let (rows, columns) = weight.dims2()?;
    let scaled = || -> Result<Vec<f32>, WeightsError> {
        let mut values = weight.flatten_all()?.to_vec1::<f32>()?;
        if let Some(factors) = factors {
            awq::times(&mut values, factors);
        }
        Ok(values)
    };
    let (codes, mut values) = match stored {
        Stored::Plain(_) | Stored::Fixed => return Ok((None, weight.clone())),
        Stored::Affine(scheme, float) => {
            let rounded = round(&scaled()?, columns, scheme, float, how);
            let values = rounded.decoded();
            (Codes::Affine(rounded), values)
        }
        Stored::Float(scheme, float) => {
            let values = scaled()?;
            let mut bytes = vec![0u8; values.len() * float.size()];
            float.narrow(&values, &mut bytes);
            let scale_bytes = rows * scheme.scale_bytes(columns, float);
            let (mut weight, mut scales) = (vec![0; rows * scheme.words(columns) * 4], vec![0; scale_bytes]);
            let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut [] };
            // Weights were checked when they were read; folding keeps them finite.
            let _ = mlx_format::quantize(scheme, float, columns, &bytes, out, true);
            let packed = PackedRef { weight: &weight, scales: &scales, biases: &[] };
            let mut bytes = vec![0u8; rows * columns * 4];
            mlx_format::dequantize(scheme, FloatType::F32, columns, packed, &mut bytes);
            let mut values = values;
            FloatType::F32.widen(&bytes, &mut values);
            (Codes::Float([weight, scales, Vec::new()]), values)
        }
    };
    if let Some(factors) = factors {
        awq::over(&mut values, factors);
    }
    Ok((Some(codes), Tensor::from_vec(values, (rows, columns), weight.device())?))
}
