//! A head that is the embedding's table once more.

use mlx_quant_model::Architecture;

/// The paths of the table and of the head that repeats it, if mlx-vlm's model has such a head.
pub(super) fn repeated(architecture: &Architecture) -> Option<(String, String)> {
    let place = architecture.place;
    let wanted = architecture.towers.as_ref().is_some_and(|towers| towers.repeats_head);
    wanted.then(|| (place.name("model.embed_tokens"), place.name("lm_head")))
}
