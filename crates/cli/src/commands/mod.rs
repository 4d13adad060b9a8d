//! One file per command: settings from arguments, then the library, then the printer.

pub(crate) mod card;
mod carry;
pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod devices;
mod drafter;
mod ending;
pub(crate) mod eval;
pub(crate) mod inspect;
mod line;
mod parents;
pub(crate) mod quantize;
pub(crate) mod recommend;
pub(crate) mod shell;
pub(crate) mod source;
#[cfg(feature = "hub")]
mod stream;
pub(crate) mod upload;
mod windows;
