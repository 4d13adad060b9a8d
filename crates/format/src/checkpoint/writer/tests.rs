//! Outputs that are begun, left, taken up and finished.

use safetensors::Dtype;

use super::*;
use crate::checkpoint::{Checkpoint, Directory, TensorSpec};

fn layout() -> Layout {
    let spec =
        |name: &str, rows| TensorSpec { name: name.to_owned(), dtype: Dtype::U8, shape: vec![rows, 4] };
    Layout::new(vec![spec("a", 2), spec("b", 3), spec("c", 1)], 12)
}

fn write_all(writer: &Writer, skip: &BTreeSet<usize>) {
    for index in 0..3 {
        let bytes = vec![index as u8 + 1; writer.layout().specs()[index].bytes() as usize];
        if !skip.contains(&index) {
            writer.write_at(index, 0, &bytes[..2]).unwrap();
            writer.write_at(index, 2, &bytes[2..]).unwrap();
        }
    }
}

fn check(target: &Path) {
    let checkpoint = Checkpoint::open(Directory::open(target).unwrap()).unwrap();
    for (name, value) in [("a", 1), ("b", 2), ("c", 3)] {
        let tensor = checkpoint.tensor(name).unwrap();
        assert!(checkpoint.bytes(tensor).iter().all(|byte| *byte == value));
    }
    assert!(!target.join(JOURNAL).exists());
}

#[test]
fn writes_then_renames_once() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let writer = Writer::open(&target, layout(), "x").unwrap();
    assert!(!target.exists());
    assert!(matches!(Writer::open(&target, layout(), "x"), Err(WriteError::Busy(_))));
    write_all(&writer, &BTreeSet::new());
    writer.write_file("model.safetensors.index.json", writer.layout().index_json(1).as_bytes()).unwrap();
    writer.finish().unwrap();
    check(&target);
    assert!(matches!(Writer::open(&target, layout(), "x"), Err(WriteError::Exists(_))));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn goes_on_with_what_another_engine_made_only_if_told_to() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let [cpu, gpu] = ["cpu", "gpu"].map(|engine| Run { identity: "x", engine });
    let mut writer = Writer::open(&target, layout(), cpu).unwrap();
    writer.record([0]).unwrap();
    drop(writer);
    let text = Writer::open(&target, layout(), gpu).unwrap_err().to_string();
    assert!(text.contains("begun by cpu, and now gpu would") && text.contains("--restart-block"), "{text}");
    let told = Destination { restart_block: true, ..Destination::from(&target) };
    for _ in 0..2 {
        let mut writer = Writer::open(told, layout(), gpu).unwrap();
        assert!(writer.done().contains(&0));
        writer.record([1]).unwrap();
        let shares: Vec<_> =
            writer.shares().iter().map(|share| (&*share.engine, share.tensors.len())).collect();
        assert_eq!(shares, [("cpu", 1), ("gpu", 1)]);
    }
    assert!(matches!(Writer::open(&target, layout(), cpu), Err(WriteError::OtherEngine { .. })));
    assert!(Writer::open(&target, layout(), gpu).is_ok());
}

#[test]
fn resumes_the_same_run_and_refuses_another() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let mut writer = Writer::open(&target, layout(), "x").unwrap();
    writer.write_at(1, 0, &[2; 12]).unwrap();
    writer.record([1]).unwrap();
    // A crash in the middle of a journal line.
    let journal = writer.partial().join(JOURNAL);
    let mut journal = std::fs::File::options().append(true).open(journal).unwrap();
    journal.write_all(b"0").unwrap();
    drop(writer);
    std::fs::write(directory.path().join(".out.partial/stale.json"), "x").unwrap();
    assert!(matches!(Writer::open(&target, layout(), "y"), Err(WriteError::OtherRun { .. })));
    let mut writer = Writer::open(&target, layout(), "x").unwrap();
    assert_eq!(*writer.done(), BTreeSet::from([1]));
    writer.write_at(2, 0, &[3; 4]).unwrap();
    writer.record([2]).unwrap();
    drop(writer);
    let writer = Writer::open(&target, layout(), "x").unwrap();
    assert_eq!(*writer.done(), BTreeSet::from([1, 2]));
    write_all(&writer, &writer.done().clone());
    writer.finish().unwrap();
    check(&target);
}

#[test]
fn starts_over_when_a_shard_is_missing_or_damaged() {
    for damage in [0, 1] {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let mut writer = Writer::open(&target, layout(), "x").unwrap();
        write_all(&writer, &BTreeSet::new());
        writer.record([0, 1, 2]).unwrap();
        let shard = directory.path().join(".out.partial").join(writer.layout().shards().next().unwrap().0);
        drop(writer);
        if damage == 0 {
            std::fs::remove_file(shard).unwrap();
        } else {
            std::fs::File::options().write(true).open(shard).unwrap().set_len(20).unwrap();
        }
        let writer = Writer::open(&target, layout(), "x").unwrap();
        assert!(writer.done().is_empty());
        write_all(&writer, &BTreeSet::new());
        writer.finish().unwrap();
        check(&target);
    }
}

#[test]
fn what_others_put_there_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let partial = directory.path().join(".out.partial");
    std::fs::create_dir(&partial).unwrap();
    std::fs::write(partial.join("mine"), "x").unwrap();
    assert!(matches!(Writer::open(&target, layout(), "x"), Err(WriteError::Foreign(_))));
    assert!(partial.join("mine").exists());
    std::fs::remove_file(partial.join("mine")).unwrap();
    let writer = Writer::open(&target, layout(), "x").unwrap();
    // A target that appears meanwhile is not replaced.
    std::fs::create_dir(&target).unwrap();
    assert!(matches!(writer.finish(), Err(WriteError::Exists(_))));
    let mut writer = Writer::open(&directory.path().join("other"), layout(), "x").unwrap();
    writer.record([0]).unwrap();
    drop(writer);
    let writer = Writer::open(&directory.path().join("other"), layout(), "x").unwrap();
    writer.discard_if_fresh().unwrap();
    assert!(directory.path().join(".other.partial").is_dir(), "a resumed run is kept");
}

#[test]
fn refuses_bad_targets() {
    assert!(matches!(Writer::check_target(Path::new("/nonexistent/dir/out")), Err(WriteError::BadPath(_))));
    assert!(matches!(Writer::check_target(Path::new("..")), Err(WriteError::Exists(_))));
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(Writer::check_target(directory.path()), Err(WriteError::Exists(_))));
}
