//! Carrying out a plan that needs no calibration.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use mlx_format::checkpoint::{Destination, Directory, Run, WriteError, Writer};
use sha2::{Digest, Sha256};

use crate::carry::{CHUNK_BYTES, CHUNKS_PER_THREAD, Carrier, ColumnWeights};
use crate::observer::{Event, Observer, Step, StepPart};
use crate::plan::{GenerationConfig, Item, Job, Plan};
use crate::source::is_processor;

const GENERATION_CONFIG: &str = "generation_config.json";

/// Bits at which a search without data is careful: with fewer codes, grids that keep zero and an edge leave too little;
/// with more, none does harm.
const CAREFUL_BITS: u32 = 3;

use crate::{Error, Model, model_card, threads};
use mlx_quant_model::decoder::{Block, Decoder, Layer, Norm};
use mlx_quant_model::{Producer, Site, View};

/// Starts or resumes the output, with a note where nothing keeps a second run out of it.
pub(crate) fn open_writer(
    target: Destination<'_>,
    plan: &Plan,
    run: Run<'_>,
    observer: &dyn Observer,
) -> Result<Writer, Error> {
    let writer = Writer::open(target, plan.layout.clone(), run)?;
    if let [.., before, own] = writer.shares()
        && !before.tensors.is_empty()
    {
        let text = format!("what {} has finished stays, {} computes the rest", before.engine, own.engine);
        observer.event(Event::Warning { text: &text });
    }
    if !writer.is_locked() {
        let text = "the output's disk knows no locks; do not start a second run into the same output";
        observer.event(Event::Note { text });
    }
    Ok(writer)
}

/// Refuses to replace a model that is read.
pub(crate) fn keep_apart<'m>(
    target: Destination<'_>,
    models: impl IntoIterator<Item = &'m Model>,
) -> Result<(), Error> {
    let Ok(place) = target.path.canonicalize() else { return Ok(()) };
    let same = |model: &Model| match model.checkpoint.directory() {
        Directory::Path(path) => path.canonicalize().is_ok_and(|path| path == place),
        Directory::Embedded { .. } => false,
    };
    if target.replaces.is_some() && models.into_iter().any(same) {
        let reason = "it is the model that is read".to_owned();
        return Err(WriteError::NotReplaceable { path: target.path.to_owned(), reason }.into());
    }
    Ok(())
}

/// Whether a path lies in an output directory, or where that is being built.
pub(crate) fn is_within(path: &Path, target: &Path) -> Result<bool, Error> {
    let partial = Writer::partial_path(target)?;
    let whole = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    Ok([target, partial.as_path()].iter().any(|own| whole(path).starts_with(whole(own))))
}

/// The step of a job that is a conversion.
pub fn step() -> Step {
    Step::new("convert", [StepPart::WRITE])
}

/// What a conversion did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Converted {
    /// Bytes of input read in this run.
    pub input_bytes: u64,
    /// Bytes of all safetensors files.
    pub output_bytes: u64,
    /// Wall time of the work.
    pub seconds: f64,
}

/// Upper estimate of the resident memory of a conversion in bytes: program, headers, and for every thread the
/// mapped chunks of one round and its buffers, whatever the size of the model.
pub fn peak_memory(plan: &Plan, threads: usize) -> u64 {
    let largest_row = plan.items.iter().flat_map(Item::views).map(View::row_bytes).max().unwrap_or(0);
    let chunk = CHUNK_BYTES.max(largest_row) as u64;
    // Of a tensor whose rows lie all over it a round touches every page, and it may touch the next tensor's.
    let spread = plan.items.iter().flat_map(Item::views).map(View::spread_bytes).max().unwrap_or(0);
    let headers = plan.layout.specs().len() as u64 * 2_000;
    (12 << 20) + headers + 2 * spread as u64 + threads as u64 * chunk * (CHUNKS_PER_THREAD as u64 + 4)
}

/// Carries out `plan` on `model` into the directory `target`, on `threads` threads (0: one per core).
///
/// An unfinished run of the same plan on the same source is resumed, unless the [`Destination`] says otherwise.
///
/// # Errors
/// [`Error`]. After a refusal ([`Error::is_refusal`]) this run leaves nothing behind (what an earlier,
/// interrupted run left is kept); after any other failure the partial directory stays and the same call resumes.
/// `target` itself only ever appears complete.
pub fn convert<'d>(
    model: &Model,
    plan: &Plan,
    target: impl Into<Destination<'d>>,
    threads: usize,
    observer: &dyn Observer,
) -> Result<Converted, Error> {
    let start = Instant::now();
    let target = target.into();
    keep_apart(target, [model])?;
    observer.event(Event::Job { steps: &[step()] });
    for file in &model.companions()? {
        model.checkpoint.directory().check_readable(file)?;
    }
    let pool = threads::pool(threads)?;
    let (weights, careful) = if plan.settings.search {
        known_of_inputs(model, plan)
    } else {
        (ColumnWeights::new(), BTreeSet::new())
    };
    let search = plan.settings.search.then_some(&weights);
    let mut writer = open_writer(target, plan, Run::from(&*fingerprint(model, plan)?), observer)?;
    let carrier = Carrier { model, plan, pool: &pool, observer, search, careful: Some(&careful) };
    let read = match carrier.carry(&mut writer, 0..plan.items.len()) {
        Ok(read) => read,
        Err(error) => {
            if error.is_refusal() {
                writer.discard_if_fresh()?;
            }
            return Err(error);
        }
    };
    finish(writer, model, plan, observer)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Converted { input_bytes: read, output_bytes: plan.layout.file_bytes(), seconds })
}

/// Writes what stands beside the weights, and gives the directory its name.
pub(crate) fn finish(
    writer: Writer,
    model: &Model,
    plan: &Plan,
    observer: &dyn Observer,
) -> Result<(), Error> {
    observer.event(Event::Finishing);
    write_companions(&writer, model, plan, model.companions()?)?;
    writer.write_file("README.md", model_card(plan, model).as_bytes())?;
    Ok(writer.finish()?)
}

/// Writes the tensors that are others once more.
pub(crate) fn repeat(writer: &Writer, plan: &Plan) -> Result<(), WriteError> {
    for item in &plan.items {
        if let Job::Repeat { of } = item.job {
            writer.repeat(of, item.first_output)?;
        }
    }
    Ok(())
}

/// Tensors that are others once more, and everything beside the weights but the model card.
pub(crate) fn write_companions(
    writer: &Writer,
    model: &Model,
    plan: &Plan,
    companions: Vec<String>,
) -> Result<(), Error> {
    repeat(writer, plan)?;
    for file in companions {
        if plan.settings.text_only && is_processor(&file) {
            continue;
        }
        match &plan.generation_config {
            GenerationConfig::Replaced(config) if file == GENERATION_CONFIG => {
                writer.write_file(&file, config.to_python_json().as_bytes())?;
            }
            GenerationConfig::LeftOut if file == GENERATION_CONFIG => {}
            _ => writer.copy_file(model.checkpoint.directory(), &file)?,
        }
    }
    if let Some(overrides) = &plan.settings.overrides {
        writer.write_file("recipe.toml", overrides.text.as_bytes())?;
    }
    writer.write_file("model.safetensors.index.json", plan.layout.index_json(plan.parameters).as_bytes())?;
    Ok(writer.write_file("config.json", plan.config.to_mlx_json().as_bytes())?)
}

/// A line that stands for the source files and everything in the plan that decides bytes.
pub(crate) fn fingerprint(model: &Model, plan: &Plan) -> Result<String, Error> {
    let checkpoint = &model.checkpoint;
    let mut source = String::new();
    for shard in checkpoint.shards() {
        let _ = write!(source, "{shard} {:?};", checkpoint.directory().identity(shard)?);
    }
    Ok(fingerprint_of(&source, plan))
}

/// The same for a source that `source` recognises.
pub(crate) fn fingerprint_of(source: &str, plan: &Plan) -> String {
    struct Hash(Sha256);
    impl std::fmt::Write for Hash {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            self.0.update(text.as_bytes());
            Ok(())
        }
    }
    let mut hash = Hash(Sha256::new());
    let (items, specs, settings) = (&plan.items, plan.layout.specs(), &plan.settings);
    let _ = write!(hash, "{source}{items:?};{specs:?};{};{}", settings.allow_nonfinite, settings.search);
    let hash = crate::data::hexadecimal(&hash.0.finalize());
    format!("mlx-quant {}, algorithm {} {hash}", env!("CARGO_PKG_VERSION"), crate::device::ALGORITHM)
}

/// What is known without data of the inputs of layers, and the layers of 3 bits where that may be far from what they are.
/// For a model without a decoder description: nothing, and all.
fn known_of_inputs(model: &Model, plan: &Plan) -> (ColumnWeights, BTreeSet<String>) {
    let careful =
        |item: &&Item| matches!(item.job, Job::Quantize { scheme, .. } if scheme.bits() == CAREFUL_BITS);
    let mut careful: BTreeSet<String> =
        plan.items.iter().filter(careful).map(|item| item.name.clone()).collect();
    let Ok(walk) = crate::Walk::open(model) else { return (ColumnWeights::new(), careful) };
    for path in bold(&walk.decoder) {
        careful.remove(path);
    }
    (column_weights(&walk, plan), careful)
}

/// Layers whose inputs are about as loud as they seem: tables and head, which read tokens or the last norm; what gates
/// and widens in a feed-forward network; and what reads the mean of values that attention is. Behind the norm of a mixer,
/// and behind a gated product, some inputs are hundreds of times as loud as others.
fn bold(decoder: &Decoder) -> impl Iterator<Item = &str> {
    let stages = decoder.blocks.iter().flat_map(|block| &block.stages);
    let blocks = stages.flat_map(|stage| &stage.branches).flat_map(|branch| {
        let feeds = matches!(branch.layer, Layer::Mlp(_) | Layer::Moe(_));
        let even = move |site: &Site<'_>| match site.producer {
            Producer::Norm(_) | Producer::Residual => feeds,
            Producer::Attention(_) => true,
            Producer::Product(_) | Producer::Other => false,
        };
        branch.sites().into_iter().filter(even).flat_map(|site| site.readers)
    });
    blocks.map(|linear| linear.path.as_str()).chain(decoder.tables())
}

/// How loud the inputs of a layer's columns are behind a norm: the squares of its weight, as what it normed has unit
/// variance.
fn column_weights(walk: &crate::Walk, plan: &Plan) -> ColumnWeights {
    let mut weights = ColumnWeights::new();
    let of = |norm: &Norm| -> Option<Vec<f32>> {
        let path = norm.path.as_ref().filter(|path| !path.contains("{head}"))?;
        let parameters = walk.weights.module(path, &walk.device).ok()?;
        let weight = parameters.get(&format!("{path}.weight"))?.to_vec().ok()?;
        let one = if norm.plus_one { 1.0 } else { 0.0 };
        Some(weight.iter().map(|value| (value + one) * (value + one)).collect())
    };
    for site in walk.decoder.blocks.iter().flat_map(Block::sites).filter(Site::has_own_readers) {
        if let Producer::Norm(norm) = site.producer
            && let Some(squares) = of(norm)
        {
            weights.extend(site.readers.iter().map(|reader| (reader.path.clone(), squares.clone())));
        }
    }
    let head = walk.decoder.head.linear.as_ref().map_or(&walk.decoder.embedding.path, |head| &head.path);
    weights.extend(of(&walk.decoder.norm).map(|squares| (head.clone(), squares)));
    let columns: HashMap<&str, usize> = plan
        .items
        .iter()
        .filter_map(|item| Some((item.name.as_str(), item.views().next()?.columns())))
        .collect();
    weights.retain(|path, weights| {
        columns.get(path.as_str()) == Some(&weights.len()) && weights.iter().any(|weight| *weight > 0.0)
    });
    weights
}
