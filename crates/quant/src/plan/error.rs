//! Everything that can be wrong with a source and settings together.

use mlx_format::checkpoint::ConfigError;
use mlx_format::{Dtype, SchemeError};
use mlx_quant_model::SourceError;

use super::OverridesError;

/// A source or settings that cannot be converted; found before any work.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum PlanError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Source(#[from] SourceError),
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
        "{lacking} of {layers} layers that {method} has packed cannot be taken over exactly ({path}: {reason}); hint: -q --q-bits N decodes and rounds them to N bits, -d decodes them"
    )]
    NotTaken { method: &'static str, lacking: usize, layers: usize, path: String, reason: String },
    #[error(
        "layer {0} has a global_scale for each expert, which -d does not decode; hint: get the bfloat16 version of this model"
    )]
    GlobalScale(String),
    #[error(
        "nothing in this model has a global_scale: MLX has it for stacked experts in nvfp4 alone; hint: leave out --q-global-scale, or add --q-mode nvfp4 to a mixture of experts"
    )]
    NoGlobalScale,
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
        "tensor {tensor} (shape {shape:?}) is no part of a {family} model as MLX knows it; hint: get the model in the form that its makers published"
    )]
    Unknown { tensor: String, shape: Vec<usize>, family: &'static str },
    #[error(
        "model type {model_type:?} has no description here, and mlx_lm would not load it quantized by tensor names: {why}; hint: without -q it converts as it is"
    )]
    DoesNotLoad { model_type: String, why: &'static str },
    #[error(
        "model type {model_type:?} is not converted: {why}; hint: mlx_vlm has models of such types, and converts them itself"
    )]
    NotRun { model_type: String, why: String },
    #[error(
        "model type {model_type:?} cannot be written as text alone: mlx_lm has no model of this type, and mlx_vlm wants what sees; hint: leave out --text-only"
    )]
    TextOnly { model_type: String },
    #[error(
        "model type {model_type:?} has no description here, and its experts stand one by one, which mlx_lm wants stacked: {tensors}; hint: without -q it converts as it is"
    )]
    NumberedExperts { model_type: String, tensors: String },
    #[error(
        "model type {model_type:?} has no description here, and these tensors hold many matrices each, which would stay unquantized: {tensors}; hint: without -q it converts as it is"
    )]
    Stacked { model_type: String, tensors: String },
    #[error("{what}; hint: experts must be alike and all there, download the missing shard")]
    Experts { what: String },
    #[error(
        "none of the {dropped} tensors of this checkpoint is one that MLX loads; hint: the weights themselves are missing, download the model again"
    )]
    NoTensors { dropped: usize },
    #[error("nothing is left to quantize in this model; hint: leave out -q")]
    NothingToQuantize,
    #[error(
        "{asked} cannot be reached: {range}; hint: ask for something in between, or change --min-bits and --max-bits"
    )]
    Target { asked: String, range: String },
    #[error("tensor {tensor} is {dtype}; hint: language model weights are float32, float16 or bfloat16")]
    Dtype { tensor: String, dtype: Dtype },
}
