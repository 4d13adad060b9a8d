//! The highest memory of this process, where the system tells; what is free says the library.

/// Highest resident set of this process so far, or since [`reset_peak`].
pub(crate) fn resident_peak() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// Resident set of this process, as cheaply as a progress bar asks for it.
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

/// A line of Linux's file on this process, in bytes.
fn status_bytes(key: &str) -> Option<u64> {
    let text = fs_err::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}
