//! `mlx-quant completions` and `mlx-quant man`: what packages install beside the binary.

use std::path::Path;

use anyhow::Result;
use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::Cli;
use crate::printer::Printer;

/// Prints a completion script.
pub(crate) fn completions(shell: Shell, printer: Printer) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
    let script = String::from_utf8(script)?;
    let script = if shell == Shell::Bash { agreed(&script) } else { script };
    printer.data(script.trim_end());
    Ok(())
}

const NAME: &str = "mlx-quant";

/// The script for bash, with one spelling of each command's state. clap_complete 4.6 writes the hyphen in the program's name as `__`
/// where a state is entered, and as `__subcmd__` where it is looked for, so that nothing is completed behind a command
/// (<https://github.com/clap-rs/clap/issues/6421>). Where that is mended this changes nothing.
fn agreed(script: &str) -> String {
    script.replace(&NAME.replace('-', "__subcmd__"), &NAME.replace('-', "__"))
}

/// Writes a page for the program and one for each command.
pub(crate) fn man(directory: &Path, printer: Printer) -> Result<()> {
    fs_err::create_dir_all(directory)?;
    let program = Cli::command();
    let name = |command: &clap::Command| format!("mlx-quant-{}", command.get_name());
    let mut pages = vec![("mlx-quant".to_owned(), program.clone())];
    for command in program.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = name(command);
        pages.push((name.clone(), command.clone().name(name)));
    }
    for (name, command) in pages {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        fs_err::write(directory.join(format!("{name}.1")), page)?;
    }
    printer.say(&format!("{}: man pages are written", directory.display()));
    Ok(())
}
