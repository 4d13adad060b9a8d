//! Checkpoints whose numbers a seed gives: a family's names, shapes and references are kept, its weights are made when a test asks.
//!
//! `scripts/seeds.py` makes the same numbers, and the references with the libraries that define the models.

use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// splitmix64's output function (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
fn mixed(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// FNV-1a.
fn seed_of(name: &str) -> u64 {
    name.bytes()
        .fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

/// `count` numbers within `center - spread..center + spread`.
fn values(name: &str, count: usize, center: f64, spread: f64) -> impl Iterator<Item = f32> {
    let seed = seed_of(name);
    (1..=count as u64).map(move |at| {
        let bits = mixed(at.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(seed)) >> 40;
        (center + spread * (2.0 * (bits as f64 / f64::from(1 << 24)) - 1.0)) as f32
    })
}

fn write_model(tensors: &Map<String, Value>, to: &Path) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, said) in tensors {
        let (dtype, shape): (&str, Vec<usize>) =
            (said[0].as_str().unwrap(), serde_json::from_value(said[1].clone()).unwrap());
        let (center, spread) = (said[2].as_f64().unwrap(), said[3].as_f64().unwrap());
        let begin = data.len();
        for value in values(name, shape.iter().product(), center, spread) {
            match dtype {
                "BF16" => data.extend(bf16::from_f32(value).to_le_bytes()),
                "F32" => data.extend(value.to_le_bytes()),
                other => panic!("{name}: {other}"),
            }
        }
        let range = [begin, data.len()];
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": range}));
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(to, file).unwrap();
}

/// All of them as a directory of checkpoints, which is there as long as what is given back.
pub(crate) fn seeded() -> TempDir {
    let all = tempfile::tempdir().unwrap();
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/seeds");
    for entry in std::fs::read_dir(seeds).unwrap().map(|entry| entry.unwrap()) {
        let to = all.path().join(entry.file_name());
        std::fs::create_dir(&to).unwrap();
        for name in ["config.json", "convert_q4.json", "oracle.safetensors"] {
            std::fs::copy(entry.path().join(name), to.join(name)).unwrap();
        }
        let tensors = std::fs::read(entry.path().join("tensors.json")).unwrap();
        write_model(&serde_json::from_slice(&tensors).unwrap(), &to.join("model.safetensors"));
    }
    all
}
