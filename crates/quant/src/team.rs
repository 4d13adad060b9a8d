//! Several devices that compute together: each takes a part of the windows through the same code.
//!
//! What is summed over windows is exchanged as nodes of the tree of [`crate::reduce`], so that the sum has the bits that
//! one device gives it; what is decided, the first device decides. Every member makes the same exchanges in the same
//! order, and only the first one, which leads, writes and tells. A member that stops lets all others stop.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use mlx_quant_engine::Tensor;

use crate::Error;
use crate::methods::Rounded;
use crate::reduce::CHUNK;

/// What a member brings to an exchange.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    /// What the rest is.
    pub(crate) head: Vec<u64>,
    /// Tensors where they lie.
    pub(crate) tensors: Vec<Tensor>,
    /// Codes, scales and biases.
    pub(crate) rounded: Vec<Arc<Rounded>>,
}

/// An exchange that is under way, and the last one.
#[derive(Debug)]
struct Exchange {
    /// Exchanges so far.
    round: u64,
    /// What has been brought to this one, by member.
    brought: Vec<Option<Part>>,
    /// What all brought to the last one.
    last: Arc<Vec<Part>>,
    /// Whether a member has stopped.
    lost: bool,
}

#[derive(Debug)]
struct Link {
    exchange: Mutex<Exchange>,
    changed: Condvar,
}

impl Link {
    fn exchange(&self) -> MutexGuard<'_, Exchange> {
        // A member that panics is noted as lost; an exchange is never left half-done.
        self.exchange.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A member's place among those that compute together.
#[derive(Clone, Debug)]
pub(crate) struct Team {
    rank: usize,
    count: usize,
    link: Arc<Link>,
}

impl Team {
    /// A device that computes alone.
    pub(crate) fn alone() -> Self {
        Self::of(1).remove(0)
    }

    /// The members of a team, the leader first.
    fn of(count: usize) -> Vec<Self> {
        let brought = vec![None; count];
        let exchange = Exchange { round: 0, brought, last: Arc::default(), lost: false };
        let link = Arc::new(Link { exchange: Mutex::new(exchange), changed: Condvar::new() });
        (0..count).map(|rank| Self { rank, count, link: link.clone() }).collect()
    }

    /// Whether nobody else computes.
    pub(crate) fn is_alone(&self) -> bool {
        self.count == 1
    }

    /// Whether this member writes, tells and decides.
    pub(crate) fn leads(&self) -> bool {
        self.rank == 0
    }

    /// All members, the leader first.
    pub(crate) fn members(&self) -> Vec<Self> {
        (0..self.count).map(|rank| Self { rank, ..self.clone() }).collect()
    }

    /// Whether another one is this member.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.rank == other.rank
    }

    /// Its windows among so many: neighbours, and whole chunks of those that are summed in order.
    pub(crate) fn share(&self, windows: usize) -> Range<usize> {
        self.shared(windows, CHUNK)
    }

    /// Its part of `count` things, in whole `step`s.
    pub(crate) fn shared(&self, count: usize, step: usize) -> Range<usize> {
        let steps = count.div_ceil(step);
        let end = |rank: usize| (steps * rank / self.count * step).min(count);
        end(self.rank)..end(self.rank + 1)
    }

    /// What all members bring, in their order. Comes back when all have brought something.
    ///
    /// # Errors
    /// [`Error::Stopped`] if a member has stopped.
    pub(crate) fn gather(&self, own: Part) -> Result<Arc<Vec<Part>>, Error> {
        let mut exchange = self.link.exchange();
        if exchange.lost {
            return Err(Error::Stopped);
        }
        let round = exchange.round;
        exchange.brought[self.rank] = Some(own);
        if exchange.brought.iter().all(Option::is_some) {
            exchange.last = Arc::new(exchange.brought.iter_mut().filter_map(Option::take).collect());
            exchange.round += 1;
            self.link.changed.notify_all();
            return Ok(exchange.last.clone());
        }
        while exchange.round == round && !exchange.lost {
            exchange = self.link.changed.wait(exchange).unwrap_or_else(PoisonError::into_inner);
        }
        // Nobody goes a round further before all have this one.
        if exchange.round == round { Err(Error::Stopped) } else { Ok(exchange.last.clone()) }
    }

    /// What the leader says.
    ///
    /// # Errors
    /// As [`Team::gather`].
    pub(crate) fn said(&self, own: impl FnOnce() -> u64) -> Result<u64, Error> {
        if self.is_alone() {
            return Ok(own());
        }
        let head = if self.leads() { vec![own()] } else { Vec::new() };
        let all = self.gather(Part { head, ..Part::default() })?;
        Ok(all[0].head[0])
    }

    /// Whether all members say the same number.
    ///
    /// # Errors
    /// As [`Team::gather`].
    pub(crate) fn agrees(&self, own: u64) -> Result<bool, Error> {
        let all = self.gather(Part { head: vec![own], ..Part::default() })?;
        Ok(all.iter().all(|part| part.head == [own]))
    }

    fn lose(&self) {
        self.link.exchange().lost = true;
        self.link.changed.notify_all();
    }
}

/// Lets all others stop unless its member has finished.
struct Leaving<'t> {
    team: &'t Team,
    finished: bool,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.team.lose();
        }
    }
}

fn take_part<T>(team: &Team, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let mut leaving = Leaving { team, finished: false };
    let done = work();
    leaving.finished = done.is_ok();
    done
}

/// Lets a team of `count` members work, each on a thread of its own; gives what the leader gives.
///
/// # Errors
/// What the first member that stopped met with.
pub(crate) fn together<T>(
    count: usize,
    lead: impl FnOnce(&Team) -> Result<T, Error>,
    follow: impl Fn(&Team, usize) -> Result<(), Error> + Sync,
) -> Result<T, Error> {
    let mut members = Team::of(count.max(1));
    let own = members.remove(0);
    let follow = &follow;
    let (led, followed) = std::thread::scope(|scope| {
        let others: Vec<_> = members
            .iter()
            .map(|team| scope.spawn(move || take_part(team, || follow(team, team.rank))))
            .collect();
        let led = take_part(&own, || lead(&own));
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<(), Error>>| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        (led, others.into_iter().map(join).collect::<Vec<_>>())
    });
    let why = followed.into_iter().filter_map(Result::err).find(|error| !matches!(error, Error::Stopped));
    match (led, why) {
        (Err(Error::Stopped) | Ok(_), Some(why)) => Err(why),
        (led, _) => led,
    }
}

#[cfg(test)]
mod tests {
    use mlx_quant_engine::cpu;

    use super::*;

    #[test]
    fn windows_are_shared_out_in_whole_chunks() {
        for (windows, count) in [(128, 2), (128, 3), (20, 2), (5, 4), (0, 2), (100, 1)] {
            let shares: Vec<_> = Team::of(count).iter().map(|team| team.share(windows)).collect();
            assert_eq!((shares[0].start, shares[count - 1].end), (0, windows));
            for pair in shares.windows(2) {
                assert_eq!(pair[0].end, pair[1].start);
                assert!(pair[0].end == windows || pair[0].end % CHUNK == 0, "{shares:?}");
            }
        }
        let rows: Vec<_> = Team::of(3).iter().map(|team| team.shared(100, 32)).collect();
        assert_eq!(rows, [0..32, 32..64, 64..100]);
    }

    #[test]
    fn everybody_gets_what_all_brought_however_fast_they_are() {
        let work = |team: &Team| -> Result<u64, Error> {
            let mut sum = 0;
            for round in 0..200 {
                if (round + team.rank).is_multiple_of(7) {
                    std::thread::yield_now();
                }
                let head = vec![round as u64 * 10 + team.rank as u64];
                let tensor = Tensor::full(team.rank as f32, (1, 1), &cpu()).unwrap();
                let all = team.gather(Part { head, tensors: vec![tensor], ..Part::default() })?;
                let heads: Vec<u64> = all.iter().map(|part| part.head[0]).collect();
                assert_eq!(heads, (0..3).map(|rank| round as u64 * 10 + rank).collect::<Vec<_>>());
                assert_eq!(all[2].tensors[0].to_vec().unwrap(), [2.0]);
                sum += team.said(|| round as u64)?;
                assert!(team.agrees(sum)? && !team.agrees(team.rank as u64)?);
            }
            Ok(sum)
        };
        let sum = together(3, |team| work(team), |team, _| work(team).map(drop)).unwrap();
        assert_eq!(sum, (0..200).sum::<u64>());
    }

    #[test]
    fn who_stops_lets_all_others_stop_and_is_blamed() {
        let wait = |team: &Team| -> Result<(), Error> {
            loop {
                team.gather(Part::default())?;
            }
        };
        let stopped = |team: &Team, rank| if rank == 2 { Err(Error::Interrupted) } else { wait(team) };
        let error = together(4, |team| wait(team), stopped).unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{error}");
        let error = together(2, |_| Err::<(), _>(Error::Interrupted), |team, _| wait(team)).unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{error}");
    }
}
