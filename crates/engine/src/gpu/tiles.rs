//! Which of the forms of a product's tiles a card uses: a choice that is made when it is opened.

/// How products that keep a card busy are computed. All give the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tiles {
    /// Of 64 or 128 rows and columns, 16 steps of k at a time.
    #[default]
    Plain,
    /// Of 128 x 128, two in turn of 8 steps.
    Turns,
    /// Of 128 x 256, two in turn of 8 steps.
    Long,
}
