//! What a long command shows while it works.

use indicatif::ProgressBar;
use mlx_quant::{Event, Observer};

use crate::interrupt::Interrupt;
use crate::printer::{Printer, bytes};

/// Draws events and passes on the wish to stop.
pub(crate) struct Screen {
    bar: ProgressBar,
    interrupt: Interrupt,
    printer: Printer,
}

impl Screen {
    /// Draws to stderr and listens for interrupts.
    pub(crate) fn new(printer: Printer) -> Self {
        Self { bar: printer.progress(), interrupt: Interrupt::listen(), printer }
    }

    /// Takes the bar away, whatever happened.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

impl Observer for Screen {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Started { total, resumed } => {
                self.bar.set_length(total);
                self.bar.set_position(resumed);
                self.bar.reset_eta();
                if resumed > 0 {
                    self.printer.say(&format!(
                        "resuming: {} of {} were done before",
                        bytes(resumed),
                        bytes(total)
                    ));
                }
            }
            Event::Phase { name, total } => {
                self.bar.set_style(self.printer.steps());
                self.bar.set_length(total);
                self.bar.set_position(0);
                self.bar.reset_eta();
                self.bar.set_prefix(name);
                self.bar.set_message(String::new());
            }
            Event::Working { name } => self.bar.set_message(name.to_owned()),
            Event::Progress { done } => self.bar.set_position(done),
            Event::Note { text } => self.bar.suspend(|| self.printer.detail(text)),
            Event::Finishing => self.bar.finish_and_clear(),
            _ => {}
        }
    }

    fn cancelled(&self) -> bool {
        self.interrupt.requested()
    }
}
