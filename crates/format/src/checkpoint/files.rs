//! Which files of a directory hold a model's weights.
//!
//! The index decides where there is one, whatever its files are called: makers name shards by layer, or put what they add into a
//! file of its own. A directory, a listing on the hub and a cache are asked the same question, so it is answered here, from
//! names alone.

use std::collections::{BTreeMap, BTreeSet};

/// The index that transformers and mlx-lm write beside several shards.
pub const INDEX: &str = "model.safetensors.index.json";

/// The files that are a model's weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightFiles {
    /// All of them, sorted; those of the index even where they are missing.
    pub shards: Vec<String>,
    /// `model*.safetensors` files that the index does not name.
    pub ignored: Vec<String>,
    /// Files that the index names and that are not here.
    pub missing: Vec<String>,
    /// Whether an index decided.
    pub followed: bool,
}

/// Whether mlx_lm takes a file for weights, whatever the index says (`mlx_lm/utils.py`, `load_model`).
pub fn is_mlx_weights(name: &str) -> bool {
    name.starts_with("model") && name.ends_with(".safetensors")
}

/// Whether a file is weights of a whole model under another name that tools gave and give: `weights.00.safetensors` of early MLX,
/// `pytorch_model.safetensors`, numbered shards of any name. No adapter, no state of a training, and not Mistral's second copy.
fn is_other_weights(name: &str) -> bool {
    const OTHERS: [&str; 4] = ["adapter", "consolidated", "lora", "optimizer"];
    let Some(stem) =
        name.strip_suffix(".safetensors").filter(|_| !OTHERS.iter().any(|other| name.starts_with(other)))
    else {
        return false;
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbered = stem.rsplit_once("-of-").is_some_and(|(before, count)| {
        digits(count) && before.rsplit_once('-').is_some_and(|(_, number)| digits(number))
    });
    name.starts_with("weight") || name.starts_with("pytorch_model") || numbered
}

/// The weights among `names`, files of one directory, by its index (tensor name to file name) if it has one.
///
/// Without an index: every `model*.safetensors`, or if there is none those under other usual names. An
/// index none of whose files is among `names` belongs to another build; it is left aside where there are other files.
pub fn weight_files(names: &[String], index: Option<&BTreeMap<String, String>>) -> WeightFiles {
    let found = |wanted: fn(&str) -> bool| -> Vec<String> {
        let mut found: Vec<String> = names.iter().filter(|name| wanted(name)).cloned().collect();
        found.sort();
        found
    };
    let mut unindexed = found(is_mlx_weights);
    if unindexed.is_empty() {
        unindexed = found(is_other_weights);
    }
    let Some(index) = index else { return WeightFiles { shards: unindexed, ..WeightFiles::default() } };
    let here: BTreeSet<&String> = names.iter().collect();
    let named: BTreeSet<&String> = index.values().collect();
    if named.is_disjoint(&here) && !unindexed.is_empty() {
        return WeightFiles { shards: unindexed, ..WeightFiles::default() };
    }
    let unnamed = |name: &&String| is_mlx_weights(name) && !named.contains(*name);
    WeightFiles {
        ignored: names.iter().filter(unnamed).cloned().collect(),
        missing: named.difference(&here).map(|name| (*name).clone()).collect(),
        shards: named.into_iter().cloned().collect(),
        followed: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], index: Option<&[(&str, &str)]>) -> WeightFiles {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let index = index.map(|index| {
            index.iter().map(|(tensor, file)| ((*tensor).to_owned(), (*file).to_owned())).collect()
        });
        weight_files(&names, index.as_ref())
    }

    #[test]
    fn the_index_decides_whatever_its_files_are_called() {
        let index = [("a", "layers-0.safetensors"), ("b", "mtp.safetensors")];
        let found = chosen(
            &["config.json", "layers-0.safetensors", "model.safetensors", "mtp.safetensors"],
            Some(&index),
        );
        assert_eq!(found.shards, ["layers-0.safetensors", "mtp.safetensors"]);
        assert_eq!(found.ignored, ["model.safetensors"]);
        assert!(found.followed && found.missing.is_empty());
    }

    #[test]
    fn an_index_of_other_files_is_left_aside_and_a_partial_one_is_not() {
        let index = [("a", "model-00001-of-00002.safetensors"), ("b", "model-00002-of-00002.safetensors")];
        let found = chosen(&["model.safetensors"], Some(&index));
        assert_eq!((found.shards, found.followed), (vec!["model.safetensors".to_owned()], false));
        let found = chosen(&["model-00001-of-00002.safetensors", "model.safetensors"], Some(&index));
        assert_eq!(
            (found.missing, found.followed),
            (vec!["model-00002-of-00002.safetensors".to_owned()], true)
        );
        let found = chosen(&["config.json"], Some(&index));
        assert_eq!(found.missing.len(), 2);
    }

    #[test]
    fn without_an_index_the_model_itself_and_no_second_copy() {
        let found = chosen(&["consolidated.safetensors", "model-1.safetensors", "model.safetensors"], None);
        assert_eq!(found.shards, ["model-1.safetensors", "model.safetensors"]);
        let found =
            chosen(&["adapter_model.safetensors", "optimizer.safetensors", "weights.00.safetensors"], None);
        assert_eq!(found.shards, ["weights.00.safetensors"]);
        assert!(chosen(&["consolidated.safetensors", "adapter_model.safetensors"], None).shards.is_empty());
    }
}
