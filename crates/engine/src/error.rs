//! What goes wrong with tensors: shapes that do not fit together, or a device without room.

/// An operation that could not be done; the message shows the shapes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    /// With this message.
    pub fn msg(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// The result of an operation on tensors.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Returns an [`Error`] with a formatted message.
macro_rules! bail {
    ($($argument:tt)*) => {
        return Err($crate::Error::msg(format!($($argument)*)))
    };
}
pub(crate) use bail;
