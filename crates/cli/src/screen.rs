//! What a long command shows while it works: one bar for the whole job, or lines where nothing can be drawn.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use console::Term;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use mlx_quant::observer::{StepPart, Unit};
use mlx_quant::{Event, Observer};

use crate::interrupt::Interrupt;
use crate::job::{Job, Lines, fitted};
use crate::memory::{give_back, reset_peak, resident_now, resident_peak};
use crate::printer::{Printer, bytes};

/// Between lines, where no bar can be drawn.
const LINES: Duration = Duration::from_secs(60);
/// Sets it otherwise, in seconds.
const LINES_VARIABLE: &str = "MLX_QUANT_PROGRESS_SECONDS";
/// Steps of the bar.
const BAR: u64 = 10_000;
/// Below so many columns there is no room for a bar beside the words.
const NARROW: usize = 60;

/// What is shown.
#[derive(Debug)]
struct View {
    job: Job,
    /// What is worked on.
    working: String,
    lines: Lines,
}

/// Draws events and passes on the wish to stop.
pub(crate) struct Screen {
    view: Arc<Mutex<View>>,
    interrupt: Interrupt,
    printer: Printer,
    /// Whether several pieces of work are measured apart.
    apart: bool,
    /// Largest resident set of all of them.
    peak: AtomicU64,
}

impl Screen {
    /// Draws to stderr and listens for interrupts.
    pub(crate) fn new(printer: Printer) -> Self {
        let seconds = std::env::var(LINES_VARIABLE).ok().and_then(|text| text.parse().ok());
        let every = seconds.map_or(LINES, Duration::from_secs);
        let now = Instant::now();
        let view = View { job: Job::new(&[], now), working: String::new(), lines: Lines::new(every, now) };
        Self {
            view: Arc::new(Mutex::new(view)),
            interrupt: Interrupt::listen(),
            printer,
            apart: false,
            peak: AtomicU64::new(0),
        }
    }

    /// Measures each method's memory by itself.
    pub(crate) fn comparing(printer: Printer) -> Self {
        let mut own = Self::new(printer);
        own.apart = true;
        own
    }

    /// Takes the bar away, whatever happened. What begins afterwards gets another one.
    pub(crate) fn clear(&self) {
        self.end();
        self.printer.without_bar();
    }

    /// Whether the user has asked to stop.
    #[cfg(feature = "hub")]
    pub(crate) fn was_interrupted(&self) -> bool {
        self.interrupt.requested()
    }

    /// What is shown. Never held while something is printed or drawn: the bar looks at it too.
    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, text: &str) {
        self.printer.say(text);
    }

    /// Says how long the phase took, to curious people.
    fn end(&self) {
        let ended = self.view().job.end(Instant::now());
        if let Some((name, seconds)) = ended {
            self.printer.detail(&format!("{name}: {seconds:.2} s"));
        }
    }

    /// A phase begins; `unit` is missing where bytes are counted.
    fn begin(&self, name: &'static str, unit: Option<Unit>, total: u64, tokens: u64) {
        self.end();
        let mut view = self.view();
        view.job.begin(name, unit, (total, tokens), Instant::now());
        view.working.clear();
        drop(view);
        // Seen however short it is.
        self.bring_up_to_date(ProgressBar::force_draw);
    }

    fn resumed(&self, done: u64) {
        self.view().job.resumed(done, Instant::now());
        let goes_on = self.view().job.goes_on();
        if let Some(text) = goes_on {
            self.say(&text);
        }
        self.draw();
    }

    fn progress(&self, done: u64) {
        let now = Instant::now();
        let mut view = self.view();
        view.job.progress(done, now);
        let line = (self.printer.tells() && view.lines.due(now)).then(|| view.told(now));
        drop(view);
        if let Some(line) = line {
            self.say(&line);
        }
        self.draw();
    }

    /// Brings the bar up to date; it draws itself so often a second only.
    fn draw(&self) {
        self.bring_up_to_date(|_| {});
    }

    fn bring_up_to_date(&self, then: impl FnOnce(&ProgressBar)) {
        let done = self.view().job.part_done(Instant::now());
        let prepare = |bar: &ProgressBar| {
            bar.set_length(BAR);
            bar.set_style(style(&self.view));
            bar.enable_steady_tick(Duration::from_millis(250));
        };
        self.printer.with_bar(prepare, |bar| {
            bar.set_position((done * BAR as f64) as u64);
            then(bar);
        });
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.printer.without_bar();
    }
}

impl View {
    /// A line for a file.
    fn told(&self, now: Instant) -> String {
        let mut fields = self.job.fields(now);
        fields.extend(memory());
        fields.join(", ")
    }

    /// A line for a terminal of so many columns.
    fn drawn(&self, now: Instant, columns: usize) -> String {
        let mut fields = self.job.fields(now);
        fields.extend(memory());
        if !self.working.is_empty() {
            fields.push(self.working.clone());
        }
        fitted(&fields, columns)
    }
}

/// `1.21 GB (peak 1.40 GB)`, where the system tells.
fn memory() -> Option<String> {
    Some(format!("{} (peak {})", bytes(resident_now()?), bytes(resident_peak()?)))
}

/// A bar for the whole job, and beside it as many words as there is room for.
fn style(view: &Arc<Mutex<View>>) -> ProgressStyle {
    let columns = || Term::stderr().size_checked().map_or(80, |(_, columns)| usize::from(columns));
    let view = Arc::clone(view);
    let words = move |_: &ProgressState, out: &mut dyn std::fmt::Write| {
        let all = columns();
        let beside = if all < NARROW { 0 } else { 13 };
        let view = view.lock().unwrap_or_else(PoisonError::into_inner);
        let line = view.drawn(Instant::now(), all.saturating_sub(beside + 1));
        let _ = out.write_str(&line);
    };
    let template = if columns() < NARROW { "{words}" } else { "[{bar:10}] {words}" };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.with_key("words", words).progress_chars("=> ")
}

impl Observer for Screen {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Job { steps } => {
                self.view().job = Job::new(steps, Instant::now());
                let plan = self.view().job.plan();
                if let Some(plan) = plan {
                    self.say(&plan);
                }
            }
            Event::Started { total, resumed } => {
                self.begin(StepPart::WRITE, None, total, 0);
                if resumed > 0 {
                    self.resumed(resumed);
                }
            }
            Event::Phase { name, unit, total, tokens } => self.begin(name, Some(unit), total, tokens),
            Event::Resumed { done } => self.resumed(done),
            Event::Contestant { name, index, total } => {
                give_back();
                self.end();
                self.view().job.enter(index, Instant::now());
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
                    mlx_quant::numbers::duration(seconds),
                    if known { " (by an earlier run)" } else { "" },
                ));
            }
            Event::Working { name } => {
                name.clone_into(&mut self.view().working);
                self.draw();
            }
            Event::Progress { done } => self.progress(done),
            Event::Note { text } => self.printer.detail(text),
            Event::Warning { text } => self.printer.warn(text),
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
                "finishing".clone_into(&mut self.view().working);
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
