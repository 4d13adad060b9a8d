//! Sets `cfg(shared)` where the project's shared test data is present, so that the tests that need it are
//! listed as ignored, with the reason, where it is not.

use std::path::Path;

fn main() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/zoo");
    println!("cargo::rustc-check-cfg=cfg(shared)");
    // A path that does not exist would count as changed on every build.
    println!("cargo::rerun-if-changed=build.rs");
    if shared.is_dir() {
        println!("cargo::rerun-if-changed={}", shared.display());
        println!("cargo::rustc-cfg=shared");
    }
}
