//! OpenAI gpt-oss: experts packed as mxfp4 by the hub, gate and up interleaved row by row.

use mlx_format::checkpoint::ConfigError;

use super::{ATTENTION, Architecture, Source, Step, make};

pub(super) fn gpt_oss(source: Source<'_>) -> Result<Architecture, ConfigError> {
    let linears = [
        ATTENTION.as_slice(),
        &[
            "embed_tokens",
            "mlp.router",
            "experts.gate_proj",
            "experts.up_proj",
            "experts.down_proj",
            "lm_head",
        ],
    ]
    .concat();
    let architecture = Architecture::plain(source, "gpt_oss", &linears)?.protect(&["router"]);
    if source.any_name_ends_with("gate_proj.weight") {
        return Ok(architecture);
    }
    // Even rows are the gate, odd rows the up projection.
    let every_other = |from_last, odd| Step::EveryOther { from_last, odd };
    Ok(architecture.rules([
        make(
            r"^(?<x>.*\.experts)\.gate_up_proj_blocks$",
            [
                ("$x.gate_proj.weight", vec![Step::Words, every_other(1, false)]),
                ("$x.up_proj.weight", vec![Step::Words, every_other(1, true)]),
            ],
        ),
        make(
            r"^(?<x>.*\.experts)\.gate_up_proj_scales$",
            [
                ("$x.gate_proj.scales", vec![every_other(1, false)]),
                ("$x.up_proj.scales", vec![every_other(1, true)]),
            ],
        ),
        make(
            r"^(?<x>.*\.experts)\.gate_up_proj_bias$",
            [
                ("$x.gate_proj.bias", vec![every_other(0, false)]),
                ("$x.up_proj.bias", vec![every_other(0, true)]),
            ],
        ),
        make(r"^(?<x>.*\.experts\.down_proj)_blocks$", [("$x.weight", vec![Step::Words])]),
        make(r"^(?<x>.*\.experts\.down_proj)_scales$", [("$x.scales", vec![])]),
        make(r"^(?<x>.*\.experts\.down_proj)_bias$", [("$x.bias", vec![])]),
    ]))
}
