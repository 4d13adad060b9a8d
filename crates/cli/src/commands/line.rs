//! Command lines of this program, as they are shown.

use std::fmt;
use std::path::Path;

use mlx_format::Scheme;
use mlx_quant::Recipe;
use mlx_quant::methods::Method;
use mlx_quant::recipes::Precision;

use crate::args::DeviceFlags;
pub(crate) use crate::typed::quoted;

/// A command under construction.
pub(crate) struct CommandLine(Vec<String>);

impl CommandLine {
    /// Quantizes with a recipe, every layer at one scheme or so many bits per weight together.
    pub(crate) fn new(recipe: &Recipe, model: Option<&Path>, scheme: Scheme, target: Option<f64>) -> Self {
        let (bits, group) = (scheme.bits(), scheme.group_size());
        let command = match recipe.to_string().as_str() {
            "rtn" => "convert -q".to_owned(),
            "search" => "convert -q --search".to_owned(),
            "dynamic" => "dynamic-quant".to_owned(),
            alone @ ("awq" | "gptq" | "dwq") => alone.to_owned(),
            stacked => format!("quantize --recipe {stacked}"),
        };
        let mut line = Self(vec![command]);
        line.flag("--model", model.map(quoted));
        line.flag("--target-bpw", target.map(|target| format!("{target:.3}")));
        line.flag("--bits", other(bits, 4));
        line.flag("--group-size", other(group, 64));
        if recipe.rounding() == Method::Gptq && target.is_none() {
            line.flag("--fallback-bits", Some(bits.to_string()));
            line.flag("--fallback-group-size", other(group, 64));
        }
        line
    }

    /// What computes, where it is not usual.
    pub(crate) fn device(&mut self, flags: &DeviceFlags) {
        self.flag("--device", other(flags.device.to_string(), "cpu".to_owned()));
        self.flag("--precision", other(flags.precision, Precision::default()));
    }

    pub(crate) fn flag(&mut self, flag: &str, value: Option<String>) {
        if let Some(value) = value {
            self.0.push(format!("{flag} {value}"));
        }
    }
}

/// A command line as it is shown: at most `width` characters a line, continued as shells continue lines, so that it can be pasted.
pub(crate) fn wrapped(line: &str, indent: usize, width: usize) -> String {
    let (mut out, mut column) = (" ".repeat(indent), indent);
    // A flag stays with its value.
    for (at, part) in line.split(" --").enumerate() {
        let part = if at == 0 { part.to_owned() } else { format!("--{part}") };
        let length = part.chars().count();
        if at > 0 && column + 1 + length + " \\".len() > width {
            out.push_str(" \\\n");
            out.push_str(&" ".repeat(indent + 2));
            column = indent + 2;
        } else if at > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(&part);
        column += length;
    }
    out
}

impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mlx-quant {}", self.0.join(" "))
    }
}

/// A value that is not the usual one.
pub(crate) fn other<T: PartialEq + ToString>(value: T, usual: T) -> Option<String> {
    (value != usual).then(|| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_continued() {
        let line = "mlx-quant quantize --recipe dynamic+awq+gptq+dwq --model Qwen/Qwen3-8B --target-bpw 4.506 --mlx-path ./out";
        let shown = wrapped(line, 2, 80);
        assert!(shown.lines().count() == 2 && shown.lines().all(|line| line.len() <= 80), "{shown}");
        let joined: Vec<&str> = shown.lines().map(|line| line.trim().trim_end_matches(" \\")).collect();
        assert_eq!(joined.join(" "), line);
        assert_eq!(wrapped("mlx-quant convert -q", 2, 80), "  mlx-quant convert -q");
    }

    #[test]
    fn lines_say_what_is_not_usual() {
        let line = |recipe: &str, bits, group, target| {
            let scheme = Scheme::affine(bits, group).map_err(|error| error.to_string())?;
            let recipe = recipe.parse::<Recipe>().map_err(|error| error.to_string())?;
            Ok::<_, String>(
                CommandLine::new(&recipe, Some(Path::new("my model")), scheme, target).to_string(),
            )
        };
        let cases = [
            (line("rtn", 4, 64, None), "mlx-quant convert -q --model 'my model'"),
            (
                line("gptq", 3, 32, None),
                "mlx-quant gptq --model 'my model' --bits 3 --group-size 32 --fallback-bits 3 --fallback-group-size 32",
            ),
            (
                line("dynamic+awq+gptq+dwq", 4, 64, Some(4.506)),
                "mlx-quant quantize --recipe dynamic+awq+gptq+dwq --model 'my model' --target-bpw 4.506",
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(line.as_deref(), Ok(expected));
        }
    }
}
