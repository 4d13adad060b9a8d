//! Two processes at once on one output, one comparison, one directory of statistics or targets, one cache, one file: the second waits, is
//! refused or shares, and nothing that the first made is lost. (Two streams: `hub/stream.rs`.)
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::common::{mlx_quant, two_blocks, weights};

/// Little text, no measurement.
const SMALL: &str = "--n-samples 4 --sequence-length 64 --eval-windows 0";

/// A directory in which commands run, with a model of two blocks.
struct Place {
    directory: TempDir,
}

/// A process under way; killed if its test fails.
struct Run {
    line: String,
    child: Child,
    said: PathBuf,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        two_blocks(directory.path(), "model");
        Self { directory }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts a command whose arguments stand between spaces.
    fn start(&self, line: &str) -> Run {
        let given = mlx_quant();
        let mut command = std::process::Command::new(given.get_program());
        for (name, value) in given.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let said = tempfile::NamedTempFile::new().unwrap().into_temp_path().keep().unwrap();
        command.current_dir(self.directory.path()).args(line.split_whitespace());
        command.stdout(Stdio::null()).stderr(File::create(&said).unwrap());
        Run { line: line.to_owned(), child: command.spawn().unwrap(), said }
    }

    fn succeed(&self, line: &str) {
        self.start(line).succeeds();
    }

    /// Waits for a file that a process makes; it must not have ended before.
    fn wait_for(&self, name: &str, run: &mut Run) {
        let path = self.at(name);
        run.wait_until(|_| path.exists());
    }

    /// Names in a directory, sorted; nothing unfinished may be among them but what is `allowed`.
    fn names(&self, name: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.at(name)).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let unfinished = |name: &&String| name.ends_with(".partial") || name.ends_with(".lock");
        assert_eq!(names.iter().find(unfinished), None, "{names:?}");
        names
    }

    fn same(&self, one: &str, other: &str) {
        assert!(weights(&self.at(one)) == weights(&self.at(other)), "{one} and {other} differ");
    }
}

impl Run {
    fn text(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap()
    }

    fn wait_until(&mut self, mut done: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < Duration::from_secs(300), "{}: {}", self.line, self.text());
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "{} ended early: {}", self.line, self.text());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops it, or lets it go on.
    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(std::process::Command::new("kill").args([name, &id]).status().unwrap().success());
    }

    fn end(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    fn succeeds(&mut self) {
        let status = self.end();
        assert!(status.success(), "{}: {status}, {}", self.line, self.text());
    }

    /// Exit code 2, a hint, and these words.
    fn is_refused(&mut self, words: &str) {
        let (status, text) = (self.end(), self.text());
        let right = status.code() == Some(2) && text.contains("hint:") && text.contains(words);
        assert!(right, "{}: {status}, {text}", self.line);
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.said);
    }
}

/// Starts two that make the same output at the same time: one makes it, the other is refused, whenever it comes.
fn one_makes_it(place: &Place, line: &str) {
    place.succeed(&format!("{line} --mlx-path alone"));
    for round in 0..3 {
        let mut both = [0, 1].map(|_| place.start(&format!("{line} --mlx-path out")));
        let ended = both.each_mut().map(Run::end);
        let made = ended.iter().filter(|status| status.success()).count();
        assert_eq!(made, 1, "round {round}: {} {}", both[0].text(), both[1].text());
        let refused = both.iter().zip(ended).find(|(_, status)| !status.success()).unwrap();
        assert_eq!(refused.1.code(), Some(2), "{}", refused.0.text());
        let text = refused.0.text();
        assert!(
            text.contains("being written by another process") || text.contains("already exists"),
            "{text}"
        );
        place.same("out", "alone");
        assert_eq!(place.names("."), ["alone", "model", "out"]);
        std::fs::remove_dir_all(place.at("out")).unwrap();
    }
}

#[test]
fn two_conversions_into_one_output() {
    one_makes_it(&Place::new(), "convert -q --model model --quiet");
}

#[test]
fn two_quantizations_into_one_output() {
    let place = Place::new();
    let line = format!("gptq --model model {SMALL} --quiet");
    one_makes_it(&place, &line);
    let mut first = place.start(&format!("{line} --mlx-path out"));
    place.wait_for(".out.partial/.mlx-quant-run", &mut first);
    first.signal("-STOP");
    for line in [&line, "awq --model model --quiet", "convert --model model --quiet"] {
        place.start(&format!("{line} --mlx-path out")).is_refused("being written by another process");
    }
    // A killed process keeps nobody out, and what it has done counts.
    first.signal("-CONT");
    first.child.kill().unwrap();
    first.end();
    place.succeed(&format!("{line} --mlx-path out"));
    place.same("out", "alone");
}

#[test]
fn two_comparisons_in_one_directory() {
    let place = Place::new();
    let line =
        "compare --model model --methods basic,gptq --n-samples 5 --sequence-length 96 --windows 3 --quiet";
    let mut first = place.start(&format!("{line} --keep all --output out"));
    place.wait_for("out/work/comparison.json", &mut first);
    first.signal("-STOP");
    for more in ["", "--seed 7", "--methods basic,awq"] {
        let line = line.replace(
            "--methods basic,gptq",
            if more.contains("methods") { more } else { "--methods basic,gptq" },
        );
        let more = if more.contains("seed") { more } else { "" };
        place.start(&format!("{line} {more} --output out")).is_refused("in use by another process");
    }
    first.signal("-CONT");
    first.succeeds();
    assert_eq!(place.names("out/models"), ["gptq-4bit", "rtn-4bit"]);
    let entries = ["gptq-4bit.json", "rtn-4bit.json"].map(|name| place.at("out/work").join(name));
    let before = entries.each_ref().map(|path| std::fs::read(path).unwrap());
    // Afterwards it is a comparison like any other, and its models stay.
    place.succeed(&format!("{line} --output out"));
    assert_eq!(place.names("out/models"), ["gptq-4bit", "rtn-4bit"]);
    assert_eq!(before, entries.each_ref().map(|path| std::fs::read(path).unwrap()));
    place.names("out/work");
}

#[test]
fn two_users_of_one_directory_of_statistics() {
    let place = Place::new();
    let line = format!("gptq --model model {SMALL} --quiet");
    for bits in [3, 4] {
        place.succeed(&format!("{line} --bits {bits} --statistics alone-{bits} --mlx-path alone-out-{bits}"));
    }
    let mut both = [3, 4]
        .map(|bits| place.start(&format!("{line} --bits {bits} --statistics kept --mlx-path out-{bits}")));
    both.iter_mut().for_each(Run::succeeds);
    place.same("out-3", "alone-out-3");
    place.same("out-4", "alone-out-4");
    let names = place.names("kept");
    assert_eq!(names, place.names("alone-3"));
    for name in names {
        let read = |directory: &str| std::fs::read(place.at(directory).join(&name)).unwrap();
        assert!(read("kept") == read("alone-3"), "{name}");
    }
}

#[test]
fn two_users_of_one_directory_who_want_other_statistics() {
    let place = Place::new();
    let line = format!("gptq --model model {SMALL} --quiet --statistics kept");
    for round in 0..3 {
        let of = |seed: u32| format!("{line} --seed {seed} --mlx-path out-{round}-{seed}");
        let mut both = [1, 2].map(|seed| place.start(&of(seed)));
        let ended = both.each_mut().map(Run::end);
        let made = ended.iter().filter(|status| status.success()).count();
        assert_eq!(made, 1, "{} {}", both[0].text(), both[1].text());
        let refused = usize::from(ended[0].success());
        both[refused].is_refused("other calibration windows");
        let (mine, theirs) = (1 - refused, refused);
        assert!(place.at(&format!("out-{round}-{}", mine + 1)).is_dir());
        assert!(!place.at(&format!("out-{round}-{}", theirs + 1)).exists());
        std::fs::remove_dir_all(place.at("kept")).unwrap();
    }
}

#[test]
fn two_trainings_with_one_directory_of_targets() {
    let place = Place::new();
    let line = format!("dwq --model model {SMALL} --iters 4 --batch-size 2 --valid-samples 2 --quiet");
    for bits in [3, 4] {
        place.succeed(&format!("{line} --bits {bits} --target-dir alone --mlx-path alone-{bits}"));
    }
    let mut both = [3, 4]
        .map(|bits| place.start(&format!("{line} --bits {bits} --target-dir kept --mlx-path out-{bits}")));
    both.iter_mut().for_each(Run::succeeds);
    place.same("out-3", "alone-3");
    place.same("out-4", "alone-4");
    assert_eq!(place.names("kept"), place.names("alone"));
    place.start(&format!("{line} --seed 9 --target-dir kept --mlx-path other")).is_refused("of other data");
}

#[test]
fn two_evaluations_with_one_cache() {
    let place = Place::new();
    for bits in [3, 4] {
        place.succeed(&format!("convert -q --q-bits {bits} --model model --mlx-path q{bits} --quiet"));
    }
    let line = |bits: u32, cache: &str| {
        let text = "--windows 3 --sequence-length 64 --quiet";
        format!("eval --model q{bits} --reference model --cache {cache} --report {cache}-{bits}.json {text}")
    };
    for bits in [3, 4] {
        place.succeed(&line(bits, &format!("alone{bits}")));
    }
    // What a killed process left behind goes with the next.
    std::fs::create_dir(place.at("kept")).unwrap();
    std::fs::write(place.at("kept/reference-0123456789abcdef.hidden.Ab12Cd.partial"), "x").unwrap();
    std::fs::write(place.at("kept/mine.txt"), "x").unwrap();
    let mut both = [3, 4].map(|bits| place.start(&line(bits, "kept")));
    both.iter_mut().for_each(Run::succeeds);
    let names = place.names("kept");
    assert!(names.len() == 2 && names[0] == "mine.txt" && names[1].ends_with(".hidden"), "{names:?}");
    let alone = place.at("alone3").join(&names[1]);
    assert!(std::fs::read(place.at("kept").join(&names[1])).unwrap() == std::fs::read(alone).unwrap());
    for bits in [3, 4] {
        let kl = |cache: &str| -> Value {
            let text = std::fs::read(place.at(&format!("{cache}-{bits}.json"))).unwrap();
            let report: Value = serde_json::from_slice(&text).unwrap();
            report["total"].clone()
        };
        assert_eq!(kl("kept"), kl(&format!("alone{bits}")));
    }
}

#[test]
fn two_who_measure_into_one_file_of_sensitivities() {
    let place = Place::new();
    let line = |bits: &str, file: &str, out: &str| {
        format!(
            "dynamic-quant --model model {SMALL} --target-bpw {bits} --sensitivities {file} --mlx-path {out}"
        )
    };
    for bits in ["4.5", "5"] {
        place.succeed(&line(bits, &format!("alone-{bits}.json"), &format!("alone-{bits}")));
    }
    let mut first = place.start(&line("4.5", "kept.json", "out-4.5"));
    place.wait_for(".kept.json.lock", &mut first);
    first.signal("-STOP");
    let mut second = place.start(&line("5", "kept.json", "out-5"));
    second.wait_until(|run| run.text().contains("kept.json is being measured by another process"));
    let mut third = place.start(&line("5", "kept.json", "interrupted"));
    third.wait_until(|run| run.text().contains("waiting for it"));
    third.signal("-INT");
    assert_eq!(third.end().code(), Some(130), "{}", third.text());
    first.signal("-CONT");
    first.succeeds();
    second.succeeds();
    place.same("out-4.5", "alone-4.5");
    place.same("out-5", "alone-5");
    let read = |name: &str| std::fs::read(place.at(name)).unwrap();
    assert!(read("kept.json") == read("alone-5.json"));
    let names = place.names(".");
    assert!(!names.iter().any(|name| name.starts_with(".kept")), "{names:?}");
}

/// Killed between the last rename and its end, a run leaves its own files in a finished model: the next command that meets it, whatever
/// it is, removes them.
#[test]
fn what_a_crash_at_the_end_leaves_is_cleaned() {
    let place = Place::new();
    place.succeed("convert -q --model model --mlx-path whole --quiet");
    let whole = place.names("whole");
    let commands = [
        ("convert -q --model model --mlx-path whole --quiet", Some("already exists")),
        ("gptq --model model --mlx-path whole --quiet", Some("already exists")),
        ("inspect whole --quiet", None),
        ("eval --model whole --windows 2 --sequence-length 64 --quiet", None),
    ];
    for (line, refused) in commands {
        for name in [".mlx-quant-run", ".state-1-0.safetensors", ".state-dwq.safetensors"] {
            std::fs::write(place.at("whole").join(name), "x\n").unwrap();
        }
        match refused {
            Some(words) => place.start(line).is_refused(words),
            None => place.succeed(line),
        }
        assert_eq!(place.names("whole"), whole, "{line}");
    }
}
