//! Policy: what every front end would otherwise have to decide by itself. Usual figures, how windows are shared out,
//! when memory is too small, how a target is reached.
//!
//! A command line, a Python module and a program that imports this library should do the same where nothing is said. So
//! policy stands here, above the methods; a front end turns words into settings and says what came out. Nothing here
//! prints or reads the environment.

mod allocate;
mod check;
mod contestant;
mod low_memory;
mod processor;
mod schemes;
mod search;
mod text;

pub use self::allocate::{Allocator, check_place, tries};
pub use self::check::{check_allocation, check_method, check_training};
pub(crate) use self::contestant::budget_of;
pub use self::contestant::{Contestant, budget};
pub use self::low_memory::{Room, USUAL_RESIDENT, available_memory, choose_low_memory, total_memory};
pub use self::processor::processor;
pub use self::schemes::{affine, table_scheme, table_schemes};
pub use self::search::Search;
pub use self::text::{SharedText, Text};
pub use crate::data::{CALIBRATION_WINDOWS, Shares, VALIDATION_WINDOWS};
pub use crate::device::{Device, DeviceChoice, Precision};
pub use crate::setting::{Setting, SettingError};
