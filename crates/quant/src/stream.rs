//! Converting a model of which one shard is here at a time, for models that are larger than the disk.
//!
//! The model's directory holds [hollow shards](mlx_format::checkpoint::hollow_out): headers from which everything is
//! planned, and holes. Each shard in turn is fetched; every item of the plan whose tensors are all here then is carried
//! out; and the shard is hollowed out again, but for tensors that wait for a later shard (experts and fused matrices
//! may span several).
//!
//! What each file holds is written down beside the files, after it has come about, with the file's stamp: a file that
//! was made anew meanwhile holds nothing, whatever is said of it. So an interruption at any point costs a fetch at
//! most. As the layout knows every place in the output beforehand, the bytes are those of
//! [`convert`](crate::convert()).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use fs_err as fs;
use mlx_format::checkpoint::{Checkpoint, Destination, Directory, Run, Writer, hollow_out};
use serde::{Deserialize, Serialize};

use crate::carry::{Carrier, item_bytes};
use crate::convert::{fingerprint_of, finish, open_writer, step};
use crate::observer::{Event, Observer};
use crate::plan::{Item, Plan};
use crate::{Converted, Error, Model, kept, threads};
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
struct Here {
    directory: PathBuf,
    files: BTreeMap<String, Held>,
}

#[derive(Serialize, Deserialize)]
struct Held {
    /// Inode, and time of change in nanoseconds, of the file that is meant.
    stamp: (u64, i128),
    /// All tensors, or those that wait for other shards.
    tensors: Option<BTreeSet<String>>,
}

impl Here {
    const FILE: &'static str = ".stream.json";

    /// What is written down and still so. Whatever else is in the files is given back to the disk.
    fn load(directory: &Path, shards: &[String]) -> Result<Self, Error> {
        kept::sweep(directory, |name| name == Self::FILE);
        let text = std::fs::read(directory.join(Self::FILE)).unwrap_or_default();
        let files = serde_json::from_slice(&text).unwrap_or_default();
        let mut here = Self { directory: directory.to_owned(), files };
        let stamps: BTreeMap<&String, (u64, i128)> =
            shards.iter().map(|shard| Ok((shard, here.stamp(shard)?))).collect::<Result<_, Error>>()?;
        here.files.retain(|shard, held| stamps.get(shard) == Some(&held.stamp));
        for shard in shards.iter().filter(|shard| !here.files.contains_key(*shard)) {
            let path = directory.join(shard);
            hollow_out(&path, &[]).map_err(|error| Error::state(&path, &error))?;
        }
        Ok(here)
    }

    fn stamp(&self, shard: &str) -> Result<(u64, i128), Error> {
        use std::os::unix::fs::MetadataExt as _;
        let path = self.directory.join(shard);
        let found = fs::metadata(&path).map_err(|error| Error::state(&path, &error))?;
        Ok((found.ino(), i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec())))
    }

    /// Writes down what a file holds now.
    fn note(&mut self, shard: &str, tensors: Option<BTreeSet<String>>) -> Result<(), Error> {
        let stamp = self.stamp(shard)?;
        self.files.insert(shard.to_owned(), Held { stamp, tensors });
        let path = self.directory.join(Self::FILE);
        let text = serde_json::to_vec(&self.files).map_err(|error| Error::state(&path, &error))?;
        kept::write(&path, &text).map_err(|error| Error::state(&path, &error))
    }

    fn holds(&self, shard: &str, tensor: &str) -> bool {
        let held = self.files.get(shard);
        held.is_some_and(|held| held.tensors.as_ref().is_none_or(|tensors| tensors.contains(tensor)))
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

/// Carries out `plan` on `remote` into the directory `target`, on `threads` threads (0: one per core). On the disk are
/// at most the output, one shard, and what waits for others.
///
/// # Errors
/// As [`convert`](crate::convert()), and whatever ended a fetch.
pub fn convert_streamed<'d>(
    remote: Remote<'_>,
    plan: &Plan,
    target: impl Into<Destination<'d>>,
    threads: usize,
    observer: &dyn Observer,
) -> Result<Converted, Error> {
    let start = Instant::now();
    observer.event(Event::Job { steps: &[step()] });
    let pool = threads::pool(threads)?;
    let directory = Directory::open(remote.directory)?;
    let model = crate::open(&directory)?;
    let mut writer =
        open_writer(target.into(), plan, Run::from(&*fingerprint_of(remote.identity, plan)), observer)?;
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
    // Files are replaced, and what is mapped of them stays on the disk.
    drop(model);
    let mut here = Here::load(remote.directory, &shards)?;
    let mut model = crate::open(&directory)?;
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
            (remote.fetch)(shard)?;
            here.note(shard, None)?;
            model = crate::open(&directory)?;
        }
        let ready = |index: &usize| {
            sources(&model.checkpoint, &plan.items[*index]).all(|(file, name)| here.holds(file, name))
        };
        let ready: Vec<usize> = wanted.into_iter().filter(ready).collect();
        let part = Part { whole: observer, before: resumed + read };
        let carrier =
            Carrier { model: &model, plan, pool: &pool, observer: &part, search: None, careful: None };
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
        release(&kept, &mut here)?;
        model = crate::open(&directory)?;
    }
    if let Some(index) = left(&writer).first() {
        let name = &plan.items[*index].name;
        return Err(Error::Fetch(format!(
            "{name} was left over; hint: report this, and convert without --stream"
        )));
    }
    finish(writer, &model, plan, observer)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Converted { input_bytes: read, output_bytes: plan.layout.file_bytes(), seconds })
}

/// Tensors that items still need, and where they lie, by the shard file that holds them now.
type Kept = BTreeMap<String, BTreeMap<String, std::ops::Range<u64>>>;

fn waiting(model: &Model, plan: &Plan, left: &[usize], here: &Here) -> Kept {
    let checkpoint = &model.checkpoint;
    let mut kept: Kept = here.files.keys().map(|shard| (shard.clone(), BTreeMap::new())).collect();
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
fn release(kept: &Kept, here: &mut Here) -> Result<(), Error> {
    for (shard, tensors) in kept {
        let names: BTreeSet<String> = tensors.keys().cloned().collect();
        if here.files.get(shard).is_some_and(|held| held.tensors.as_ref() == Some(&names)) {
            continue;
        }
        let path = here.directory.join(shard);
        let ranges: Vec<_> = tensors.values().cloned().collect();
        hollow_out(&path, &ranges).map_err(|error| Error::state(&path, &error))?;
        here.note(shard, Some(names))?;
    }
    Ok(())
}
