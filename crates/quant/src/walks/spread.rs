//! Who computes what at the same time.

use mlx_quant_engine::Device;
use rayon::prelude::*;

/// Does something with each item, on all threads of a pool where the engine takes a window at a time. Where it takes
/// batches it is busy with one of them, and more at once would only fill its memory: then one comes after the other.
pub(crate) fn each<T: Send, R: Send, E: Send>(
    device: &Device,
    pool: &rayon::ThreadPool,
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> Result<R, E> + Sync + Send,
) -> Result<Vec<R>, E> {
    let items: Vec<T> = items.into_iter().collect();
    pool.install(|| {
        if device.batch() > 1 {
            items.into_iter().map(work).collect()
        } else {
            items.into_par_iter().map(work).collect()
        }
    })
}
