//! Everything that can be wrong with a checkpoint as a model.

use mlx_format::checkpoint::ConfigError;
use mlx_format::{Dtype, Scheme};

use crate::fit::Misfits;

/// A checkpoint that is no model as its config.json says; found from headers, before any work.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum SourceError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(
        "the source is quantized by {method:?}, in a form that is not read here; hint: get the original bfloat16 or float16 version of this model"
    )]
    Foreign { method: String },
    #[error(
        "tensor {tensor} in {file}: {reason}; hint: config.json and weights do not belong together, or the source is packed in an old form: convert the original model"
    )]
    Shape { tensor: String, file: String, reason: String },
    #[error(
        "tensor {source_name} would become {output}, which another tensor becomes as well; hint: the checkpoint holds the same weights twice, remove one copy"
    )]
    Twice { output: String, source_name: String },
    #[error("expert {missing} of {output} is missing ({found} found); hint: download the missing shard")]
    MissingExpert { output: String, missing: usize, found: usize },
    #[error(
        "expert {odd} of {output} is {other:?}, expert 0 {first:?}; hint: experts must be alike, the checkpoint is damaged"
    )]
    UnequalExperts { output: String, odd: usize, first: (Dtype, Vec<usize>), other: (Dtype, Vec<usize>) },
    #[error(
        "{output} is made of {of} parts, and those that are here ({}) are not all, or not alike; hint: download the missing shard", sources.join(", ")
    )]
    Parts { output: String, of: usize, sources: Vec<String> },
    #[error("{model} is no whole {family} model: {misfits}; hint: {}", misfits.hint())]
    Misfits { model: String, family: &'static str, misfits: Misfits },
    #[error(
        "the multi-token-prediction heads of model type {model_type:?} cannot be kept: {why}; hint: leave out --mtp"
    )]
    Heads { model_type: String, why: String },
    #[error("{model} holds no multi-token-prediction heads; hint: leave out --mtp")]
    NoHeads { model: String },
    #[error(
        "the multi-token-prediction heads of {model} are not what mlx_vlm's {drafter} reads: {what}; hint: leave out --mtp, or get all files of the model"
    )]
    HeadsMisfit { model: String, drafter: &'static str, what: String },
    #[error(
        "{file} names {names}, which is not here, and {lacks}, which is in no other file; hint: download the missing files, or remove the index if it belongs to another build"
    )]
    LeftAside { file: String, names: String, lacks: String },
    #[error(
        "layer {path} is made of tensors that config.json quantizes differently ({first} and {other}); hint: the source's config.json is damaged"
    )]
    UnequalEntries { path: String, first: String, other: String },
    #[error(
        "fp8 tensor {tensor} (shape {shape:?}) has no {scale} for blocks of {block:?}; hint: get the bfloat16 version of this model"
    )]
    Fp8 { tensor: String, scale: String, shape: Vec<usize>, block: [usize; 2] },
    #[error(
        "tensor {tensor} ({dtype}, shape {shape:?}) in {file}, packed by {method}: {reason}; hint: quantization_config and the tensors do not belong together, download config.json and weights again"
    )]
    PackedForm {
        tensor: String,
        dtype: Dtype,
        shape: Vec<usize>,
        file: String,
        method: &'static str,
        reason: String,
    },
    #[error(
        "layer {path}: {words} words and {groups} groups a row fit no quantization in config.json, or more than one; hint: the source's config.json is damaged"
    )]
    UnclearScheme { path: String, words: usize, groups: usize },
    #[error(
        "layer {path}: weight {weight:?}, scales {scales:?} and biases {biases:?} do not belong together; hint: the checkpoint is damaged, download it again"
    )]
    Packed {
        path: String,
        weight: (Dtype, Vec<usize>),
        scales: (Dtype, Vec<usize>),
        biases: Option<(Dtype, Vec<usize>)>,
    },
    #[error(
        "layer {path}, {scheme}, weight {weight:?}: its global_scale is {dtype} {found:?}; hint: MLX has one float32 for each of stacked experts in nvfp4 and no other, get the model anew"
    )]
    GlobalScale { path: String, scheme: Scheme, weight: Vec<usize>, dtype: Dtype, found: Vec<usize> },
    #[error(
        "layer {missing} of {layers} has no weights; hint: a shard is missing, or config.json belongs to another model"
    )]
    MissingLayer { missing: usize, layers: usize },
    #[error(
        "{directory} holds {found} of the {expected} shards that their names speak of; hint: download the missing ones"
    )]
    MissingShards { directory: String, found: usize, expected: usize },
}
