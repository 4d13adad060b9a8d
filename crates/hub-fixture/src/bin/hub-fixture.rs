//! A hub of the repositories in some directories, for tests that are not written in Rust.
//!
//! `hub-fixture --models DIR --datasets DIR [--token T]` serves each `DIR/ORG/NAME` as repository `ORG/NAME`, prints
//! its address as one line of JSON, and runs until its standard input ends: whoever starts it need not end it.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

use mlx_quant_hub_fixture::{Hub, Kind};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "hub-fixture: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let hub = Hub::start();
    let mut arguments = env::args_os().skip(1);
    while let Some(option) = arguments.next() {
        let value = arguments
            .next()
            .ok_or_else(|| io::Error::other(format!("{} needs a value", option.display())))?;
        match option.to_str() {
            Some("--models") => serve(&hub, Kind::Model, Path::new(&value))?,
            Some("--datasets") => serve(&hub, Kind::Dataset, Path::new(&value))?,
            Some("--token") => hub.accept(&value.to_string_lossy()),
            _ => return Err(io::Error::other(format!("{} is not an option", option.display()))),
        }
    }
    writeln!(io::stdout(), "{}", serde_json::json!({ "endpoint": hub.endpoint() }))?;
    io::stdout().flush()?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

fn serve(hub: &Hub, kind: Kind, directory: &Path) -> io::Result<()> {
    for organization in folders(directory)? {
        for repository in folders(&organization)? {
            let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            hub.add_directory(kind, &format!("{}/{}", name(&organization), name(&repository)), &repository);
        }
    }
    Ok(())
}

fn folders(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(directory)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()?;
    paths.retain(|path| path.is_dir());
    paths.sort();
    Ok(paths)
}
