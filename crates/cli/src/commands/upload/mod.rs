//! `mlx-quant upload`, and `--upload-repo` of the commands that write models; refused by a build without the hub.

#[cfg(feature = "hub")]
mod hub;
#[cfg(not(feature = "hub"))]
mod none;

#[cfg(feature = "hub")]
pub(crate) use self::hub::{Target, run};
#[cfg(not(feature = "hub"))]
pub(crate) use self::none::{Target, run};
