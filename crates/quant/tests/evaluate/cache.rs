//! The reference's states on disk.

use super::*;

/// Remembers which parts of the work were done.
#[derive(Default)]
struct Phases(std::sync::Mutex<Vec<&'static str>>);

impl Observer for Phases {
    fn event(&self, event: Event<'_>) {
        if let Event::Phase { name, .. } = event {
            self.0.lock().unwrap().push(name);
        }
    }
}

/// A reference, its conversion, and a cache for both.
struct Cached {
    reference: PathBuf,
    model: Converted,
}

impl Cached {
    fn new() -> Self {
        let model = four_bits(&zoo("llama_tied"));
        let reference = model.directory.path().join("reference");
        copy(&fixtures().join("zoo/llama_tied"), &reference);
        Self { reference, model }
    }

    fn directory(&self) -> PathBuf {
        self.model.directory.path().join("some/cache")
    }

    fn entries(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.directory()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    fn entry(&self) -> PathBuf {
        let entries = self.entries();
        assert_eq!(entries.len(), 1, "{entries:?}");
        entries[0].clone()
    }

    /// The result, and whether the reference came from the cache.
    fn run(&self, windows: &Windows) -> (Evaluation, bool) {
        let settings = EvaluationSettings { cache: Some(self.directory()), ..EvaluationSettings::default() };
        let (reference, phases) = (open_path(&self.reference).unwrap(), Phases::default());
        let mut evaluation =
            timeless(evaluate(&self.model, Some(&reference), windows, &settings, &phases).unwrap());
        let hit = std::mem::take(&mut evaluation.subject.reference_cached);
        assert_eq!(!hit, phases.0.lock().unwrap().contains(&"reference"), "what is cached is not computed");
        (evaluation, hit)
    }
}

fn copy(source: &Path, target: &Path) {
    std::fs::create_dir_all(target).unwrap();
    for entry in std::fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
    }
}

#[test]
fn the_second_run_takes_the_reference_from_the_cache() {
    let cached = Cached::new();
    let windows = windows(&cached.model, 24, 3);
    let (first, hit) = cached.run(&windows);
    assert!(!hit);
    let without = {
        let reference = open_path(&cached.reference).unwrap();
        evaluated(&cached.model, Some(&reference), &windows, &EvaluationSettings::default())
    };
    assert_eq!(first, without);
    assert_eq!(cached.run(&windows), (first.clone(), true));
    assert_eq!(cached.run(&windows), (first, true));
    cached.entry();
}

#[test]
fn other_windows_are_computed_anew() {
    let cached = Cached::new();
    let model = &cached.model;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("text.txt");
    std::fs::write(&file, text(1)).unwrap();
    let all = [
        windows(model, 24, 3),
        windows(model, 25, 3),
        windows(model, 24, 4),
        read(model, &file, 24, 3).unwrap(),
    ];
    for windows in &all {
        assert!(!cached.run(windows).1);
    }
    for windows in &all {
        assert!(cached.run(windows).1);
    }
    assert_eq!(cached.entries().len(), 4);
}

#[test]
fn a_changed_reference_is_computed_anew() {
    let cached = Cached::new();
    let windows = windows(&cached.model, 24, 3);
    let (first, _) = cached.run(&windows);
    // The same size, one weight of the embedding another.
    edit(&cached.reference.join("model-00001-of-00002.safetensors"), |bytes| *bytes.last_mut().unwrap() ^= 1);
    let (changed, hit) = cached.run(&windows);
    assert!(!hit);
    assert_ne!(first.total, changed.total);
    // Settings that weights do not show.
    edit_config(&cached.reference, |config| config["rope_theta"] = 1000.0.into());
    let (other_config, hit) = cached.run(&windows);
    assert!(!hit);
    assert_ne!(changed.total, other_config.total);
    assert!(cached.run(&windows).1);
}

#[test]
fn damaged_entries_are_written_anew() {
    let cached = Cached::new();
    let windows = windows(&cached.model, 24, 3);
    let (first, _) = cached.run(&windows);
    let entry = cached.entry();
    let whole = std::fs::read(&entry).unwrap();
    let damages: [fn(&mut Vec<u8>); 7] = [
        Vec::clear,
        |bytes| bytes.truncate(10),
        |bytes| bytes.truncate(bytes.len() - 4),
        |bytes| bytes.extend([0; 4]),
        |bytes| bytes[20] ^= 1,
        |bytes| *bytes.last_mut().unwrap() ^= 1,
        |bytes| bytes.fill(b' '),
    ];
    for (index, damage) in damages.into_iter().enumerate() {
        edit(&entry, damage);
        assert_eq!(cached.run(&windows), (first.clone(), false), "damage {index}");
        assert!(std::fs::read(cached.entry()).unwrap() == whole, "damage {index}");
    }
    assert!(cached.run(&windows).1);
}

#[test]
fn caches_that_cannot_be_written_are_found_before_any_work() {
    let cached = Cached::new();
    let windows = windows(&cached.model, 24, 3);
    let file = cached.model.directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    // Permissions do not stop root: a file in the place of a directory does, and the system's own directory.
    let mut directories = vec![file.clone(), file.join("cache")];
    if cfg!(target_os = "linux") {
        directories.push("/proc".into());
    }
    let reference = open_path(&cached.reference).unwrap();
    for directory in directories {
        let settings = EvaluationSettings { cache: Some(directory.clone()), ..EvaluationSettings::default() };
        let phases = Phases::default();
        let error = evaluate(&cached.model, Some(&reference), &windows, &settings, &phases).unwrap_err();
        let Error::Cache { path, working: false, .. } = &error else { panic!("{error}") };
        assert_eq!(Path::new(path), directory);
        assert!(error.is_refusal());
        assert!(error.to_string().contains("hint: give another directory to --cache"), "{error}");
        assert!(phases.0.lock().unwrap().is_empty(), "{error}");
    }
}
