//! Any bytes as an index: no panic, and no shard name that leads out of the directory.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use mlx_format::checkpoint::parse_index;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(map) = parse_index(bytes, "index") {
        for shard in map.values() {
            let components: Vec<Component<'_>> = Path::new(shard).components().collect();
            assert!(matches!(components[..], [Component::Normal(_)]), "{shard:?}");
        }
    }
});
