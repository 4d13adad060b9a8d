//! Model types against the zoo.

use std::collections::BTreeSet;

use mlx_quant::model::arch;

use crate::{checkpoints, common, model};

/// Types with a decoder that no checkpoint of the zoo or of seeds tests, under their own name or an alias's. One that gets
/// a checkpoint leaves this list; a new type without one has to enter it. Those without a decoder are `tests/rules.rs`'s.
const UNTESTED: [&str; 5] = ["cohere", "gemma", "glm4_moe_lite", "mellum", "solar_open"];

#[test]
#[cfg_attr(not(shared), ignore = "needs ../shared/zoo")]
fn every_type_has_a_checkpoint_or_an_alias_that_has() {
    let seeded = common::seeds::seeded();
    let tested: BTreeSet<String> = checkpoints(&common::shared().join("zoo"))
        .iter()
        .chain(&checkpoints(seeded.path()))
        .map(|directory| model::open(directory).config.model_type().unwrap().to_owned())
        .collect();
    let mut untested = Vec::new();
    println!("{:<20} tested by", "model type");
    let mut described: Vec<(&str, &[&str], bool)> = arch::described()
        .flat_map(|(types, runs)| types.iter().map(move |model_type| (*model_type, types, runs)))
        .collect();
    described.sort_unstable();
    for &(model_type, types, runs) in &described {
        let by = types.iter().find(|alias| tested.contains(**alias));
        let note = if runs { "" } else { " (no decoder description)" };
        println!("{model_type:<20} {}{note}", by.unwrap_or(&"nothing"));
        if by.is_none() && runs {
            untested.push(model_type);
        }
    }
    println!("{} types, untested: {untested:?}", described.len());
    assert_eq!(untested, UNTESTED);
    let known: BTreeSet<&str> = described.iter().map(|(model_type, ..)| *model_type).collect();
    let strange: Vec<&String> =
        tested.iter().filter(|model_type| !known.contains(model_type.as_str())).collect();
    assert!(strange.is_empty(), "in the zoo, but not described: {strange:?}");
}
