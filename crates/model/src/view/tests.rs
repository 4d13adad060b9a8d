//! Cuts, turns and stacks of small tensors that count up.

use mlx_format::checkpoint::Directory;

use super::*;

/// A checkpoint of U8 tensors `t0`, `t1` of the given shape, counting up.
fn checkpoint(shape: &[usize]) -> (tempfile::TempDir, Checkpoint) {
    let directory = tempfile::tempdir().unwrap();
    let elements: usize = shape.iter().product();
    let header = format!(
        r#"{{"t0":{{"dtype":"U8","shape":{shape:?},"data_offsets":[0,{elements}]}},"t1":{{"dtype":"U8","shape":{shape:?},"data_offsets":[{elements},{}]}}}}"#,
        elements * 2
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend((0..elements * 2).map(|i| i as u8));
    std::fs::write(directory.path().join("model.safetensors"), file).unwrap();
    let opened = Checkpoint::open(Directory::open(directory.path()).unwrap()).unwrap();
    (directory, opened)
}

fn view(checkpoint: &Checkpoint, steps: &[Step]) -> View {
    View::new("t0", checkpoint.tensor("t0").unwrap(), steps).unwrap()
}

/// All rows at once must equal all ways of cutting them.
fn read(view: &View, checkpoint: &Checkpoint) -> Vec<u8> {
    let whole = view.rows_of(checkpoint, 0..view.rows()).into_owned();
    for step in 1..view.rows() {
        let mut cut = Vec::new();
        for start in (0..view.rows()).step_by(step) {
            let rows = start..view.rows().min(start + step);
            cut.extend_from_slice(&view.rows_of(checkpoint, rows.clone()));
            view.prefetch(checkpoint, rows);
            checkpoint.release();
        }
        assert_eq!(cut, whole, "cut by {step}");
    }
    view.scatter(0..view.rows(), &whole, |tensor, at, bytes| {
        assert_eq!(&checkpoint.bytes(checkpoint.tensor(tensor).unwrap())[at..][..bytes.len()], bytes);
    })
    .unwrap();
    whole
}

#[test]
fn transpose_slice_and_split() {
    let (_directory, checkpoint) = checkpoint(&[6, 2]);
    let transposed = view(&checkpoint, &[Step::Transpose]);
    assert_eq!(transposed.shape(), [2, 6]);
    assert_eq!(read(&transposed, &checkpoint), [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]);
    let odd = view(&checkpoint, &[Step::EveryOther { from_last: 1, odd: true }]);
    assert_eq!(read(&odd, &checkpoint), [2, 3, 6, 7, 10, 11]);
    let second = view(&checkpoint, &[Step::HalfOfRows(true)]);
    assert_eq!(read(&second, &checkpoint), [6, 7, 8, 9, 10, 11]);
    let heads =
        view(&checkpoint, &[Step::SplitRows(2), Step::Rows { start: 0, count: 2, of: 3 }, Step::Transpose]);
    assert_eq!(heads.shape(), [2, 2, 2]);
    assert_eq!(read(&heads, &checkpoint), [0, 2, 1, 3, 6, 8, 7, 9]);
    let last = view(&checkpoint, &[Step::EveryOther { from_last: 0, odd: true }]);
    assert_eq!((last.shape(), read(&last, &checkpoint)), (vec![6, 1], vec![1, 3, 5, 7, 9, 11]));
}

#[test]
fn channels_go_behind_a_kernel_once() {
    let (_directory, checkpoint) = checkpoint(&[1, 3, 2, 2]);
    let turned = view(&checkpoint, &[Step::ChannelsLast]);
    assert_eq!(turned.shape(), [1, 2, 2, 3]);
    assert_eq!(read(&turned, &checkpoint), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]);
    assert_eq!(view(&checkpoint, &[Step::ChannelsLast, Step::ChannelsLast]), turned);
    for (shape, right) in [
        (&[4, 3, 2, 6, 6][..], &[4, 2, 6, 6, 3][..]),
        (&[4, 2, 6, 6, 3], &[4, 2, 6, 6, 3]),
        (&[4, 1, 3, 3], &[4, 3, 3, 1]),
        (&[4, 1, 5], &[4, 5, 1]),
        (&[4, 5, 1], &[4, 5, 1]),
    ] {
        let (_directory, checkpoint) = self::checkpoint(shape);
        assert_eq!(view(&checkpoint, &[Step::ChannelsLast]).shape(), right, "{shape:?}");
    }
    let (_directory, checkpoint) = self::checkpoint(&[4, 4]);
    assert!(View::new("t0", checkpoint.tensor("t0").unwrap(), &[Step::ChannelsLast]).is_err());
}

#[test]
fn stacks_across_tensors() {
    let (_directory, checkpoint) = checkpoint(&[2, 2]);
    let one = |name: &str| View::new(name, checkpoint.tensor(name).unwrap(), &[Step::Transpose]).unwrap();
    let stacked = View::stack(vec![one("t0"), one("t1")]).unwrap();
    assert_eq!(stacked.shape(), [2, 2, 2]);
    assert_eq!(read(&stacked, &checkpoint), [0, 2, 1, 3, 4, 6, 5, 7]);
    let other = View::new("t0", checkpoint.tensor("t0").unwrap(), &[Step::SplitRows(2)]).unwrap();
    assert!(View::stack(vec![one("t0"), other]).is_none());
}

#[test]
fn bytes_as_words() {
    let (_directory, checkpoint) = checkpoint(&[3, 2, 16]);
    let words = view(&checkpoint, &[Step::Words]);
    assert_eq!((words.dtype, words.shape()), (Dtype::U32, vec![3, 8]));
    assert_eq!(read(&words, &checkpoint), (0..96).collect::<Vec<u8>>());
}

#[test]
fn steps_that_do_not_fit_are_errors() {
    let (_directory, checkpoint) = checkpoint(&[6, 2]);
    let tensor = checkpoint.tensor("t0").unwrap();
    for step in [
        Step::SplitRows(4),
        Step::SplitRows(0),
        Step::Rows { start: 4, count: 3, of: 6 },
        Step::Rows { start: 0, count: 0, of: 6 },
        Step::Rows { start: 0, count: 2, of: 7 },
        Step::EveryOther { from_last: 2, odd: false },
        Step::Words,
    ] {
        assert!(View::new("t0", tensor, std::slice::from_ref(&step)).is_err(), "{step:?}");
    }
}
