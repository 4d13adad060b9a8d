//! The part of the quantizing commands that gives every layer its scheme.

use std::path::{Path, PathBuf};

use anyhow::Result;
use mlx_quant::{
    DynamicPlan, DynamicSettings, Model, Sensitivities, SensitivitySettings, Settings, Target, Windows,
    sensitivities,
};

use crate::Refusal;
use crate::amount;
use crate::args::DynamicFlags;
use crate::printer::Printer;
use crate::screen::Screen;

/// Tries of `--target-kl`.
const TRIES: usize = 6;
/// A model whose divergence is so close below the target is small enough.
const CLOSE: f64 = 0.95;

/// What was measured, and what is asked.
pub(crate) struct Allocator<'a> {
    model: &'a Model,
    settings: Settings,
    sensitivities: Sensitivities,
    dynamic: DynamicSettings,
}

/// What the flags ask, checked before any work.
pub(crate) fn settings(flags: &DynamicFlags) -> Result<DynamicSettings, Refusal> {
    let target = match (&flags.target_size, flags.target_kl) {
        (Some(text), _) => Target::Bytes(amount::size("--target-size", text)?),
        (_, Some(kl)) => Target::Divergence(kl),
        _ => Target::BitsPerWeight(flags.target_bpw.unwrap_or(4.0)),
    };
    for (name, bits) in [("--min-bits", flags.min_bits), ("--max-bits", flags.max_bits)] {
        if ![2, 3, 4, 5, 6, 8].contains(&bits) {
            return Err(Refusal(format!("{name} {bits}: hint: 2, 3, 4, 5, 6 or 8")));
        }
    }
    if flags.min_bits > flags.max_bits {
        let (min, max) = (flags.min_bits, flags.max_bits);
        return Err(Refusal(format!("--min-bits {min} is above --max-bits {max}; hint: exchange them")));
    }
    Ok(DynamicSettings { min_bits: flags.min_bits, max_bits: flags.max_bits, ..DynamicSettings::new(target) })
}

impl<'a> Allocator<'a> {
    /// Measures, or reads what was measured.
    pub(crate) fn new(
        model: &'a Model,
        (settings, dynamic): (Settings, DynamicSettings),
        windows: &Windows,
        measure: &SensitivitySettings,
        file: Option<&Path>,
        screen: &Screen,
    ) -> Result<Self> {
        let measured = sensitivities(model, windows, measure, file, screen);
        screen.clear();
        Ok(Self { model, settings, sensitivities: measured?, dynamic })
    }

    /// The allocation, with what is promised said.
    pub(crate) fn plan(&self, printer: Printer) -> Result<DynamicPlan> {
        let plan = DynamicPlan::new(self.model, &self.settings, &self.sensitivities, &self.dynamic)?;
        printer.say(&format!(
            "dynamic: {:.3} bits per weight, predicted KL {:.4} (at best {:.4} at this size); reachable: {:.3} to {:.3} bits per weight, KL {:.4} to {:.5}",
            plan.plan.bits_per_weight(),
            plan.predicted_kl,
            plan.bound_kl,
            plan.range.0,
            plan.range.1,
            plan.range_kl.0,
            plan.range_kl.1
        ));
        Ok(plan)
    }

    /// Weights of columns for a search without a walk.
    pub(crate) fn columns(&self) -> std::collections::BTreeMap<String, Vec<f32>> {
        self.sensitivities.columns()
    }

    /// Whether the result has to be measured before its size is settled.
    pub(crate) fn target_kl(&self) -> Option<f64> {
        match self.dynamic.target {
            Target::Divergence(target) => Some(target),
            _ => None,
        }
    }

    /// Makes models beside `target` until the smallest whose measured divergence lies below what was asked is found, and gives
    /// that one the name. `make` carries a plan out and gives what it made and the divergence.
    pub(crate) fn settle<M>(
        mut self,
        wanted: f64,
        target: &Path,
        printer: Printer,
        mut make: impl FnMut(&DynamicPlan, &Path) -> Result<(M, f64)>,
    ) -> Result<(DynamicPlan, M)> {
        let mut best: Option<(DynamicPlan, M, PathBuf)> = None;
        let mut tried: Option<u64> = None;
        for attempt in 0..TRIES {
            // What cannot be predicted to suffice any more ends the search.
            let Ok(plan) = self.plan(printer) else { break };
            let size = plan.plan.layout.tensor_bytes();
            if tried.replace(size) == Some(size) {
                break;
            }
            let path = beside(target, attempt);
            remove(&path)?;
            let (made, kl) = match make(&plan, &path) {
                Ok(made) => made,
                Err(error) => {
                    if let Some((.., old)) = &best {
                        remove(old)?;
                    }
                    return Err(error);
                }
            };
            printer.say(&format!(
                "measured KL {kl:.4} at {:.3} bits per weight, asked for {wanted}",
                plan.plan.bits_per_weight()
            ));
            // A little more than was measured, so that the next one does not miss by a hair.
            let factor = self.dynamic.factor * kl / plan.predicted_kl;
            self.dynamic.factor = if kl > wanted { factor * 1.02 } else { factor };
            let smaller = best.as_ref().is_none_or(|(other, ..)| size < other.plan.layout.tensor_bytes());
            if kl <= wanted && smaller {
                if let Some((.., old)) = best.replace((plan, made, path)) {
                    remove(&old)?;
                }
            } else {
                remove(&path)?;
            }
            if best.is_some() && kl >= wanted * CLOSE {
                break;
            }
        }
        let Some((plan, made, path)) = best else {
            anyhow::bail!(
                "no model with a measured KL below {wanted} was found in {TRIES} tries; hint: ask for a larger one, or use gptq in the recipe"
            );
        };
        std::fs::rename(&path, target)?;
        Ok((plan, made))
    }
}

/// Refuses a file of sensitivities that lies where the output will be.
pub(crate) fn check_place(file: &Path, target: &Path) -> Result<(), Refusal> {
    let whole = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if whole(file).starts_with(whole(target)) {
        let file = file.display();
        return Err(Refusal(format!(
            "--sensitivities {file} lies in the output directory; hint: give a place outside of it"
        )));
    }
    Ok(())
}

/// A hidden directory for an attempt.
fn beside(target: &Path, attempt: usize) -> PathBuf {
    let name = target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    target.with_file_name(format!(".{name}.try-{attempt}"))
}

fn remove(path: &Path) -> Result<()> {
    if path.exists() {
        std::fs::remove_dir_all(path)?;
    }
    Ok(())
}
