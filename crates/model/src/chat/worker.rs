//! A thread that compiles a template once and renders it as often as it is asked.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use minijinja::Error;
use minijinja::value::Value as Item;

use super::environment::environment;

/// Enough for lists nested as deeply as the budget allows; memory is used as it is touched.
const STACK: usize = 256 << 20;

/// The template's name in the engine's messages.
const NAME: &str = "<string>";

/// What is asked of the thread: the variables, and the budget of steps.
struct Job {
    context: Item,
    fuel: u64,
}

/// The thread. It ends when this is dropped, or with the rendering that it is at.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: Sender<Job>,
    answers: Receiver<Result<String, Error>>,
}

impl Worker {
    pub(super) fn start(source: Arc<str>) -> std::io::Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let (outbox, answers) = mpsc::channel();
        let thread = std::thread::Builder::new().name("chat template".to_owned()).stack_size(STACK);
        thread.spawn(move || work(&source, &inbox, &outbox))?;
        Ok(Self { jobs, answers })
    }

    /// Renders once. After an error of the channel the thread is of no use any more: it still works on what exceeded
    /// the deadline, or is gone.
    pub(super) fn render(
        &self,
        context: Item,
        fuel: u64,
        deadline: Duration,
    ) -> Result<Result<String, Error>, RecvTimeoutError> {
        self.jobs.send(Job { context, fuel }).map_err(|_| RecvTimeoutError::Disconnected)?;
        self.answers.recv_timeout(deadline)
    }
}

fn work(source: &str, inbox: &Receiver<Job>, outbox: &Sender<Result<String, Error>>) {
    let mut environment = environment();
    let mut compiled = false;
    while let Ok(Job { context, fuel }) = inbox.recv() {
        let mut answer = Ok(());
        if !compiled {
            answer = environment.add_template(NAME, source);
            compiled = answer.is_ok();
        }
        environment.set_fuel(Some(fuel));
        let text = answer
            .and_then(|()| environment.get_template(NAME))
            .and_then(|template| template.render(context));
        // Nobody listens any more after the deadline.
        if outbox.send(text).is_err() {
            return;
        }
    }
}
