//! The `mlx-quant` command: arguments, then settings, then a command; one printer for everything that is shown.

mod amount;
mod args;
mod commands;
#[cfg(feature = "hub")]
mod hub;
mod interrupt;
mod job;
mod machine;
mod memory;
mod printer;
mod refusal;
mod screen;
mod typed;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Cli, Command};
use crate::commands::source::{self, Asked};
use crate::printer::Printer;
use crate::refusal::{INTERRUPTED, exit_code, interrupted};

/// Activations of megabytes come and go for every window and block: the system's allocator would give them back each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Called under the name of an mlx-lm command (a symbolic link), the binary behaves as that command.
fn arguments(mut given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let program = given.next().unwrap_or_else(|| "mlx-quant".into());
    let name = std::path::Path::new(&program).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let command = match name {
        "mlx_lm.convert" => Some("convert"),
        "mlx_lm.awq" => Some("awq"),
        "mlx_lm.gptq" => Some("gptq"),
        "mlx_lm.dwq" => Some("dwq"),
        "mlx_lm.dynamic_quant" => Some("dynamic-quant"),
        _ => None,
    };
    // Help then says `mlx-quant awq`, whatever the link is called.
    let program = if command.is_some() { "mlx-quant".into() } else { program };
    [program].into_iter().chain(command.map(Into::into)).chain(given).collect()
}

fn main() -> ExitCode {
    #[cfg(feature = "hub")]
    if std::env::var_os("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_none() {
        // SAFETY: nothing else runs yet. hf-hub is given the token and must not look for one itself; for our own look this is not set.
        unsafe { std::env::set_var("HF_HUB_DISABLE_IMPLICIT_TOKEN", "given") };
    }
    if std::env::var_os("HF_XET_TELEMETRY_ENABLED").is_none() {
        // SAFETY: as above. The hub's library for large files would send figures about itself.
        unsafe { std::env::set_var("HF_XET_TELEMETRY_ENABLED", "0") };
    }
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // What a parser of damaged files panics about becomes an error.
        if !mlx_quant::model::is_contained() {
            usual(panic);
        }
    }));
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    let printer = cli.command.output().map_or_else(
        || Printer::new(false, false, false),
        |output| Printer::new(output.quiet, output.verbose, output.json),
    );
    match run(&cli.command, printer) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = exit_code(&error);
            printer.error(&if code == INTERRUPTED { interrupted() } else { error });
            ExitCode::from(code)
        }
    }
}

/// Says which model a command is about, and runs it.
fn run(command: &Command, printer: Printer) -> anyhow::Result<()> {
    if let Some((model, revision)) = command.source()? {
        source::tell(Asked::new(model, revision), printer);
    }
    match command {
        Command::Compare(args) => commands::compare::run(args, printer),
        Command::Convert(args) => commands::convert::run(args, printer),
        Command::Awq(args) => commands::quantize::run(&args.as_ref().into(), printer),
        Command::Gptq(args) => commands::quantize::run(&args.as_ref().into(), printer),
        Command::DynamicQuant(args) => commands::quantize::run(&args.as_ref().into(), printer),
        Command::Dwq(args) => commands::quantize::run(&args.as_ref().into(), printer),
        Command::Quantize(args) => commands::quantize::run(&args.as_ref().into(), printer),
        Command::Recommend(args) => commands::recommend::run(args, printer),
        Command::Devices(args) => commands::devices::run(args, printer),
        Command::Inspect(args) => commands::inspect::run(args, printer),
        Command::Eval(args) => commands::eval::run(args, printer),
        Command::Upload(args) => commands::upload::run(args, printer),
        Command::Completions { shell } => commands::shell::completions(*shell, printer),
        Command::Man { directory } => commands::shell::man(directory, printer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_to_the_names_of_mlx_lm() {
        let arguments = |name: &str| arguments([name.into(), "-q".into()].into_iter());
        assert_eq!(arguments("/usr/bin/mlx_lm.convert"), ["mlx-quant", "convert", "-q"]);
        assert_eq!(arguments("mlx-quant"), ["mlx-quant", "-q"]);
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
