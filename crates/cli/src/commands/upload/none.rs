//! Without the hub nothing can be uploaded.

use std::convert::Infallible;
use std::path::Path;

use anyhow::Result;
use mlx_quant::Model;

use crate::args::HubFlags;
use crate::printer::Printer;
use crate::refusal::Refusal;

/// A repository: there is none.
pub(crate) struct Target(Infallible);

impl Target {
    pub(crate) fn of(flags: &HubFlags, _: bool, _: Printer) -> Result<Option<Self>> {
        if flags.upload_repo.is_some() {
            let why = "this build does not know the hub";
            return Err(Refusal(format!(
                "{why}; hint: leave out --upload-repo, and upload with `hf upload`"
            ))
            .into());
        }
        Ok(None)
    }

    pub(crate) fn push(&self, _: &Path, _: Option<&Model>, _: Printer) -> Result<()> {
        match self.0 {}
    }
}
