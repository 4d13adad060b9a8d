//! The plan: every output tensor, its scheme and its place, known from headers alone.
//!
//! `--dry-run` prints a plan and stops; [`crate::convert()`] carries one out. Everything that can be wrong with a
//! source or with settings is found here, before any work.

mod bulk;
mod check;
mod complete;
mod decide;
mod drafter;
mod end_of_turn;
mod error;
mod head;
mod ids;
mod item;
mod mixed;
mod overrides;
mod packed;
mod planner;
mod report;
mod settings;
mod specs;

use mlx_format::checkpoint::{Checkpoint, Config};
use mlx_quant_model::Named;

pub use self::complete::{DrafterPlan, Plan, Towers};
pub use self::end_of_turn::GenerationConfig;
pub use self::error::PlanError;
pub use self::ids::TensorId;
pub use self::item::{Item, Job};
pub use self::mixed::MixedRecipe;
pub use self::overrides::{Overrides, OverridesError};
pub use self::report::{DrafterReport, LayerReport, PlanReport};
pub use self::settings::{PackedSource, Settings};

use self::check::{check_by_names, check_experts, check_settings, check_taken, check_type, takes_over};
use self::end_of_turn::EndOfTurn;
use self::planner::Planner;

impl Plan {
    /// Plans the conversion of an opened checkpoint. Reads headers and config.json only.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn new(checkpoint: &Checkpoint, config: &Config, settings: Settings) -> Result<Self, PlanError> {
        check_type(&settings, config)?;
        let named = Named::read(checkpoint, config)?;
        check_settings(&settings, &named.existing)?;
        named.check(checkpoint, settings.allow_unread)?;
        if !settings.text_only {
            named.check_towers(checkpoint)?;
        }
        if !named.architecture.described {
            check_experts(&named)?;
        }
        let taken = takes_over(&settings) && !named.packed.is_empty();
        if (settings.quantize.is_some() || taken) && !named.architecture.described {
            check_by_names(&named, config)?;
        }
        if taken {
            check_taken(&named)?;
        }
        let eos = EndOfTurn::of(checkpoint.directory(), config, settings.keep_eos);
        let mtp = settings.mtp && !checkpoint.is_headers_only();
        let drafter = mtp.then(|| DrafterPlan::new(checkpoint, config, &settings)).transpose()?;
        let mut plan = Planner::new(named, settings, config)?.finish(config, eos)?;
        if plan.settings.global_scale && !plan.items.iter().any(|item| plan.is_spread(item)) {
            return Err(PlanError::NoGlobalScale);
        }
        plan.drafter = drafter.map(Box::new);
        if plan.settings.mtp && !mtp {
            plan.notes.push(
                "config.json alone does not tell what multi-token-prediction heads there are".to_owned(),
            );
        }
        let sees = plan.architecture.towers.is_some() && !plan.settings.text_only;
        if checkpoint.is_headers_only() && sees && config.0.contains_key("vision_config") {
            let note = "config.json alone does not tell how large vision and audio are: they are not counted";
            plan.notes.push(note.to_owned());
        }
        Ok(plan)
    }
}
