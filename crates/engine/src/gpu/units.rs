//! Products by a card's matrix units, where somebody asks for them ([`Precision::Fast`]).
//!
//! Units multiply float16. An operand is brought near one by powers of two and split in two float16, which together hold
//! 22 of float32's 24 bits; three products of the halves give what float32 gives but for the last bits, at twice its rate
//! or more. Only what says that it may be computed so is (`Product::loose`): linear layers, their gradients, Gram matrices
//! and what rounding makes of errors, not factors.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::memory::Memory;
use super::program::{Program, Words, program};
use super::squares::{LINE, ROOM, SQUARES, THREADS, TILE, WARPS};
use crate::error::{Result, bail};
use crate::settings::Precision;

/// Unchecked as other products are.
static UNITS: Program = Program { checked: false, ..program!("units", 3, 3, "operands") };
static PEAKS: Program = program!("peaks", 1, 1);

/// What the kernel's words of its own stand for.
fn sizes(a_along: bool, b_along: bool) -> Vec<(&'static str, String)> {
    let fetched = |along: bool, lines: usize| if along { 16 * lines / 4 / THREADS } else { 4 };
    let all = [
        ("UNITS", 1),
        ("ROWS", TILE.0),
        ("COLUMNS", TILE.1),
        ("THREADS", THREADS),
        ("WARPS", WARPS),
        ("DOWN", SQUARES.0),
        ("ACROSS", SQUARES.1),
        ("A_FETCHED", fetched(a_along, TILE.0)),
        ("B_FETCHED", fetched(b_along, TILE.1)),
        ("LINE", LINE),
        ("B_FROM", TILE.0 * LINE),
        ("LOW", ROOM),
        ("ROOM", 2 * ROOM),
        ("SQUARES", THREADS / 32 * 256),
    ];
    all.map(|(name, value)| (name, value.to_string())).to_vec()
}

/// An operand: lines along k, or across it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand<'m> {
    /// From the first element to the last.
    pub(super) slice: Slice<'m>,
    /// Elements between lines.
    pub(super) line: usize,
    pub(super) along: bool,
    /// The largest size of all of it, where lines lie across k and it is known.
    pub(super) peak: Option<Slice<'m>>,
}

impl Operand<'_> {
    /// Its peaks, if they have to be made; `own` lines along k, or elements of a line across it.
    fn made(&self, card: &Arc<Card>, own: usize, k: usize) -> Result<Option<Memory>> {
        match self.peak {
            Some(_) if !self.along => Ok(None),
            _ => peaks(card, self, own, k).map(Some),
        }
    }

    fn peaks<'p>(&'p self, made: Option<&'p Memory>, own: usize) -> Result<Slice<'p>> {
        match (made, self.peak) {
            (Some(made), _) => Ok(Slice::all(made, if self.along { own } else { 1 })),
            (None, Some(peak)) => Ok(peak),
            (None, None) => bail!("an operand without its largest size"),
        }
    }
}

/// Computes a product of sizes `[m, k, n]`; `words` and `numbers` are those of all kernels of products. `whole` says that
/// all lines are whole vec4s.
pub(super) fn run(
    card: &Arc<Card>,
    mut words: Vec<(&'static str, String)>,
    ([m, k, n], whole): ([usize; 3], bool),
    (a, b): (Operand<'_>, Operand<'_>),
    (bias, c): (Slice<'_>, Slice<'_>),
    (numbers, work): (&[u32], u64),
) -> Result<()> {
    let whole = whole && m.is_multiple_of(TILE.0) && n.is_multiple_of(TILE.1) && k.is_multiple_of(16);
    let (of_a, of_b) = (a.made(card, m, k)?, b.made(card, n, k)?);
    words.extend(sizes(a.along, b.along));
    words.push(("WHOLE", u8::from(whole).to_string()));
    card.launch(&Launch {
        program: &UNITS,
        words: &words,
        slices: &[a.slice, b.slice, bias, c, a.peaks(of_a.as_ref(), m)?, b.peaks(of_b.as_ref(), n)?],
        numbers,
        groups: [n.div_ceil(TILE.1) as u32, m.div_ceil(TILE.0) as u32, 1],
        work,
    })
}

/// The largest size in a matrix of `k` lines of `length`, where somebody may ask for it.
pub(super) fn peak(card: &Arc<Card>, x: Slice<'_>, (k, length): (usize, usize)) -> Result<Option<Memory>> {
    let x = Operand { slice: x, line: length, along: false, peak: None };
    let asked = card.precision == Precision::Fast;
    asked.then(|| peaks(card, &x, length, k)).transpose()
}

/// The largest size in each line along k; in all of a matrix whose lines lie across k.
fn peaks(card: &Arc<Card>, x: &Operand<'_>, own: usize, k: usize) -> Result<Memory> {
    let (lines, length) = if x.along { (own, k) } else { (k, own) };
    let by_line = card.room(lines)?;
    largest(card, x.slice, (lines, length, x.line), &by_line)?;
    if x.along {
        return Ok(by_line);
    }
    let whole = card.room(1)?;
    largest(card, Slice::all(&by_line, lines), (1, lines, lines), &whole)?;
    Ok(whole)
}

fn largest(
    card: &Arc<Card>,
    x: Slice<'_>,
    (lines, length, apart): (usize, usize, usize),
    out: &Memory,
) -> Result<()> {
    const NONE: Words<'static> = &[];
    card.launch(&Launch {
        program: &PEAKS,
        words: NONE,
        slices: &[x, Slice::all(out, lines)],
        numbers: &[lines as u32, length as u32, apart as u32],
        groups: card.groups_for(lines),
        work: (lines * length) as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel is what WGSL and its extensions say, also where no adapter has matrix units.
    #[test]
    fn the_kernel_is_valid() {
        for (a_along, b_along, triangle) in [(true, true, false), (true, false, false), (false, false, true)]
        {
            let flag = |holds: bool| u8::from(holds).to_string();
            let mut words = vec![
                ("VEC", "1".to_owned()),
                ("WHOLE", "0".to_owned()),
                ("A_ALONG", flag(a_along)),
                ("B_ALONG", flag(b_along)),
                ("TRIANGLE", flag(triangle)),
                ("BIAS", "0".to_owned()),
                ("OLD", "1".to_owned()),
                ("FINISH", "old + sum".to_owned()),
                ("ROWS_OF_A", "p.m".to_owned()),
            ];
            words.extend(sizes(a_along, b_along));
            let text = UNITS.text(&words).unwrap();
            let module = naga::front::wgsl::parse_str(&text).unwrap();
            let capabilities = naga::valid::Capabilities::all();
            let flags = naga::valid::ValidationFlags::all();
            naga::valid::Validator::new(flags, capabilities).validate(&module).unwrap();
        }
    }

    #[test]
    fn what_is_asked_for_and_is_not_there_is_said() {
        for choice in super::super::adapters().iter().map(|own| format!("gpu:{}", own.index)) {
            let choice = choice.parse().unwrap();
            match Card::open(&choice, Precision::Fast, None) {
                Ok(card) => assert_eq!(card.precision, Precision::Fast),
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains("float32 alone") && error.contains("; hint: "), "{error}");
                }
            }
        }
    }
}
