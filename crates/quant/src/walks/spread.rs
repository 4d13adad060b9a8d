//! Who computes what at the same time.

use mlx_quant_engine::Device;
use rayon::prelude::*;

use crate::Error;

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

/// Blocks in `order`, one after the other: loads each and works with it. Where the engine has a memory of its own, the
/// next one is loaded meanwhile; the processor has better things to do, and no room.
pub(crate) fn in_turn<T: Send>(
    device: &Device,
    order: impl Iterator<Item = usize>,
    load: &(dyn Fn(usize) -> Result<T, Error> + Sync),
    mut work: impl FnMut(usize, T) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut order = order;
    if device.memory().is_none() {
        return order.try_for_each(|index| work(index, load(index)?));
    }
    std::thread::scope(|scope| {
        let mut begun = order.next().map(|index| (index, load(index)));
        while let Some((index, loaded)) = begun {
            let loaded = loaded?;
            let next = order.next().map(|next| (next, scope.spawn(move || load(next))));
            work(index, loaded)?;
            begun = next.map(|(next, loading)| match loading.join() {
                Ok(loaded) => (next, loaded),
                Err(panic) => std::panic::resume_unwind(panic),
            });
        }
        Ok(())
    })
}
