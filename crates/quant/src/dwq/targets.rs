//! What the full-precision model says, computed once, window by window, and kept in files.
//!
//! Within a run that has the teacher at hand its final hidden states are kept, from which its whole distribution is had with its
//! head; a directory of targets keeps the likeliest tokens and what the others have together, after which no teacher is needed.

use std::path::{Path, PathBuf};
use std::time::Instant;

use mlx_format::checkpoint::{Array, Arrays, array_shapes};
use mlx_quant_engine::{Candidates, Tensor};
use mlx_quant_model::{Forward, WeightsError};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::data::{Windows, hexadecimal};
use crate::device::identity;
use crate::kept::{self, Keyed};
use crate::observer::{Event, Observer, Quiet, Unit};
use crate::walks::Walk;
use crate::walks::{Teacher, Top, Wave, each, tiles};
use crate::{Error, Model};

/// Tokens kept for each token.
const KEPT: usize = 1024;
const KEY: &str = "targets.json";
/// Raised when the form or the meaning of targets changes.
const VERSION: u32 = 2;

/// What the targets of a directory were made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Key {
    version: u32,
    /// [`Model::hash`] of the teacher.
    teacher: String,
    /// Its architecture and sizes: any model with the same can learn from it.
    decoder: String,
    /// SHA-256 of the training windows' tokens.
    training: String,
    /// Of the held-out windows.
    held_out: String,
    sequence_length: usize,
    temperature: f64,
    kept: usize,
    /// [`identity`].
    engine: String,
}

/// Which windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Training,
    HeldOut,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::HeldOut => "held-out",
        }
    }
}

/// Where targets come from.
pub(super) enum Targets<'t> {
    /// Final hidden states in files whose names begin so, and the teacher with its head.
    States { teacher: Box<Walk<'t>>, files: PathBuf },
    /// A directory of the likeliest tokens.
    Directory(PathBuf),
}

fn refused(path: &Path, reason: impl Into<String>) -> Error {
    Error::Targets { path: path.display().to_string(), reason: reason.into() }
}

/// In what two models differ.
pub(super) fn differing(teacher: &Walk<'_>, student: &Walk<'_>) -> String {
    let (own, other) = (&student.decoder, &teacher.decoder);
    let sizes = |decoder: &mlx_quant_model::Decoder| {
        format!(
            "{} blocks, {} features, {} tokens",
            decoder.blocks.len(),
            decoder.hidden_size,
            decoder.vocabulary
        )
    };
    let family = |walk: &Walk<'_>| walk.weights.named.architecture.family;
    format!(
        "the student ({}: {}) is no form of the teacher ({}: {})",
        family(student),
        sizes(own),
        family(teacher),
        sizes(other)
    )
}

/// Recognises an architecture with its sizes.
pub(super) fn shape_of(walk: &Walk<'_>) -> String {
    hexadecimal(&Sha256::digest(format!("{:?}", walk.decoder))[..8])
}

/// Whether a file is there and not cut off.
fn is_whole(path: &Path) -> bool {
    std::fs::File::open(path).and_then(array_shapes).is_ok()
}

fn with_suffix(files: &Path, suffix: &str) -> PathBuf {
    let mut name = files.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// What is to be learned, by windows.
pub(super) struct Lessons<'w> {
    pub(super) training: &'w Windows,
    pub(super) held_out: &'w Windows,
    pub(super) temperature: f64,
}

impl<'w> Lessons<'w> {
    fn windows(&self, part: Part) -> &'w Windows {
        match part {
            Part::Training => self.training,
            Part::HeldOut => self.held_out,
        }
    }

    /// Held-out windows are judged as they will be used.
    pub(super) fn temperature(&self, part: Part) -> f64 {
        match part {
            Part::Training => self.temperature,
            Part::HeldOut => 1.0,
        }
    }
}

impl<'t> Targets<'t> {
    /// Makes the targets that are not there yet. With `directory` they go there and its key is checked; otherwise
    /// they are files that begin with `files`. Without a teacher the directory has to be complete.
    pub(super) fn prepare(
        teacher: Option<&'t Model>,
        student: &Walk<'_>,
        lessons: &Lessons<'_>,
        directory: Option<&Path>,
        files: PathBuf,
        pool: &rayon::ThreadPool,
        observer: &dyn Observer,
    ) -> Result<Self, Error> {
        // Every step passes the teacher's head twice.
        let walk = teacher.map(Walk::open).transpose()?.map(Walk::with_head_kept);
        if let Some(walk) = &walk
            && walk.decoder != student.decoder
        {
            return Err(Error::Student(differing(walk, student)));
        }
        let targets = match (directory, walk) {
            (Some(directory), walk) => {
                check(directory, teacher, student, lessons)?;
                let own = Self::Directory(directory.to_owned());
                match walk {
                    Some(walk) => {
                        begin(directory, teacher, student, lessons)?;
                        own.make(&walk, lessons, pool, observer)?;
                    }
                    None => check_complete(directory, lessons)?,
                }
                return Ok(own);
            }
            (None, Some(teacher)) => Self::States { teacher: Box::new(teacher), files },
            (None, None) => return Err(refused(Path::new("--target-dir"), "neither teacher nor targets")),
        };
        if let Self::States { teacher, .. } = &targets {
            targets.make(teacher, lessons, pool, observer)?;
        }
        Ok(targets)
    }

    fn path(&self, (part, window): (Part, usize)) -> PathBuf {
        match self {
            Self::States { files, .. } => {
                with_suffix(files, &format!("{}-{window}.safetensors", part.name()))
            }
            Self::Directory(directory) => directory.join(format!("{}-{window}.safetensors", part.name())),
        }
    }

    fn missing(&self, lessons: &Lessons<'_>) -> Vec<(Part, usize)> {
        let all = [Part::Training, Part::HeldOut];
        let all = all
            .into_iter()
            .flat_map(|part| (0..lessons.windows(part).picked.len()).map(move |window| (part, window)));
        all.filter(|one| !is_whole(&self.path(*one))).collect()
    }

    /// Those that are missing.
    fn make(
        &self,
        teacher: &Walk<'_>,
        lessons: &Lessons<'_>,
        pool: &rayon::ThreadPool,
        observer: &dyn Observer,
    ) -> Result<(), Error> {
        let missing = self.missing(lessons);
        let total = (lessons.training.picked.len() + lessons.held_out.picked.len()) as u64;
        let tokens = total * lessons.training.sequence_length as u64;
        observer.event(Event::Phase { name: "teacher", unit: Unit::Windows, total, tokens });
        // Of the likeliest, thousands a token are looked at together.
        let most = if matches!(self, Self::Directory(_)) { 8 } else { 256 };
        let most = teacher.wave(lessons.training.sequence_length).min(most);
        let mut wave = Wave::new(pool.current_num_threads(), most, teacher.batch());
        let mut done = total - missing.len() as u64;
        if done > 0 {
            observer.event(Event::Resumed { done });
        }
        for part in [Part::Training, Part::HeldOut] {
            let all: Vec<_> = missing.iter().filter(|one| one.0 == part).collect();
            let mut left = &all[..];
            while !left.is_empty() {
                if observer.cancelled() {
                    return Err(Error::Interrupted);
                }
                let some;
                (some, left) = left.split_at(wave.windows().min(left.len()));
                let begun = Instant::now();
                self.make_some(teacher, lessons, (part, some), pool, observer)?;
                wave.took(begun.elapsed());
                done += some.len() as u64;
                observer.event(Event::Progress { done });
            }
        }
        Ok(())
    }

    /// Those of some windows together.
    fn make_some(
        &self,
        teacher: &Walk<'_>,
        lessons: &Lessons<'_>,
        (part, some): (Part, &[&(Part, usize)]),
        pool: &rayon::ThreadPool,
        observer: &dyn Observer,
    ) -> Result<(), Error> {
        let tokens: Vec<&[u32]> =
            some.iter().map(|one| &*lessons.windows(part).picked[one.1].tokens).collect();
        let hidden = teacher.hidden(&tokens, pool, &Quiet(observer), &mut 0)?;
        match self {
            Self::States { .. } => {
                for (one, hidden) in some.iter().zip(hidden) {
                    let arrays = kept::from_tensors([("hidden".to_owned(), hidden)]);
                    self.save(**one, &arrays.map_err(WeightsError::from)?)?;
                }
            }
            Self::Directory(_) => {
                let tops = tops(teacher, &hidden, lessons.temperature(part), pool)?;
                for (one, top) in some.iter().zip(tops) {
                    self.save_top(**one, top)?;
                }
            }
        }
        Ok(())
    }

    fn save_top(&self, one: (Part, usize), top: Top) -> Result<(), Error> {
        let tokens = top.ids.len() / top.count.max(1);
        let shape = [tokens, top.count];
        let arrays = Arrays::from([
            ("ids".to_owned(), Array::new(shape, top.ids)),
            ("log_probabilities".to_owned(), Array::new(shape, top.log_probabilities)),
        ]);
        self.save(one, &arrays)
    }

    fn save(&self, one: (Part, usize), arrays: &Arrays<'_>) -> Result<(), Error> {
        let path = self.path(one);
        kept::store(&path, arrays).map_err(|error| Error::state(&path, &error))
    }

    /// Lends out the targets of some windows.
    pub(super) fn with<R>(
        &self,
        part: Part,
        windows: &[usize],
        (vocabulary, tokens): (usize, usize),
        use_them: impl FnOnce(&Teacher<'_>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let load = |window: usize| {
            let path = self.path((part, window));
            let all = kept::load(&path).map_err(|error| Error::state(&path, &error))?;
            Ok::<_, Error>((path, all))
        };
        match self {
            Self::States { teacher, .. } => {
                let mut hidden = Vec::with_capacity(windows.len());
                for &window in windows {
                    let (path, all) = load(window)?;
                    let all =
                        kept::to_tensors(all, &teacher.device).map_err(|error| Error::state(&path, &error));
                    let own = all?.remove("hidden");
                    hidden.push(own.ok_or_else(|| Error::state(&path, &"no hidden states"))?);
                }
                let forward =
                    Forward::new(&teacher.decoder, 0, &teacher.device).map_err(WeightsError::from)?;
                let tile = |rows| teacher.head_tile(rows);
                use_them(&Teacher::Whole { forward: &forward, tile: &tile, hidden })
            }
            Self::Directory(_) => {
                let mut tops = Vec::with_capacity(windows.len());
                for &window in windows {
                    let (path, mut all) = load(window)?;
                    let damaged = || refused(&path, "it is damaged");
                    let mut read =
                        || -> Option<Top> {
                            let (ids, logs) = (all.remove("ids")?, all.remove("log_probabilities")?);
                            let count = KEPT.min(vocabulary);
                            if ids.shape != [tokens, count] {
                                return None;
                            }
                            let (ids, log_probabilities) = (ids.into_u32()?, logs.into_f32()?);
                            let sorted =
                                ids.chunks_exact(count.max(1)).all(|row| row.is_sorted_by(|a, b| a < b));
                            let known = ids.iter().all(|id| (*id as usize) < vocabulary);
                            let sound = log_probabilities.iter().all(|log| *log <= 1e-3);
                            (sorted && known && sound && ids.len() == log_probabilities.len())
                                .then_some(Top { count, ids, log_probabilities })
                        };
                    tops.push(read().ok_or_else(damaged)?);
                }
                use_them(&Teacher::Top(tops))
            }
        }
    }
}

/// How files of final hidden states begin that other runs with the same teacher and windows share.
pub(super) fn shared_states(
    directory: &Path,
    teacher: Option<&Model>,
    lessons: &Lessons<'_>,
) -> Result<PathBuf, Error> {
    std::fs::create_dir_all(directory).map_err(|error| Error::state(directory, &error))?;
    kept::sweep(directory, |name| name.starts_with("teacher-"));
    let mut hash = Sha256::new();
    hash.update(teacher.map(Model::hash).transpose()?.unwrap_or_default());
    for windows in [lessons.training, lessons.held_out] {
        hash.update(windows.tokens_hash());
    }
    Ok(directory.join(format!("teacher-{}-", &hexadecimal(&hash.finalize())[..16])))
}

/// Refuses a directory that lacks targets.
pub(super) fn check_complete(directory: &Path, lessons: &Lessons<'_>) -> Result<(), Error> {
    let own = Targets::Directory(directory.to_owned());
    match own.missing(lessons).first() {
        None => Ok(()),
        Some(missing) => {
            let missing = own.path(*missing);
            Err(refused(directory, format!("{} is missing, and no teacher was given", missing.display())))
        }
    }
}

fn key(teacher: Option<&Model>, student: &Walk<'_>, lessons: &Lessons<'_>) -> Result<Key, Error> {
    Ok(Key {
        version: VERSION,
        teacher: teacher.map(Model::hash).transpose()?.unwrap_or_default(),
        decoder: shape_of(student),
        training: lessons.training.tokens_hash(),
        held_out: lessons.held_out.tokens_hash(),
        sequence_length: lessons.training.sequence_length,
        temperature: lessons.temperature,
        kept: KEPT.min(student.decoder.vocabulary),
        engine: identity(&student.device),
    })
}

fn keyed(directory: &Path) -> Keyed<'_> {
    Keyed { directory, file: KEY, version: VERSION.into() }
}

/// Makes a directory with its key, if it is not there. Several processes may work in it at once: what they write follows from the key.
fn begin(
    directory: &Path,
    teacher: Option<&Model>,
    student: &Walk<'_>,
    lessons: &Lessons<'_>,
) -> Result<(), Error> {
    let key = key(teacher, student, lessons)?;
    let found = keyed(directory).make(&key).map_err(|reason| refused(directory, reason))?;
    same(directory, &found, &key)
}

/// Checks a directory's key, if it has one.
pub(super) fn check(
    directory: &Path,
    teacher: Option<&Model>,
    student: &Walk<'_>,
    lessons: &Lessons<'_>,
) -> Result<(), Error> {
    let mut key = key(teacher, student, lessons)?;
    let found = keyed(directory).read::<Key>().map_err(|reason| refused(directory, reason))?;
    match (found, teacher) {
        (Some(found), None) => {
            key.teacher.clone_from(&found.teacher);
            same(directory, &found, &key)
        }
        (Some(found), Some(_)) => same(directory, &found, &key),
        (None, Some(_)) => Ok(()),
        (None, None) => Err(refused(directory, format!("it has no {KEY}, and no teacher was given"))),
    }
}

fn same(directory: &Path, found: &Key, key: &Key) -> Result<(), Error> {
    let what = if found.teacher != key.teacher || found.decoder != key.decoder {
        "another model"
    } else if found.temperature != key.temperature {
        "another temperature"
    } else if found != key {
        "other data (its windows follow from --data, --seed, --sequence-length, --n-samples, --iters and --batch-size)"
    } else {
        return Ok(());
    };
    Err(refused(directory, format!("the targets in it are of {what}")))
}

/// The likeliest tokens of every token of every window, at a temperature.
fn tops(
    teacher: &Walk<'_>,
    hidden: &[Tensor],
    temperature: f64,
    pool: &rayon::ThreadPool,
) -> Result<Vec<Top>, Error> {
    let vocabulary = teacher.decoder.vocabulary;
    let kept = KEPT.min(vocabulary);
    let forward = Forward::new(&teacher.decoder, 0, &teacher.device).map_err(WeightsError::from)?;
    let mut all: Vec<Vec<Candidates>> = Vec::new();
    for window in hidden {
        all.push(vec![Candidates::default(); window.dim(0).map_err(WeightsError::from)?]);
    }
    for rows in tiles(&teacher.device, vocabulary) {
        let parameters = pool.install(|| teacher.head_tile(rows.clone()))?;
        let step = |(own, hidden): (&mut Vec<Candidates>, &Tensor)| -> mlx_quant_engine::Result<()> {
            let logits = (forward.logits(&parameters, hidden)? / temperature)?;
            logits.device().keep_likeliest(&logits, rows.start as u32, kept, own)
        };
        each(&teacher.device, pool, all.iter_mut().zip(hidden), step).map_err(WeightsError::from)?;
    }
    let finish = |window: Vec<Candidates>| {
        let mut top = Top { count: kept, ids: Vec::new(), log_probabilities: Vec::new() };
        for Candidates { score, mut found } in window {
            found.sort_unstable_by_key(|candidate| candidate.1);
            let lse = score.log_sum_exp();
            top.ids.extend(found.iter().map(|candidate| candidate.1));
            let logs = found.iter().map(|candidate| (f64::from(candidate.0) - lse) as f32);
            top.log_probabilities.extend(logs);
        }
        top
    };
    Ok(all.into_iter().map(finish).collect())
}
