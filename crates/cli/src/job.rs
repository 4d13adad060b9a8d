//! Where a job stands: its steps, what of them is done, and how long the rest will take.
//!
//! What is expected of each part comes with the job (from a forecast, where there is one). What parts really take
//! corrects it: those that are done by one factor for all that is to come, the one under way by its own rate.

use std::time::{Duration, Instant};

use mlx_quant::numbers::bytes;
use mlx_quant::observer::{Step, StepPart, Unit};

/// Of everything that is expected, what a forecast weighs against what was seen.
const PRIOR: f64 = 0.05;
/// The part of a phase after which its own rate and what was expected of it weigh alike.
const TRUST: f64 = 0.1;

/// What is counted in a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Count {
    Bytes,
    Units(Unit),
}

/// A part of the work under way.
#[derive(Clone, Debug)]
struct Phase {
    name: &'static str,
    count: Count,
    total: u64,
    /// Done by an earlier run, and done altogether.
    before: u64,
    done: u64,
    /// Tokens that pass in all of it; 0 where none do.
    tokens: u64,
    begun: Instant,
    /// When `done` last grew.
    moved: Instant,
    /// Its place among the job's steps.
    place: Option<(usize, usize)>,
}

impl Phase {
    /// Parts of it that are done: altogether, and by this run.
    fn parts(&self) -> (f64, f64) {
        let total = self.total.max(1) as f64;
        let here = self.done.saturating_sub(self.before);
        ((self.done as f64 / total).min(1.0), (here as f64 / total).min(1.0))
    }

    fn seconds(&self, now: Instant) -> f64 {
        now.saturating_duration_since(self.begun).as_secs_f64()
    }

    /// Seconds until it is done, when the whole of it was expected to take so many.
    fn left(&self, expected: Option<f64>, now: Instant) -> Option<f64> {
        let (done, here) = self.parts();
        let seen = (here > 0.0).then(|| {
            let moved = self.moved.saturating_duration_since(self.begun).as_secs_f64();
            moved / here
        });
        let whole = match (seen, expected) {
            (None, expected) => expected?,
            (Some(seen), None) => seen,
            (Some(seen), Some(expected)) => {
                let trust = here / (here + TRUST);
                trust * seen + (1.0 - trust) * expected
            }
        };
        let waited = now.saturating_duration_since(self.moved).as_secs_f64();
        let unit = whole / self.total.max(1) as f64;
        // One that takes longer than expected says something of the others, but it may be the only one.
        let slower = match self.count {
            Count::Units(_) if waited > unit && unit > 0.0 => (waited / unit).sqrt(),
            _ => 1.0,
        };
        Some((whole * slower * (1.0 - done) - waited.min(0.9 * unit)).max(0.0))
    }
}

/// What is known of the time of a job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Times {
    /// Seconds until it is done.
    pub(crate) left: f64,
    /// Seconds that all of it takes, earlier runs included; nothing where only the phase under way is known.
    pub(crate) of: Option<f64>,
}

/// A job under way.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    steps: Vec<Step>,
    begun: Instant,
    phase: Option<Phase>,
    /// The step that was entered by its name: a phase is looked for in it alone.
    within: Option<usize>,
    /// The part behind which the next phase is looked for.
    next: (usize, usize),
    /// What was expected of finished parts, and what they took, as far as this run did them.
    expected: f64,
    took: f64,
}

impl Job {
    pub(crate) fn new(steps: &[Step], now: Instant) -> Self {
        Self {
            steps: steps.to_vec(),
            begun: now,
            phase: None,
            within: None,
            next: (0, 0),
            expected: 0.0,
            took: 0.0,
        }
    }

    /// What will be done, for people: nothing of a job of one step.
    pub(crate) fn plan(&self) -> Option<String> {
        let sure: Vec<&Step> = self.steps.iter().filter(|step| !step.optional).collect();
        if self.steps.len() < 2 {
            return None;
        }
        let names: Vec<&str> = sure.iter().map(|step| step.name.as_str()).collect();
        let more = self.steps.len() - sure.len();
        let more = if more > 0 { format!(", and at most {more} more") } else { String::new() };
        let seconds: Option<f64> = sure.iter().flat_map(|step| &step.parts).map(|part| part.seconds).sum();
        let time =
            seconds.map_or_else(String::new, |seconds| format!("; about {} in all", duration(seconds)));
        Some(format!("{} steps: {}{more}{time}", sure.len(), names.join(", ")))
    }

    /// Turns to a step by its number.
    pub(crate) fn enter(&mut self, step: usize, now: Instant) {
        self.end(now);
        self.within = Some(step);
        self.next = (step, 0);
    }

    /// The next phase begins; `unit` is missing where bytes are counted.
    pub(crate) fn begin(
        &mut self,
        name: &'static str,
        unit: Option<Unit>,
        (total, tokens): (u64, u64),
        now: Instant,
    ) {
        self.end(now);
        let place = self.find(name);
        if let Some((step, part)) = place {
            self.next = (step, part + 1);
        }
        let count = unit.map_or(Count::Bytes, Count::Units);
        let (before, done) = (0, 0);
        self.phase = Some(Phase { name, count, total, before, done, tokens, begun: now, moved: now, place });
    }

    /// The next part of that name.
    fn find(&self, name: &str) -> Option<(usize, usize)> {
        let last = self.within.map_or(self.steps.len(), |step| step + 1);
        let steps = self.steps.iter().enumerate().take(last).skip(self.next.0);
        let mut parts = steps.flat_map(|(at, step)| {
            let first = if at == self.next.0 { self.next.1 } else { 0 };
            step.parts.iter().enumerate().skip(first).map(move |(part, own)| (at, part, own))
        });
        parts.find(|(.., own)| own.phase == name).map(|(step, part, _)| (step, part))
    }

    /// So much of the phase was done before.
    pub(crate) fn resumed(&mut self, done: u64, now: Instant) {
        if let Some(phase) = &mut self.phase {
            (phase.before, phase.done, phase.moved, phase.begun) = (done, done, now, now);
        }
    }

    pub(crate) fn progress(&mut self, done: u64, now: Instant) {
        if let Some(phase) = self.phase.as_mut().filter(|phase| phase.done != done) {
            (phase.done, phase.moved) = (done, now);
        }
    }

    /// The phase is over; how long it took.
    pub(crate) fn end(&mut self, now: Instant) -> Option<(&'static str, f64)> {
        let phase = self.phase.take()?;
        let took = phase.seconds(now);
        if let Some(expected) = phase.place.and_then(|place| self.part(place).seconds) {
            self.expected += expected * phase.parts().1;
            self.took += took;
        }
        Some((phase.name, took))
    }

    fn part(&self, (step, part): (usize, usize)) -> StepPart {
        self.steps[step].parts[part]
    }

    /// How much longer everything takes than it was expected to.
    fn factor(&self) -> f64 {
        let parts = self.steps.iter().filter(|step| !step.optional).flat_map(|step| &step.parts);
        let prior = PRIOR * parts.filter_map(|part| part.seconds).sum::<f64>();
        let (mut expected, mut took) = (self.expected, self.took);
        if let Some(phase) = &self.phase
            && let Some(seconds) = phase.place.and_then(|place| self.part(place).seconds)
            && phase.parts().1 > 0.0
        {
            expected += seconds * phase.parts().1;
            took += phase.moved.saturating_duration_since(phase.begun).as_secs_f64();
        }
        let factor = (took + prior) / (expected + prior);
        if factor.is_finite() { factor } else { 1.0 }
    }

    /// What is left of the job, or where that is not known of the phase; nothing before anything is known.
    pub(crate) fn times(&self, now: Instant) -> Option<Times> {
        let phase = self.phase.as_ref()?;
        let factor = self.factor();
        let expected = phase.place.and_then(|place| self.part(place).seconds).map(|seconds| seconds * factor);
        let own = phase.left(expected, now)?;
        let step_now = phase.place.map_or(self.next.0, |place| place.0);
        let places = self.steps.iter().enumerate().filter(|(at, step)| !step.optional || *at == step_now);
        let parts = places.flat_map(|(at, step)| {
            step.parts.iter().enumerate().map(move |(part, own)| ((at, part), own.seconds))
        });
        let all: Option<f64> = parts.clone().map(|(_, seconds)| seconds).sum();
        let later = parts.filter(|(place, _)| *place >= self.next);
        let later: Option<f64> = later.map(|(_, seconds)| seconds).sum();
        let Some(later) = later else { return Some(Times { left: own, of: None }) };
        let left = own + later * factor;
        // What was done before, or is not needed, counts as what it would have taken.
        let spent = now.saturating_duration_since(self.begun).as_secs_f64();
        let of = all.filter(|all| *all > 0.0).map(|all| (all * factor).max(spent + left));
        Some(Times { left, of })
    }

    /// The part of the job that is done.
    pub(crate) fn part_done(&self, now: Instant) -> f64 {
        match (self.times(now), &self.phase) {
            (Some(Times { left, of: Some(of) }), _) if of > 0.0 => (1.0 - left / of).clamp(0.0, 1.0),
            (_, Some(phase)) => phase.parts().0,
            _ => 0.0,
        }
    }

    /// `step 3 of 5`, where there are several.
    fn step(&self) -> Option<String> {
        let step = self.phase.as_ref()?.place.map_or(self.next.0, |place| place.0);
        let (sure, all) = (self.steps.iter().filter(|step| !step.optional).count(), self.steps.len());
        let most = if sure < all { "at most " } else { "" };
        (all > 1).then(|| format!("step {} of {most}{all}", (step + 1).min(all)))
    }

    /// `gptq`, `dwq: teacher`; nothing of what has no name.
    fn name(&self) -> Option<String> {
        let phase = self.phase.as_ref()?;
        let Some((step, _)) = phase.place else {
            return (phase.count != Count::Bytes).then(|| phase.name.to_owned());
        };
        let step = &self.steps[step];
        Some(match &step.parts[..] {
            [_] => step.name.clone(),
            _ if step.name == phase.name => step.name.clone(),
            _ => format!("{}: {}", step.name, phase.name),
        })
    }

    /// `block 12 of 32`, `37 %`, `1.2 GB of 15 GB`.
    fn count(&self) -> Option<String> {
        let phase = self.phase.as_ref()?;
        let (next, total) = ((phase.done + 1).min(phase.total), phase.total);
        Some(match phase.count {
            Count::Bytes => format!("{} of {}", bytes(phase.done), bytes(total)),
            Count::Units(Unit::Blocks) if next == total => "the head".to_owned(),
            Count::Units(Unit::Blocks) => format!("block {next} of {}", total - 1),
            Count::Units(Unit::Layers) => format!("layer {next} of {total}"),
            Count::Units(Unit::Windows) => format!("window {next} of {total}"),
            Count::Units(Unit::Steps) => format!("training step {next} of {total}"),
            Count::Units(_) => format!("{:.0} %", 100.0 * phase.parts().0),
        })
    }

    /// `gptq: goes on at block 12 of 32`; nothing where nothing was done before, or everything.
    pub(crate) fn goes_on(&self) -> Option<String> {
        let phase = self.phase.as_ref().filter(|phase| phase.before > 0 && phase.before < phase.total)?;
        let name = self.name().unwrap_or_else(|| phase.name.to_owned());
        Some(format!("{name}: goes on at {}", self.count()?))
    }

    /// `310 tokens/s`, `210 MB/s`.
    fn rate(&self, now: Instant) -> Option<String> {
        let phase = self.phase.as_ref()?;
        let (seconds, (_, here)) = (phase.seconds(now), phase.parts());
        if here <= 0.0 || seconds < 0.5 {
            return None;
        }
        match phase.count {
            Count::Bytes => Some(format!("{}/s", bytes((here * phase.total as f64 / seconds) as u64))),
            Count::Units(_) if phase.tokens > 0 => {
                Some(format!("{:.0} tokens/s", phase.tokens as f64 * here / seconds))
            }
            Count::Units(_) => None,
        }
    }

    /// Everything that a person wants to know, the most important first.
    pub(crate) fn fields(&self, now: Instant) -> Vec<String> {
        // Of what is done nothing is left, and that is said by what comes next.
        let times = self.times(now).filter(|times| times.left > 0.0);
        let left = times.map(|times| match times.of {
            Some(of) => format!("{} left of {}", duration(times.left), duration(of)),
            None if self.steps.len() > 1 => format!("{} left of this step", duration(times.left)),
            None => format!("{} left", duration(times.left)),
        });
        [self.step(), self.name(), self.count(), left, self.rate(now)].into_iter().flatten().collect()
    }
}

/// `45 s`, `12 min`, `2 h 10 min`, `4 d 12 h`: what is only expected has no parts of a second. Nothing that is not done
/// takes no time.
pub(crate) fn duration(seconds: f64) -> String {
    match seconds {
        _ if seconds < 89.5 => format!("{:.0} s", seconds.max(1.0)),
        _ if seconds < 3570.0 => format!("{:.0} min", seconds / 60.0),
        _ => mlx_quant::numbers::duration(seconds),
    }
}

/// As many fields as stand within `width` columns, and always the first.
pub(crate) fn fitted(fields: &[String], width: usize) -> String {
    let mut line = String::new();
    for field in fields {
        let comma = if line.is_empty() { 0 } else { 2 };
        if !line.is_empty() && line.chars().count() + comma + field.chars().count() > width {
            break;
        }
        if comma > 0 {
            line.push_str(", ");
        }
        line.push_str(field);
    }
    line
}

/// When a line is due where nothing can be drawn: whenever something has moved on, but not more often than `every`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lines {
    every: Duration,
    last: Instant,
}

impl Lines {
    pub(crate) fn new(every: Duration, now: Instant) -> Self {
        Self { every, last: now }
    }

    /// Asked whenever something has moved on.
    pub(crate) fn due(&mut self, now: Instant) -> bool {
        let due = now.saturating_duration_since(self.last) >= self.every;
        if due {
            self.last = now;
        }
        due
    }
}

#[cfg(test)]
#[path = "job_tests.rs"]
mod tests;
