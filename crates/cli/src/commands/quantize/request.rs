//! The quantizing commands as one: a recipe with the flags of its methods.

use std::path::Path;

use mlx_format::{Mode, Scheme};
use mlx_quant::Recipe;
use mlx_quant::dwq::DwqSettings;
use mlx_quant::dynamic::{DynamicSettings, Target};
use mlx_quant::learn::LearnSettings;
use mlx_quant::methods::{Method, MethodSettings};
use mlx_quant::recipes::{self, Shares, check_allocation, check_method, check_training, table_scheme};

use crate::amount;
use crate::args::{
    Awq, AwqFlags, Calibrated, Dwq, DwqFlags, DynamicFlags, DynamicQuant, Gptq, GptqFlags, LearnFlags,
    Quantize,
};
use crate::commands::source::Asked;
use crate::refusal::Refusal;

/// One of the commands.
pub(crate) struct Request<'a> {
    pub(super) recipe: Recipe,
    pub(super) common: &'a Calibrated,
    pub(super) dynamic: Option<&'a DynamicFlags>,
    pub(super) awq: Option<&'a AwqFlags>,
    pub(super) gptq: Option<&'a GptqFlags>,
    pub(super) learn: Option<&'a LearnFlags>,
    pub(super) dwq: Option<&'a DwqFlags>,
    /// The command `dwq`, with flags of its own.
    pub(super) alone: Option<&'a Dwq>,
}

impl<'a> Request<'a> {
    /// The model that is to be quantized.
    pub(super) fn asked(&self) -> Asked<'a> {
        Asked::new(self.common.target.model.given(), self.common.hub.revision.as_deref())
    }

    fn of(method: Method, common: &'a Calibrated) -> Self {
        let recipe = Recipe::of(method);
        Self { recipe, common, dynamic: None, awq: None, gptq: None, learn: None, dwq: None, alone: None }
    }
}

impl<'a> From<&'a Awq> for Request<'a> {
    fn from(args: &'a Awq) -> Self {
        Self { awq: Some(&args.awq), ..Self::of(Method::Awq, &args.common) }
    }
}

impl<'a> From<&'a Gptq> for Request<'a> {
    fn from(args: &'a Gptq) -> Self {
        Self { gptq: Some(&args.gptq), ..Self::of(Method::Gptq, &args.common) }
    }
}

impl<'a> From<&'a DynamicQuant> for Request<'a> {
    fn from(args: &'a DynamicQuant) -> Self {
        Self { dynamic: Some(&args.dynamic), ..Self::of(Method::Dynamic, &args.common) }
    }
}

impl<'a> From<&'a Dwq> for Request<'a> {
    fn from(args: &'a Dwq) -> Self {
        Self { dwq: Some(&args.flags), alone: Some(args), ..Self::of(Method::Dwq, &args.common) }
    }
}

impl<'a> From<&'a Quantize> for Request<'a> {
    fn from(args: &'a Quantize) -> Self {
        Self {
            recipe: args.recipe.clone(),
            common: &args.common,
            dynamic: Some(&args.dynamic),
            awq: Some(&args.awq),
            gptq: Some(&args.gptq),
            learn: Some(&args.learn),
            dwq: Some(&args.dwq),
            alone: None,
        }
    }
}

impl Request<'_> {
    /// What is wrong with the flags alone.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        self.check_methods()?;
        self.check_mode()?;
        check_method(&self.method())?;
        if let Some(dwq) = self.dwq.filter(|_| self.recipe.trains()) {
            check_training(&self.training(), dwq.valid_samples)?;
        }
        Ok(())
    }

    /// What dynamic is asked for, where the recipe has it.
    pub(super) fn allocation(&self) -> Result<Option<DynamicSettings>, Refusal> {
        let Some(flags) = self.dynamic.filter(|_| self.recipe.allocates()) else { return Ok(None) };
        let target = match (&flags.target_size, flags.target_kl) {
            (Some(text), _) => Target::Bytes(amount::size("--target-size", text)?),
            (_, Some(kl)) => Target::Divergence(kl),
            _ => Target::BitsPerWeight(flags.target_bpw.unwrap_or(4.0)),
        };
        let (min_bits, max_bits) = (flags.min_bits, flags.max_bits);
        let settings = DynamicSettings {
            min_bits,
            max_bits,
            learned: self.recipe.learns(),
            ..DynamicSettings::new(target)
        };
        check_allocation(&settings)?;
        Ok(Some(settings))
    }

    /// File of what dynamic measures.
    pub(super) fn sensitivities(&self) -> Option<&Path> {
        self.dynamic.and_then(|flags| flags.sensitivities.as_deref())
    }

    /// Whether only the teacher's targets are computed.
    pub(super) fn targets_only(&self) -> bool {
        self.alone.is_some_and(|dwq| dwq.targets_only)
    }

    /// Refuses flags of methods that the recipe does not have.
    fn check_methods(&self) -> Result<(), Refusal> {
        let mut given: Vec<(&str, Method)> = Vec::new();
        if let Some(dynamic) = self.dynamic.filter(|_| !self.recipe.allocates()) {
            let flags = [
                ("--target-bpw", dynamic.target_bpw.is_some()),
                ("--target-size", dynamic.target_size.is_some()),
                ("--target-kl", dynamic.target_kl.is_some()),
                ("--sensitivities", dynamic.sensitivities.is_some()),
            ];
            given.extend(flags.into_iter().filter(|flag| flag.1).map(|flag| (flag.0, Method::Dynamic)));
        }
        if let Some(learn) = self.learn.filter(|_| !self.recipe.learns()) {
            let flags = [
                ("--learn-steps", learn.learn_steps.is_some()),
                ("--learn-batch", learn.learn_batch.is_some()),
            ];
            given.extend(flags.into_iter().filter(|flag| flag.1).map(|flag| (flag.0, Method::Learn)));
        }
        if let Some(dwq) = self.dwq.filter(|_| !self.recipe.trains()) {
            let flags = [
                ("--target-dir", dwq.target_dir.is_some()),
                ("--learning-rate", dwq.learning_rate.is_some()),
            ];
            given.extend(flags.into_iter().filter(|flag| flag.1).map(|flag| (flag.0, Method::Dwq)));
        }
        if let Some((flag, method)) = given.first() {
            let (recipe, method) = (&self.recipe, method.name());
            return Err(Refusal(format!(
                "{flag} belongs to {method}, which is not in the recipe {recipe}; hint: add it to the recipe or leave the flag out"
            )));
        }
        if self.recipe.learns() && self.common.statistics.is_some() {
            return Err(Refusal(
                "--statistics spares windows the way through the blocks, and learn lets them pass; hint: leave one of them out".to_owned(),
            ));
        }
        let Some(alone) = self.alone.filter(|alone| alone.quantized_model.is_some()) else { return Ok(()) };
        let flags = [
            ("--targets-only", alone.targets_only),
            ("--dtype", self.common.target.dtype.is_some()),
            ("--recipe-file", self.common.target.recipe_file.is_some()),
            ("--statistics", self.common.statistics.is_some()),
        ];
        match flags.into_iter().find(|flag| flag.1) {
            Some((flag, _)) => Err(Refusal(format!(
                "{flag} has no meaning with --quantized-model, whose codes and schemes stay as they are; hint: leave one of them out"
            ))),
            None => Ok(()),
        }
    }

    pub(super) fn method(&self) -> MethodSettings {
        let mut settings = MethodSettings::default();
        if let Some(awq) = self.awq {
            settings.n_grid = awq.n_grid as usize;
        }
        if let Some(gptq) = self.gptq {
            settings.block_size = gptq.block_size as usize;
            settings.damping = gptq.damping;
            settings.correction = gptq.correction;
            settings.sweeps = gptq.sweeps;
            settings.act_order = gptq.act_order;
        }
        settings
    }

    pub(super) fn learning(&self) -> LearnSettings {
        let mut settings = LearnSettings { seed: self.common.machine.seed, ..LearnSettings::default() };
        if let Some(learn) = self.learn {
            settings.steps = learn.learn_steps.map_or(settings.steps, |steps| steps as usize);
            settings.batch = learn.learn_batch.map_or(settings.batch, |windows| windows as usize);
        }
        settings
    }

    pub(super) fn training(&self) -> DwqSettings {
        let mut settings = DwqSettings { seed: self.common.machine.seed, ..DwqSettings::default() };
        if let Some(windows) = self.common.batch_size {
            settings.batch_size = windows as usize;
        }
        if let Some(dwq) = self.dwq {
            settings.iterations = dwq.iters;
            settings.learning_rate = dwq.learning_rate;
            settings.temperature = dwq.temperature;
            settings.target_dir.clone_from(&dwq.target_dir);
        }
        settings
    }

    /// Windows of the calibration text.
    pub(super) fn shares(&self) -> Shares {
        let asked = self.common.n_samples;
        let shares = Shares::new(asked);
        match self.dwq.filter(|_| self.recipe.trains()) {
            Some(dwq) => {
                shares.with_training(asked, dwq.iters, self.training().batch_size, dwq.valid_samples)
            }
            None => shares,
        }
    }

    /// Whether embeddings and head get the scheme that the recipe usually gives them.
    pub(super) fn tables_are_usual(&self) -> bool {
        let awq = self.awq.is_none_or(|awq| awq.embed_bits.is_none() && awq.embed_group_size.is_none());
        awq && self.gptq.is_none_or(|gptq| gptq.fallback_bits.is_none() && gptq.fallback_group_size.is_none())
    }

    /// The scheme of layers of which nothing else is said.
    pub(super) fn scheme(&self) -> Result<Scheme, Refusal> {
        self.common.scheme.scheme()
    }

    /// Refuses methods that have nothing to choose in an fp mode.
    fn check_mode(&self) -> Result<(), Refusal> {
        let mode: Mode = self.common.scheme.mode.into();
        let affine = [Method::Dynamic, Method::Learn, Method::Dwq];
        match affine.into_iter().find(|method| self.recipe.methods().contains(method)) {
            Some(method) if mode != Mode::Affine => Err(Refusal(format!(
                "{} works on affine scales and biases, which {} does not have; hint: leave --q-mode out, or take a recipe of awq and one of rtn, search, refine, gptq",
                method.name(),
                mode.name()
            ))),
            _ => Ok(()),
        }
    }

    /// The scheme of embeddings and head.
    pub(super) fn tables(&self, base: Scheme) -> Result<Scheme, Refusal> {
        let gptq = self.gptq.filter(|_| self.recipe.rounding() == Method::Gptq);
        let bits = self.awq.and_then(|awq| awq.embed_bits).or(gptq.and_then(|gptq| gptq.fallback_bits));
        let group_size = self.awq.and_then(|awq| awq.embed_group_size);
        let group_size = group_size.or(gptq.and_then(|gptq| gptq.fallback_group_size));
        let scheme = table_scheme(&self.recipe, base, bits, group_size);
        scheme.map_err(|error| Refusal(error.to_string()))
    }
}

/// A scheme that every MLX loads.
pub(crate) fn affine(bits: u32, group_size: usize) -> Result<Scheme, Refusal> {
    recipes::affine(bits, group_size).map_err(|error| Refusal(error.to_string()))
}
