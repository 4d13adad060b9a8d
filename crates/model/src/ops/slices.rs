//! Slices of tensors.
