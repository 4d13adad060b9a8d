//! Turns Hugging Face language models into MLX quantized models.
//!
//! The path is always the same: [`open`] a checkpoint, make a [`Plan`], [`convert()`] it, [`evaluate()`] what was
//! written. A plan knows every output tensor, scheme, byte and file before any work; converting streams the weights
//! through, a few rows at a time, and evaluating holds one block, so memory does not grow with the model.
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
//! [`quantize`] carries out a recipe that looks at calibration text, [`distill`](session::distill) trains a model that
//! is quantized already, [`compare`](compare::compare) ranks methods on a model, and [`forecast`] foresees from headers
//! what any of them will need. Each takes an [`Observer`]: events come out of it, and its [`Observer::cancelled`] stops
//! the work at the next safe point, from which the same call goes on.
//!
//! [`inspect`] looks at a model, converted or not, and says whether mlx_lm loads it.
//!
//! The library never prints and never reads the environment; progress leaves it through [`Observer`].
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test panics to fail"))]

/// The example of docs/library.md.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/library.md")]
pub struct LibraryPage;

pub mod card;
mod carry;
pub mod compare;
pub mod convert;
pub mod data;
pub mod device;
pub mod drafter;
pub mod dwq;
pub mod dynamic;
mod error;
pub mod evaluate;
pub mod forecast;
pub mod inspect;
pub mod kept;
pub mod learn;
pub mod methods;
pub mod numbers;
pub mod observer;
mod parameters;
pub mod plan;
pub mod recipes;
pub mod reduce;
pub mod replace;
pub mod session;
pub mod setting;
pub mod source;
pub mod spelling;
mod spread;
pub mod stream;
mod team;
#[cfg(test)]
mod testing;
pub mod threads;
pub mod walks;

/// What almost every program needs: the path from an opened checkpoint to a measured model. Everything else stands in
/// the module that it belongs to.
pub mod prelude {
    pub use crate::convert::convert;
    pub use crate::data::{DataSource, Pick, Windows};
    pub use crate::error::Error;
    pub use crate::evaluate::{Evaluation, EvaluationSettings, evaluate};
    pub use crate::methods::Recipe;
    pub use crate::observer::{Event, Observer, Silent};
    pub use crate::plan::{Plan, Settings};
    pub use crate::session::{QuantizeSettings, quantize};
    pub use crate::source::{Model, open};
}

pub use mlx_quant_model as model;
pub use prelude::*;
#[cfg(feature = "demo")]
pub use source::demo;

// What files of this crate take from its root; outside it stands in its module.
pub(crate) use card::model_card;
pub(crate) use convert::Converted;
pub(crate) use dwq::DwqSettings;
pub(crate) use plan::{Item, PlanError};
pub(crate) use threads::threads_or_all;
pub(crate) use walks::Walk;
