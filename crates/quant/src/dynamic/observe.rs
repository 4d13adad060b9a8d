//! Measuring sensitivities: one backward pass a window.
//!
//! At the full-precision model a change's cost is second order: `KL = 1/2 E[(g . dz)^2]` over labels drawn from the model's own
//! distribution, `g` being the gradient of a label's log probability at an output `z = W x` that changes by `dz = dW x`. With
//! outputs and inputs taken as uncorrelated that is `1/2 sum over o, k of E[g_o^2] E[x_k^2] dW_ok^2`: two vectors a linear, whatever the
//! candidates.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use mlx_quant_engine::{Notebook, Observed, Tensor};
use mlx_quant_model::decoder::{Block, Layer as DecoderLayer};
use mlx_quant_model::mixers::{LatentAttention, LatentKeys};
use mlx_quant_model::{Parameters, Reader, WeightsError};
use serde::{Deserialize, Serialize};

use super::unfinished::Unfinished;
use super::{Layer, Seen, Table};
use crate::Error;
use crate::data::Windows;
use crate::observer::{Event, Observer, Unit};
use crate::reduce::{InOrder, Sum};
use crate::walks::Walk;
use crate::walks::{Passed, Visit, Wave, fisher};

/// A linear under observation; of stacked weights one notebook an expert.
#[derive(Debug)]
struct Probe {
    weight: Tensor,
    notebooks: Vec<Notebook>,
}

impl Reader for Probe {
    fn read(
        &self,
        x: &Tensor,
        expert: Option<usize>,
        bias: Option<&Tensor>,
    ) -> mlx_quant_engine::Result<Tensor> {
        let weight = match expert {
            Some(expert) => self.weight.get(expert)?,
            None => self.weight.clone(),
        };
        x.device().observed_linear(x, &weight, bias, &self.notebooks[expert.unwrap_or(0)])
    }
}

/// Modules that are measured, with the shapes of their weights.
pub(super) fn observed_paths(walk: &Walk<'_>) -> Vec<(String, Vec<usize>)> {
    let decoder = &walk.decoder;
    let embedding = &decoder.embedding;
    let sites = decoder.blocks.iter().flat_map(Block::sites);
    let mut paths: Vec<String> =
        sites.flat_map(|site| site.readers).map(|reader| reader.path.clone()).collect();
    paths.extend([embedding.path.clone(), walk.head_path().to_owned()]);
    for layer in decoder.blocks.iter().flat_map(Block::layers) {
        if let DecoderLayer::Latent(LatentAttention {
            keys: LatentKeys::Split { embed_q, unembed_out },
            ..
        }) = layer
        {
            let modules = [embed_q, unembed_out].map(|name| name.trim_end_matches(".weight").to_owned());
            paths.extend(modules);
        }
    }
    paths.extend(embedding.positions.clone());
    paths.sort();
    paths.dedup();
    let shape = |path: &str| walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[]).to_vec();
    paths.into_iter().map(|path| (path.clone(), shape(&path))).collect()
}

/// What one linear saw; of stacked weights one an expert.
#[derive(Default, Serialize, Deserialize)]
struct Experts(Vec<Observed>);

impl Sum for Experts {
    fn add(&mut self, right: Self) {
        self.0.resize(self.0.len().max(right.0.len()), Observed::default());
        self.0.iter_mut().zip(&right.0).for_each(|(sum, other)| sum.add(other));
    }
}

/// Squared gradients of a table: of each row (token or position), and of each feature.
#[derive(Default, Serialize, Deserialize)]
struct OfTable {
    rows: BTreeMap<u32, f64>,
    features: Vec<f64>,
}

impl Sum for OfTable {
    fn add(&mut self, right: Self) {
        self.rows.add(right.rows);
        self.features.add(right.features);
    }
}

/// Sums of everything over windows, in the making.
#[derive(Default, Serialize, Deserialize)]
struct Sums {
    /// By path.
    linears: BTreeMap<String, InOrder<Experts>>,
    head: InOrder<Experts>,
    /// Of the head's outputs, by tile of the vocabulary.
    head_rows: Vec<InOrder<Vec<f64>>>,
    /// By path.
    tables: BTreeMap<String, InOrder<OfTable>>,
    tokens: u64,
}

pub(super) struct Measurement<'m> {
    pub(super) walk: &'m Walk<'m>,
    pub(super) windows: &'m Windows,
    pub(super) seed: u64,
    pub(super) low_memory: bool,
    pub(super) pool: &'m rayon::ThreadPool,
    pub(super) observer: &'m dyn Observer,
    /// Where an unfinished measurement waits.
    pub(super) unfinished: Option<&'m Unfinished>,
}

impl Measurement<'_> {
    /// Sensitivities of all linears, tables and the head, in the order of the model; costs are left empty.
    pub(super) fn run(&self) -> Result<Vec<Layer>, Error> {
        let Self { walk, windows, .. } = self;
        let blocks = walk.decoder.blocks.len();
        let total = (windows.picked.len() * blocks * 2) as u64;
        let tokens = (windows.picked.len() * windows.sequence_length) as u64;
        self.observer.event(Event::Phase { name: "sensitivities", unit: Unit::Parts, total, tokens });
        let resumed = self.unfinished.and_then(|file| file.load::<Sums>(windows.picked.len()));
        let (mut done, mut sums) = resumed.unwrap_or_default();
        if done > 0 {
            self.observer.event(Event::Resumed { done: (done * blocks * 2) as u64 });
        }
        let threads = self.pool.current_num_threads();
        let most = walk.trail(windows.sequence_length, threads, self.low_memory);
        let mut wave = Wave::new(threads, most, walk.batch());
        let mut saved = Instant::now();
        while done < windows.picked.len() {
            let end = windows.picked.len().min(done + wave.windows());
            let begun = Instant::now();
            self.wave(done..end, &mut sums)?;
            wave.took(begun.elapsed());
            done = end;
            if let Some(file) = self.unfinished.filter(|file| saved.elapsed() >= file.every) {
                file.save(done, &sums)?;
                saved = Instant::now();
            }
        }
        Ok(self.layers(sums))
    }

    fn wave(&self, range: std::ops::Range<usize>, sums: &mut Sums) -> Result<(), Error> {
        let Self { walk, windows, pool, observer, .. } = self;
        let (first, count) = (range.start, range.len() as u64);
        let tokens: Vec<&[u32]> =
            windows.picked[range.clone()].iter().map(|window| &*window.tokens).collect();
        let done = 2 * (first * walk.decoder.blocks.len()) as u64;
        let Sums { linears, head, head_rows, tokens: counted, .. } = sums;
        let mut blocks = Observing { measurement: self, first, count, done, linears, head, tokens: counted };
        let embedded = fisher(walk, &tokens, (self.seed, first), head_rows, &mut blocks, (pool, *observer))?;
        for (window, (tokens, gradient)) in range.zip(tokens.iter().zip(&embedded)) {
            self.tables(window, tokens, gradient, sums)?;
        }
        Ok(())
    }

    /// What the embedding's rows are worth: squared gradients by token (and position), and by feature.
    fn tables(&self, window: usize, tokens: &[u32], gradient: &Tensor, sums: &mut Sums) -> Result<(), Error> {
        let embedding = &self.walk.decoder.embedding;
        let features = gradient.dims().last().copied().unwrap_or(1).max(1);
        let device = gradient.device();
        device.leave("squares of embeddings' gradients", "they are summed by token, in float64");
        let rows = gradient.to_vec().map_err(WeightsError::from)?;
        let positions: Vec<u32> = (0..tokens.len() as u32).collect();
        let tables = std::iter::once((&embedding.path, tokens, embedding.multiplier));
        let tables =
            tables.chain(embedding.positions.iter().map(|path| (path, &*positions, embedding.multiplier)));
        for (path, ids, multiplier) in tables {
            let mut own = OfTable::default();
            own.features.resize(features, 0.0);
            for (id, row) in ids.iter().zip(rows.chunks_exact(features)) {
                let sum = own.rows.entry(*id).or_default();
                for (feature, value) in own.features.iter_mut().zip(row) {
                    let square = (f64::from(*value) * multiplier).powi(2);
                    *sum += square;
                    *feature += square;
                }
            }
            sums.tables.entry(path.clone()).or_default().add(window, own);
        }
        Ok(())
    }

    fn layers(&self, sums: Sums) -> Vec<Layer> {
        let decoder = &self.walk.decoder;
        let tokens = sums.tokens.max(1) as f64;
        let shape = |path: &str| self.walk.weights.shape(&format!("{path}.weight")).unwrap_or(&[]).to_vec();
        let mut layers: Vec<Layer> = Vec::new();
        let whole = |sum: InOrder<Experts>| sum.finish().unwrap_or_default().0;
        let mut head = whole(sums.head).pop().unwrap_or_default();
        head.gradients =
            sums.head_rows.into_iter().flat_map(|sum| sum.finish().unwrap_or_default()).collect();
        for (path, sum) in sums.tables {
            let OfTable { rows, features } = sum.finish().unwrap_or_default();
            let all: f64 = features.iter().sum::<f64>().max(f64::MIN_POSITIVE);
            let table = Table {
                rows: rows.into_iter().map(|(row, sum)| (row, (sum / tokens) as f32)).collect(),
                features: features.iter().map(|sum| (sum / all) as f32).collect(),
            };
            layers.push(Layer {
                shape: shape(&path),
                path,
                seen: Vec::new(),
                table: Some(table),
                costs: Vec::new(),
            });
        }
        let mut linears: BTreeMap<String, Vec<Observed>> =
            sums.linears.into_iter().map(|(path, sum)| (path, whole(sum))).collect();
        let mut add = |path: &str, all: Vec<Observed>| {
            let shape = shape(path);
            let seen = all.iter().map(|observed| Seen::of(observed, tokens, &shape)).collect();
            layers.push(Layer { path: path.to_owned(), shape, seen, table: None, costs: Vec::new() });
        };
        for block in &decoder.blocks {
            for site in block.sites() {
                for reader in site.readers {
                    if let Some(all) = linears.remove(&reader.path) {
                        add(&reader.path, all);
                    }
                }
            }
        }
        if decoder.head.linear.is_some() {
            add(self.walk.head_path(), vec![head]);
        } else if let Some(table) = layers.iter_mut().find(|layer| layer.path == decoder.embedding.path) {
            table.seen.push(Seen::of(&head, tokens, &table.shape));
        }
        for (path, all) in linears {
            let shape = shape(&path);
            let transposed = path.ends_with("embed_q");
            let seen = all.iter().flat_map(|one| by_head(one, tokens, &shape, transposed)).collect();
            layers.push(Layer { path, shape, seen, table: None, costs: Vec::new() });
        }
        layers
    }
}

/// Blocks on the way back whose linears note what passes.
struct Observing<'o, 'm> {
    measurement: &'o Measurement<'m>,
    /// The first window of this wave, and how many there are.
    first: usize,
    count: u64,
    done: u64,
    linears: &'o mut BTreeMap<String, InOrder<Experts>>,
    head: &'o mut InOrder<Experts>,
    tokens: &'o mut u64,
}

impl Visit for Observing<'_, '_> {
    type Block = Arc<Parameters>;
    type Batch = Notebooks;

    fn before(&mut self, index: usize) {
        let Measurement { walk, observer, .. } = self.measurement;
        observer.event(Event::Working { name: walk.decoder.blocks[index].prefix.trim_end_matches('.') });
    }

    fn turned(&mut self, hidden: &[Tensor]) -> Result<(), Error> {
        self.done += self.count * self.measurement.walk.decoder.blocks.len() as u64;
        self.measurement.observer.event(Event::Progress { done: self.done });
        for (at, hidden) in hidden.iter().enumerate() {
            let squares = hidden.sqr().and_then(|squares| squares.sum(0)).and_then(|sum| sum.to_vec());
            let inputs = squares.map_err(WeightsError::from)?.into_iter().map(f64::from).collect();
            let tokens = hidden.dim(0).map_err(WeightsError::from)? as u64;
            self.head.add(self.first + at, Experts(vec![Observed { tokens, inputs, gradients: Vec::new() }]));
            *self.tokens += tokens;
        }
        Ok(())
    }

    fn batch(&self, index: usize, block: &Self::Block) -> mlx_quant_engine::Result<(Parameters, Notebooks)> {
        observed(block, &self.measurement.walk.decoder.blocks[index])
    }

    fn passed(&mut self, _: usize, _: Self::Block, batches: Vec<Passed<Notebooks>>) -> Result<(), Error> {
        // Of all batches at once: a card is waited for once.
        let notebooks = batches.iter().flat_map(|batch| &batch.noted).flat_map(|(_, notebooks)| notebooks);
        let notebooks: Vec<Notebook> = notebooks.cloned().collect();
        let mut all = Notebook::take(&notebooks).map_err(WeightsError::from)?.into_iter();
        for Passed { first, noted, .. } in batches {
            for (path, notebooks) in noted {
                let seen = Experts(all.by_ref().take(notebooks.len()).collect());
                self.linears.entry(path).or_default().add(self.first + first, seen);
            }
        }
        self.done += self.count;
        self.measurement.observer.event(Event::Progress { done: self.done });
        Ok(())
    }
}

/// By path; one an expert.
type Notebooks = Vec<(String, Vec<Notebook>)>;

/// A block whose linears note what passes, and their notebooks by path.
fn observed(
    parameters: &Arc<Parameters>,
    block: &Block,
) -> mlx_quant_engine::Result<(Parameters, Notebooks)> {
    let mut own = (**parameters).clone();
    let mut all = Notebooks::new();
    let mut linears: Vec<(String, Tensor)> = Vec::new();
    for reader in block.sites().into_iter().flat_map(|site| site.readers) {
        linears.push((reader.path.clone(), parameters.tensor(&format!("{}.weight", reader.path))?.clone()));
    }
    for layer in block.layers() {
        if let DecoderLayer::Latent(latent) = layer {
            linears.extend(latent.expansions(parameters)?);
        }
    }
    for (path, weight) in linears {
        if own.reader(&path).is_some() {
            continue;
        }
        let experts = if weight.rank() == 3 { weight.dim(0)? } else { 1 };
        let notebooks: Vec<Notebook> = (0..experts).map(|_| Notebook::default()).collect();
        all.push((path.clone(), notebooks.clone()));
        own.set_reader(&path, Arc::new(Probe { weight, notebooks }));
    }
    Ok((own, all))
}

/// Of a matrix between heads what each head saw. What reads the latent vector in all heads alike is a column of one and a row of the
/// other: stored rows of keys' matrices are its features.
fn by_head(observed: &Observed, tokens: f64, shape: &[usize], transposed: bool) -> Vec<Seen> {
    let (heads, features) = (shape[0], observed.gradients.len() / shape[0].max(1));
    (0..heads)
        .map(|head| {
            let gradients = observed.gradients[head * features..][..features].to_vec();
            let inputs = observed.inputs.clone();
            let own = observed.tokens.max(1) as f64;
            if !transposed {
                return Seen::of(
                    &Observed { tokens: observed.tokens, inputs, gradients },
                    tokens,
                    &shape[1..],
                );
            }
            // The product of both is what counts: their parts are exchanged, and so are their divisors.
            let turned = Observed {
                tokens: observed.tokens,
                inputs: gradients.iter().map(|sum| sum / tokens * own).collect(),
                gradients: inputs.iter().map(|sum| sum / own * tokens).collect(),
            };
            Seen::of(&turned, tokens, &shape[1..])
        })
        .collect()
}
