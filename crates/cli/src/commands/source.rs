//! Where a command's model comes from.

use std::path::Path;

use anyhow::Result;
use mlx_format::Scheme;
use mlx_format::checkpoint::Directory;
use mlx_quant::{Model, Overrides};

use crate::Refusal;
use crate::args::Hub;
use crate::printer::Printer;

/// The directory of `model`, or the built-in demo model.
pub(crate) fn directory(model: Option<&Path>) -> Result<Directory> {
    match model {
        Some(path) => {
            if !path.exists() && looks_like_hub_id(path) {
                let id = path.display();
                return Err(Refusal(format!(
                    "{id} is not a directory here, and this version does not download from the hub; \
                     hint: download it first (`hf download {id} --local-dir DIR`) and give the directory"
                ))
                .into());
            }
            Ok(Directory::open(path).map_err(mlx_quant::Error::from)?)
        }
        #[cfg(feature = "demo")]
        None => Ok(mlx_quant::demo()),
        #[cfg(not(feature = "demo"))]
        None => {
            Err(Refusal("this build has no demo model; hint: give the directory of a model".to_owned())
                .into())
        }
    }
}

/// Opens a model, with a word on files that are not part of it.
pub(crate) fn open(model: Option<&Path>, printer: Printer) -> Result<Model> {
    let model = mlx_quant::open(&directory(model)?)?;
    for file in model.checkpoint.ignored() {
        printer.warn(&format!("{file} is not in the index and is not used"));
    }
    Ok(model)
}

/// Says what of the hub's flags this version does not do.
pub(crate) fn refuse_upload(hub: &Hub, printer: Printer) -> Result<(), Refusal> {
    if hub.upload_repo.is_some() {
        return Err(Refusal(
            "this version does not upload; hint: leave out --upload-repo and run `hf upload ORG/NAME DIR` afterwards"
                .to_owned(),
        ));
    }
    if hub.revision.is_some() {
        printer.warn("--revision has no effect on a local model");
    }
    Ok(())
}

/// A recipe file, what it leaves out being taken from `base`.
pub(crate) fn overrides(path: Option<&Path>, base: Scheme) -> Result<Option<Overrides>, Refusal> {
    let Some(path) = path else { return Ok(None) };
    let text = fs_err::read_to_string(path)
        .map_err(|error| Refusal(format!("{error}; hint: --recipe-file takes a TOML file")))?;
    let overrides = Overrides::parse(&text, base);
    Ok(Some(overrides.map_err(|error| Refusal(format!("{}: {error}", path.display())))?))
}

fn looks_like_hub_id(path: &Path) -> bool {
    path.is_relative() && path.components().count() == 2 && !path.starts_with(".") && !path.starts_with("..")
}
