//! Whether a head that is there is the embedding's table: config.json says so, a family's default guesses, the tensors know.

use mlx_format::FloatType;
use mlx_format::checkpoint::{Checkpoint, Config, Tensor};
use serde_json::Value;

use crate::SourceError;
use crate::arch::{Architecture, Language};

/// A config that says that head and embedding are two tables.
pub(crate) fn untied(config: &Config) -> Config {
    let mut config = config.clone();
    let map = match config.0.get_mut("text_config") {
        Some(Value::Object(text)) => text,
        _ => &mut config.0,
    };
    map.insert("tie_word_embeddings".to_owned(), false.into());
    config
}

/// Ends of names of embeddings.
const EMBEDDINGS: [&str; 6] = [
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "embedding.weight",
    "embeddings.weight",
    "word_embeddings.weight",
];

/// Whether a head that is there is the embedding's table.
pub(crate) struct Tied {
    /// It is not, and config.json is silent.
    pub(crate) untied: bool,
    /// It is, written once more for mlx-vlm, whose language model has a head of its own.
    pub(crate) repeated: bool,
    /// What a person should know.
    pub(crate) note: Option<String>,
}

impl Tied {
    /// Compares rows of a head that would be dropped with the embedding's.
    pub(crate) fn of(checkpoint: &Checkpoint, config: &Config) -> Result<Self, SourceError> {
        let tied = Self { untied: false, repeated: false, note: None };
        let language = Language::of(config);
        let silent = language.tied().is_none();
        let architecture = language.architecture(checkpoint.tensors())?;
        let own = |end: &str| {
            let ends = |name: &&String| *name == end || name.ends_with(&format!(".{end}"));
            checkpoint.tensors().keys().find(ends)
        };
        let embedding = EMBEDDINGS.into_iter().find_map(own);
        let head = ["lm_head.weight", "embed_out.weight"].into_iter().find_map(own);
        let (Some(embedding), Some(head)) = (embedding, head) else { return Ok(tied) };
        let repeats = architecture.towers.as_ref().is_some_and(|towers| towers.repeats_head);
        if repeats && language.tied() != Some(false) && is_repeated(checkpoint, head, embedding) {
            return Ok(Self { repeated: true, ..tied });
        }
        let dropped = |architecture: &Architecture| {
            let renamed = architecture.renamed(head);
            architecture.rules.iter().any(|rule| rule.outputs.is_empty() && rule.captures(&renamed).is_some())
        };
        if !dropped(&architecture) || checkpoint.is_headers_only() {
            return Ok(tied);
        }
        let differ = differ(checkpoint, head, embedding);
        // Where config.json says nothing, the family's default is a guess, and the tensors know better.
        let apart = untied(config);
        let may_part = silent && !dropped(&Language::of(&apart).architecture(checkpoint.tensors())?);
        let note = match differ {
            Some(false) => return Ok(tied),
            None if !may_part => return Ok(tied),
            None => format!(
                "config.json does not say whether {head} and {embedding} are one table, and their rows are not here to be compared: \
                 they stay two"
            ),
            Some(true) if may_part => format!(
                "{head} differs from {embedding}, and config.json does not say whether they are one table: they stay two"
            ),
            Some(true) => format!(
                "{head} differs from {embedding}, but the model ties them: {head} is left out, as mlx_lm does; if the model was trained \
                 with a head of its own, set tie_word_embeddings to false in its config.json"
            ),
        };
        Ok(Self { untied: may_part, repeated: false, note: Some(note) })
    }
}

/// Whether a head is the embedding once more, packed or not, by the bytes of up to 64 rows of each of its tensors.
fn is_repeated(checkpoint: &Checkpoint, head: &str, embedding: &str) -> bool {
    let parts = ["weight", "scales", "biases"].map(|leaf| {
        let of = |weight: &str| {
            checkpoint.tensor(&format!("{}{leaf}", weight.strip_suffix("weight").unwrap_or(weight)))
        };
        (of(head), of(embedding))
    });
    let same = |(head, embedding): (Option<&Tensor>, Option<&Tensor>)| match (head, embedding) {
        (None, None) => true,
        (Some(head), Some(embedding)) => {
            let (left, right) = (checkpoint.bytes(head), checkpoint.bytes(embedding));
            let row = left.len() / head.shape.first().copied().unwrap_or(1).max(1);
            let rows = left.len().checked_div(row).unwrap_or(0);
            let mut sample = (0..rows.min(ROWS)).map(|index| index * rows / rows.min(ROWS) * row);
            head.dtype == embedding.dtype
                && head.shape == embedding.shape
                && sample.all(|at| left[at..at + row] == right[at..at + row])
        }
        _ => false,
    };
    !checkpoint.is_headers_only() && parts.into_iter().all(same)
}

/// How many rows of two tables are compared.
const ROWS: usize = 64;

/// Whether two tables differ, by up to 64 of their rows; nothing where all of these are zeros, as in files of which only headers
/// are here.
fn differ(checkpoint: &Checkpoint, left: &str, right: &str) -> Option<bool> {
    let (a, b) = (checkpoint.tensor(left)?, checkpoint.tensor(right)?);
    if a.shape != b.shape {
        return Some(true);
    }
    let (left, right) = (FloatType::from_dtype(a.dtype)?, FloatType::from_dtype(b.dtype)?);
    let columns = a.shape.last().copied().unwrap_or(0);
    let rows = a.elements().checked_div(columns).unwrap_or(0);
    let row = |tensor: &Tensor, float: FloatType, row: usize| {
        let bytes = &checkpoint.bytes(tensor)[row * columns * float.size()..][..columns * float.size()];
        let mut values = vec![0f32; columns];
        float.widen(bytes, &mut values);
        values
    };
    let sample = rows.min(ROWS);
    let mut zeros = true;
    for at in (0..sample).map(|index| index * rows / sample) {
        let (left, right) = (row(a, left, at), row(b, right, at));
        // Bits, so that NaN equals itself.
        if left.iter().zip(&right).any(|(left, right)| left.to_bits() != right.to_bits()) {
            return Some(true);
        }
        zeros &= left.iter().all(|value| *value == 0.0);
    }
    (!zeros).then_some(false)
}
