//! Results for people and programs: plain data in, text out, one small file for each form.

mod json;
mod markdown;
mod rows;
mod table;

pub use json::json;
pub use markdown::markdown;
pub use table::table;
