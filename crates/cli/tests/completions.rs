//! Tab is pressed in a real bash, zsh and fish, each in a terminal of its own: what the shell then runs is what was completed.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

mod common;

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::common::mlx_quant;

const PROMPT: &str = "READY>";
const PATIENCE: Duration = Duration::from_secs(60);

/// Commands whose last flag in every help is `--verbose`, and those that have no other flag than `--help`.
const COMMANDS: [(&str, &str); 14] = [
    ("convert", "--verbose"),
    ("awq", "--verbose"),
    ("gptq", "--verbose"),
    ("dynamic-quant", "--verbose"),
    ("dwq", "--verbose"),
    ("quantize", "--verbose"),
    ("inspect", "--verbose"),
    ("eval", "--verbose"),
    ("compare", "--verbose"),
    ("recommend", "--verbose"),
    ("devices", "--verbose"),
    ("upload", "--verbose"),
    ("completions", "--help"),
    ("man", "--help"),
];

/// What is typed before Tab, and the last word afterwards.
const LINES: [(&str, &str); 8] = [
    ("insp", "inspect"),
    ("dynamic-q", "dynamic-quant"),
    ("gptq --fallback-b", "--fallback-bits"),
    ("dynamic-quant --target-b", "--target-bpw"),
    ("convert -q --quant-p", "--quant-predicate"),
    ("convert --q-mode nv", "nvfp4"),
    ("completions fi", "fish"),
    ("recommend --model ./Qw", "./Qwen3-8B"),
];

/// A shell in a terminal (`script` of util-linux), in a directory where a stand-in for the program writes down its words.
struct Shell {
    home: tempfile::TempDir,
    script: Child,
    keys: ChildStdin,
    screen: Receiver<Vec<u8>>,
    seen: String,
}

impl Shell {
    /// Starts `command`, whose settings `setup` writes into its home directory. `None`, which is said by name, where there is no such shell.
    fn start(name: &str, command: &str, setup: impl Fn(&Path)) -> Option<Self> {
        for program in [name, "script"] {
            let found =
                std::env::split_paths(&std::env::var_os("PATH")?).any(|place| place.join(program).is_file());
            if !found {
                // Not by a macro, which the harness would keep to itself.
                let _ = writeln!(std::io::stderr(), "SKIPPED {name}_completes: there is no {program} here");
                return None;
            }
        }
        let home = tempfile::tempdir().unwrap();
        let bin = home.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        std::fs::create_dir(home.path().join("Qwen3-8B")).unwrap();
        let program = bin.join("mlx-quant");
        let words = "#!/bin/sh\nprintf '%s\\n' \"$@\" > \"$HOME/words.new\"\nmv \"$HOME/words.new\" \"$HOME/words\"\n";
        std::fs::write(&program, words).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        setup(home.path());
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        let mut script = Command::new("script")
            .args(["--quiet", "--return", "--command", command, "/dev/null"])
            .current_dir(home.path())
            .env_clear()
            .envs([("PATH", path.as_str()), ("TERM", "xterm"), ("LANG", "C.UTF-8"), ("SHELL", "/bin/sh")])
            .env("HOME", home.path())
            .env("ZDOTDIR", home.path())
            .env("XDG_CONFIG_HOME", home.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (keys, mut shown) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = shown.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Some(Self { home, script, keys, screen, seen: String::new() })
    }

    /// Waits for the next prompt.
    fn prompt(&mut self) {
        let end = Instant::now() + PATIENCE;
        while !self.seen.contains(PROMPT) {
            match self.screen.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("no prompt ({error}): {:?}", self.seen),
            }
        }
        self.seen.clear();
    }

    /// Types a line, presses Tab and Enter, and gives back the words that the program got.
    fn complete(&mut self, line: &str) -> Vec<String> {
        let words = self.home.path().join("words");
        let _ = std::fs::remove_file(&words);
        write!(self.keys, "mlx-quant {line}\t").unwrap();
        self.keys.flush().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        writeln!(self.keys).unwrap();
        self.keys.flush().unwrap();
        let end = Instant::now() + PATIENCE;
        while !words.exists() {
            assert!(Instant::now() < end, "{line}: nothing was run");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.prompt();
        let words = std::fs::read_to_string(words).unwrap();
        words.lines().map(str::to_owned).collect()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

fn write_script(shell: &str, to: &Path) -> PathBuf {
    let made = mlx_quant().args(["completions", shell]).assert().success();
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    std::fs::write(to, &made.get_output().stdout).unwrap();
    to.to_owned()
}

fn check(shell: Option<Shell>) {
    let Some(mut shell) = shell else { return };
    shell.prompt();
    let flags = COMMANDS.map(|(command, flag)| (format!("{command} {}", &flag[..flag.len() - 2]), flag));
    let lines = LINES.map(|(line, word)| (line.to_owned(), word));
    let mut wrong = Vec::new();
    for (line, word) in lines.into_iter().chain(flags) {
        let words = shell.complete(&line);
        // A directory gets a slash, and zsh an equals sign behind a flag that takes a value.
        let last = words.last().map(|word| word.trim_end_matches(['/', '=']));
        if last != Some(word) || words.len() != line.split_whitespace().count() {
            wrong.push((line, words));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn bash_completes() {
    check(Shell::start("bash", "bash --noprofile --rcfile bashrc -i", |home| {
        write_script("bash", &home.join("mlx-quant.bash"));
        let lines = "bind 'set bell-style none'\nsource mlx-quant.bash\nPS1='READY> '\n";
        std::fs::write(home.join("bashrc"), lines).unwrap();
    }));
}

#[test]
fn zsh_completes() {
    check(Shell::start("zsh", "zsh -i", |home| {
        write_script("zsh", &home.join("functions/_mlx-quant"));
        let lines =
            "fpath=(~/functions $fpath)\nautoload -Uz compinit\ncompinit -u -d ~/dump\nPS1='READY> '\n";
        std::fs::write(home.join(".zshrc"), lines).unwrap();
    }));
}

#[test]
fn fish_completes() {
    check(Shell::start("fish", "fish -i", |home| {
        write_script("fish", &home.join("fish/completions/mlx-quant.fish"));
        let lines = "function fish_prompt; echo -n 'READY> '; end\nset -g fish_greeting\n";
        std::fs::write(home.join("fish/config.fish"), lines).unwrap();
    }));
}
