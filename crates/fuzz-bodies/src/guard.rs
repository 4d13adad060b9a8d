//! Panics: which of them are findings.

use std::backtrace::Backtrace;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};

/// What the last panic said, and where.
static LAST: Mutex<Option<(String, Backtrace)>> = Mutex::new(None);

/// Panics of all threads so far.
static PANICS: AtomicU64 = AtomicU64::new(0);

/// Runs a body on bytes. A panic that leaves it is printed and ends the process, as fuzzers want it; one that is caught within, as those of
/// libraries may be, is none.
pub fn attempt(body: fn(&[u8]), bytes: &[u8]) {
    static HOOK: Once = Once::new();
    // In place of libfuzzer's, which ends the process before anything can catch the panic.
    HOOK.call_once(|| {
        std::panic::set_hook(Box::new(|panic| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            let last = (panic.to_string(), Backtrace::force_capture());
            *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(last);
        }));
    });
    if catch_unwind(|| body(bytes)).is_err() {
        print_last();
        std::process::abort();
    }
}

#[expect(clippy::print_stderr, reason = "that is where fuzzers look")]
fn print_last() {
    if let Some((message, backtrace)) = &*LAST.lock().unwrap_or_else(PoisonError::into_inner) {
        eprintln!("{message}\n{backtrace}");
    }
}

/// How often a thread of this process panicked, caught or not.
pub(crate) fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}
