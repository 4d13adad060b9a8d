//! Without the hub nothing can be uploaded or streamed.

use std::convert::Infallible;
use std::path::Path;

use anyhow::Result;
use mlx_quant::Model;

use crate::args::{HubFlags, Upload};
use crate::printer::Printer;
use crate::refusal::Refusal;

/// Refuses the command.
pub(crate) fn run(args: &Upload, _: Printer) -> Result<()> {
    let instead = format!("`hf upload {} {}`", args.upload_repo, args.directory.display());
    Err(Refusal::no_hub("upload needs the hub", &instead).into())
}

/// A repository: there is none.
pub(crate) struct Target(Infallible);

impl Target {
    pub(crate) fn of(flags: &HubFlags, _: bool, _: Printer) -> Result<Option<Self>> {
        if flags.upload_repo.is_some() {
            return Err(Refusal::no_hub(
                "--upload-repo uploads to the hub",
                "leave it out, and upload with `hf upload`",
            )
            .into());
        }
        Ok(None)
    }

    pub(crate) fn push(&self, _: &Path, _: Option<&Model>, _: Printer) -> Result<()> {
        match self.0 {}
    }
}
