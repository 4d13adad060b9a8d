//! Machines that lack something: system calls that fail, directories that cannot be written.

use std::io::Write as _;
use std::path::Path;
use std::process::Output;

use crate::place::{Place, finish};

/// Runs a command where some system calls fail with that error. Nothing, with a word on why, where that cannot be arranged.
pub(crate) fn without(calls: &[Call], errno: u32, command: &mut assert_cmd::Command) -> Option<Output> {
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    return std::thread::scope(|scope| {
        // A filter holds for one thread and what it starts.
        let run = || match filtered(calls, errno) {
            Ok(()) => Some(finish(command)),
            Err(error) => skipped(&format!("no system call filters here: {error}")),
        };
        scope.spawn(run).join().unwrap()
    });
    #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    return skipped(&format!("no system call filters here for {calls:?}, {errno}, {command:?}"));
}

/// A system call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    Flock,
    Symlink,
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn filtered(calls: &[Call], errno: u32) -> Result<(), Box<dyn std::error::Error>> {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
    let number = |call: &Call| -> &[i64] {
        match call {
            Call::Flock if cfg!(target_arch = "x86_64") => &[73],
            Call::Flock => &[32],
            // `symlink` and `symlinkat`.
            Call::Symlink if cfg!(target_arch = "x86_64") => &[88, 266],
            Call::Symlink => &[36],
        }
    };
    let rules = calls.iter().flat_map(number).map(|number| (*number, Vec::new())).collect();
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno), architecture)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

/// Runs a command while a directory cannot be written. Nothing, with a word on why, where that cannot be arranged.
pub(crate) fn read_only(
    place: &Place,
    directory: &Path,
    line: &str,
    environment: &[(&str, &str)],
) -> Option<Output> {
    let mut given = place.command(line);
    given.envs(environment.iter().copied());
    if !is_root() {
        modes(directory, 0o555);
        let output = finish(&mut given);
        modes(directory, 0o755);
        return Some(output);
    }
    let script = r#"mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" || exit 99; exec "$@""#;
    let mut command = assert_cmd::Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(directory).arg(given.get_program()).args(given.get_args());
    command.current_dir(place.at(""));
    for (name, value) in given.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let allowed = std::process::Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .arg(directory)
        .arg("true")
        .status();
    if !allowed.is_ok_and(|status| status.success()) {
        return skipped("root may write everywhere, and may not mount here");
    }
    Some(finish(&mut command))
}

/// Root heeds no modes.
fn is_root() -> bool {
    let probe = tempfile::tempdir().unwrap();
    modes(probe.path(), 0o555);
    let written = std::fs::write(probe.path().join("x"), "").is_ok();
    modes(probe.path(), 0o755);
    written
}

fn modes(directory: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    if mode & 0o200 != 0 {
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            modes(&path, mode);
        }
    }
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn skipped<T>(why: &str) -> Option<T> {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    // Past the test harness, which hides what passing tests print.
    let _ = writeln!(std::io::stderr(), "skipped, {name}: {why}");
    None
}
