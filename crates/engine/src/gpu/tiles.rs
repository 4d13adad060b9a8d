//! The forms of a product's tiles: how much of it a workgroup computes, and which of its threads what.

/// How products that keep a card busy are computed. Both give the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tiles {
    /// One tile at a time, of 64 or 128 rows and columns.
    #[default]
    Plain,
    /// Two in turn: while one is multiplied, the next is fetched. Measured on an H200 (8192 x 4096 x 4096): 46 TFLOP/s where
    /// one at a time reaches 37.
    Turns,
}

/// A form of tiles in turn: `down` x `across` threads, each of which computes `4 * rows` x `4 * columns` elements, `steps`
/// steps of k between two barriers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// Threads down, a multiple of 4.
    pub(super) down: usize,
    /// Threads across, a multiple of 8.
    pub(super) across: usize,
    /// Groups of 4 rows of a thread.
    pub(super) rows: usize,
    /// Groups of 4 columns of a thread.
    pub(super) columns: usize,
    /// A multiple of 4.
    pub(super) steps: usize,
}

/// Where both operands lie along k: few threads with many elements each, and several such workgroups at a time.
const ALONG: Form = Form { down: 16, across: 8, rows: 2, columns: 4, steps: 8 };
/// Where one lies across k.
const ACROSS: Form = Form { down: 16, across: 16, rows: 2, columns: 2, steps: 8 };

impl Form {
    /// The form that suits operands that both lie along k, or do not.
    pub(super) fn of(along: bool) -> Self {
        if along { ALONG } else { ACROSS }
    }

    pub(super) fn threads(self) -> usize {
        self.down * self.across
    }

    /// Rows and columns of a tile.
    pub(super) fn tile(self) -> (usize, usize) {
        (4 * self.rows * self.down, 4 * self.columns * self.across)
    }

    /// Bytes of workgroup memory.
    pub(super) fn memory(self) -> usize {
        let (rows, columns) = self.tile();
        2 * self.steps * (rows + columns + 8) * 4
    }
}
