//! Where a command's model comes from.

use std::path::Path;

use anyhow::Result;
use mlx_format::checkpoint::Directory;

use crate::Refusal;

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

fn looks_like_hub_id(path: &Path) -> bool {
    path.is_relative() && path.components().count() == 2 && !path.starts_with(".") && !path.starts_with("..")
}
