//! Where states wait, and what of them an interrupted run finds.

use std::sync::Mutex;

use mlx_quant_engine::cpu;

use super::*;

#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Observer for Told {
    fn event(&self, event: Event<'_>) {
        if let Event::Warning { text } = event {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }
}

fn state(value: f32) -> State {
    let hidden = Tensor::full(value, (1, 3, 4), &cpu()).unwrap();
    State::from_tensors([("hidden".to_owned(), hidden)]).unwrap()
}

fn value(states: &States, window: usize) -> f32 {
    states.get(window).unwrap().hidden.to_vec().unwrap()[0]
}

const THREE: Batches = Batches { windows: 3, before: 0, size: 1 };
const ALWAYS: Saving = Saving { small: u64::MAX, every: Duration::MAX };

/// Three windows in front of the first block.
fn begun(files: &Path, spill: bool, saving: Saving) -> States {
    let state = |window| Ok(state(window as f32));
    States::new(THREE, files.to_owned(), spill, saving, &cpu(), state).unwrap()
}

/// Takes all of them through a block; gives whether what leaves it was saved.
fn pass(states: &mut States) -> bool {
    let next = states.block() + 1;
    for window in 0..3 {
        states.put(window, vec![state((10 * next + window) as f32)]).unwrap();
    }
    let saved = states.is_saved();
    states.passed();
    saved
}

/// Three windows behind `blocks` blocks, and what an observer hears of taking them up again.
fn resumed(blocks: usize, spill: bool, damage: &[&str]) -> (tempfile::TempDir, Option<States>, Vec<String>) {
    let directory = tempfile::tempdir().unwrap();
    let files = directory.path().join(".state-");
    let saving = Saving { small: 1 << 20, every: Duration::MAX };
    let mut states = begun(&files, spill, saving);
    (0..blocks).for_each(|_| assert!(pass(&mut states)));
    assert!(std::fs::read_dir(directory.path()).unwrap().count() <= 6, "of two blocks at most");
    for name in damage {
        let path = directory.path().join(format!(".state-{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    }
    let told = Told::default();
    let resumed = States::resume(THREE, files, spill, blocks, (saving, &cpu()), &told);
    (directory, resumed, told.0.into_inner().unwrap())
}

#[test]
fn goes_on_behind_the_last_block() {
    for spill in [false, true] {
        let (_files, states, told) = resumed(3, spill, &[]);
        let states = states.unwrap();
        assert_eq!((states.block(), told.len()), (3, 0));
        assert_eq!((value(&states, 0), value(&states, 2)), (30.0, 32.0));
    }
}

/// Of batches of any size, from batches of any other.
#[test]
fn goes_on_with_batches_of_another_size() {
    let value = |states: &States, batch| states.get(batch).unwrap().hidden.to_vec().unwrap();
    for (from, to) in SIZES.into_iter().flat_map(|from| SIZES.map(|to| (from, to))) {
        let directory = tempfile::tempdir().unwrap();
        let files = directory.path().join(".state-");
        let batches = |size| Batches { windows: 7, before: 0, size };
        let batch = |size: usize, batch: usize| {
            let windows: Vec<State> =
                (batch * size..7.min((batch + 1) * size)).map(|window| state(window as f32)).collect();
            together(&windows).unwrap()
        };
        let state = |at| Ok(batch(from, at));
        States::new(batches(from), files.clone(), true, ALWAYS, &cpu(), state).unwrap();
        let told = Told::default();
        let states = States::resume(batches(to), files.clone(), false, 0, (ALWAYS, &cpu()), &told).unwrap();
        assert_eq!(states.len(), 7usize.div_ceil(to));
        for at in 0..states.len() {
            assert_eq!(value(&states, at), batch(to, at).hidden.to_vec().unwrap(), "{from} to {to}");
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), states.len());
        // What one engine left damaged is told and not taken.
        let cut = batches(to).file(&files, 0, 0);
        std::fs::write(&cut, &std::fs::read(&cut).unwrap()[1..]).unwrap();
        assert!(States::resume(batches(from), files, false, 0, (ALWAYS, &cpu()), &told).is_none());
        assert_eq!(told.0.into_inner().unwrap().len(), 1);
    }
}

#[test]
fn an_unreadable_file_costs_one_block_and_is_told() {
    for spill in [false, true] {
        let (_files, states, told) = resumed(3, spill, &["3-1"]);
        let states = states.unwrap();
        assert_eq!((states.block(), value(&states, 2)), (2, 22.0));
        assert!(told.len() == 1 && told[0].contains("3-1.safetensors"), "{told:?}");
        let (_files, states, told) = resumed(3, spill, &["3-1", "2-0"]);
        assert!(states.is_none() && told.len() == 2, "{told:?}");
        // A single block has the beginning behind it.
        let (_files, states, _) = resumed(1, spill, &["1-0"]);
        assert_eq!(states.unwrap().block(), 0);
    }
}

/// Large states are saved by the clock, and an interrupted run goes on behind the last block at which they were.
#[test]
fn large_states_are_saved_by_the_clock() {
    let directory = tempfile::tempdir().unwrap();
    let files = directory.path().join(".state-");
    let count = || std::fs::read_dir(directory.path()).unwrap().count();
    let never = Saving { small: 0, every: Duration::MAX };
    let mut states = begun(&files, false, never);
    assert!(!pass(&mut states) && !pass(&mut states) && count() == 0);
    let told = Told::default();
    let resume = |most| States::resume(THREE, files.clone(), false, most, (never, &cpu()), &told);
    assert!(resume(2).is_none() && told.0.lock().unwrap().is_empty());
    states.saving.every = Duration::ZERO;
    assert!(pass(&mut states) && count() == 3);
    states.saving.every = Duration::MAX;
    assert!(!pass(&mut states) && count() == 3);
    let resumed = resume(4).unwrap();
    assert_eq!((resumed.block(), value(&resumed, 1), resumed.saved.clone()), (3, 31.0, vec![3]));
    // Those of two savings stay.
    states.saving.every = Duration::ZERO;
    assert!(pass(&mut states) && count() == 6 && pass(&mut states) && count() == 6);
    assert_eq!((states.saved.clone(), resume(6).unwrap().block()), (vec![5, 6], 6));
    // In files alone they are saved whatever the clock says.
    let mut states = begun(&files, true, never);
    assert!(pass(&mut states) && value(&states, 2) == 12.0);
}
