//! Carrying out items of a plan that need no calibration: read rows, cast, quantize, write in place, give memory back.
//!
//! Work is cut into chunks of about a megabyte of input, over all tensors, so that large and small tensors
//! alike keep every thread busy. A chunk's place in the output is known from the plan; nothing depends on
//! which thread does it or when, and the bytes are the same for every number of threads.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use mlx_format::checkpoint::{Layout, Writer};
use mlx_format::{FloatType, Mode, PackedMut, PackedRef, Scheme};
use mlx_quant_model::View;
use rayon::prelude::*;

use crate::methods::{How, Rounded, round};
use crate::observer::{Event, Observer};
use crate::plan::{Item, Job, Plan};
use crate::{Error, Model, spread};

/// Input bytes of one chunk: small enough for a core's cache, large enough for the disk.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that each thread works on between looks at progress and cancellation.
pub(crate) const CHUNKS_PER_THREAD: usize = 16;
/// Output is synced and journalled whenever this much input has been done, or so much time has gone by: that is what a
/// kill costs.
const JOURNAL_BYTES: u64 = 1 << 30;
const JOURNAL_TIME: Duration = Duration::from_secs(60);

/// Weights of a layer's columns for the searched grid, by module path, `[in]` or `[experts * in]`; layers that are not
/// named weigh all alike, and large weights more.
pub(crate) type ColumnWeights = BTreeMap<String, Vec<f32>>;

/// What carries out items.
#[derive(Clone, Copy)]
pub(crate) struct Carrier<'a> {
    pub(crate) model: &'a Model,
    pub(crate) plan: &'a Plan,
    pub(crate) pool: &'a rayon::ThreadPool,
    pub(crate) observer: &'a dyn Observer,
    /// Scales and biases are searched instead of taken from each group's extremes.
    pub(crate) search: Option<&'a ColumnWeights>,
    /// Layers where the search stays near those extremes, by module path.
    pub(crate) careful: Option<&'a BTreeSet<String>>,
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

pub(crate) fn item_bytes(item: &Item) -> usize {
    item.views().map(|view| view.rows() * view.row_bytes()).sum()
}

fn item_rows(item: &Item) -> usize {
    item.views().next().map_or(0, View::rows)
}

/// All chunks of those items, in order.
fn chunks(plan: &Plan, items: Vec<usize>) -> impl Iterator<Item = Chunk> + use<'_> {
    items.into_iter().flat_map(|index| {
        let item = &plan.items[index];
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

impl Carrier<'_> {
    /// Carries out those of `items` (indices in the plan) that are not done. Gives the bytes that were read.
    ///
    /// # Errors
    /// As [`crate::convert()`].
    pub(crate) fn carry(
        &self,
        writer: &mut Writer,
        items: impl IntoIterator<Item = usize>,
    ) -> Result<u64, Error> {
        let Self { model, plan, pool, observer, .. } = *self;
        let bytes = |index: &usize| item_bytes(&plan.items[*index]) as u64;
        let done = |index: &usize| writer.done().contains(&plan.items[*index].first_output);
        let (finished, left): (Vec<usize>, Vec<usize>) = items.into_iter().partition(done);
        if left.iter().any(|index| matches!(plan.items[*index].job, Job::Quantize { .. })) {
            model.device.leave("what is rounded without text", "reading and writing it take longer");
        }
        let resumed: u64 = finished.iter().map(bytes).sum();
        observer.event(Event::Started { total: resumed + left.iter().map(bytes).sum::<u64>(), resumed });
        let scratch: Vec<Mutex<Scratch>> =
            (0..pool.current_num_threads()).map(|_| Mutex::default()).collect();
        let mut pending = chunks(plan, left);
        // The disk reads a round ahead of the processors.
        let mut next = self.next_round(&mut pending);
        let (mut read, mut unrecorded, mut recorded) = (0u64, 0u64, Instant::now());
        let mut finished = Vec::new();
        let mut globals = BTreeMap::new();
        while !next.is_empty() {
            if observer.cancelled() {
                writer.record(finished)?;
                return Err(Error::Interrupted);
            }
            let upcoming = self.next_round(&mut pending);
            let round = std::mem::replace(&mut next, upcoming);
            observer.event(Event::Working { name: &plan.items[round[0].item].name });
            for chunk in &round {
                if plan.is_spread(&plan.items[chunk.item]) && !globals.contains_key(&chunk.item) {
                    globals
                        .insert(chunk.item, pool.install(|| spread::globals(model, &plan.items[chunk.item])));
                }
            }
            // All results, so that the same chunk is blamed whatever the timing.
            let results: Vec<Result<(), Error>> = pool.install(|| {
                let shared: &Writer = writer;
                round
                    .par_iter()
                    .map(|chunk| {
                        let thread = rayon::current_thread_index().unwrap_or(0);
                        // A search waits for parts of its own, and the thread may come by here again meanwhile.
                        let mut own = Scratch::default();
                        let mut held = scratch[thread].try_lock();
                        let scratch = held.as_deref_mut().unwrap_or(&mut own);
                        let task = Task {
                            model,
                            plan,
                            writer: shared,
                            item: &plan.items[chunk.item],
                            globals: globals.get(&chunk.item).map(Vec::as_slice),
                            search: self.search,
                            careful: self
                                .careful
                                .is_some_and(|paths| paths.contains(&plan.items[chunk.item].name)),
                        };
                        task.run(chunk.rows.clone(), scratch)
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
            if unrecorded >= JOURNAL_BYTES || recorded.elapsed() >= JOURNAL_TIME {
                writer.record(std::mem::take(&mut finished))?;
                (unrecorded, recorded) = (0, Instant::now());
            }
            observer.event(Event::Progress { done: resumed + read });
        }
        Ok(read)
    }

    /// The chunks that are worked on together, being read ahead from now on.
    fn next_round(&self, pending: &mut impl Iterator<Item = Chunk>) -> Vec<Chunk> {
        let round: Vec<Chunk> = pending.take(CHUNKS_PER_THREAD * self.pool.current_num_threads()).collect();
        for chunk in &round {
            for view in self.plan.items[chunk.item].views() {
                view.prefetch(&self.model.checkpoint, chunk.rows.clone());
            }
        }
        round
    }
}

/// One item of a conversion.
struct Task<'a> {
    /// What scales of each expert are spread over, where the layer has that.
    globals: Option<&'a [f32]>,
    model: &'a Model,
    plan: &'a Plan,
    writer: &'a Writer,
    item: &'a Item,
    search: Option<&'a ColumnWeights>,
    careful: bool,
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
            Job::Quantize { view, float, scheme } if self.search.is_some() => {
                self.search(view, *float, *scheme, rows, scratch)?;
            }
            Job::Quantize { view, float, scheme } => {
                let columns = view.columns();
                let mut bytes: Cow<'_, [u8]> = view.rows_of(checkpoint, rows.clone());
                if view.change.is_some() || view.dtype != float.dtype() {
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
                let done = match self.globals {
                    None => mlx_format::quantize(*scheme, *float, columns, &bytes, out, allow),
                    Some(globals) => {
                        let height = view.rows() / globals.len();
                        spread::quantize(*float, columns, &bytes, (globals, height), rows.start, out)
                    }
                };
                done.map_err(|found| {
                    let (tensor, file, element) = self.place(view, rows.start, columns, found.element);
                    Error::NonFinite { tensor, file, element, value: found.value }
                })?;
                self.write(0, &rows, weight_row, &scratch.weight)?;
                self.write(1, &rows, scale_bytes, &scratch.scales)?;
                if scheme.has_biases() {
                    self.write(2, &rows, biases_row, &scratch.biases)?;
                }
                if let (Some(globals), 0) = (self.globals, rows.start) {
                    let bytes: Vec<u8> = globals.iter().flat_map(|global| global.to_le_bytes()).collect();
                    self.write(2, &(0..globals.len()), 4, &bytes)?;
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
            // What it repeats may be written later.
            Job::Repeat { .. } => {}
        }
        Ok(())
    }

    /// Rounds rows to nearest on the searched grid.
    fn search(
        &self,
        view: &View,
        float: FloatType,
        scheme: Scheme,
        rows: Range<usize>,
        scratch: &mut Scratch,
    ) -> Result<(), Error> {
        let columns = view.columns();
        let bytes = view.rows_of(&self.model.checkpoint, rows.clone());
        // In the output's dtype, as round-to-nearest sees them.
        let bytes = self.cast(view, &bytes, float, rows.start, &mut scratch.values, &mut scratch.cast)?;
        if let Some(at) = float.first_nonfinite(bytes) {
            let (tensor, file, element) = self.place(view, rows.start, columns, at);
            let value = f32::NAN;
            return Err(Error::NonFinite { tensor, file, element, value });
        }
        let mut values = vec![0f32; rows.len() * columns];
        float.widen(bytes, &mut values);
        let known = self.search.and_then(|weights| weights.get(&self.item.name));
        let known = known.filter(|weights| !weights.is_empty() && weights.len().is_multiple_of(columns));
        let Some(weights) = known else {
            let even = vec![1.0; columns];
            let weights = &even[..];
            let how =
                if self.careful { How::Careful { weights, blind: true } } else { How::Blind { weights } };
            let rounded = round(&values, columns, scheme, float, how);
            let rounded = rounded.map_err(mlx_quant_model::WeightsError::from)?;
            return write_rounded(self.writer, self.item.first_output, rows.start, float, &rounded);
        };
        // Rows of one expert after another.
        let per_expert = (view.rows() / (weights.len() / columns)).max(1);
        let mut start = rows.start;
        while start < rows.end {
            let expert = start / per_expert;
            let end = rows.end.min((expert + 1) * per_expert);
            let own = &values[(start - rows.start) * columns..(end - rows.start) * columns];
            let weights = &weights[expert * columns..][..columns];
            let how =
                if self.careful { How::Careful { weights, blind: false } } else { How::Nearest { weights } };
            let rounded =
                round(own, columns, scheme, float, how).map_err(mlx_quant_model::WeightsError::from)?;
            write_rounded(self.writer, self.item.first_output, start, float, &rounded)?;
            start = end;
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

    /// Elements of `view` in dtype `float`; what the view changes is changed before, in the dtype of the file.
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
        if let Some(change) = &view.change {
            change.apply(values, first, view.columns(), Some(from));
        }
        out.resize(values.len() * float.size(), 0);
        float.narrow(values, out);
        self.check_range(view, float, out, first, view.columns())?;
        Ok(out)
    }
}

/// Weight, scales and biases of rows after plain quantization, and what they decode to in float32. The values are
/// finite: weights were checked when they were read.
pub(crate) fn plain(
    values: &[f32],
    columns: usize,
    scheme: Scheme,
    float: FloatType,
) -> ([Vec<u8>; 3], Vec<f32>) {
    let rows = values.len() / columns;
    let scale_bytes = rows * scheme.scale_bytes(columns, float);
    let mut bytes = vec![0u8; values.len() * float.size()];
    float.narrow(values, &mut bytes);
    let mut weight = vec![0; rows * scheme.words(columns) * 4];
    let mut scales = vec![0; scale_bytes];
    let mut biases = vec![0; if scheme.has_biases() { scale_bytes } else { 0 }];
    let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut biases };
    let _ = mlx_format::quantize(scheme, float, columns, &bytes, out, true);
    let widened = |bytes: &[u8]| match scheme.mode() {
        Mode::Affine => {
            let mut wide = vec![0f32; bytes.len() / float.size()];
            float.widen(bytes, &mut wide);
            wide.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()
        }
        _ => bytes.to_vec(),
    };
    let (wide_scales, wide_biases) = (widened(&scales), widened(&biases));
    let packed = PackedRef { weight: &weight, scales: &wide_scales, biases: &wide_biases };
    let mut bytes = vec![0u8; values.len() * 4];
    mlx_format::dequantize(scheme, FloatType::F32, columns, packed, &mut bytes);
    let mut decoded = vec![0f32; values.len()];
    FloatType::F32.widen(&bytes, &mut decoded);
    ([weight, scales, biases], decoded)
}

/// Writes rows from `first` on of a layer whose tensors begin at `output`.
pub(crate) fn write_rounded(
    writer: &Writer,
    output: usize,
    first: usize,
    float: FloatType,
    rounded: &Rounded,
) -> Result<(), Error> {
    let (scheme, columns) = (rounded.scheme, rounded.columns);
    for numbers in [&rounded.scales, &rounded.biases] {
        let fits = |number: &f32| !scheme.has_biases() || float.round(*number).is_finite();
        if let Some(at) = numbers.iter().position(|number| !fits(number)) {
            let tensor = writer.layout().specs()[output].name.clone();
            let element = (first * columns) + at * scheme.group_size();
            return Err(Error::Overflow {
                tensor,
                file: "the source".to_owned(),
                element,
                dtype: float.name(),
            });
        }
    }
    let mut weight = vec![0u8; rounded.rows() * scheme.words(columns) * 4];
    mlx_format::pack(scheme, &rounded.codes, &mut weight);
    writer.write_at(output, (first * scheme.words(columns) * 4) as u64, &weight)?;
    if !scheme.has_biases() {
        let start = first * scheme.scale_bytes(columns, float);
        writer.write_at(output + 1, start as u64, &rounded.scale_bytes())?;
        return Ok(());
    }
    for (leaf, numbers) in [(1, &rounded.scales), (2, &rounded.biases)] {
        let mut bytes = vec![0u8; numbers.len() * float.size()];
        float.narrow(numbers, &mut bytes);
        writer.write_at(output + leaf, (first * scheme.scale_bytes(columns, float)) as u64, &bytes)?;
    }
    Ok(())
}
