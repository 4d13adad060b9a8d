//! The texts that are built into mlx-quant, so that calibration and evaluation work with nothing else at hand.
//!
//! Both are half prose, three tenths documentation and two tenths code, in the public domain or permissively
//! licensed (see SOURCES.md in this crate, which has to go along with them). No document is in both.

/// What methods are calibrated on: 505 kB, drawn from what the demo model was trained on.
pub const CALIBRATION: &str = include_str!("../files/calibration.txt");

/// What results are evaluated on: 207 kB, which the demo model has not seen.
pub const HELD_OUT: &str = include_str!("../files/held_out.txt");
