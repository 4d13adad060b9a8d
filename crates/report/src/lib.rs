//! Results for people and programs: plain data in, text out, one small file for each form.
//!
//! A crate of its own, because drawing needs libraries (plots, tables, templates) that nobody who quantizes in a program
//! of their own should have to build. [`mlx_quant`] measures; here it only gets a shape.
//!
//! ```
//! use mlx_quant_report::{Column, Table, bytes};
//! let columns = [Column::words("method"), Column::figures("size")];
//! let table = Table::new(columns, [vec!["gptq".to_owned(), bytes(5_368_709_120)]]);
//! assert_eq!(table.fit(80), " method     size\n gptq    5.37 GB");
//! assert_eq!(table.fit(40), "method: gptq\nsize: 5.37 GB");
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test panics to fail"))]

mod comparison;
mod engines;
mod error;
mod evaluation;
mod foreseen;
mod json;
mod layers;
mod markdown;
mod numbers;
mod rows;
mod suite;
mod table;

pub use comparison::{Commands, comparison_html, comparison_markdown, comparison_svg, comparison_table};
pub use engines::{EngineRow, engines};
pub use error::Error;
pub use evaluation::table;
pub use foreseen::{advice, foreseen, machine, methods};
pub use json::{json, versioned};
pub use layers::{inspection, plan};
pub use markdown::markdown;
pub use mlx_quant::numbers::{bytes, duration};
use numbers::with_error;
pub use numbers::{rate, weights};
pub use suite::{suite_markdown, suite_table};
pub use table::{Column, NARROW, Table, facts, wrap};
