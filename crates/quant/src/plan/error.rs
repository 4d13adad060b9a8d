//! Everything that can be wrong with a source and settings together.

use mlx_format::checkpoint::ConfigError;
use mlx_format::{Dtype, SchemeError};

use super::OverridesError;

/// A source or settings that cannot be converted; found before any work.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum PlanError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Scheme(#[from] SchemeError),
    #[error("recipe file: {0}")]
    Overrides(#[from] OverridesError),
    #[error("quantize and dequantize exclude each other; hint: choose one of -q and -d")]
    Both,
    #[error(
        "the source is already quantized ({0}); quantizing it again would only lose quality; hint: quantize the original model, or decode this one first (convert -d) and quantize the result"
    )]
    AlreadyQuantized(String),
    #[error("the source is not quantized, there is nothing to decode; hint: leave out -d")]
    NotQuantized,
    #[error(
        "the source is quantized by {method:?}, which cannot be converted; hint: get the original bfloat16 or float16 version of this model"
    )]
    Foreign { method: String },
    #[error("mixed-bit recipes are affine, not {0}; hint: leave out --q-mode or --quant-predicate")]
    MixedMode(&'static str),
    #[error(
        "mixed-bit recipes need layers named down_proj, which this model does not have; hint: leave out --quant-predicate, or set bits per layer with --recipe-file"
    )]
    MixedLayers,
    #[error("a recipe file sets how layers are quantized; hint: add -q")]
    OverridesWithoutQuantize,
    #[error(
        "group size {group_size} divides the input of no layer of this model ({examples}); hint: choose a smaller group size"
    )]
    NothingDivides { group_size: usize, examples: String },
    #[error(
        "layer {path}: input of {columns} does not divide into groups of {group_size} (--recipe-file); hint: choose another group size for it, or keep it"
    )]
    OverrideDivides { path: String, columns: usize, group_size: usize },
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
        "fp8 tensor {tensor} (shape {shape:?}) has no {scale} for blocks of {block:?}; hint: get the bfloat16 version of this model"
    )]
    Fp8 { tensor: String, scale: String, shape: Vec<usize>, block: [usize; 2] },
    #[error(
        "layer {path}: {words} words and {groups} groups a row fit no quantization in config.json; hint: the source's config.json is damaged"
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
        "layer {missing} of {layers} has no weights; hint: a shard is missing, or config.json belongs to another model"
    )]
    MissingLayer { missing: usize, layers: usize },
    #[error(
        "{directory} holds {found} of the {expected} shards that their names speak of; hint: download the missing ones"
    )]
    MissingShards { directory: String, found: usize, expected: usize },
    #[error(
        "tensor {tensor} (shape {shape:?}) is no part of a {family} model as MLX knows it; hint: get the model in the form that its makers published"
    )]
    Unknown { tensor: String, shape: Vec<usize>, family: &'static str },
    #[error("nothing is left to quantize in this model; hint: leave out -q")]
    NothingToQuantize,
    #[error("tensor {tensor} is {dtype}; hint: language model weights are float32, float16 or bfloat16")]
    Dtype { tensor: String, dtype: Dtype },
}
