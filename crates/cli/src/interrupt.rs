//! Ctrl-C: once to stop at the next safe point (exit 130, resumable), twice to stop at once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

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
                    std::process::exit(i32::from(crate::INTERRUPTED));
                }
            });
            AtomicBool::new(false)
        });
        Self(asked)
    }

    pub(crate) fn requested(self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
