//! What can go wrong when a report is drawn.

/// A report that could not be drawn.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The page's template and the data do not fit.
    #[error(
        "the page of the report cannot be drawn: {0}; hint: this is a fault of mlx-quant, please report it"
    )]
    Page(String),
}
