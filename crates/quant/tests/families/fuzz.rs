//! config.json with one key changed: whatever it says, nothing panics.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use mlx_format::checkpoint::Config;
use mlx_quant::Model;
use mlx_quant::model::Weights;
use serde_json::{Map, Value, json};

use crate::{Verdict, model};

/// Longest that a config may take; one that allocates gigabytes takes longer.
const LIMIT: Duration = Duration::from_secs(2);

/// Every value inside a JSON value, by its path.
fn places(value: &Value, path: &mut Vec<String>, found: &mut Vec<(Vec<String>, Value)>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(list) => {
            list.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect()
        }
        _ => Vec::new(),
    };
    for (key, value) in children {
        path.push(key);
        found.push((path.clone(), value.clone()));
        places(value, path, found);
        path.pop();
    }
}

/// What a value is replaced with; `None` removes the key.
fn replacements(value: &Value) -> Vec<Option<Value>> {
    let mut all = vec![None, Some(Value::Null)];
    let numbers = [
        json!(0),
        json!(1),
        json!(2),
        json!((1u64 << 31) - 1),
        json!(1u64 << 31),
        json!(u64::MAX),
        json!(-1),
    ];
    match value {
        Value::Number(_) => {
            all.extend(
                numbers.into_iter().chain([json!(0.5), json!(-0.5), json!(1e300), json!(1e-300)]).map(Some),
            );
        }
        Value::Bool(flag) => all.push(Some(json!(!flag))),
        Value::String(_) => all.extend([json!(""), json!("unknown"), json!(0)].map(Some)),
        Value::Array(_) => all.extend([json!([]), json!({}), json!(0)].map(Some)),
        Value::Object(_) => all.extend([json!([]), json!({}), json!("default")].map(Some)),
        Value::Null => all.extend(numbers.map(Some)),
    }
    all
}

fn replace(map: &mut Map<String, Value>, path: &[String], with: Option<Value>) {
    let (last, outer) = path.split_last().unwrap();
    if outer.is_empty() {
        match with {
            Some(value) => map.insert(last.clone(), value),
            None => map.shift_remove(last),
        };
        return;
    }
    let mut inner = map.get_mut(&outer[0]).unwrap();
    for key in &outer[1..] {
        inner = match inner {
            Value::Array(list) => &mut list[key.parse::<usize>().unwrap()],
            other => other.get_mut(key).unwrap(),
        };
    }
    match (inner, with) {
        (Value::Object(map), with) => replace(map, std::slice::from_ref(last), with),
        (Value::Array(list), Some(value)) => list[last.parse::<usize>().unwrap()] = value,
        (Value::Array(list), None) => drop(list.remove(last.parse().unwrap())),
        _ => {}
    }
}

/// How far a model gets.
enum End {
    Refused,
    Failed,
    Ran,
}

fn try_config(model: &Model, config: &Config) -> End {
    let weights = Weights::open(&model.checkpoint, config);
    let Ok(weights) = weights else { return End::Refused };
    let Ok(decoder) = weights.decoder(config, false) else { return End::Refused };
    for block in &decoder.blocks {
        let _ = block.sites();
    }
    match model::run(&weights, &decoder, &[&[1, 2, 3, 4, 5, 6, 7, 0]], &mut ()) {
        Ok(_) => End::Ran,
        Err(_) => End::Failed,
    }
}

/// Changes each value of config.json in turn, in every way that [`replacements`] knows. Every change is refused,
/// fails with an error or runs, and none takes long.
pub(crate) fn no_config_panics(directory: &Path) -> Verdict {
    let model = model::open(directory);
    let mut found = Vec::new();
    places(&Value::Object(model.config.0.clone()), &mut Vec::new(), &mut found);
    let (mut ends, mut wrong) = ([0usize; 3], Vec::new());
    for (path, value) in found {
        for replacement in replacements(&value) {
            let mut config = model.config.clone();
            replace(&mut config.0, &path, replacement.clone());
            let start = Instant::now();
            let end = catch_unwind(AssertUnwindSafe(|| try_config(&model, &config)));
            let change =
                || format!("{} = {}", path.join("."), replacement.clone().unwrap_or("(removed)".into()));
            match end {
                Err(_) => wrong.push(format!("{}: panicked", change())),
                Ok(_) if start.elapsed() > LIMIT => {
                    wrong.push(format!("{}: took {:?}", change(), start.elapsed()));
                }
                Ok(end) => ends[end as usize] += 1,
            }
        }
    }
    let [refused, failed, ran] = ends;
    if wrong.is_empty() {
        Ok(format!("{:>5}: {refused:>5} {failed:>5} {ran:>5}", refused + failed + ran))
    } else {
        Err(wrong.join("\n  "))
    }
}
