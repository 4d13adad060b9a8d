//! What a long command shows while it works.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use mlx_quant::numbers::duration;
use mlx_quant::{Event, Observer};

use crate::interrupt::Interrupt;
use crate::memory::{give_back, reset_peak, resident_now, resident_peak};
use crate::printer::{Printer, bytes};

/// A phase under way.
#[derive(Clone, Copy, Debug)]
struct Phase {
    name: &'static str,
    begun: Instant,
    total: u64,
    tokens: u64,
}

/// Draws events and passes on the wish to stop.
pub(crate) struct Screen {
    bar: ProgressBar,
    interrupt: Interrupt,
    printer: Printer,
    phase: Mutex<Option<Phase>>,
    /// Whether several pieces of work are measured apart.
    apart: bool,
    /// Largest resident set of all of them.
    peak: AtomicU64,
}

impl Screen {
    /// Draws to stderr and listens for interrupts.
    pub(crate) fn new(printer: Printer) -> Self {
        Self {
            bar: printer.progress(),
            interrupt: Interrupt::listen(),
            printer,
            phase: Mutex::new(None),
            apart: false,
            peak: AtomicU64::new(0),
        }
    }

    /// Measures each method's memory by itself.
    pub(crate) fn comparing(printer: Printer) -> Self {
        Self { apart: true, ..Self::new(printer) }
    }

    /// Takes the bar away, whatever happened.
    pub(crate) fn clear(&self) {
        self.end();
        self.bar.finish_and_clear();
    }

    /// Whether the user has asked to stop.
    #[cfg(feature = "hub")]
    pub(crate) fn was_interrupted(&self) -> bool {
        self.interrupt.requested()
    }

    /// A line for people, above the bar.
    fn say(&self, text: &str) {
        self.bar.suspend(|| self.printer.say(text));
    }

    /// Says how long the phase took, to curious people.
    fn end(&self) {
        if let Some(phase) = self.phase.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let seconds = phase.begun.elapsed().as_secs_f64();
            self.bar.suspend(|| self.printer.detail(&format!("{}: {seconds:.2} s", phase.name)));
        }
    }

    fn begin(&self, name: &'static str, total: u64, tokens: u64) {
        self.end();
        let phase = Phase { name, begun: Instant::now(), total, tokens };
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = Some(phase);
        self.bar.set_style(self.steps());
        self.bar.set_length(total);
        self.bar.set_position(0);
        self.bar.reset_eta();
        self.bar.reset_elapsed();
        self.bar.set_prefix(name);
        self.bar.set_message(String::new());
        self.bar.enable_steady_tick(Duration::from_millis(250));
    }

    /// The style of a bar over the steps of a phase.
    fn steps(&self) -> ProgressStyle {
        let phase = *self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            if let Some(rate) = phase.and_then(|phase| rate(&phase, state.pos())) {
                let _ = write!(out, "{rate:.0} tokens/s ");
            }
        };
        let memory = |_: &ProgressState, out: &mut dyn std::fmt::Write| {
            if let (Some(now), Some(peak)) = (resident_now(), resident_peak()) {
                let _ = write!(out, "{} (peak {}) ", bytes(now), bytes(peak));
            }
        };
        let template = "{prefix:>13} [{bar:24}] {pos}/{len} {eta} left {rate}{memory}{wide_msg}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        style.with_key("rate", rate).with_key("memory", memory).progress_chars("=> ")
    }
}

/// The style of a bar over bytes, with rate and remaining time.
fn bytes_style() -> ProgressStyle {
    let template =
        "[{bar:24}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} left {wide_msg}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("=> ")
}

/// Tokens a second, once there is something to count.
fn rate(phase: &Phase, done: u64) -> Option<f64> {
    let seconds = phase.begun.elapsed().as_secs_f64();
    let part = done as f64 / phase.total.max(1) as f64;
    (phase.tokens > 0 && done > 0 && seconds > 0.5).then(|| phase.tokens as f64 * part / seconds)
}

impl Observer for Screen {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Started { total, resumed } => {
                self.end();
                self.bar.set_style(bytes_style());
                self.bar.set_prefix("");
                self.bar.set_length(total);
                self.bar.set_position(resumed);
                self.bar.reset_eta();
                if resumed > 0 {
                    self.say(&format!("resuming: {} of {} were done before", bytes(resumed), bytes(total)));
                }
            }
            Event::Contestant { name, index, total } => {
                give_back();
                self.say(&format!("[{}/{total}] {name}", index + 1));
            }
            Event::ContestantDone {
                kl,
                kl_stderr,
                bits_per_weight,
                bytes: size,
                seconds,
                peak_memory,
                known,
                ..
            } => {
                self.end();
                let error = kl_stderr.map_or_else(String::new, |error| format!(" ± {error:.4}"));
                let memory = peak_memory.map_or_else(String::new, |peak| format!(", memory {}", bytes(peak)));
                self.say(&format!(
                    "      KL {kl:.4}{error}, {bits_per_weight:.3} bits per weight, {}, {}{memory}{}",
                    bytes(size),
                    duration(seconds),
                    if known { " (by an earlier run)" } else { "" },
                ));
            }
            Event::Phase { name, total, tokens } => self.begin(name, total, tokens),
            Event::Working { name } => self.bar.set_message(name.to_owned()),
            Event::Progress { done } => self.bar.set_position(done),
            Event::Note { text } => self.bar.suspend(|| self.printer.detail(text)),
            Event::Warning { text } => self.bar.suspend(|| self.printer.warn(text)),
            Event::Allocated { bits_per_weight, predicted_kl, bound_kl, range, range_kl } => {
                self.say(&format!(
                    "dynamic: {bits_per_weight:.3} bits per weight, predicted KL {predicted_kl:.4} (at best {bound_kl:.4} at this size); reachable: {:.3} to {:.3} bits per weight, KL {:.4} to {:.5}",
                    range.0, range.1, range_kl.0, range_kl.1
                ));
            }
            Event::Tried { bits_per_weight, kl, wanted } => self.say(&format!(
                "measured KL {kl:.4} at {bits_per_weight:.3} bits per weight, asked for {wanted}"
            )),
            Event::Finishing => {
                self.end();
                self.bar.set_message("finishing");
            }
            _ => {}
        }
    }

    fn cancelled(&self) -> bool {
        self.interrupt.requested()
    }

    fn wants_notes(&self) -> bool {
        self.printer.is_verbose()
    }

    fn peak_memory(&self) -> Option<u64> {
        let peak = resident_peak()?;
        self.peak.fetch_max(peak, Ordering::Relaxed);
        if self.apart && !reset_peak() {
            return None;
        }
        Some(peak)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_counted_by_the_part_that_is_done() {
        let begun = Instant::now().checked_sub(Duration::from_secs(10)).unwrap_or_else(Instant::now);
        let phase = Phase { name: "quantize", begun, total: 4, tokens: 8000 };
        let rate = super::rate(&phase, 1).unwrap_or_default();
        assert!((rate - 200.0).abs() < 5.0, "{rate}");
        assert_eq!(super::rate(&phase, 0), None);
        assert_eq!(super::rate(&Phase { tokens: 0, ..phase }, 1), None);
    }
}
