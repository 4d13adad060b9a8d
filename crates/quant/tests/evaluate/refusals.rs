//! What is refused.

use super::numbers::{any_windows, two_tiles_and_a_rest};
use super::*;

#[test]
fn references_with_another_vocabulary() {
    let (model, reference) = (zoo("llama_tied"), demo());
    let error = refused(&model, Some(&reference), &windows(&model, 24, 3));
    assert!(matches!(error, Error::Vocabulary(_)), "{error}");
    assert!(error.to_string().contains("6144") && error.to_string().contains("512"), "{error}");
}

#[test]
fn scales_that_are_no_numbers() {
    let layer = "model.layers.1.mlp.down_proj";
    let cases = [(quantize(4, 64), &[0xC0, 0x7F][..]), (mxfp4(), &[0xFF][..])];
    for (settings, not_a_number) in cases {
        let converted = converted(&zoo("llama_tied"), settings);
        edit_weights(&converted.path, |header, data| {
            let start = header[format!("{layer}.scales")]["data_offsets"][0].as_u64().unwrap() as usize;
            data[start..start + not_a_number.len()].copy_from_slice(not_a_number);
        });
        let model = open_path(&converted.path).unwrap();
        let error = refused(&model, None, &windows(&model, 24, 3));
        let Error::Weights(WeightsError::NonFinite { tensor, element: 0, file, .. }) = &error else {
            panic!("{error}")
        };
        assert_eq!(*tensor, format!("{layer}.weight"));
        assert!(file.contains("model.safetensors"), "{file}");
    }
}

#[test]
fn packed_tensors_that_do_not_belong_together() {
    let layer = "model.layers.1.mlp.down_proj";
    let converted = four_bits(&zoo("llama_tied"));
    let windows = windows(&converted, 24, 3);
    edit_weights(&converted.path, |header, _| {
        let shape = &mut header[format!("{layer}.scales")]["shape"];
        *shape = serde_json::json!([shape[1], shape[0]]);
    });
    let error = refused(&open_path(&converted.path).unwrap(), None, &windows);
    let Error::Weights(WeightsError::Source(SourceError::Packed { path, .. })) = &error else {
        panic!("{error}")
    };
    assert_eq!(path, layer);
}

#[test]
fn weights_that_the_config_does_not_describe() {
    let converted = four_bits(&zoo("llama_tied"));
    let windows = windows(&converted, 24, 3);
    edit_config(&converted.path, |config| config["intermediate_size"] = 256.into());
    edit_config(&converted.path, |config| config["hidden_size"] = 32.into());
    let error = refused(&open_path(&converted.path).unwrap(), None, &windows);
    assert!(matches!(error, Error::Weights(WeightsError::Source(SourceError::Misfits { .. }))), "{error}");
}

#[test]
fn model_types_that_are_not_described() {
    let converted = four_bits(&zoo("llama_tied"));
    let windows = windows(&converted, 24, 3);
    edit_config(&converted.path, |config| config["model_type"] = "new_one".into());
    let error = refused(&open_path(&converted.path).unwrap(), None, &windows);
    assert!(error.to_string().contains("new_one"), "{error}");
    assert!(matches!(error, Error::Weights(WeightsError::Undescribed { .. })), "{error}");
}

#[test]
fn texts_shorter_than_a_window() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("short.txt");
    std::fs::write(&file, "A few words only.").unwrap();
    let error = read(&zoo("llama_tied"), &file, 512, 3).unwrap_err();
    assert!(matches!(error, DataError::TooShort { .. }) && error.to_string().contains("hint: "), "{error}");
}

#[test]
fn tokens_beyond_the_vocabulary() {
    let model = zoo("llama_tied");
    let tokenizer = demo().tokenizer().unwrap();
    let pick = Pick::EvenlySpaced { windows: 3 };
    let error = Windows::read(&DataSource::BuiltinHeldOut, &tokenizer, 512, 24, pick).unwrap_err();
    assert!(matches!(error, DataError::Vocabulary { vocabulary: 512, .. }), "{error}");
    // Windows that were made for another model.
    let error = refused(&model, None, &windows(&demo(), 24, 3));
    assert!(matches!(error, Error::Weights(WeightsError::Token { rows: 512, .. })), "{error}");
}

#[test]
fn activations_that_overflow() {
    let directory = tempfile::tempdir().unwrap();
    let model = two_tiles_and_a_rest(directory.path(), 0.0);
    edit_weights(directory.path(), |header, data| {
        let start = header["model.norm.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
        data[start..start + 4].copy_from_slice(&f32::MAX.to_le_bytes());
    });
    drop(model);
    let model = Model { allow_unread: true, ..open_path(directory.path()).unwrap() };
    let error = refused(&model, None, &any_windows(5003));
    assert!(matches!(error, Error::NotANumber { .. }), "{error}");
}
