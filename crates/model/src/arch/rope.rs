//! Rotary embeddings from config.json: `rope_scaling` of old configs, `rope_parameters` of new ones.
//!
//! The formulas are those of `transformers`' `modeling_rope_utils.py`, version 5.23.

use mlx_format::checkpoint::ConfigError;
use serde_json::{Map, Value};

use super::keys::{undescribed, wrong};
use super::sketch::Sketch;
use crate::decoder::{Frequencies, Rope};
use crate::ops::Pairing;

/// `rope_scaling`, `rope_parameters`, or what they hold for one kind of layer.
#[derive(Clone, Copy, Debug)]
struct Scaling<'a>(Option<&'a Map<String, Value>>);

impl<'a> Scaling<'a> {
    fn float(self, key: &str) -> Option<f64> {
        self.0?.get(key)?.as_f64()
    }

    fn float_or(self, key: &str, default: f64) -> f64 {
        self.float(key).unwrap_or(default)
    }

    fn required(self, key: &str) -> Result<f64, ConfigError> {
        self.float(key)
            .filter(|value| *value > 0.0)
            .ok_or_else(|| wrong(&format!("rope_scaling.{key}"), "is missing or not positive"))
    }

    fn kind(self) -> &'a str {
        let key = |key| self.0.and_then(|map| map.get(key)).and_then(Value::as_str);
        key("rope_type").or_else(|| key("type")).unwrap_or("default")
    }
}

impl Sketch<'_> {
    /// The rotary embedding of the first `partial_rotary_factor` of `head_dim` features; `default` where the config
    /// does not say which part.
    pub(super) fn rope_of(&self, head_dim: usize, default: f64) -> Result<Rope, ConfigError> {
        self.rope_for(None, head_dim, default, self.rope_theta(self.defaults.rope_theta))
    }

    /// Of so many features, whatever part of a head the config says.
    pub(super) fn rope_of_features(&self, features: usize) -> Result<Rope, ConfigError> {
        let scaling = Scaling(self.rope_map());
        self.scaled_rope(scaling, self.rope_theta(self.defaults.rope_theta), features, features)
    }

    /// All features of a head, unless the config says otherwise.
    pub(super) fn rope(&self) -> Result<Rope, ConfigError> {
        self.rope_of(self.head_dim()?, 1.0)
    }

    /// `rope_scaling`, which people add to a config, before `rope_parameters`, as transformers has it.
    fn rope_map(&self) -> Option<&Map<String, Value>> {
        let object = |key| self.config.get(key).and_then(Value::as_object).filter(|map| !map.is_empty());
        object("rope_scaling").or_else(|| object("rope_parameters"))
    }

    /// `rope_theta`, wherever it stands.
    pub(super) fn rope_theta(&self, default: f64) -> f64 {
        let nested = self.rope_map().and_then(|map| map.get("rope_theta")).and_then(Value::as_f64);
        nested.or_else(|| self.float("rope_theta")).unwrap_or(default)
    }

    /// For one kind of layer (`sliding_attention`, `full_attention`) of configs that set them apart.
    pub(super) fn rope_for(
        &self,
        layer_type: Option<&str>,
        head_dim: usize,
        partial: f64,
        theta: f64,
    ) -> Result<Rope, ConfigError> {
        let whole = self.rope_map();
        let nested = layer_type.and_then(|layer_type| whole?.get(layer_type)).and_then(Value::as_object);
        let by_layer = |map: &Map<String, Value>| map.contains_key("full_attention");
        if nested.is_none() && whole.is_some_and(by_layer) {
            return Err(wrong(
                "rope_parameters",
                "sets kinds of layers apart, which this model type does not have",
            ));
        }
        let scaling = Scaling(nested.or(whole));
        let theta = scaling.float_or("rope_theta", theta);
        let partial =
            scaling.float_or("partial_rotary_factor", self.float_or("partial_rotary_factor", partial));
        if theta.is_nan() || theta <= 0.0 || !(0.0..=1.0).contains(&partial) {
            return Err(wrong("rope_theta", "or partial_rotary_factor is out of range"));
        }
        let dims = (head_dim as f64 * partial) as usize;
        self.scaled_rope(scaling, theta, head_dim, dims)
    }

    /// Without scaling, whatever the config says of other layers.
    pub(super) fn plain_rope(&self, theta: f64) -> Result<Rope, ConfigError> {
        Ok(Rope::plain(theta, self.head_dim()?))
    }

    fn scaled_rope(
        &self,
        scaling: Scaling<'_>,
        theta: f64,
        head_dim: usize,
        dims: usize,
    ) -> Result<Rope, ConfigError> {
        let plain = Rope::plain(theta, dims);
        let map = |change: &dyn Fn(usize, f64) -> f64| {
            let changed = plain.frequencies(0).iter().enumerate();
            Frequencies::Fixed(changed.map(|(i, f)| change(i, f64::from(*f)) as f32).collect())
        };
        Ok(match scaling.kind() {
            "default" | "mrope" => plain,
            "linear" => {
                let factor = scaling.required("factor")?;
                Rope { frequencies: map(&|_, f| f / factor), ..plain }
            }
            "llama3" => {
                let factor = scaling.required("factor")?;
                let (low, high) =
                    (scaling.float_or("low_freq_factor", 1.0), scaling.float_or("high_freq_factor", 4.0));
                let original = scaling.float_or("original_max_position_embeddings", 8192.0);
                let change = |_, f: f64| {
                    let wavelength = std::f64::consts::TAU / f;
                    let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - smooth) * f / factor + smooth * f
                };
                Rope { frequencies: map(&change), ..plain }
            }
            "yarn" => {
                let factor = scaling.required("factor")?;
                let (change, magnitude) = self.yarn(scaling, theta, dims, factor)?;
                Rope { frequencies: map(&change), magnitude: magnitude as f32, ..plain }
            }
            "longrope" | "su" => self.longrope(scaling, theta, dims)?,
            // Without alpha it changes nothing up to max_position_embeddings.
            "dynamic" => match scaling.float("alpha") {
                Some(alpha) if dims > 2 => {
                    Rope::plain(theta * alpha.powf(dims as f64 / (dims as f64 - 2.0)), dims)
                }
                _ => plain,
            },
            // Gemma 4: the frequencies of the whole head, of which the first part turns.
            "proportional" => {
                let factor = scaling.float_or("factor", 1.0);
                let turning = dims / 2;
                let whole = Rope::plain(theta, head_dim);
                let frequencies = whole.frequencies(0).iter().enumerate();
                let frequencies = frequencies.map(|(i, f)| if i < turning { f / factor as f32 } else { 0.0 });
                Rope { frequencies: Frequencies::Fixed(frequencies.collect()), ..whole }
            }
            other => return Err(undescribed("rope_scaling", &format!("is of type {other:?}"))),
        })
    }

    /// What yarn (arXiv 2309.00071) makes of frequency `i`, and its factor on cosine and sine.
    fn yarn(
        &self,
        scaling: Scaling<'_>,
        theta: f64,
        dims: usize,
        factor: f64,
    ) -> Result<(impl Fn(usize, f64) -> f64 + use<>, f64), ConfigError> {
        let original = match scaling.float("original_max_position_embeddings") {
            Some(original) => original,
            None => self.config.count("max_position_embeddings")? as f64,
        };
        let correction = |rotations: f64| {
            dims as f64 * (original / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
        };
        let truncate = scaling.0.and_then(|map| map.get("truncate")).and_then(Value::as_bool).unwrap_or(true);
        let mut low = correction(scaling.float_or("beta_fast", 32.0));
        let mut high = correction(scaling.float_or("beta_slow", 1.0));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dims as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let change = move |i: usize, f: f64| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            f / factor * ramp + f * (1.0 - ramp)
        };
        let magnitude = match (scaling.float("mscale"), scaling.float("mscale_all_dim")) {
            (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => {
                yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all)
            }
            _ => yarn_magnitude(factor, 1.0),
        };
        Ok((change, scaling.float("attention_factor").unwrap_or(magnitude)))
    }

    /// Phi-3: a factor for every frequency, another set beyond the original length.
    fn longrope(&self, scaling: Scaling<'_>, theta: f64, dims: usize) -> Result<Rope, ConfigError> {
        let maximum = self.config.count("max_position_embeddings")? as f64;
        let original = scaling
            .float("original_max_position_embeddings")
            .or_else(|| self.config.get("original_max_position_embeddings").and_then(Value::as_f64))
            .unwrap_or(maximum);
        let plain = Rope::plain(theta, dims);
        let divided = |key: &str| {
            let factors = scaling.0.and_then(|map| map.get(key)).and_then(Value::as_array);
            let factors: Option<Vec<f64>> = factors.and_then(|list| list.iter().map(Value::as_f64).collect());
            factors
                .filter(|factors| factors.len() == dims / 2)
                .map(|factors| {
                    let pairs = plain.frequencies(0).iter().zip(factors);
                    pairs.map(|(f, factor)| (f64::from(*f) / factor) as f32).collect()
                })
                .ok_or_else(|| {
                    wrong(&format!("rope_scaling.{key}"), &format!("does not hold {} factors", dims / 2))
                })
        };
        if !(maximum > 0.0 && original > 0.0) {
            return Err(wrong("original_max_position_embeddings", "is not positive"));
        }
        let factor = maximum / original;
        let named = scaling.float("long_mscale");
        if named != scaling.float("short_mscale") {
            return Err(undescribed("rope_scaling.long_mscale", "differs from short_mscale"));
        }
        let magnitude = if let Some(magnitude) = named {
            magnitude
        } else if factor <= 1.0 {
            1.0
        } else {
            (1.0 + factor.ln() / original.ln()).sqrt()
        };
        Ok(Rope {
            frequencies: Frequencies::ByLength {
                short: divided("short_factor")?,
                long: divided("long_factor")?,
                original: original as usize,
            },
            pairing: Pairing::Halves,
            magnitude: scaling.float("attention_factor").unwrap_or(magnitude) as f32,
        })
    }

    /// DeepSeek's factor on the scores where yarn stretches positions.
    pub(super) fn yarn_score_factor(&self) -> f64 {
        let scaling = Scaling(self.rope_map());
        match (scaling.float("mscale_all_dim"), scaling.float("factor")) {
            (Some(all), Some(factor)) if all != 0.0 => yarn_magnitude(factor, all).powi(2),
            _ => 1.0,
        }
    }
}

fn yarn_magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
