//! What a calibrated run did.

use std::collections::BTreeMap;

use mlx_format::checkpoint::{Share, Writer};
use serde::Serialize;

use crate::dwq::Distilled;
use crate::evaluate::Evaluation;

/// Tokens that the experts of one stacked layer saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ExpertTokens {
    /// By expert; of experts behind the last one that was chosen nothing is said.
    pub tokens: Vec<u64>,
    /// Experts whose codes were chosen without a Hessian, because too few tokens reached them.
    pub fell_back: Vec<usize>,
}

impl ExpertTokens {
    pub(super) fn set(&mut self, expert: usize, tokens: u64, fell_back: bool) {
        if self.tokens.len() <= expert {
            self.tokens.resize(expert + 1, 0);
        }
        self.tokens[expert] = tokens;
        if fell_back {
            self.fell_back.push(expert);
        }
    }
}

/// What one engine computed of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Computed {
    /// Its name.
    pub engine: String,
    /// Blocks that it finished.
    pub blocks: usize,
    /// Tensors that it finished, those of blocks included.
    pub tensors: usize,
}

impl Computed {
    /// By engine in turn, with the tensors that each block consists of; engines that finished nothing are left out.
    pub(super) fn of(writer: &Writer, blocks: &[Vec<usize>]) -> Vec<Self> {
        let one = |share: &Share| {
            let whole = |block: &&Vec<usize>| block.iter().all(|tensor| share.tensors.contains(tensor));
            Self {
                engine: share.engine.clone(),
                blocks: blocks.iter().filter(whole).count(),
                tensors: share.tensors.len(),
            }
        };
        writer.shares().iter().filter(|share| !share.tensors.is_empty()).map(one).collect()
    }

    /// `cpu x86-v4: 3 blocks; gpu llvmpipe: 5 blocks`.
    pub fn list(all: &[Self]) -> String {
        let walked = all.iter().any(|one| one.blocks > 0);
        let counted = |one: &Self| {
            if walked { format!("{} blocks", one.blocks) } else { format!("{} tensors", one.tensors) }
        };
        let one = |one: &Self| format!("{}: {}", one.engine, counted(one));
        all.iter().map(one).collect::<Vec<_>>().join("; ")
    }
}

/// Result of [`crate::quantize`].
#[derive(Clone, Debug, Default, Serialize)]
pub struct Quantized {
    /// Blocks that an earlier, interrupted run had finished.
    pub resumed_blocks: usize,
    /// What computed, and how much of the model: more than one where a run went on with another engine's blocks.
    pub engines: Vec<Computed>,
    /// Sites at which factors were folded: those of AWQ, and ranges of nvfp4.
    pub folded: usize,
    /// Sites at which they could have been.
    pub foldable: usize,
    /// By the path of a stacked layer.
    pub experts: BTreeMap<String, ExpertTokens>,
    /// What DWQ did.
    pub distilled: Option<Distilled>,
    /// Largest resident memory until everything was written, bytes, where [`crate::Observer::peak_memory`] knows.
    pub peak_memory: Option<u64>,
    /// Wall time of quantizing and writing.
    pub quantize_seconds: f64,
    /// Wall time, the evaluation included.
    pub seconds: f64,
    /// Quality of the written files on held-out text.
    pub evaluation: Option<Evaluation>,
}

impl Quantized {
    /// Adds a block: sites at which a fold was applied, and at which one was possible; tokens by the path of a stacked layer.
    pub(super) fn add(
        &mut self,
        (folded, foldable): (usize, usize),
        experts: &mut BTreeMap<String, ExpertTokens>,
    ) {
        self.folded += folded;
        self.foldable += foldable;
        self.experts.append(experts);
    }
}
