//! The model that a command is about.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::refusal::Refusal;

/// A model, by its place on the command line or by its flag: most commands are read as "do this to that model", and mlx-lm's take a flag.
#[derive(Clone, Debug, Args)]
pub(crate) struct ModelArg {
    /// The same as --model
    #[arg(value_name = "MODEL", id = "place")]
    place: Option<PathBuf>,

    /// Model: a directory, or a hub id or URL such as Qwen/Qwen3-8B [default: the built-in demo model]
    #[arg(long = "model", id = "model", short = 'm', visible_alias = "hf-path", value_name = "MODEL")]
    flag: Option<PathBuf>,
}

impl ModelArg {
    /// What was given; nothing for the built-in demo model.
    pub(crate) fn given(&self) -> Option<&Path> {
        self.flag.as_deref().or(self.place.as_deref())
    }

    /// Refuses two models.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        match (&self.place, &self.flag) {
            (Some(place), Some(flag)) if place != flag => Err(Refusal(format!(
                "{} and --model {} are two models; hint: name one of them",
                place.display(),
                flag.display()
            ))),
            _ => Ok(()),
        }
    }
}
