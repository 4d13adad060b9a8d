//! What an engine tells of a card's memory and time.

/// Bytes of a card's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Of living tensors.
    pub in_use: u64,
    /// The most that was in use at a time.
    pub peak: u64,
    /// Given back by tensors, and kept for the next ones.
    pub kept: u64,
}

/// What time was spent on.
#[derive(Clone, Debug, PartialEq)]
pub struct Spent {
    /// The operation and the kernel, or what was waited for in front of the card.
    pub what: String,
    /// Seconds, all together.
    pub seconds: f64,
    /// How often.
    pub times: u64,
}

/// How much a card holds, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Of its own memory, where the driver tells.
    pub memory: Option<u64>,
    /// Of the largest tensor.
    pub largest: u64,
}
