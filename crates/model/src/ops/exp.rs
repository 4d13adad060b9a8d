//! Exponentials.
