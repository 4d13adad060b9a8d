//! What a time was measured on.

use sysinfo::{CpuRefreshKind, RefreshKind, System};

/// The processor as the system calls it; `None` where it does not say.
pub fn processor() -> Option<String> {
    let system = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
    let name = system.cpus().first()?.brand().trim();
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_name() {
        let Some(name) = processor() else { return };
        assert!(name.len() > 2 && !name.contains('\n'), "{name:?}");
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        assert!(std::fs::read_to_string("/proc/cpuinfo").unwrap().contains(&name), "{name:?}");
    }
}
