//! Sliding windows.

use std::path::Path;

use mlx_quant::model::decoder::{Attention, Layer};
use mlx_quant::model::{Decoder, Weights};

use crate::{Verdict, model};

/// A window that the oracle's tokens reach beyond.
const SHORT: usize = 8;

fn attentions(decoder: &mut Decoder) -> impl Iterator<Item = &mut Attention> {
    let stages = decoder.blocks.iter_mut().flat_map(|block| &mut block.stages);
    stages.flat_map(|stage| &mut stage.branches).filter_map(|branch| match &mut branch.layer {
        Layer::Attention(attention) => Some(attention),
        _ => None,
    })
}

/// Without its windows a model says something else from the first token on that reaches beyond one, and the
/// same before it. Windows that the tokens do not reach are shortened first.
pub(crate) fn windows_are_applied(directory: &Path) -> Verdict {
    let model = model::open(directory);
    let weights = Weights::open(&model.checkpoint, &model.config).map_err(model::text)?;
    let mut decoder = weights.decoder(&model.config, false).map_err(model::text)?;
    let tokens = model::windows(directory).remove(0);
    let sliding: Vec<usize> = attentions(&mut decoder).filter_map(|attention| attention.window).collect();
    let Some(&window) = sliding.first() else { return Ok("none".to_owned()) };
    let run = |decoder: &Decoder| model::run(&weights, decoder, &[&tokens], &mut ());
    let mut open = decoder.clone();
    attentions(&mut open).for_each(|attention| attention.window = None);
    let without = run(&open)?;
    let mut note = String::new();
    if window >= tokens.len() {
        if model::first_difference(&run(&decoder)?, &without).is_some() {
            return Err(format!("a window of {window} matters to {} tokens", tokens.len()));
        }
        attentions(&mut decoder).for_each(|attention| attention.window = attention.window.and(Some(SHORT)));
        note = format!(", shortened to {SHORT}");
    }
    let expected = window.min(if note.is_empty() { window } else { SHORT });
    let at = model::first_difference(&run(&decoder)?, &without).map(|at| at / decoder.vocabulary);
    if at != Some(expected) {
        return Err(format!("a window of {expected}, but logits first differ at {at:?}"));
    }
    Ok(format!("{} of {}, window {window}{note}", sliding.len(), attentions(&mut decoder).count()))
}
