//! Token mixers that the common vocabulary cannot say: their data is in [`crate::decoder`], their arithmetic beside the forward pass.

pub use crate::decoder::{
    DeltaNet, DeltaProjections, LatentAttention, LatentKeys, LatentQueries, LightningAttention, Mamba,
    ShortConvolution,
};
