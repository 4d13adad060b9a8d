//! `convert --stream`: shard by shard.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mlx_quant_hub_fixture::{Fault, Hub, Kind};

use crate::place::{ID, Place, assert_same, contents, failed, finish, fixture, sharded};

const SHARDS: usize = 12;

/// A model of experts, whose fused tensors span shards, in twelve of them.
fn place() -> Place {
    let place = Place::new();
    let all = sharded(&fixture("qwen3_moe"), SHARDS);
    let plain = place.at("plain-source");
    std::fs::create_dir(&plain).unwrap();
    for (name, bytes) in &all {
        std::fs::write(plain.join(name), bytes).unwrap();
    }
    place.hub.add(Kind::Model, ID, all);
    place.succeed("convert -q --model plain-source --mlx-path plain");
    place
}

/// Bytes that the files below a directory take on the disk, links and what is named `skip` left out.
fn used(directory: &Path, skip: &[&str]) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    let mut sum = 0;
    for entry in entries.flatten() {
        let Ok(found) = entry.path().symlink_metadata() else { continue };
        if skip.iter().any(|name| entry.file_name() == **name) {
            continue;
        }
        sum += if found.is_dir() { used(&entry.path(), skip) } else { found.blocks() * 512 };
    }
    sum
}

/// How often each shard's content was asked for in full, its header not counted.
fn fetched(hub: &Hub, shard: usize) -> usize {
    let name = format!("model-{shard:05}-of-{SHARDS:05}");
    let whole = |request: &mlx_quant_hub_fixture::Request| {
        request.method == "GET"
            && request.path.contains("/resolve/")
            && request.path.contains(&name)
            && request.range.is_none()
    };
    hub.requests().into_iter().filter(whole).count()
}

#[test]
fn streams_with_the_output_and_two_shards_on_the_disk() {
    let place = place();
    let shards = std::fs::read_dir(place.at("plain-source")).unwrap().map(|entry| entry.unwrap());
    let shards =
        shards.filter(|entry| entry.path().extension().is_some_and(|ending| ending == "safetensors"));
    let largest = shards.map(|entry| entry.metadata().unwrap().len()).max().unwrap();
    let output: u64 = contents(&place.at("plain")).values().map(|bytes| bytes.len() as u64).sum();
    // Slowly, so that every state is seen.
    place.hub.fault("cdn GET", 1000, Fault::Slow { bytes_per_second: 400_000 });
    let (peak, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                peak.fetch_max(used(&place.at(""), &["plain", "plain-source"]), Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let ran = place.run(&format!("convert -q --stream --model {ID} --mlx-path out"));
        over.store(true, Ordering::SeqCst);
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    });
    assert_same(&place.at("out"), &place.at("plain"));
    let peak = peak.load(Ordering::SeqCst);
    // Files take whole blocks: the small ones of the output, and each shard's header.
    let blocks = 4096 * (2 * SHARDS as u64 + 12);
    assert!(peak <= output + 2 * largest + blocks, "{peak} bytes; output {output}, shard {largest}");
    assert!(peak >= output, "nothing was seen");
    let left: Vec<_> =
        std::fs::read_dir(place.at("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
    assert!(!place.snapshot(ID).join("model-00001-of-00012.safetensors").exists());
    for shard in 1..=SHARDS {
        assert_eq!(fetched(&place.hub, shard), 1, "shard {shard}");
    }
}

/// Starts a stream and kills it as soon as that shard's content is asked for.
fn kill_at(place: &Place, line: &str, shard: usize) {
    let name = format!("model-{shard:05}-of-{SHARDS:05}");
    let before = place.hub.requests().len();
    let mut child = place.start(line);
    let asked = |request: &mlx_quant_hub_fixture::Request| {
        request.method == "GET" && request.range.is_none() && request.path.contains(&name)
    };
    let start = Instant::now();
    while !place.hub.requests()[before..].iter().any(asked) {
        assert!(start.elapsed() < Duration::from_secs(60), "shard {shard} is never asked for");
        if child.try_wait().unwrap().is_some() {
            let output = place.run(line);
            panic!("it ended before shard {shard}: {}", String::from_utf8_lossy(&output.stderr));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!place.at("out").exists());
}

#[test]
fn a_killed_stream_goes_on() {
    let place = place();
    place.hub.fault("cdn GET", 1000, Fault::Slow { bytes_per_second: 150_000 });
    let line = format!("convert -q --stream --model {ID} --mlx-path out");
    for shard in [2, 7, 11] {
        kill_at(&place, &line, shard);
    }
    place.hub.calm();
    place.succeed(&line);
    assert_same(&place.at("out"), &place.at("plain"));
    // What was finished when the kill came is not fetched again; the shard that was under way is.
    for shard in (1..=SHARDS).filter(|shard| ![2, 7, 11].contains(shard)) {
        assert_eq!(fetched(&place.hub, shard), 1, "shard {shard}");
    }
}

/// Killed at any moment, over and over: while shards come, are converted, recorded and emptied.
#[test]
fn kills_at_any_moment_cost_time_only() {
    let place = place();
    place.hub.fault("cdn GET", 100_000, Fault::Slow { bytes_per_second: 1_500_000 });
    let line = format!("convert -q --stream --threads 1 --model {ID} --mlx-path out");
    let mut runs = 0;
    while !place.at("out").exists() {
        let mut child = place.start(&line);
        std::thread::sleep(Duration::from_millis(150 + 17 * runs));
        child.kill().unwrap();
        child.wait().unwrap();
        runs += 1;
        assert!(runs < 100, "it never gets done");
    }
    assert!(runs > 2, "nothing was killed");
    assert_same(&place.at("out"), &place.at("plain"));
}

/// Commands that fail or only look, between an interruption and its resumption, must not make holes look like weights.
#[test]
fn nothing_in_between_spoils_a_stream() {
    let place = place();
    place.hub.fault("cdn GET", 1000, Fault::Slow { bytes_per_second: 300_000 });
    let line = format!("convert -q --stream --model {ID} --mlx-path out");
    kill_at(&place, &line, 7);
    place.hub.calm();
    let output = finish(place.command(&line).env("HF_HUB_OFFLINE", "1"));
    failed(&line, &output, 2, &["not in the cache"]);
    place.fail(&format!("{line} --revision nowhere"), 2, &["no revision"]);
    place.fail(&format!("{line} --bits 3"), 2, &["another"]);
    place.succeed(&format!("{line} --dry-run"));
    kill_at(&place, &line, 9);
    // Removed by hand: some of it, then all.
    let mut left = vec![place.at(".out.source")];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|ending| ending == "safetensors") {
            std::fs::remove_file(path).unwrap();
        }
    }
    kill_at(&place, &line, 10);
    std::fs::remove_dir_all(place.at(".out.source")).unwrap();
    place.succeed(&line);
    assert_same(&place.at("out"), &place.at("plain"));
    assert!(!place.at(".out.source").exists() && !place.at(".out.partial").exists());
}

#[test]
fn two_streams_into_one_output() {
    let place = place();
    place.hub.fault("cdn GET", 1000, Fault::Slow { bytes_per_second: 100_000 });
    let line = format!("convert -q --stream --model {ID} --mlx-path out");
    let mut first = place.start(&line);
    let start = Instant::now();
    while !place.at(".out.source/lock").exists() {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    place.fail(&line, 2, &["in use by another process"]);
    assert!(first.wait().unwrap().success());
    assert_same(&place.at("out"), &place.at("plain"));
}

#[test]
fn other_forms_and_dtypes_stream_as_well() {
    let place = place();
    for (name, flags) in [
        ("six", "-q --bits 6 --group-size 32"),
        ("fp", "-q --q-mode mxfp4"),
        ("half", "--dtype float16"),
        ("mixed", "-q --quant-predicate mixed_3_6"),
    ] {
        place.succeed(&format!("convert {flags} --model plain-source --mlx-path plain-{name}"));
        place.succeed(&format!("convert {flags} --stream --model {ID} --mlx-path stream-{name}"));
        assert_same(&place.at(&format!("plain-{name}")), &place.at(&format!("stream-{name}")));
    }
}

#[test]
fn what_is_cached_is_not_streamed() {
    let place = place();
    place.succeed(&format!("convert -q --model {ID} --mlx-path first"));
    let before = place.weights().len();
    place.succeed(&format!("convert -q --stream --model {ID} --mlx-path second"));
    assert_eq!(place.weights().len(), before);
    assert_same(&place.at("first"), &place.at("second"));
    let said = place.succeed("convert -q --stream --model plain-source --mlx-path third");
    assert!(said.contains("--stream has no effect"), "{said}");
    place.fail(&format!("convert -q --search --stream --model {ID} --mlx-path fourth"), 2, &["--search"]);
}

#[test]
fn broken_connections_do_not_stop_a_stream() {
    let place = place();
    // Four times while headers are fetched, twice in the shard itself.
    place.hub.fault("model-00005", 6, Fault::Drop { after: 9_000 });
    place.succeed(&format!("convert -q --stream --model {ID} --mlx-path out"));
    assert_same(&place.at("out"), &place.at("plain"));
}

/// A shard that is not what it should be: nothing is half-written, and the same command goes on later.
#[test]
fn a_wrong_shard_ends_a_stream() {
    let place = place();
    place.hub.fault("cdn GET", 1000, Fault::Flip { at: 20_000 });
    place.fail(&format!("convert -q --stream --model {ID} --mlx-path out"), 1, &["hash differs"]);
    assert!(!place.at("out").exists());
    place.hub.calm();
    place.succeed(&format!("convert -q --stream --model {ID} --mlx-path out"));
    assert_same(&place.at("out"), &place.at("plain"));
}
