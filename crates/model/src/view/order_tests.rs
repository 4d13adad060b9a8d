//! Rows in another order, parts one behind the other, and values that change.

use mlx_format::FloatType;
use mlx_format::checkpoint::{Checkpoint, Directory};

use super::{Change, Factors, Step, View};

/// A checkpoint of U8 tensors `t0` of `first` and `t1` of `second`, each counting up from 0 and 100.
fn checkpoint(first: &[usize], second: &[usize]) -> (tempfile::TempDir, Checkpoint) {
    let directory = tempfile::tempdir().unwrap();
    let (left, right): (usize, usize) = (first.iter().product(), second.iter().product());
    let header = format!(
        r#"{{"t0":{{"dtype":"U8","shape":{first:?},"data_offsets":[0,{left}]}},"t1":{{"dtype":"U8","shape":{second:?},"data_offsets":[{left},{}]}}}}"#,
        left + right
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend((0..left).map(|index| index as u8));
    file.extend((0..right).map(|index| 100 + index as u8));
    std::fs::write(directory.path().join("model.safetensors"), file).unwrap();
    let opened = Checkpoint::open(Directory::open(directory.path()).unwrap()).unwrap();
    (directory, opened)
}

fn view(checkpoint: &Checkpoint, name: &str, steps: &[Step]) -> View {
    View::new(name, checkpoint.tensor(name).unwrap(), steps).unwrap()
}

fn read(view: &View, checkpoint: &Checkpoint) -> Vec<u8> {
    let whole = view.rows_of(checkpoint, 0..view.rows()).into_owned();
    let rows = (0..view.rows()).flat_map(|row| view.rows_of(checkpoint, row..row + 1).into_owned());
    assert_eq!(rows.collect::<Vec<u8>>(), whole);
    view.scatter(0..view.rows(), &whole, |tensor, at, bytes| {
        let source = checkpoint.bytes(checkpoint.tensor(tensor).unwrap());
        assert_eq!(&source[at..][..bytes.len()], bytes);
    })
    .unwrap();
    whole
}

#[test]
fn parts_of_unequal_length() {
    let (_directory, checkpoint) = checkpoint(&[4, 2], &[6, 2]);
    let parts = || vec![view(&checkpoint, "t0", &[]), view(&checkpoint, "t1", &[])];
    let joined = View::join(parts()).unwrap();
    assert_eq!((joined.shape(), joined.rows()), (vec![10, 2], 10));
    let expected: Vec<u8> = (0..8).chain(100..112).collect();
    assert_eq!(read(&joined, &checkpoint), expected);
    assert!(
        View::join(vec![view(&checkpoint, "t0", &[Step::Transpose]), view(&checkpoint, "t1", &[])]).is_none()
    );
    assert!(View::join(vec![view(&checkpoint, "t0", &[Step::UnitRows])]).is_none());
    // A joined view is no slice of a stack.
    assert!(View::stack(vec![joined]).is_none());
}

#[test]
fn vectors_one_behind_the_other() {
    let (_directory, checkpoint) = checkpoint(&[4], &[6]);
    let joined = View::join(vec![view(&checkpoint, "t0", &[]), view(&checkpoint, "t1", &[])]).unwrap();
    assert_eq!(joined.shape(), [10]);
    assert_eq!(read(&joined, &checkpoint), [0, 1, 2, 3, 100, 101, 102, 103, 104, 105]);
}

#[test]
fn halves_of_a_head_in_turn() {
    let (_directory, checkpoint) = checkpoint(&[8, 1], &[4]);
    let turned = view(&checkpoint, "t0", &[Step::Interleave { of: 4 }]);
    assert_eq!(turned.shape(), [8, 1]);
    assert_eq!(read(&turned, &checkpoint), [0, 2, 1, 3, 4, 6, 5, 7]);
    assert_eq!(
        read(&view(&checkpoint, "t1", &[Step::Interleave { of: 4 }]), &checkpoint),
        [100, 102, 101, 103]
    );
    for of in [0, 3, 6] {
        let steps = [Step::Interleave { of }];
        assert!(View::new("t0", checkpoint.tensor("t0").unwrap(), &steps).is_err(), "{of}");
    }
}

#[test]
fn axes_become_one_and_few_are_kept() {
    let (_directory, checkpoint) = checkpoint(&[1, 2, 3], &[4]);
    let flat = view(&checkpoint, "t0", &[Step::Flatten, Step::First(4)]);
    assert_eq!((flat.shape(), read(&flat, &checkpoint)), (vec![4], vec![0, 1, 2, 3]));
    let rows = view(&checkpoint, "t0", &[Step::Flatten, Step::SplitRows(3)]);
    assert_eq!(rows.shape(), [3, 2]);
    assert_eq!(view(&checkpoint, "t1", &[Step::First(9)]).shape(), [4]);
    let turned = [Step::Transpose, Step::Flatten];
    assert!(View::new("t0", checkpoint.tensor("t0").unwrap(), &turned).is_err());
}

#[test]
fn values_change_in_the_dtype_of_the_file() {
    let bf16 = Some(FloatType::Bf16);
    let changed = |change: Change, first, rounds| {
        let mut values = [3.0, 4.0, 0.5, 0.0];
        change.apply(&mut values, first, 2, rounds);
        values
    };
    assert_eq!(changed(Change::AddOne, 0, bf16), [4.0, 5.0, 1.5, 1.0]);
    let factor = FloatType::Bf16.round(0.1);
    let product = FloatType::Bf16.round(3.0 * factor);
    assert_eq!(changed(Change::Times(Factors::even(0.1)), 5, bf16)[0], product);
    assert_ne!(product, 3.0 * 0.1f32);
    let of_rows = Change::Times(Factors::of_rows(vec![9.0, 2.0, -1.0]));
    assert_eq!(changed(of_rows, 1, bf16), [6.0, 8.0, -0.5, 0.0]);
    let unit = changed(Change::UnitRows, 0, None);
    assert!(
        (unit[0] - 0.6).abs() < 1e-6 && (unit[1] - 0.8).abs() < 1e-6 && (unit[2] - 1.0).abs() < 1e-6,
        "{unit:?}"
    );
    let mut gates = [0.0];
    Change::Gate(false).apply(&mut gates, 0, 1, bf16);
    assert_eq!(gates, [0.5]);
    let mut gates = [0.0];
    Change::Gate(true).apply(&mut gates, 0, 1, bf16);
    assert_eq!(gates, [0.75f32.sqrt()]);
}
