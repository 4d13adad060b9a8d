//! Every value is a number: weights, norms, scales, biases. Read as conversions read: some rows at a time, in parallel,
//! the pages given back after each round.

use std::ops::Range;

use mlx_format::{Dtype, FloatType, Mode};
use mlx_quant_model::{Named, View};
use rayon::prelude::*;

use super::findings::Findings;
use crate::carry::{CHUNK_BYTES, CHUNKS_PER_THREAD};
use crate::inspect::stored::{Stored, bytes, stored};
use crate::{Error, Event, Model, Observer, threads};

/// What a tensor's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Float(FloatType),
    /// Exponents of mxfp4 and mxfp8: 255 is no number.
    E8m0,
    /// Scales of nvfp4, elements of mxfp8: 127 and 255 are no numbers.
    E4m3,
}

/// A tensor to be read.
struct Task<'n> {
    name: String,
    view: &'n View,
    kind: Kind,
}

/// Values of a chunk that are no numbers.
struct Found {
    task: usize,
    /// Element in the tensor.
    first: usize,
    count: usize,
    value: f32,
}

/// Returns the number of tensors and bytes that were read.
pub(super) fn check(
    model: &Model,
    named: &Named,
    observer: &dyn Observer,
    threads: usize,
    findings: &mut Findings,
) -> Result<(usize, u64), Error> {
    let tasks = tasks(named);
    let total = tasks.iter().map(|task| bytes(task.view)).sum();
    let pool = threads::pool(threads)?;
    let threads = pool.current_num_threads();
    observer.event(Event::Started { total, resumed: 0 });
    let mut chunks = tasks.iter().enumerate().flat_map(|(index, task)| chunks(index, task.view));
    let (mut done, mut found) = (0, Vec::<Found>::new());
    loop {
        if observer.cancelled() {
            return Err(Error::Interrupted);
        }
        let round: Vec<_> = chunks.by_ref().take(CHUNKS_PER_THREAD * threads).collect();
        let Some((first, _)) = round.first() else { break };
        observer.event(Event::Working { name: &tasks[*first].name });
        let results: Vec<Option<Found>> = pool.install(|| {
            let read =
                |(index, rows): &(usize, Range<usize>)| tasks[*index].read(model, *index, rows.clone());
            round.par_iter().map(read).collect()
        });
        model.checkpoint.release();
        found.extend(results.into_iter().flatten());
        done += round
            .iter()
            .map(|(index, rows)| (rows.len() * tasks[*index].view.row_bytes()) as u64)
            .sum::<u64>();
        observer.event(Event::Progress { done });
    }
    observer.event(Event::Finishing);
    for of_task in found.chunk_by(|a, b| a.task == b.task) {
        let (first, count) = (&of_task[0], of_task.iter().map(|found| found.count).sum::<usize>());
        let (name, file) = (&tasks[first.task].name, tasks[first.task].file(model, first.first));
        let (element, value) = (first.first, first.value);
        findings.warning(
            name,
            format!("in {file}: {count} value(s) are no numbers, element {element} is {value}"),
        );
    }
    Ok((tasks.len(), total))
}

/// Tensors in natural order, without those whose bytes can be anything.
fn tasks(named: &Named) -> Vec<Task<'_>> {
    let mut tasks = Vec::new();
    for stored in stored(&named.tensors).into_iter().chain(stored(&named.towers)) {
        match stored {
            Stored::Plain { name, view } => {
                if let Some(float) = FloatType::from_dtype(view.dtype) {
                    tasks.push(Task { name: name.to_owned(), view, kind: Kind::Float(float) });
                }
            }
            Stored::Packed(packed) => {
                let mode = packed.scheme(named).map(mlx_format::Scheme::mode);
                for (name, view) in packed.parts() {
                    let kind = match (view.dtype, mode) {
                        (Dtype::U8, Some(Mode::Nvfp4)) | (Dtype::U32, Some(Mode::Mxfp8)) => Some(Kind::E4m3),
                        (Dtype::U8, Some(_)) => Some(Kind::E8m0),
                        (dtype, _) => FloatType::from_dtype(dtype).map(Kind::Float),
                    };
                    tasks.extend(kind.map(|kind| Task { name, view, kind }));
                }
            }
        }
    }
    tasks
}

fn chunks(index: usize, view: &View) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
    let rows = view.rows();
    let step = (CHUNK_BYTES / view.row_bytes().max(1)).max(1);
    (0..rows).step_by(step).map(move |start| (index, start..rows.min(start + step)))
}

impl Task<'_> {
    fn read(&self, model: &Model, task: usize, rows: Range<usize>) -> Option<Found> {
        let bytes = self.view.rows_of(&model.checkpoint, rows.clone());
        let before = rows.start * self.view.row_bytes();
        let (first, count, value) = self.kind.look(&bytes)?;
        Some(Found { task, first: before / self.kind.size() + first, count, value })
    }

    fn file(&self, model: &Model, element: usize) -> String {
        let row = element * self.kind.size() / self.view.row_bytes().max(1);
        let tensor = model.checkpoint.tensor(self.view.source_of(row));
        tensor.map(|tensor| model.checkpoint.file_of(tensor)).unwrap_or_default()
    }
}

impl Kind {
    /// Bytes of one element.
    fn size(self) -> usize {
        if let Self::Float(float) = self { float.size() } else { 1 }
    }

    /// The first element that is no number, how many there are, and what it is.
    fn look(self, bytes: &[u8]) -> Option<(usize, usize, f32)> {
        let bad: fn(&u8) -> bool = match self {
            Self::Float(float) => {
                let first = float.first_nonfinite(bytes)?;
                let mut values = vec![0f32; bytes.len() / float.size() - first];
                float.widen(&bytes[first * float.size()..], &mut values);
                let count = values.iter().filter(|value| !value.is_finite()).count();
                return Some((first, count, values[0]));
            }
            Self::E8m0 => |byte| *byte == 0xFF,
            Self::E4m3 => |byte| byte & 0x7F == 0x7F,
        };
        let first = bytes.iter().position(bad)?;
        Some((first, bytes.iter().filter(|byte| bad(byte)).count(), f32::NAN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_numbers() {
        assert_eq!(Kind::E8m0.look(&[0, 127, 254]), None);
        assert!(matches!(Kind::E8m0.look(&[0, 255, 255]), Some((1, 2, _))));
        assert!(matches!(Kind::E4m3.look(&[0x7E, 0xFE, 0x7F, 0xFF]), Some((2, 2, _))));
        let infinite = [1.0f32, f32::INFINITY, 2.0, f32::NAN].map(f32::to_le_bytes).concat();
        assert_eq!(Kind::Float(FloatType::F32).look(&infinite), Some((1, 2, f32::INFINITY)));
    }
}
