//! How many threads work, and the pool that they work in.

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::Error;

/// One thread per core where none are asked for; the environment has no say.
pub fn threads_or_all(threads: usize) -> usize {
    if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads }
}

/// A pool of `threads` threads, or of one per core for 0.
///
/// # Errors
/// [`Error::Threads`] if the system does not give them.
pub(crate) fn pool(threads: usize) -> Result<ThreadPool, Error> {
    let threads = threads_or_all(threads);
    let pool = ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|error| Error::Threads { threads, reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_has_the_threads_that_were_asked_for() {
        assert_eq!(pool(3).unwrap().current_num_threads(), 3);
        assert_eq!(pool(0).unwrap().current_num_threads(), threads_or_all(0));
    }
}
