//! Ctrl-C: once to stop at the next safe point (exit 130, resumable), twice to stop at once.
//!
//! A safe point may be far away: one factorisation of a wide layer's Hessian takes longer than people wait. Files are written so that a run can be
//! killed at any moment and goes on from there (scripts/crash_matrix.py), so the process ends where it is when no safe point came in time. Lost is only
//! what was done since the last one.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::printer::Printer;
use crate::refusal::{INTERRUPTED, interrupted};

/// How long the next safe point is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// Signals come to the process, whatever part of a command is at work.
static ASKED: OnceLock<AtomicBool> = OnceLock::new();

/// Whether the user has asked to stop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupt(&'static AtomicBool);

impl Interrupt {
    /// Listens from now on. Where no handler can be installed, signals keep their default effect.
    pub(crate) fn listen() -> Self {
        let asked = ASKED.get_or_init(|| {
            let _ = ctrlc::set_handler(|| {
                let again = ASKED.get().is_some_and(|asked| asked.swap(true, Ordering::SeqCst));
                if again {
                    end();
                }
                let watch = std::thread::Builder::new().name("interrupt".to_owned());
                let _ = watch.spawn(|| {
                    std::thread::sleep(PATIENCE);
                    Printer::new(true, false, false).error(&interrupted());
                    end();
                });
            });
            AtomicBool::new(false)
        });
        Self(asked)
    }

    pub(crate) fn requested(self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Ends the process, whatever its other threads do.
fn end() -> ! {
    std::process::exit(i32::from(INTERRUPTED))
}
