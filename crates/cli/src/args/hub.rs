//! Flags about the hub, and arguments of `upload`.

use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::Output;

/// From the hub, and to it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Hub")]
pub(crate) struct HubFlags {
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,

    /// Upload the result to this hub repository when it is done
    #[arg(long, value_name = "ORG/NAME")]
    pub(crate) upload_repo: Option<String>,

    /// Where --upload-repo creates a repository, make it private
    #[arg(long, requires = "upload_repo")]
    pub(crate) private: bool,

    /// Without effect: nothing in a model directory is ever run
    #[arg(long, hide = true, action = ArgAction::SetTrue)]
    pub(crate) trust_remote_code: bool,
}

const UPLOAD_EXAMPLES: &str = "\
Examples:
  mlx-quant upload ./Qwen3-8B-4bit --upload-repo my-org/Qwen3-8B-4bit
      needs a token with write access: `hf auth login`, or HF_TOKEN
  mlx-quant upload ./Qwen3-8B-4bit --upload-repo my-org/Qwen3-8B-4bit --reference Qwen/Qwen3-8B
      measures KL to the original for the model card first
  mlx-quant gptq --model Qwen/Qwen3-8B --upload-repo my-org/Qwen3-8B-gptq
      quantize and upload in one go";

/// Arguments of `upload`.
#[derive(Debug, Args)]
#[command(after_help = UPLOAD_EXAMPLES)]
#[expect(clippy::struct_field_names, reason = "the flag's name")]
pub(crate) struct Upload {
    /// Model directory
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,

    /// Hub repository to upload to
    #[arg(long, value_name = "ORG/NAME")]
    pub(crate) upload_repo: String,

    /// If the repository is created, make it private
    #[arg(long)]
    pub(crate) private: bool,

    /// Measure the model against this one (a directory or a hub id) for its card, if the card does not tell it yet
    #[arg(long, value_name = "MODEL")]
    pub(crate) reference: Option<PathBuf>,

    /// Branch, tag or commit of --reference on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,

    #[command(flatten)]
    pub(crate) output: Output,
}
