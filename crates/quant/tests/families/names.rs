//! Names and bytes from the hub's form to MLX's and back.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use mlx_quant::model::Named;

use crate::{Verdict, model};

/// A source tensor as it comes back, and how often each byte did.
struct Restored {
    bytes: Vec<u8>,
    times: Vec<u8>,
}

/// Every byte of every tensor that is not dropped comes back once, from a tensor under an MLX name.
pub(crate) fn round_trip(directory: &Path) -> Verdict {
    let model = model::open(directory);
    let checkpoint = &model.checkpoint;
    let named = Named::read(checkpoint, &model.config).map_err(model::text)?;
    let mut restored: BTreeMap<String, Restored> = BTreeMap::new();
    for (name, view) in named.tensors.iter().chain(&named.towers) {
        let bytes = view.rows_of(checkpoint, 0..view.rows());
        let mut sources = BTreeSet::new();
        let write = |source: &str, at: usize, bytes: &[u8]| {
            let length = checkpoint.tensor(source).unwrap().bytes();
            let tensor = restored
                .entry(source.to_owned())
                .or_insert_with(|| Restored { bytes: vec![0; length], times: vec![0; length] });
            tensor.bytes[at..][..bytes.len()].copy_from_slice(bytes);
            tensor.times[at..][..bytes.len()].iter_mut().for_each(|times| *times += 1);
            sources.insert(source.to_owned());
        };
        view.scatter(0..view.rows(), &bytes, write).map_err(model::text)?;
        let claimed: BTreeSet<String> = (0..view.rows()).map(|row| view.source_of(row).to_owned()).collect();
        if sources != claimed {
            return Err(format!("{name} was read from {sources:?} and says {claimed:?}"));
        }
    }
    let wrong: Vec<String> = checkpoint
        .tensors()
        .keys()
        .filter_map(|source| {
            let found = restored.get(source);
            let reason = if named.dropped.contains(source) {
                found.map(|_| "is dropped, and yet under an MLX name")
            } else if let Some(Restored { bytes, times }) = found {
                let source = checkpoint.bytes(checkpoint.tensor(source).unwrap());
                let lost = times.iter().any(|times| *times != 1).then_some("did not come back once");
                lost.or((bytes != source).then_some("came back as something else"))
            } else {
                Some("is under no MLX name")
            };
            reason.map(|reason| format!("{source} {reason}"))
        })
        .collect();
    if !wrong.is_empty() {
        return Err(wrong.join("; "));
    }
    let bytes: usize = restored.values().map(|tensor| tensor.bytes.len()).sum();
    Ok(format!("{bytes:>9}{:>4}", named.dropped.len()))
}
