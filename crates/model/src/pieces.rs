//! Long texts in pieces, with the ids of the whole.
//!
//! A tokenizer keeps some eighty bytes for each byte of a text and works on one core. Between a line feed and the letter after it
//! every tokenizer that we know begins anew, so a long text can be cut there. What a tokenizer really does is not taken
//! on trust: at each cut the text around it is tokenized as a whole and in its two halves, and only where both give the same
//! ids it is cut. Tokenizers that put something in front of every text (Metaspace) fail that everywhere and get the text whole.

/// The length of a piece in bytes.
const PIECE: usize = 1 << 20;

/// How much text on either side of a cut is looked at.
const AROUND: usize = 2 << 10;

/// How many places are tried for a cut before the rest is left whole.
const TRIES: usize = 8;

/// The pieces of a text whose ids together are those of the text. `encode` fails where the whole would.
pub(crate) fn pieces<E>(text: &str, encode: impl Fn(&str) -> Result<Vec<u32>, E>) -> Result<Vec<&str>, E> {
    pieces_of(text, PIECE, encode)
}

fn pieces_of<E>(
    text: &str,
    length: usize,
    encode: impl Fn(&str) -> Result<Vec<u32>, E>,
) -> Result<Vec<&str>, E> {
    let (mut pieces, mut rest) = (Vec::new(), text);
    while rest.len() > 2 * length {
        let Some(cut) = find_cut(rest, length, &encode)? else { break };
        let (piece, after) = rest.split_at(cut);
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    Ok(pieces)
}

/// Where a text can be cut, at the first such place behind `from`.
fn find_cut<E>(
    text: &str,
    from: usize,
    encode: impl Fn(&str) -> Result<Vec<u32>, E>,
) -> Result<Option<usize>, E> {
    let bytes = text.as_bytes();
    let is_cut = |at: &usize| bytes[at - 1] == b'\n' && bytes[*at].is_ascii_alphabetic();
    for cut in (from..bytes.len()).filter(is_cut).take(TRIES) {
        let start = boundary(text, cut.saturating_sub(AROUND));
        let end = boundary(text, (cut + AROUND).min(text.len()));
        let both = [encode(&text[start..cut])?, encode(&text[cut..end])?].concat();
        if encode(&text[start..end])? == both {
            return Ok(Some(cut));
        }
    }
    Ok(None)
}

/// The first place from here on where a character begins.
fn boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// A tokenizer of characters.
    #[expect(clippy::unnecessary_wraps, reason = "a tokenizer can fail")]
    fn letters(text: &str) -> Result<Vec<u32>, Infallible> {
        Ok(text.chars().map(u32::from).collect())
    }

    #[test]
    fn cuts_are_between_lines() {
        let text = "one line\n  two ä\nthree\n\nfour\n".repeat(100);
        let pieces = pieces_of(&text, 200, letters).unwrap();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.len() > 9 && pieces.iter().all(|piece| piece.len() >= 200 && piece.ends_with('\n')));
        assert!(pieces.iter().all(|piece| piece.starts_with(char::is_alphabetic)));
    }

    #[test]
    fn what_depends_on_its_surroundings_is_not_cut() {
        let text = "one line\ntwo\n".repeat(100);
        // Something in front of every text; tokens across line ends; ids that depend on all that stands before.
        let prefixed = |text: &str| Ok::<_, Infallible>([vec![7], letters(text)?].concat());
        let across = |text: &str| letters(&text.replace("\nt", "#"));
        let counted = |text: &str| Ok::<_, Infallible>((0..).zip(text.chars()).map(|(id, _)| id).collect());
        assert_eq!(pieces_of(&text, 200, prefixed).unwrap(), [&*text]);
        assert_eq!(pieces_of(&text, 200, counted).unwrap(), [&*text]);
        let pieces = pieces_of(&text, 200, across).unwrap();
        assert!(pieces.len() > 4 && pieces.iter().all(|piece| piece.starts_with("one")));
        let fails = |_: &str| Err(3);
        assert_eq!(pieces_of(&text, 200, fails), Err(3));
        assert_eq!(pieces_of("short\ntext", 200, fails), Ok(vec!["short\ntext"]));
    }

    #[test]
    fn texts_without_lines_stay_whole() {
        let text = "words without an end ".repeat(100);
        assert_eq!(pieces_of(&text, 200, letters).unwrap(), [&*text]);
    }
}
