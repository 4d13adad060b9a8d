//! Checkpoint directories: reading Hugging Face and MLX ones, writing MLX ones.
//!
//! Reading: [`Checkpoint::open`] maps the safetensors files and validates every header, offset, shape and index
//! entry before anything is used; weights stay on disk. Nothing in a directory is executed, and no name found
//! in a file leads out of the directory.
//!
//! Writing: [`Layout`] knows every file, header and offset from names, dtypes and shapes alone, so that
//! [`Writer`] can put tensors in place in any order, from any thread, and resume after a crash.

mod arrays;
mod claimed;
mod config;
mod destination;
mod directory;
mod files;
mod hollow;
mod journal;
mod layout;
mod lock;
mod records;
mod run;
mod safetensors;
mod write_error;
mod writer;

pub use arrays::{Array, Arrays, Values, array_shapes, read_arrays, write_arrays};
pub use claimed::{CLAIM, remove_claimed, remove_unclaimed, sweep_gone};
pub use config::{Config, ConfigError, is_truthy};
pub use destination::{Command, Destination, Replaceable};
pub use directory::{Directory, DirectoryError, forget_cached};
pub use files::{INDEX, WeightFiles, is_mlx_weights, weight_files};
pub use hollow::{MAX_HEADER_BYTES, hollow_out, make_hollow};
pub use journal::{source_path, tidy};
pub use layout::{Layout, Placement, SHARD_BYTES, TensorSpec};
pub use lock::{Lock, is_at, try_lock};
pub use run::{Run, Share};
pub use safetensors::{
    Checkpoint, CheckpointError, HeaderTensor, LeftAside, Tensor, parse_header, parse_index,
};
pub use write_error::WriteError;
pub use writer::Writer;
