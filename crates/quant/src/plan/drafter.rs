//! The plan of a drafter: heads that predict tokens beyond the next one, in a directory of their own.

use mlx_format::Scheme;
use mlx_format::checkpoint::{Checkpoint, Config};
use mlx_quant_model::Heads;

use super::end_of_turn::EndOfTurn;
use super::planner::Planner;
use super::{DrafterPlan, PackedSource, PlanError, Settings};

/// Bits and group size of a drafter's linears where its model is quantized.
const BITS: (u32, usize) = (8, 64);

impl DrafterPlan {
    /// Plans the drafter of an opened checkpoint, in 8 bits if `settings` quantize, rounded to nearest: no text tells how.
    /// Reads headers and config.json only.
    ///
    /// # Errors
    /// [`PlanError`] if there are no heads, or nothing loads them.
    pub fn new(checkpoint: &Checkpoint, config: &Config, settings: &Settings) -> Result<Self, PlanError> {
        let Heads { named, config, files } = Heads::read(checkpoint, config)?;
        let scheme = Scheme::affine(BITS.0, BITS.1)?;
        let settings = Settings {
            quantize: settings.quantize.map(|_| scheme),
            packed: PackedSource::Decode,
            dtype: settings.dtype,
            allow_nonfinite: settings.allow_nonfinite,
            ..Settings::default()
        };
        let mut plan = Planner::new(named, settings, &config)?.finish(&config, EndOfTurn::default())?;
        // It stands for the dtype of the source alone, and mlx-vlm writes none.
        plan.config.0.shift_remove("torch_dtype");
        Ok(Self { plan, files })
    }
}
