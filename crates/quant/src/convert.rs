//! Carrying out a plan that needs no calibration: read rows, cast, quantize, write in place, give memory back.
//!
//! Work is cut into chunks of about a megabyte of input, over all tensors, so that large and small tensors
//! alike keep every thread busy. A chunk's place in the output is known from the plan; nothing depends on
//! which thread does it or when, and the bytes are the same for every number of threads.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use mlx_format::checkpoint::{Layout, Writer};
use mlx_format::{FloatType, PackedMut, PackedRef};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::observer::{Event, Observer};
use crate::plan::{Item, Job, Plan};
use crate::{Error, Model, model_card};
use mlx_quant_model::View;

/// Input bytes of one chunk: small enough for a core's cache, large enough for the disk.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that each thread works on between looks at progress and cancellation.
const CHUNKS_PER_THREAD: usize = 16;
/// Output is synced and journalled whenever this much input has been done.
const JOURNAL_BYTES: u64 = 1 << 30;

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

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    cast: Vec<u8>,
    weight: Vec<u8>,
    scales: Vec<u8>,
    biases: Vec<u8>,
}

/// Some rows of one item.
struct Chunk {
    item: usize,
    rows: Range<usize>,
    bytes: usize,
}

/// One thread per core where none are asked for; the environment has no say.
pub fn threads_or_all(threads: usize) -> usize {
    if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads }
}

/// Upper estimate of the resident memory of a conversion in bytes: program, headers, and for every thread the
/// mapped chunks of one round and its buffers, whatever the size of the model.
pub fn peak_memory(plan: &Plan, threads: usize) -> u64 {
    let largest_row = plan.items.iter().flat_map(Item::views).map(View::row_bytes).max().unwrap_or(0);
    let chunk = CHUNK_BYTES.max(largest_row) as u64;
    let headers = plan.layout.specs().len() as u64 * 2_000;
    (12 << 20) + headers + threads as u64 * chunk * (CHUNKS_PER_THREAD as u64 + 4)
}

/// Carries out `plan` on `model` into the directory `target`, on `threads` threads (0: one per core).
///
/// An unfinished run of the same plan on the same source is resumed.
///
/// # Errors
/// [`Error`]. After a refusal ([`Error::is_refusal`]) this run leaves nothing behind (what an earlier,
/// interrupted run left is kept); after any other failure the partial directory stays and the same call resumes.
/// `target` itself only ever appears complete.
pub fn convert(
    model: &Model,
    plan: &Plan,
    target: &Path,
    threads: usize,
    observer: &dyn Observer,
) -> Result<Converted, Error> {
    let start = Instant::now();
    let companions = model.companions()?;
    for file in &companions {
        model.checkpoint.directory().check_readable(file)?;
    }
    let threads = threads_or_all(threads);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Error::Threads { threads, reason: error.to_string() })?;
    let mut writer = Writer::open(target, plan.layout.clone(), &fingerprint(model, plan)?)?;
    let read = match run(model, plan, &mut writer, &pool, observer) {
        Ok(read) => read,
        Err(error) => {
            if error.is_refusal() {
                writer.discard_if_fresh()?;
            }
            return Err(error);
        }
    };
    observer.event(Event::Finishing);
    for file in companions {
        writer.copy_file(model.checkpoint.directory(), &file)?;
    }
    if let Some(overrides) = &plan.settings.overrides {
        writer.write_file("recipe.toml", overrides.text.as_bytes())?;
    }
    let source = model.checkpoint.directory().display();
    let name = Path::new(&*source).file_name().map_or(source.clone(), |name| name.to_string_lossy());
    writer.write_file("README.md", model_card(plan, &name).as_bytes())?;
    writer.write_file("model.safetensors.index.json", plan.layout.index_json(plan.parameters).as_bytes())?;
    writer.write_file("config.json", plan.config.to_mlx_json().as_bytes())?;
    writer.finish()?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Converted { input_bytes: read, output_bytes: plan.layout.file_bytes(), seconds })
}

/// A line that stands for the source files and everything in the plan that decides bytes.
fn fingerprint(model: &Model, plan: &Plan) -> Result<String, Error> {
    struct Hash(Sha256);
    impl std::fmt::Write for Hash {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            self.0.update(text.as_bytes());
            Ok(())
        }
    }
    let mut hash = Hash(Sha256::new());
    let checkpoint = &model.checkpoint;
    for shard in checkpoint.shards() {
        let identity = checkpoint.directory().identity(shard)?;
        let _ = write!(hash, "{shard} {identity:?};");
    }
    let _ = write!(hash, "{:?};{:?};{}", plan.items, plan.layout.specs(), plan.settings.allow_nonfinite);
    let mut line = format!("mlx-quant {} ", env!("CARGO_PKG_VERSION"));
    for byte in hash.0.finalize() {
        let _ = write!(line, "{byte:02x}");
    }
    Ok(line)
}

fn item_bytes(item: &Item) -> usize {
    item.views().map(|view| view.rows() * view.row_bytes()).sum()
}

fn item_rows(item: &Item) -> usize {
    item.views().next().map_or(0, View::rows)
}

/// All chunks of the items that are not done, in order.
fn chunks<'p>(plan: &'p Plan, writer: &Writer) -> impl Iterator<Item = Chunk> + use<'p> {
    let done = writer.done().clone();
    let items = plan.items.iter().enumerate().filter(move |(_, item)| !done.contains(&item.first_output));
    items.flat_map(|(index, item)| {
        let (rows, bytes) = (item_rows(item), item_bytes(item));
        let row_bytes = bytes.div_ceil(rows.max(1)).max(1);
        let step = (CHUNK_BYTES / row_bytes).max(1);
        // An empty tensor is done by having no bytes.
        let starts = (0..rows.max(1)).step_by(step);
        starts.map(move |start| {
            let end = rows.min(start + step);
            Chunk { item: index, rows: start..end, bytes: (end - start) * row_bytes }
        })
    })
}

/// The chunks that are worked on together, being read ahead from now on.
fn next_round(
    pending: &mut impl Iterator<Item = Chunk>,
    model: &Model,
    plan: &Plan,
    pool: &rayon::ThreadPool,
) -> Vec<Chunk> {
    let round: Vec<Chunk> = pending.take(CHUNKS_PER_THREAD * pool.current_num_threads()).collect();
    for chunk in &round {
        for view in plan.items[chunk.item].views() {
            view.prefetch(&model.checkpoint, chunk.rows.clone());
        }
    }
    round
}

fn run(
    model: &Model,
    plan: &Plan,
    writer: &mut Writer,
    pool: &rayon::ThreadPool,
    observer: &dyn Observer,
) -> Result<u64, Error> {
    let total = plan.input_bytes();
    let resumed: u64 = plan
        .items
        .iter()
        .filter(|item| writer.done().contains(&item.first_output))
        .map(|item| item_bytes(item) as u64)
        .sum();
    observer.event(Event::Started { total, resumed });
    let scratch: Vec<Mutex<Scratch>> = (0..pool.current_num_threads()).map(|_| Mutex::default()).collect();
    let mut pending = chunks(plan, writer);
    // The disk reads a round ahead of the processors.
    let mut next = next_round(&mut pending, model, plan, pool);
    let (mut read, mut unrecorded) = (0u64, 0u64);
    let mut finished = Vec::new();
    while !next.is_empty() {
        if observer.cancelled() {
            writer.record(finished)?;
            return Err(Error::Interrupted);
        }
        let upcoming = next_round(&mut pending, model, plan, pool);
        let round = std::mem::replace(&mut next, upcoming);
        observer.event(Event::Working { name: &plan.items[round[0].item].name });
        // All results, so that the same chunk is blamed whatever the timing.
        let results: Vec<Result<(), Error>> = pool.install(|| {
            let shared: &Writer = writer;
            round
                .par_iter()
                .map(|chunk| {
                    let thread = rayon::current_thread_index().unwrap_or(0);
                    // A worker holds its own buffers only; a panic elsewhere does not spoil them.
                    let mut scratch =
                        scratch[thread].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let task = Task { model, plan, writer: shared, item: &plan.items[chunk.item] };
                    task.run(chunk.rows.clone(), &mut scratch)
                })
                .collect()
        });
        results.into_iter().collect::<Result<(), Error>>()?;
        model.checkpoint.release();
        for chunk in round {
            read += chunk.bytes as u64;
            unrecorded += chunk.bytes as u64;
            if chunk.rows.end == item_rows(&plan.items[chunk.item]) {
                finished.push(plan.items[chunk.item].first_output);
            }
        }
        if unrecorded >= JOURNAL_BYTES {
            writer.record(std::mem::take(&mut finished))?;
            unrecorded = 0;
        }
        observer.event(Event::Progress { done: resumed + read });
    }
    Ok(read)
}

/// One item of a conversion.
struct Task<'a> {
    model: &'a Model,
    plan: &'a Plan,
    writer: &'a Writer,
    item: &'a Item,
}

impl Task<'_> {
    fn run(&self, rows: Range<usize>, scratch: &mut Scratch) -> Result<(), Error> {
        let checkpoint = &self.model.checkpoint;
        match &self.item.job {
            Job::Copy { view, float } => {
                let bytes = view.rows_of(checkpoint, rows.clone());
                let row_bytes = self.output_row_bytes(0, view.rows());
                if let Some(float) = float {
                    let (values, cast) = (&mut scratch.values, &mut scratch.cast);
                    self.write(
                        0,
                        &rows,
                        row_bytes,
                        self.cast(view, &bytes, *float, rows.start, values, cast)?,
                    )?;
                } else {
                    self.check_finite(view, &bytes, rows.start)?;
                    self.write(0, &rows, row_bytes, &bytes)?;
                }
            }
            Job::Quantize { view, float, scheme } => {
                let columns = view.columns();
                let mut bytes: Cow<'_, [u8]> = view.rows_of(checkpoint, rows.clone());
                if view.add_one || view.dtype != float.dtype() {
                    bytes = Cow::Borrowed(self.cast(
                        view,
                        &bytes,
                        *float,
                        rows.start,
                        &mut scratch.values,
                        &mut scratch.cast,
                    )?);
                }
                let scale_bytes = scheme.scale_bytes(columns, *float);
                let (weight_row, biases_row) =
                    (scheme.words(columns) * 4, if scheme.has_biases() { scale_bytes } else { 0 });
                scratch.weight.resize(rows.len() * weight_row, 0);
                scratch.scales.resize(rows.len() * scale_bytes, 0);
                scratch.biases.resize(rows.len() * biases_row, 0);
                let out = PackedMut {
                    weight: &mut scratch.weight,
                    scales: &mut scratch.scales,
                    biases: &mut scratch.biases,
                };
                let allow = self.plan.settings.allow_nonfinite;
                mlx_format::quantize(*scheme, *float, columns, &bytes, out, allow).map_err(|found| {
                    let (tensor, file, element) = self.place(view, rows.start, columns, found.element);
                    Error::NonFinite { tensor, file, element, value: found.value }
                })?;
                self.write(0, &rows, weight_row, &scratch.weight)?;
                self.write(1, &rows, scale_bytes, &scratch.scales)?;
                if scheme.has_biases() {
                    self.write(2, &rows, biases_row, &scratch.biases)?;
                }
            }
            Job::Dequantize { weight, scales, biases, float, scheme } => {
                let columns = scales.columns() * scheme.group_size();
                let packed = weight.rows_of(checkpoint, rows.clone());
                let raw_scales = scales.rows_of(checkpoint, rows.clone());
                let raw_biases = biases.as_ref().map(|biases| biases.rows_of(checkpoint, rows.clone()));
                // Affine scales and biases are cast before they are used, as mlx-lm does.
                let (mut cast_scales, mut cast_biases) = (Vec::new(), Vec::new());
                let (scale_bytes, bias_bytes): (&[u8], &[u8]) = match (&raw_biases, biases) {
                    (Some(raw), Some(biases)) => (
                        self.cast(
                            scales,
                            &raw_scales,
                            *float,
                            rows.start,
                            &mut scratch.values,
                            &mut cast_scales,
                        )?,
                        self.cast(biases, raw, *float, rows.start, &mut scratch.values, &mut cast_biases)?,
                    ),
                    _ => (&raw_scales, &[]),
                };
                let row_bytes = columns * float.size();
                scratch.weight.resize(rows.len() * row_bytes, 0);
                let packed = PackedRef { weight: &packed, scales: scale_bytes, biases: bias_bytes };
                mlx_format::dequantize(*scheme, *float, columns, packed, &mut scratch.weight);
                self.check_range(weight, *float, &scratch.weight, rows.start, columns)?;
                self.write(0, &rows, row_bytes, &scratch.weight)?;
            }
        }
        Ok(())
    }

    fn layout(&self) -> &Layout {
        self.writer.layout()
    }

    fn output_row_bytes(&self, output: usize, rows: usize) -> usize {
        let bytes = self.layout().specs()[self.item.first_output + output].bytes() as usize;
        bytes.checked_div(rows).unwrap_or(0)
    }

    fn write(&self, output: usize, rows: &Range<usize>, row_bytes: usize, bytes: &[u8]) -> Result<(), Error> {
        let offset = (rows.start * row_bytes) as u64;
        Ok(self.writer.write_at(self.item.first_output + output, offset, bytes)?)
    }

    /// The first element that is not finite, unless those are allowed.
    fn nonfinite_in(&self, float: FloatType, bytes: &[u8]) -> Option<usize> {
        if self.plan.settings.allow_nonfinite { None } else { float.first_nonfinite(bytes) }
    }

    /// Name, source file and index in the whole tensor of element `at` of rows of `columns` from `first` on.
    fn place(&self, view: &View, first: usize, columns: usize, at: usize) -> (String, String, usize) {
        let checkpoint = &self.model.checkpoint;
        let tensor = checkpoint.tensor(view.source_of(first + at / columns.max(1)));
        let file = tensor.map_or_else(String::new, |tensor| checkpoint.file_of(tensor));
        (self.layout().specs()[self.item.first_output].name.clone(), file, first * columns + at)
    }

    fn check_finite(&self, view: &View, bytes: &[u8], first: usize) -> Result<(), Error> {
        let Some(float) = FloatType::from_dtype(view.dtype) else { return Ok(()) };
        let Some(at) = self.nonfinite_in(float, bytes) else { return Ok(()) };
        let mut value = [0f32];
        float.widen(&bytes[at * float.size()..][..float.size()], &mut value);
        let (tensor, file, element) = self.place(view, first, view.columns(), at);
        Err(Error::NonFinite { tensor, file, element, value: value[0] })
    }

    /// Refuses infinities that came about by rounding finite values to dtype `float`.
    fn check_range(
        &self,
        view: &View,
        float: FloatType,
        bytes: &[u8],
        first: usize,
        columns: usize,
    ) -> Result<(), Error> {
        let Some(at) = self.nonfinite_in(float, bytes) else { return Ok(()) };
        let (tensor, file, element) = self.place(view, first, columns, at);
        Err(Error::Overflow { tensor, file, element, dtype: float.name() })
    }

    /// Elements of `view` in dtype `float`; 1 is added before, in the dtype of the file, where the view says so.
    fn cast<'s>(
        &self,
        view: &View,
        bytes: &[u8],
        float: FloatType,
        first: usize,
        values: &mut Vec<f32>,
        out: &'s mut Vec<u8>,
    ) -> Result<&'s [u8], Error> {
        self.check_finite(view, bytes, first)?;
        let from = FloatType::from_dtype(view.dtype).unwrap_or(float);
        values.resize(bytes.len() / from.size(), 0.0);
        from.widen(bytes, values);
        if view.add_one {
            for value in &mut *values {
                *value = from.round(*value + 1.0);
            }
        }
        out.resize(values.len() * float.size(), 0);
        float.narrow(values, out);
        self.check_range(view, float, out, first, view.columns())?;
        Ok(out)
    }
}
