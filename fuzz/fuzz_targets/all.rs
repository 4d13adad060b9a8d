//! All targets in one program, which is smaller to carry to another machine than twelve: `FUZZ_TARGET` or the program's own name
//! says which one runs.
#![no_main]

use std::sync::LazyLock;

use mlx_quant_fuzz_bodies::{TARGETS, attempt, target};

static BODY: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let program = std::env::args().next().unwrap_or_default();
    let own = program.rsplit('/').next().unwrap_or_default().to_owned();
    let name = std::env::var("FUZZ_TARGET").unwrap_or(own);
    let Some(target) = target(&name) else {
        let all = TARGETS.map(|target| target.name).join(", ");
        panic!("there is no target {name:?}; hint: set FUZZ_TARGET to one of {all}");
    };
    target.body
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| attempt(*BODY, bytes));
