//! The quantizing commands as one: a recipe with the flags of its methods.

use mlx_format::Scheme;
use mlx_quant::{DwqSettings, Method, MethodSettings, Recipe};

use crate::Refusal;
use crate::args::{
    Awq, AwqFlags, Calibrated, Dwq, DwqFlags, DynamicFlags, DynamicQuant, Gptq, GptqFlags, Quantize,
};
use crate::commands::source::Asked;

/// Calibration windows where nothing else is said.
const WINDOWS: usize = 128;
/// Windows a step of dwq.
const BATCH: u32 = 4;

/// One of the commands.
pub(crate) struct Request<'a> {
    pub(super) recipe: Recipe,
    pub(super) common: &'a Calibrated,
    pub(super) dynamic: Option<&'a DynamicFlags>,
    pub(super) awq: Option<&'a AwqFlags>,
    pub(super) gptq: Option<&'a GptqFlags>,
    pub(super) dwq: Option<&'a DwqFlags>,
    /// The command `dwq`, with flags of its own.
    pub(super) alone: Option<&'a Dwq>,
}

impl<'a> Request<'a> {
    /// The model that is to be quantized.
    pub(super) fn asked(&self) -> Asked<'a> {
        Asked::new(self.common.target.model.as_deref(), self.common.hub.revision.as_deref())
    }

    fn of(method: Method, common: &'a Calibrated) -> Self {
        let recipe = Recipe::of(method);
        Self { recipe, common, dynamic: None, awq: None, gptq: None, dwq: None, alone: None }
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
            dwq: Some(&args.dwq),
            alone: None,
        }
    }
}

impl Request<'_> {
    /// What is wrong with the flags alone.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        self.check_methods()?;
        if let Some(gptq) = self.gptq
            && !(gptq.damping > 0.0 && gptq.damping <= 1.0)
        {
            let damping = gptq.damping;
            return Err(Refusal(format!(
                "--damping {damping}: hint: give a number above 0 and at most 1, such as 0.01"
            )));
        }
        let Some(dwq) = self.dwq.filter(|_| self.recipe.trains()) else { return Ok(()) };
        for (name, value) in
            [("--temperature", Some(dwq.temperature)), ("--learning-rate", dwq.learning_rate)]
        {
            if value.is_some_and(|value| !(value.is_finite() && value > 0.0)) {
                let value = value.unwrap_or_default();
                return Err(Refusal(format!("{name} {value}: hint: give a number above 0")));
            }
        }
        if dwq.valid_samples == 0 {
            let hint = "steps are judged on them, give at least 1";
            return Err(Refusal(format!("--valid-samples 0: hint: {hint}")));
        }
        Ok(())
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
            settings.sweeps = gptq.sweeps;
            settings.act_order = gptq.act_order;
        }
        settings
    }

    pub(super) fn training(&self) -> DwqSettings {
        let mut settings = DwqSettings {
            batch_size: self.common.batch_size.unwrap_or(BATCH) as usize,
            seed: self.common.machine.seed,
            ..DwqSettings::default()
        };
        if let Some(dwq) = self.dwq {
            settings.iterations = dwq.iters;
            settings.learning_rate = dwq.learning_rate;
            settings.temperature = dwq.temperature;
            settings.target_dir.clone_from(&dwq.target_dir);
        }
        settings
    }

    /// Windows: calibration, training, held out. 0: all.
    pub(super) fn windows(&self) -> (usize, usize, usize) {
        let asked = self.common.n_samples;
        let calibration = asked.unwrap_or(WINDOWS);
        let Some(dwq) = self.dwq.filter(|_| self.recipe.trains()) else { return (calibration, 0, 0) };
        let steps = dwq.iters.saturating_mul(self.common.batch_size.unwrap_or(BATCH) as usize);
        (calibration, asked.unwrap_or(steps.max(1)), dwq.valid_samples)
    }

    /// The scheme of embeddings and head, where it is not that of the rest.
    pub(super) fn embedding(&self, base: Scheme) -> Result<Scheme, Refusal> {
        let gptq = self.gptq.filter(|_| self.recipe.rounding() == Method::Gptq);
        let (awq_bits, awq_group) =
            self.awq.map_or((None, None), |awq| (awq.embed_bits, awq.embed_group_size));
        // Dynamic decides of them too, if nothing is said.
        let usual = if self.recipe.allocates() { (None, None) } else { (Some(6), Some(64)) };
        let (gptq_bits, gptq_group) = gptq.map_or((None, None), |gptq| {
            (gptq.fallback_bits.or(usual.0), gptq.fallback_group_size.or(usual.1))
        });
        let bits = awq_bits.or(gptq_bits).unwrap_or(base.bits());
        let group_size = awq_group.or(gptq_group).unwrap_or(base.group_size());
        affine(bits, group_size)
    }
}

pub(crate) fn affine(bits: u32, group_size: usize) -> Result<Scheme, Refusal> {
    // MLX has one bit since 0.32.4; older versions do not load it.
    let refused = |error: mlx_format::SchemeError| Refusal(error.to_string());
    if bits == 1 {
        return Err(refused(mlx_format::SchemeError::Bits(1)));
    }
    Scheme::affine(bits, group_size).map_err(refused)
}
