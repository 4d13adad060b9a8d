//! Whether a run takes the way of less memory and more time, because the machine has too little memory for the usual
//! one.

use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

/// What a process holds after it has tokenized a text, where the system does not tell.
pub const USUAL_RESIDENT: u64 = 80 << 20;

/// Memory for a run, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// What programs may still take; `None` where the system does not say.
    pub free: Option<u64>,
    /// What this process holds already, which forecasts count too.
    pub resident: u64,
}

impl Room {
    /// On this machine, now.
    pub fn now() -> Self {
        Self { free: available_memory(), resident: resident_memory().unwrap_or(USUAL_RESIDENT) }
    }

    /// Whether a process that comes to hold `peak` bytes fits. Where the system does not say, it does.
    pub fn fits(&self, peak: u64) -> bool {
        self.free.is_none_or(|free| peak <= free.saturating_add(self.resident))
    }
}

/// Foresees a run as it was asked for, and where that does not fit, the one that needs less memory. `foresee` is told
/// whether to save memory, `fits` says of a forecast whether there is as much. Gives whether memory is saved, and the
/// forecast.
///
/// # Errors
/// Those of `foresee`.
pub fn choose_low_memory<F, E>(
    asked: bool,
    mut foresee: impl FnMut(bool) -> Result<F, E>,
    fits: impl Fn(&F) -> bool,
) -> Result<(bool, F), E> {
    let first = foresee(asked)?;
    if asked || fits(&first) {
        return Ok((asked, first));
    }
    Ok((true, foresee(true)?))
}

/// Memory that programs may still take, bytes.
pub fn available_memory() -> Option<u64> {
    known(memory().available_memory())
}

/// Memory of the machine, bytes.
pub fn total_memory() -> Option<u64> {
    known(memory().total_memory())
}

/// What this process holds.
fn resident_memory() -> Option<u64> {
    let own = sysinfo::get_current_pid().ok()?;
    let mut system = System::new();
    let only_memory = ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), false, only_memory);
    known(system.process(own)?.memory())
}

fn memory() -> System {
    System::new_with_specifics(RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram()))
}

/// sysinfo says 0 where the system says nothing.
fn known(bytes: u64) -> Option<u64> {
    (bytes > 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_saved_only_where_the_usual_way_does_not_fit() {
        let room = Room { free: Some(100), resident: 10 };
        let choose = |asked, room: Room, usual| {
            let foresee = |low| Ok::<u64, ()>(if low { 50 } else { usual });
            choose_low_memory(asked, foresee, |peak| room.fits(*peak)).unwrap()
        };
        assert_eq!(choose(false, room, 110), (false, 110));
        assert_eq!(choose(false, room, 111), (true, 50));
        assert_eq!(choose(true, room, 1), (true, 50));
        let unknown = Room { free: None, resident: 10 };
        assert_eq!(choose(false, unknown, u64::MAX), (false, u64::MAX));
    }

    #[test]
    fn errors_come_through_at_once() {
        let failed = choose_low_memory(false, |_| Err::<u64, &str>("no"), |_| false);
        assert_eq!(failed, Err("no"));
    }

    #[test]
    fn this_machine_tells() {
        let (total, free) = (total_memory().unwrap(), available_memory().unwrap());
        assert!(free <= total && total > 64 << 20, "{free} of {total}");
        assert!((1 << 20..total).contains(&resident_memory().unwrap()));
        // Other tests of this process take and give back memory meanwhile.
        let grows = |_| {
            let before = resident_memory().unwrap();
            let filled = vec![1u8; 256 << 20];
            resident_memory().unwrap() > before + (200 << 20) && filled[filled.len() - 1] == 1
        };
        assert!((0..50).any(grows), "what is filled is not seen");
    }
}
