//! Results for people and programs: plain data in, text out, one small file for each form.

mod comparison;
mod json;
mod markdown;
mod numbers;
mod rows;
mod table;

pub use comparison::{comparison_html, comparison_markdown, comparison_table, size_plot};
pub use json::json;
pub use markdown::markdown;
use numbers::with_error;
pub use numbers::{bytes, duration, reading, weights};
pub use table::{plain_table, table};
