//! The steps of a rule, each taken on the strides of a piece.

use mlx_format::Dtype;

use super::join::interleaved;
use super::piece::{Piece, row_major};
use super::step::{Change, Step};

/// Takes a step on a view's only piece: its dtype, what is to be done with its values; nothing if it does not fit the shape.
pub(super) fn apply(
    step: &Step,
    pieces: &mut Vec<Piece>,
    dtype: &mut Dtype,
    change: &mut Option<Change>,
) -> Option<()> {
    let piece = &mut pieces[0];
    let axes = piece.shape.len();
    match step {
        &Step::SplitRows(parts) => {
            let rows = *piece.shape.first()?;
            if parts == 0 || !rows.is_multiple_of(parts) {
                return None;
            }
            piece.shape.splice(0..1, [parts, rows / parts]);
            piece.strides.insert(0, piece.strides[0].wrapping_mul(rows / parts));
        }
        &Step::Rows { start, count, of } => {
            let axis = axes.checked_sub(2)?;
            if piece.shape[axis] != of || count == 0 || start.checked_add(count)? > of {
                return None;
            }
            piece.slice(axis, start, count, 1);
        }
        &Step::EveryOther { from_last, odd } => {
            let axis = axes.checked_sub(from_last + 1)?;
            if piece.shape[axis] == 0 || !piece.shape[axis].is_multiple_of(2) {
                return None;
            }
            piece.slice(axis, usize::from(odd), piece.shape[axis] / 2, 2);
        }
        &Step::HalfOfRows(second) => {
            let axis = axes.checked_sub(2)?;
            let half = piece.shape[axis] / 2;
            if half == 0 || half * 2 != piece.shape[axis] {
                return None;
            }
            piece.slice(axis, if second { half } else { 0 }, half, 1);
        }
        Step::Transpose => {
            let last = axes.checked_sub(2)? + 1;
            // Packed words cannot be turned.
            if *dtype == Dtype::U32 {
                return None;
            }
            piece.shape.swap(last - 1, last);
            piece.strides.swap(last - 1, last);
        }
        Step::ChannelsLast => {
            // Packed words cannot be turned.
            if axes < 3 || *dtype == Dtype::U32 {
                return None;
            }
            if has_channels_first(&piece.shape) {
                let (channels, stride) = (piece.shape.remove(1), piece.strides.remove(1));
                piece.shape.push(channels);
                piece.strides.push(stride);
            }
        }
        Step::Words => {
            let last = axes.checked_sub(2)? + 1;
            let inner = piece.shape[last];
            if *dtype != Dtype::U8
                || piece.offset != 0
                || piece.strides != row_major(&piece.shape)
                || !inner.is_multiple_of(4)
            {
                return None;
            }
            piece.shape.truncate(last);
            piece.shape[last - 1] *= inner / 4;
            piece.strides = row_major(&piece.shape);
            *dtype = Dtype::U32;
        }
        Step::Scalar => {
            if piece.shape.iter().product::<usize>() != 1 {
                return None;
            }
            piece.shape.clear();
            piece.strides.clear();
        }
        Step::Flatten => {
            if !piece.is_row_major() {
                return None;
            }
            piece.shape = vec![piece.shape.iter().product()];
            piece.strides = vec![1];
        }
        &Step::First(count) => {
            let last = axes.checked_sub(1)?;
            piece.slice(last, 0, count.min(piece.shape[last]), 1);
        }
        &Step::Interleave { of } => {
            let [piece] = &pieces[..] else { return None };
            *pieces = interleaved(piece, of)?;
        }
        Step::AddOne => *change = (axes == 1).then_some(Change::AddOne),
        Step::Times(_) | Step::UnitRows | Step::GateOfStream | Step::GateOfBranch => {
            *change = Some(change_of(step, &piece.shape)?);
        }
    }
    Some(())
}

/// What is done with values of such a shape from a step on; nothing if it does not fit.
fn change_of(step: &Step, shape: &[usize]) -> Option<Change> {
    match step {
        Step::AddOne => Some(Change::AddOne),
        Step::Times(factors) => {
            let rows = shape[..shape.len().saturating_sub(1)].iter().product::<usize>();
            let fit = factors.0.len() <= 1 || factors.0.len() == rows;
            fit.then(|| Change::Times(factors.clone()))
        }
        Step::UnitRows => Some(Change::UnitRows),
        Step::GateOfStream => Some(Change::Gate(true)),
        Step::GateOfBranch => Some(Change::Gate(false)),
        _ => None,
    }
}

/// Whether the weight of a convolution is `[out, in, kernel..]`; else it is `[out, kernel.., in]`.
fn has_channels_first(shape: &[usize]) -> bool {
    match shape {
        [_, channels, _] => *channels == 1,
        [.., height, width] => height == width,
        _ => false,
    }
}
