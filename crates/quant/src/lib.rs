//! Turns Hugging Face language models into MLX quantized models.
//!
//! The path is always the same: [`open`] a checkpoint, make a [`Plan`], [`convert`] it, [`evaluate`] what was written. A
//! plan knows every output tensor, scheme, byte and file before any work; converting streams the weights through, a
//! few rows at a time, and evaluating holds one block, so memory does not grow with the model.
//!
//! ```
//! use mlx_format::{Scheme, checkpoint::Directory};
//! use mlx_quant::{DataSource, EvaluationSettings, Pick, Plan, Settings, Silent, Windows};
//! use mlx_quant::{convert, evaluate, open};
//!
//! # fn main() -> Result<(), mlx_quant::Error> {
//! # let directory = tempfile::tempdir().unwrap();
//! # let target = directory.path().join("out");
//! # #[cfg(feature = "demo")] {
//! let source = open(&mlx_quant::demo())?;
//! let settings = Settings { quantize: Some(Scheme::affine(4, 64).unwrap()), ..Settings::default() };
//! let plan = Plan::new(&source.checkpoint, &source.config, settings)?;
//! println!("{:.3} bits per weight", plan.bits_per_weight());
//! convert(&source, &plan, &target, 2, &Silent)?;
//!
//! let written = open(&Directory::open(&target)?)?;
//! let pick = Pick::EvenlySpaced { windows: 2 };
//! let (tokenizer, vocabulary) = (source.tokenizer()?, source.vocabulary()?);
//! let windows = Windows::read(&DataSource::BuiltinHeldOut, &tokenizer, vocabulary, 128, pick)?;
//! let quality = evaluate(&written, Some(&source), &windows, &EvaluationSettings::default(), &Silent)?;
//! println!("KL to the original: {:.4} nats a token", quality.total.against.as_ref().unwrap().kl_mean);
//! # assert!(quality.total.against.unwrap().kl_mean < 0.2);
//! # }
//! # Ok(())
//! # }
//! ```
//!
//! [`quantize`] carries out a recipe that looks at calibration text, [`distill`] trains a model that is quantized already,
//! [`compare`](compare::compare) ranks methods on a model, and [`forecast`] foresees from headers what any of them will need. Each takes an [`Observer`]: events
//! come out of it, and its [`Observer::cancelled`] stops the work at the next safe point, from which the same call goes on.
//!
//! [`inspect`] looks at a model, converted or not, and says whether mlx_lm loads it.
//!
//! The library never prints and never reads the environment; progress leaves it through [`Observer`].
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test panics to fail"))]

/// The example of README.md.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Readme;

mod card;
mod carry;
pub mod compare;
mod convert;
pub mod data;
mod device;
mod dwq;
mod dynamic;
mod error;
mod evaluate;
pub mod forecast;
pub mod inspect;
pub mod kept;
pub mod methods;
pub mod numbers;
mod observer;
mod parameters;
mod plan;
pub mod recipes;
pub mod reduce;
mod session;
mod setting;
mod source;
mod stream;
#[cfg(test)]
mod testing;
mod threads;
mod walks;

pub use card::{inherited_keys, is_own_card, lacks_quality, model_card, with_quality, without_key};
pub use compare::{CompareSettings, Comparison, Contestant, compare};
pub use convert::{Converted, convert, peak_memory};
pub use data::{
    Corpus, DataError, DataFile, DataReport, DataSource, Extent, OnRefusal, Pick, SourceInfo, Window, Windows,
};
pub use dwq::{Distilled, DwqMemory, DwqSettings, dwq_memory, dwq_operations};
pub use dynamic::{
    Allocation, Choice, Cost, DynamicPlan, DynamicSettings, Key, Layer, Seen, Sensitivities,
    SensitivityMemory, SensitivitySettings, Table, Target, allocate, sensitivities, sensitivity_needs,
};
pub use error::Error;
pub use evaluate::{
    Against, Divergence, Evaluation, EvaluationSettings, Measures, Memory, SourceEvaluation, States, Subject,
    TokenMeasure, VocabularyMismatch, evaluate, measure, memory,
};
pub use methods::{Method, MethodSettings, Recipe, RecipeError};
pub use mlx_quant_model as model;
pub use observer::{Event, Observer, Silent};
pub use plan::{
    GenerationConfig, Item, Job, LayerReport, MixedRecipe, Overrides, OverridesError, Plan, PlanError,
    PlanReport, Settings, TensorId,
};
pub use session::{
    ExpertTokens, QuantizeMemory, QuantizeSettings, Quantized, distill, operations, quantize,
    quantize_memory, targets,
};
#[cfg(feature = "demo")]
pub use source::demo;
pub use source::{Model, is_companion, open, open_config, open_files};
pub use stream::{Remote, convert_streamed};
pub use threads::threads_or_all;
pub use walks::{Residency, Walk};
