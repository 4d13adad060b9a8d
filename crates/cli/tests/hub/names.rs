//! Shards of any name: the index decides on the hub, too.

use mlx_quant_hub_fixture::Kind;

use crate::place::{ID, Place, assert_same, fixture, sharded};

/// A model of three shards, renamed by `name`; the index names them so.
fn place(name: impl Fn(usize) -> String) -> Place {
    let place = Place::new();
    let plain = place.at("plain-source");
    std::fs::create_dir(&plain).unwrap();
    let mut files = Vec::new();
    for (file, mut bytes) in sharded(&fixture("qwen3_moe"), 3) {
        std::fs::write(plain.join(&file), &bytes).unwrap();
        let own = |index: usize| format!("model-{:05}-of-00003.safetensors", index + 1);
        let renamed = (0..3).find(|index| file == own(*index)).map_or(file.clone(), &name);
        if file.ends_with("index.json") {
            let mut text = String::from_utf8(bytes).unwrap();
            (0..3).for_each(|index| text = text.replace(&own(index), &name(index)));
            bytes = text.into_bytes();
        }
        files.push((renamed, bytes));
    }
    place.hub.add(Kind::Model, ID, files);
    place.succeed("convert -q --model plain-source --mlx-path plain");
    place
}

#[test]
fn every_command_follows_the_index() {
    let names: [fn(usize) -> String; 3] = [
        |index| format!("layers-{index}.safetensors"),
        |index| ["outside.safetensors", "mtp.safetensors", "model.safetensors"][index].to_owned(),
        |index| format!("part{index}.of.it.safetensors"),
    ];
    for name in names {
        let place = place(name);
        for line in [
            "convert -q --dry-run",
            "recommend --memory 8GB --time 1h",
            "gptq --dry-run --n-samples 2 --sequence-length 32",
        ] {
            place.succeed(&format!("{line} --model {ID}"));
        }
        place.succeed(&format!("inspect {ID}"));
        assert!(place.weights().iter().all(|request| request.range.is_some()), "headers alone are fetched");
        place.succeed(&format!("convert -q --stream --model {ID} --mlx-path streamed"));
        assert_same(&place.at("plain"), &place.at("streamed"));
        place.succeed(&format!("convert -q --model {ID} --mlx-path fetched"));
        assert_same(&place.at("plain"), &place.at("fetched"));
    }
}

#[test]
fn a_second_copy_is_not_fetched() {
    let place = Place::new();
    let mut files = sharded(&fixture("llama_tied"), 2);
    let whole = files.iter().find(|(name, _)| name.ends_with(".safetensors")).unwrap().1.clone();
    for name in ["consolidated.safetensors", "adapter_model.safetensors", "optimizer.safetensors"] {
        files.push((name.to_owned(), whole.clone()));
    }
    place.hub.add(Kind::Model, ID, files);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
    let others = place.downloads().into_iter().filter(|request| {
        ["consolidated", "adapter", "optimizer"].iter().any(|name| request.path.contains(name))
    });
    assert_eq!(others.count(), 0);
}
