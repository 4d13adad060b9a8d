//! GPT-2: its `Conv1D` weights are stored `[in, out]`, its names have no `model.` prefix, its head is tied.

use mlx_format::checkpoint::ConfigError;

use super::{Architecture, Linears, Source, Step, drop, make};

pub(super) fn gpt2(source: Source<'_>) -> Result<Architecture, ConfigError> {
    Ok(Architecture {
        family: "gpt2",
        described: true,
        layers: source.config.count("n_layer")?,
        prefixes: vec![("model.", "model."), ("transformer.", "model."), ("", "model.")],
        rules: vec![
            drop(r"\.attn\.(bias|masked_bias)$"),
            drop(r"^model\.lm_head\.weight$"),
            make(
                r"^(?<x>model\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight)$",
                // A checkpoint that already carries the prefix was written by MLX and is transposed.
                [("$x", if source.any_name_is_prefixed() { vec![] } else { vec![Step::Transpose] })],
            ),
        ],
        linears: Linears::Named(vec!["wte", "wpe", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        protected: Vec::new(),
        keep_dtype: Vec::new(),
    })
}

impl Source<'_> {
    fn any_name_is_prefixed(&self) -> bool {
        self.tensors.keys().any(|name| name.starts_with("model."))
    }
}
