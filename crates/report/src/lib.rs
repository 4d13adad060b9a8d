//! Results for people and programs: plain data in, text out, one small file for each form.
//!
//! A crate of its own, because drawing needs libraries (plots, tables, templates) that nobody who quantizes in a program
//! of their own should have to build. [`mlx_quant`] measures; here it only gets a shape.
//!
//! ```
//! let heads = ["method", "size"];
//! let rows = vec![vec!["gptq".to_owned(), mlx_quant_report::bytes(5_368_709_120)]];
//! assert_eq!(mlx_quant_report::plain_table(&heads, rows, 1), " method     size\n gptq    5.37 GB");
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test panics to fail"))]

mod comparison;
mod error;
mod json;
mod markdown;
mod numbers;
mod rows;
mod table;

pub use comparison::{comparison_html, comparison_markdown, comparison_table, size_plot};
pub use error::Error;
pub use json::json;
pub use markdown::markdown;
pub use mlx_quant::numbers::{bytes, duration};
use numbers::with_error;
pub use numbers::{reading, weights};
pub use table::{plain_table, table};
