//! Converting a model of which one shard is here at a time, for models that are larger than the disk.
//!
//! The model's directory holds [hollow shards](mlx_format::checkpoint::hollow_out): headers from which everything is planned,
//! and holes. Each shard in turn is fetched; every item of the plan whose tensors are all here then is carried out; and the
//! shard is hollowed out again, but for tensors that wait for a later shard (experts and fused matrices may span several).
//! What a shard file holds is never recorded ahead of what is in it, so that an interrupted run goes on where it was. As the
//! layout knows every place in the output beforehand, the bytes are those of [`convert`](crate::convert).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

use fs_err as fs;
use mlx_format::checkpoint::{Checkpoint, Directory, Writer, hollow_out};
use serde::{Deserialize, Serialize};

use crate::carry::{Carrier, item_bytes};
use crate::convert::{fingerprint_of, finish, thread_pool};
use crate::observer::{Event, Observer};
use crate::plan::{Item, Plan};
use crate::{Converted, Error, Model};
use mlx_quant_model::View;

/// A model whose weights are elsewhere.
pub struct Remote<'a> {
    /// Directory with config.json, the small files, and hollow shards.
    pub directory: &'a Path,
    /// Recognises the content again: revision and hashes.
    pub identity: &'a str,
    /// Puts the whole of the named shard in the place of the hollow one, by a rename.
    pub fetch: &'a mut dyn FnMut(&str) -> Result<(), Error>,
}

/// Which tensors each shard file holds.
#[derive(Default, Serialize, Deserialize)]
struct Here(BTreeMap<String, Held>);

#[derive(Serialize, Deserialize)]
enum Held {
    /// All.
    Whole,
    /// Those that wait for other shards.
    Some(BTreeSet<String>),
}

impl Here {
    const FILE: &'static str = "stream.json";

    fn load(writer: &Writer) -> Self {
        let text = std::fs::read(writer.state_path(Self::FILE)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    fn save(&self, writer: &Writer) -> Result<(), Error> {
        let path = writer.state_path(Self::FILE);
        let next = path.with_extension("next");
        let state = |error: std::io::Error| Error::State {
            path: path.display().to_string(),
            reason: error.to_string(),
        };
        let text = serde_json::to_vec(self).map_err(|error| state(error.into()))?;
        fs::write(&next, text).and_then(|()| fs::rename(&next, &path)).map_err(state)
    }

    fn holds(&self, shard: &str, tensor: &str) -> bool {
        match self.0.get(shard) {
            Some(Held::Whole) => true,
            Some(Held::Some(tensors)) => tensors.contains(tensor),
            None => false,
        }
    }
}

/// The shard of each tensor that an item is made of.
fn sources<'a>(checkpoint: &'a Checkpoint, item: &'a Item) -> impl Iterator<Item = (&'a str, &'a str)> {
    let names = item.views().flat_map(View::sources);
    names.filter_map(|name| Some((checkpoint.place(checkpoint.tensor(name)?).0, name)))
}

/// Passes on progress of one shard's items as part of the whole.
struct Part<'a> {
    whole: &'a dyn Observer,
    before: u64,
}

impl Observer for Part<'_> {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Started { .. } => {}
            Event::Progress { done } => self.whole.event(Event::Progress { done: self.before + done }),
            other => self.whole.event(other),
        }
    }

    fn cancelled(&self) -> bool {
        self.whole.cancelled()
    }
}

/// Carries out `plan` on `remote` into the directory `target`, on `threads` threads (0: one per core). On the disk are at most the
/// output, one shard, and what waits for others.
///
/// # Errors
/// As [`convert`](crate::convert), and whatever ended a fetch.
pub fn convert_streamed(
    remote: Remote<'_>,
    plan: &Plan,
    target: &Path,
    threads: usize,
    observer: &dyn Observer,
) -> Result<Converted, Error> {
    let start = Instant::now();
    let pool = thread_pool(threads)?;
    let directory = Directory::open(remote.directory)?;
    let mut model = crate::open(&directory)?;
    let mut writer = Writer::open(target, plan.layout.clone(), &fingerprint_of(remote.identity, plan))?;
    let mut here = Here::load(&writer);
    let left = |writer: &Writer| -> Vec<usize> {
        let done = |index: &usize| writer.done().contains(&plan.items[*index].first_output);
        (0..plan.items.len()).filter(|index| !done(index)).collect()
    };
    let bytes =
        |items: &[usize]| items.iter().map(|index| item_bytes(&plan.items[*index]) as u64).sum::<u64>();
    let total = bytes(&(0..plan.items.len()).collect::<Vec<_>>());
    let resumed = total - bytes(&left(&writer));
    observer.event(Event::Started { total, resumed });
    let shards: Vec<String> = model.checkpoint.shards().map(str::to_owned).collect();
    let mut read = 0;
    for shard in &shards {
        let items = left(&writer);
        let wanted =
            |index: &&usize| sources(&model.checkpoint, &plan.items[**index]).any(|(file, _)| file == shard);
        let wanted: Vec<usize> = items.iter().filter(wanted).copied().collect();
        let missing = wanted.iter().any(|index| {
            let mut own = sources(&model.checkpoint, &plan.items[*index]).filter(|(file, _)| file == shard);
            own.any(|(_, name)| !here.holds(shard, name))
        });
        if missing {
            if observer.cancelled() {
                return Err(Error::Interrupted);
            }
            here.0.remove(shard);
            here.save(&writer)?;
            (remote.fetch)(shard)?;
            here.0.insert(shard.clone(), Held::Whole);
            here.save(&writer)?;
            model = crate::open(&directory)?;
        }
        let ready = |index: &usize| {
            sources(&model.checkpoint, &plan.items[*index]).all(|(file, name)| here.holds(file, name))
        };
        let ready: Vec<usize> = wanted.into_iter().filter(ready).collect();
        let part = Part { whole: observer, before: resumed + read };
        let carrier = Carrier { model: &model, plan, pool: &pool, observer: &part, search: None };
        match carrier.carry(&mut writer, ready.iter().copied()) {
            Ok(bytes) => read += bytes,
            Err(error) => {
                if error.is_refusal() {
                    writer.discard_if_fresh()?;
                }
                return Err(error);
            }
        }
        writer.record(ready.iter().map(|index| plan.items[*index].first_output))?;
        // What is mapped stays on the disk.
        let kept = waiting(&model, plan, &left(&writer), &here);
        drop(model);
        release(remote.directory, &kept, &mut here, &writer)?;
        model = crate::open(&directory)?;
    }
    finish(writer, &model, plan, observer)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Converted { input_bytes: read, output_bytes: plan.layout.file_bytes(), seconds })
}

/// Tensors that items still need, and where they lie, by the shard file that holds them now.
type Kept = BTreeMap<String, BTreeMap<String, std::ops::Range<u64>>>;

fn waiting(model: &Model, plan: &Plan, left: &[usize], here: &Here) -> Kept {
    let checkpoint = &model.checkpoint;
    let mut kept: Kept = here.0.keys().map(|shard| (shard.clone(), BTreeMap::new())).collect();
    for index in left {
        for (shard, name) in sources(checkpoint, &plan.items[*index]) {
            if let (true, Some(tensor), Some(own)) =
                (here.holds(shard, name), checkpoint.tensor(name), kept.get_mut(shard))
            {
                own.insert(name.to_owned(), checkpoint.place(tensor).1);
            }
        }
    }
    kept
}

/// Hollows out every shard file that holds more than is still needed.
fn release(directory: &Path, kept: &Kept, here: &mut Here, writer: &Writer) -> Result<(), Error> {
    for (shard, tensors) in kept {
        let names: BTreeSet<String> = tensors.keys().cloned().collect();
        if matches!(here.0.get(shard), Some(Held::Some(held)) if *held == names) {
            continue;
        }
        // Recorded first: what is promised is in the old file as well as in the new one.
        if names.is_empty() {
            here.0.remove(shard);
        } else {
            here.0.insert(shard.clone(), Held::Some(names));
        }
        here.save(writer)?;
        let path = directory.join(shard);
        let ranges: Vec<_> = tensors.values().cloned().collect();
        hollow_out(&path, &ranges)
            .map_err(|error| Error::State { path: path.display().to_string(), reason: error.to_string() })?;
    }
    Ok(())
}
