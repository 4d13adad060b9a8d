//! `--recipe-file`.

use std::sync::LazyLock;

use mlx_format::checkpoint::Config;
use mlx_format::{Mode, Scheme};
use mlx_quant::plan::Overrides;
use mlx_quant::{Plan, Settings};

use crate::checkpoint::MATRICES;
use crate::work::assert_helps;

static LLAMA: LazyLock<Config> =
    LazyLock::new(|| Config::parse(br#"{"model_type": "llama"}"#).expect("a valid config"));

/// A recipe file beside each mode of the command line. What it says of a layer is a scheme that MLX has, its last entry decides
/// of the path that it spells out, and planning a checkpoint with it ends in a plan or an error.
///
/// # Panics
/// If it says something else, or an error does not help.
pub fn recipe(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for mode in [Mode::Affine, Mode::Mxfp4, Mode::Mxfp8, Mode::Nvfp4] {
        let base = Scheme::new(mode, None, None).expect("every mode has a scheme of its own");
        let overrides = match Overrides::parse(text, base) {
            Ok(overrides) => overrides,
            // The name of the file is the command's to say.
            Err(error) => {
                assert_helps(&error, "");
                continue;
            }
        };
        assert_eq!(overrides.text, text);
        for path in ["model.layers.0.mlp.down_proj", "lm_head", ""] {
            if let Some(Some(scheme)) = overrides.get(path) {
                check_scheme(scheme);
            }
        }
        check_last(&overrides, text);
        let paths = ["model.layers.0.mlp.down_proj", "lm_head"];
        if let Err(error) = overrides.check_used(paths.into_iter()) {
            assert_helps(&error, "");
        }
        let settings = Settings { quantize: Some(base), overrides: Some(overrides), ..Settings::default() };
        if let Ok(plan) = Plan::new(&MATRICES, &LLAMA, settings) {
            let _ = plan.report();
        }
    }
}

fn check_scheme(scheme: Scheme) {
    let again = Scheme::new(scheme.mode(), Some(scheme.bits()), Some(scheme.group_size()));
    assert_eq!(again.expect("a scheme that MLX has"), scheme);
}

/// The last entry against its own words, where its path is no pattern.
fn check_last(overrides: &Overrides, text: &str) {
    let file: toml::Table = text.parse().expect("parsed before");
    let Some(last) = file.get("layer").and_then(toml::Value::as_array).and_then(|layers| layers.last())
    else {
        return;
    };
    let path = last.get("path").and_then(toml::Value::as_str).expect("every entry has a path");
    if !path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
        return;
    }
    let said = overrides.get(path).expect("its own path matches");
    if last.get("keep").and_then(toml::Value::as_bool) == Some(true) {
        assert_eq!(said, None);
        return;
    }
    let scheme = said.expect("not kept");
    check_scheme(scheme);
    let number = |key: &str| last.get(key).and_then(toml::Value::as_integer);
    assert!(number("bits").is_none_or(|bits| bits == i64::from(scheme.bits())));
    assert!(number("group_size").is_none_or(|size| usize::try_from(size) == Ok(scheme.group_size())));
    let mode = last.get("mode").and_then(toml::Value::as_str);
    assert!(mode.is_none_or(|mode| Mode::from_name(mode) == Some(scheme.mode())));
}
