//! The packed form of rows: the slices that hold its three arrays.

/// Where the packed form of some rows goes. For `rows` rows of `columns` elements:
/// `weight` has `rows * scheme.words(columns) * 4` bytes (uint32 words, little-endian), `scales` and `biases`
/// `rows * scheme.scale_bytes(columns, float)`; `biases` is empty for the fp modes.
#[derive(Debug)]
pub struct PackedMut<'a> {
    /// Packed codes.
    pub weight: &'a mut [u8],
    /// One scale per group.
    pub scales: &'a mut [u8],
    /// One bias per group, affine only.
    pub biases: &'a mut [u8],
}

/// The packed form of some rows; lengths as in [`PackedMut`].
#[derive(Clone, Copy, Debug)]
pub struct PackedRef<'a> {
    /// Packed codes.
    pub weight: &'a [u8],
    /// One scale per group.
    pub scales: &'a [u8],
    /// One bias per group, affine only.
    pub biases: &'a [u8],
}
