//! What the system says of memory; nothing where it does not say.

/// What a process holds after it has tokenized a text, where the system does not tell.
pub(crate) const USUAL_RESIDENT: u64 = 80 << 20;

/// Highest resident set of this process so far, or since [`reset_peak`].
pub(crate) fn resident_peak() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// Resident set of this process.
pub(crate) fn resident_now() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// Lets [`resident_peak`] begin anew; whether it did.
pub(crate) fn reset_peak() -> bool {
    fs_err::write("/proc/self/clear_refs", "5").is_ok()
}

/// Gives what the allocator keeps for later back to the system, so that the next piece of work is measured by itself.
pub(crate) fn give_back() {
    // SAFETY: the function takes no pointers and may be called at any time.
    unsafe { libmimalloc_sys::mi_collect(true) };
}

/// Memory that programs may still take.
pub(crate) fn free_memory() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemAvailable:")
}

/// Memory of the machine.
pub(crate) fn total_memory() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemTotal:")
}

fn status_bytes(key: &str) -> Option<u64> {
    kilobytes("/proc/self/status", key)
}

/// A line of Linux's files, in bytes.
fn kilobytes(file: &str, key: &str) -> Option<u64> {
    let text = fs_err::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}
