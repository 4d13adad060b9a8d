//! Where the time of a run goes, on a card and in front of it: for those who make it faster.
//!
//! The card writes down the time behind each command; what a command took is the distance to the one before it, for
//! commands of one queue follow each other. That takes some time itself, so it is done only where somebody asks.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Instant;

use crate::usage::Spent;

/// Commands of a submission at most.
const MOST: u32 = 256;

/// What a profile needs of an adapter.
pub(super) const FEATURES: wgpu::Features = wgpu::Features::TIMESTAMP_QUERY
    .union(wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS)
    .union(wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES);

thread_local! {
    /// The operation that this thread is in.
    static OPERATION: Cell<&'static str> = const { Cell::new("") };
}

/// As long as it lives, this thread's launches belong to an operation, unless that is part of another one.
pub(super) struct Operation(&'static str);

impl Operation {
    pub(super) fn new(name: &'static str) -> Self {
        let before = OPERATION.get();
        if before.is_empty() {
            OPERATION.set(name);
        }
        Self(before)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        OPERATION.set(self.0);
    }
}

/// The times of one submission, which the card writes when it gets there.
#[derive(Debug)]
struct Times {
    commands: Vec<(&'static str, &'static str)>,
    buffer: wgpu::Buffer,
}

/// What was spent on what so far.
#[derive(Debug, Default)]
pub(super) struct Profile {
    /// Of what is recorded and not yet submitted.
    queries: Option<wgpu::QuerySet>,
    commands: Vec<(&'static str, &'static str)>,
    submitted: Vec<Times>,
    host: BTreeMap<&'static str, (f64, u64)>,
}

impl Profile {
    /// A new submission begins.
    pub(super) fn begin(&mut self, device: &wgpu::Device, encoder: &mut wgpu::CommandEncoder) {
        let set = device.create_query_set(&wgpu::QuerySetDescriptor {
            label: None,
            ty: wgpu::QueryType::Timestamp,
            count: MOST,
        });
        encoder.write_timestamp(&set, 0);
        self.queries = Some(set);
    }

    /// Behind a command: the query that notes the time.
    pub(super) fn after(&mut self, command: &'static str) -> Option<(&wgpu::QuerySet, u32)> {
        let set = self.queries.as_ref()?;
        if self.commands.len() as u32 + 1 >= MOST {
            return None;
        }
        self.commands.push((OPERATION.get(), command));
        Some((set, self.commands.len() as u32))
    }

    /// The submission ends.
    pub(super) fn end(&mut self, device: &wgpu::Device, encoder: &mut wgpu::CommandEncoder) {
        let Some(set) = self.queries.take() else { return };
        let commands = std::mem::take(&mut self.commands);
        let count = commands.len() as u32 + 1;
        let buffer = |usage| {
            let size = u64::from(count) * 8;
            device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size,
                usage,
                mapped_at_creation: false,
            })
        };
        let resolved = buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC);
        let kept = buffer(wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ);
        encoder.resolve_query_set(&set, 0..count, &resolved, 0);
        encoder.copy_buffer_to_buffer(&resolved, 0, &kept, 0, None);
        self.submitted.push(Times { commands, buffer: kept });
    }

    /// Counts time that somebody spent in front of the card.
    pub(super) fn host(&mut self, what: &'static str, since: Instant) {
        let entry = self.host.entry(what).or_default();
        entry.0 += since.elapsed().as_secs_f64();
        entry.1 += 1;
    }

    /// Everything so far, the largest first; all that was submitted must be done. `period`: nanoseconds of a tick.
    pub(super) fn spent(&mut self, device: &wgpu::Device, period: f32) -> Vec<Spent> {
        let mut all: BTreeMap<String, (f64, u64)> = BTreeMap::new();
        let submitted = std::mem::take(&mut self.submitted);
        for times in &submitted {
            times.buffer.map_async(wgpu::MapMode::Read, .., |_| {});
        }
        drop(device.poll(wgpu::PollType::Wait { submission_index: None, timeout: None }));
        let mut last: Option<u64> = None;
        for times in &submitted {
            let Ok(range) = times.buffer.get_mapped_range(..) else { continue };
            let stamps: &[u64] = bytemuck::cast_slice(&range);
            let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 * f64::from(period) / 1e9;
            let mut add = |name: String, seconds: f64| {
                let entry = all.entry(name).or_default();
                entry.0 += seconds;
                entry.1 += 1;
            };
            if let (Some(last), Some((operation, command))) = (last, times.commands.first()) {
                add(format!("the card waits for {operation}: {command}"), seconds(last, stamps[0]));
            }
            for ((operation, command), pair) in times.commands.iter().zip(stamps.windows(2)) {
                add(format!("{operation}: {command}"), seconds(pair[0], pair[1]));
            }
            last = stamps.last().copied();
        }
        all.extend(self.host.iter().map(|(what, spent)| (format!("in front of the card: {what}"), *spent)));
        let spent = all.into_iter().map(|(what, (seconds, times))| Spent { what, seconds, times });
        let mut spent: Vec<Spent> = spent.collect();
        spent.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        spent
    }
}
