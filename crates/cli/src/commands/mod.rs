//! One file per command: settings from arguments, then the library, then the printer.

pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod eval;
pub(crate) mod inspect;
pub(crate) mod quantize;
mod source;
mod windows;
