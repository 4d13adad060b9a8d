//! Several pieces on one axis: parts that stand one behind the other, rows in another order.

use super::piece::Piece;

/// Pieces of equal length, one behind the other as `pieces` are: as long as the longest length that divides each.
pub(super) fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
    let length = |piece: &Piece| piece.shape.first().copied().unwrap_or(0);
    let rows = pieces.iter().fold(0, |rows, piece| greatest_common_divisor(rows, length(piece)));
    let cut = |piece: Piece| {
        let starts = (0..length(&piece).checked_div(rows).unwrap_or(0)).map(move |part| part * rows);
        starts.map(move |start| {
            let mut part = piece.clone();
            part.slice(0, start, rows, 1);
            part
        })
    };
    pieces.into_iter().flat_map(cut).collect()
}

/// Pieces of two rows: a row of the first half of each `of`, and its partner in the second.
pub(super) fn interleaved(piece: &Piece, of: usize) -> Option<Vec<Piece>> {
    let (half, rows) = (of / 2, *piece.shape.first()?);
    if half == 0 || half * 2 != of || rows == 0 || !rows.is_multiple_of(of) {
        return None;
    }
    let pair = |start: usize| {
        let mut pair = piece.clone();
        pair.offset += start * piece.strides[0];
        pair.shape[0] = 2;
        pair.strides[0] = piece.strides[0].wrapping_mul(half);
        pair
    };
    let starts = (0..rows / of).flat_map(|head| (0..half).map(move |row| head * of + row));
    Some(starts.map(pair).collect())
}

fn greatest_common_divisor(left: usize, right: usize) -> usize {
    if right == 0 { left } else { greatest_common_divisor(right, left % right) }
}
