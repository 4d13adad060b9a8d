//! Settings that no run could follow, found before a model is opened.

use super::schemes::affine;
use crate::dwq::DwqSettings;
use crate::dynamic::DynamicSettings;
use crate::methods::MethodSettings;
use crate::setting::{Setting, SettingError};

/// Any group size will do: only the width is looked at.
const GROUP_SIZE: usize = 64;

/// Figures of awq and gptq.
///
/// # Errors
/// [`Setting::Damping`], [`Setting::Correction`].
pub fn check_method(settings: &MethodSettings) -> Result<(), SettingError> {
    if !(0.0..=1.0).contains(&settings.correction) {
        let hint = "give a number from 0 to 1, such as 0.5";
        return Err(SettingError::out_of_range(Setting::Correction, settings.correction, hint));
    }
    if settings.damping > 0.0 && settings.damping <= 1.0 {
        return Ok(());
    }
    let hint = "give a number above 0 and at most 1, such as 0.01";
    Err(SettingError::out_of_range(Setting::Damping, settings.damping, hint))
}

/// Figures of dwq, with the number of windows on which its steps are judged.
///
/// # Errors
/// [`Setting::Temperature`], [`Setting::LearningRate`], [`Setting::ValidationWindows`].
pub fn check_training(settings: &DwqSettings, validation: usize) -> Result<(), SettingError> {
    for (setting, value) in
        [(Setting::Temperature, Some(settings.temperature)), (Setting::LearningRate, settings.learning_rate)]
    {
        if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
            return Err(SettingError::out_of_range(setting, value, "give a number above 0"));
        }
    }
    if validation == 0 {
        let hint = "steps are judged on them, give at least 1";
        return Err(SettingError::out_of_range(Setting::ValidationWindows, validation, hint));
    }
    Ok(())
}

/// Widths between which dynamic chooses. Its target is checked against the model, by
/// [`crate::dynamic::DynamicPlan::check`].
///
/// # Errors
/// [`Setting::MinBits`], [`Setting::MaxBits`].
pub fn check_allocation(settings: &DynamicSettings) -> Result<(), SettingError> {
    for (setting, bits) in [(Setting::MinBits, settings.min_bits), (Setting::MaxBits, settings.max_bits)] {
        if affine(bits, GROUP_SIZE).is_err() {
            let problem = "is no width of a code".to_owned();
            let hint = "2, 3, 4, 5, 6 or 8".into();
            return Err(SettingError { setting, value: bits.to_string(), problem, hint });
        }
    }
    if settings.min_bits > settings.max_bits {
        return Err(SettingError {
            setting: Setting::MinBits,
            value: settings.min_bits.to_string(),
            problem: format!("is above the most bits, {}", settings.max_bits),
            hint: "exchange them".into(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dynamic::Target;

    #[test]
    fn damping_lies_between_0_and_1() {
        let check = |damping| check_method(&MethodSettings { damping, ..MethodSettings::default() });
        for damping in [1e-6, 0.01, 1.0] {
            assert_eq!(check(damping), Ok(()));
        }
        for damping in [0.0, -1.0, 1.5, f32::NAN, f32::INFINITY] {
            let error = check(damping).unwrap_err();
            assert_eq!(error.setting, Setting::Damping);
            assert!(
                error.named("--damping").starts_with(&format!("--damping {damping} is out of range; hint: "))
            );
        }
    }

    #[test]
    fn corrections_are_parts() {
        let check = |correction| check_method(&MethodSettings { correction, ..MethodSettings::default() });
        for correction in [0.0, 0.5, 1.0] {
            assert_eq!(check(correction), Ok(()));
        }
        for correction in [-0.1, 1.1, f32::NAN, f32::INFINITY] {
            assert_eq!(check(correction).unwrap_err().setting, Setting::Correction);
        }
    }

    #[test]
    fn trainings_need_positive_figures_and_windows_to_judge_on() {
        let usual = DwqSettings::default();
        assert_eq!(check_training(&usual, 1), Ok(()));
        assert_eq!(check_training(&usual, 0).unwrap_err().setting, Setting::ValidationWindows);
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let hot = DwqSettings { temperature: wrong, ..usual.clone() };
            assert_eq!(check_training(&hot, 1).unwrap_err().setting, Setting::Temperature);
            let fast = DwqSettings { learning_rate: Some(wrong), ..usual.clone() };
            assert_eq!(check_training(&fast, 1).unwrap_err().setting, Setting::LearningRate);
        }
    }

    #[test]
    fn widths_are_those_of_codes_in_order() {
        let check = |min_bits, max_bits| {
            let usual = DynamicSettings::new(Target::BitsPerWeight(4.0));
            check_allocation(&DynamicSettings { min_bits, max_bits, ..usual }).map_err(|error| error.setting)
        };
        assert_eq!(check(2, 8), Ok(()));
        assert_eq!(check(5, 5), Ok(()));
        assert_eq!(check(1, 8), Err(Setting::MinBits));
        assert_eq!(check(2, 7), Err(Setting::MaxBits));
        assert_eq!(check(6, 3), Err(Setting::MinBits));
    }
}
