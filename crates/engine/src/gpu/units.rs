//! Products by a card's matrix units, where somebody asks for them ([`Precision::Fast`]).
//!
//! Units multiply float16. An operand is brought near one by powers of two and split in two float16, which together hold
//! 22 of float32's 24 bits; three products of the halves give what float32 gives but for the last bits, at twice its rate
//! or more. Only what says that it may be computed so is: linear layers, their gradients and Gram matrices, not factors,
//! and not what rounding makes of errors.

use std::sync::Arc;

use super::card::Card;
use super::launch::{Launch, Slice};
use super::memory::Memory;
use super::product::{Matrix, Product};
use super::program::{Program, Words, program};
use crate::error::Result;
use crate::settings::Precision;

/// Unchecked as other products are.
static UNITS: Program = Program { checked: false, ..program!("units", 3, 3, "operands") };
static PEAKS: Program = program!("peaks", 1, 1);

/// Rows and columns of a workgroup's tile. Of the forms that were tried on an H200 this is the fastest: larger tiles leave
/// room for fewer workgroups at a time, and it is other workgroups that work while one waits.
pub(super) const TILE: (usize, usize) = (128, 128);
/// Squares of 16 down and across that 32 threads compute.
const SQUARES: (usize, usize) = (4, 4);
/// Groups of 32 threads across a tile.
const WARPS: usize = TILE.1 / (16 * SQUARES.1);
/// Threads of a workgroup.
const THREADS: usize = TILE.0 / (16 * SQUARES.0) * WARPS * 32;
// Where lines lie across k a thread has 4 x 4 of a tile's 16 steps.
const _: () = assert!(TILE.0 == THREADS && TILE.1 == THREADS);
/// Vec4s of a line of 16 elements in workgroup memory.
const LINE: usize = 4;
/// Vec4s of the tiles of both operands.
const ROOM: usize = (TILE.0 + TILE.1) * LINE;
/// Bytes of workgroup memory that the kernel takes.
const MEMORY: u32 = (2 * ROOM * 8 + THREADS / 32 * 1024) as u32;
/// Tiles from which on a card is busy with them.
const BUSY: usize = 64;

/// What a device must be opened with so that its matrix units can be used.
pub(super) const FEATURES: wgpu::Features =
    wgpu::Features::SHADER_F16.union(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);

/// Why an adapter's matrix units cannot compute our products, if they cannot.
pub(super) fn lacking(adapter: &wgpu::Adapter) -> Option<&'static str> {
    let info = adapter.get_info();
    let squares = adapter.cooperative_matrix_properties().into_iter().any(|own| {
        (own.m_size, own.n_size, own.k_size) == (16, 16, 16)
            && own.ab_type == wgpu::CooperativeScalarType::F16
            && own.cr_type == wgpu::CooperativeScalarType::F32
    });
    if !adapter.features().contains(FEATURES) || !squares {
        Some("it has no matrix units for squares of 16 float16 with sums in float32")
    } else if (info.subgroup_min_size, info.subgroup_max_size) != (32, 32) {
        Some("its threads do not run together in groups of 32")
    } else if adapter.limits().max_compute_workgroup_storage_size < MEMORY {
        Some("its workgroups share too little memory")
    } else {
        None
    }
}

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

impl Product<'_> {
    /// Whether matrix units compute it.
    pub(super) fn by_units(&self, card: &Card) -> bool {
        let [m, k, n] = self.sizes;
        let tiles = m.div_ceil(TILE.0) * n.div_ceil(TILE.1);
        let halved = if self.triangle.is_some() { 2 } else { 1 };
        card.precision == Precision::Fast
            && self.loose
            && self.batch == [1, 1]
            && self.in_fours()
            && m.min(n).min(k) >= 64
            && tiles / halved >= BUSY
            && m.div_ceil(TILE.0).max(n.div_ceil(TILE.1)) <= card.groups as usize
    }

    /// Computes it by matrix units; `words`, `slices` and `numbers` are those of all kernels of products.
    pub(super) fn run_by_units(
        &self,
        card: &Arc<Card>,
        mut words: Vec<(&'static str, String)>,
        slices: [Slice<'_>; 4],
        numbers: &[u32],
    ) -> Result<()> {
        let [m, k, n] = self.sizes;
        let whole = m.is_multiple_of(TILE.0) && n.is_multiple_of(TILE.1) && k.is_multiple_of(16);
        let own_peaks = peaks(card, &self.a, self.a_along, (m, k))?;
        let other = if self.is_square() { None } else { Some(peaks(card, &self.b, self.b_along, (n, k))?) };
        let of_b = other.as_ref().unwrap_or(&own_peaks);
        let size = |along: bool, lines: usize| if along { lines } else { 1 };
        words.extend(sizes(self.a_along, self.b_along));
        words.push(("WHOLE", u8::from(self.in_fours() && whole).to_string()));
        let [a, b, bias, c] = slices;
        let (a_peaks, b_peaks) =
            (Slice::all(&own_peaks, size(self.a_along, m)), Slice::all(of_b, size(self.b_along, n)));
        card.launch(&Launch {
            program: &UNITS,
            words: &words,
            slices: &[a, b, bias, c, a_peaks, b_peaks],
            numbers,
            groups: [n.div_ceil(TILE.1) as u32, m.div_ceil(TILE.0) as u32, 1],
            work: self.work(),
        })
    }

    /// Whether both operands are the same lines.
    fn is_square(&self) -> bool {
        let of = |x: &Matrix<'_>| (std::ptr::from_ref(x.memory), x.first, x.line);
        of(&self.a) == of(&self.b) && self.a_along == self.b_along && self.sizes[0] == self.sizes[2]
    }
}

/// The largest size in each line along k; in all of a matrix whose lines lie across k.
fn peaks(card: &Arc<Card>, x: &Matrix<'_>, along: bool, (own, k): (usize, usize)) -> Result<Memory> {
    let (lines, length) = if along { (own, k) } else { (k, own) };
    let by_line = card.room(lines)?;
    let all = Slice { memory: x.memory, first: x.first, count: (lines - 1) * x.line + length };
    largest(card, all, (lines, length, x.line), &by_line)?;
    if along {
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
