//! `convert --stream`: a model on the hub, one shard at a time.

use std::path::Path;

use anyhow::Result;
use mlx_format::checkpoint::{Directory, source_path};
use mlx_quant::Settings;
use mlx_quant::kept::Claim;
use mlx_quant::stream::Remote;

use crate::args::Convert;
use crate::commands::source::Asked;
use crate::commands::{carry, upload};
use crate::hub::{Address, Hub};
use crate::printer::Printer;
use crate::refusal::{REFUSED, Refusal, exit_code};
use crate::screen::Screen;

/// Runs the command; `false` if there is nothing to stream, because the model is here.
pub(super) fn run(
    args: &Convert,
    asked: Asked<'_>,
    settings: &Settings,
    upload: Option<&upload::Target>,
    printer: Printer,
) -> Result<bool> {
    let Some(address) = asked.address()? else {
        printer.warn("--stream has no effect on a local model");
        return Ok(false);
    };
    if settings.search {
        let why = "--search weighs by norms, which --stream has not at hand";
        return Err(Refusal(format!("{why}; hint: leave out one of them")).into());
    }
    if args.target.dry_run {
        let place = tempfile::tempdir()?;
        return stream(args, &address, settings, place.path(), printer);
    }
    let target = &args.target.mlx_path;
    // Beside the output and on its disk.
    let place = source_path(target);
    let fresh = !place.exists();
    let claim = Claim::within(&place)?;
    let claim = claim.ok_or_else(|| mlx_quant::Error::busy(target))?;
    if !claim.is_certain() {
        printer.warn(&format!(
            "{} is on a disk that knows no locks; do not start a second run into the same output",
            place.display()
        ));
    }
    let done = stream(args, &address, settings, &place, printer);
    // Kept after failures, because the same command goes on with it, and what an earlier run left is not this one's.
    let refused = |error: &anyhow::Error| exit_code(error) == REFUSED;
    if done.as_ref().map_or_else(|error| fresh && refused(error), |streamed| fresh || *streamed) {
        claim.remove(&place)?;
    } else {
        drop(claim);
    }
    let streamed = done?;
    if let Some(upload) = upload.filter(|_| streamed) {
        upload.push(target, None, printer)?;
    }
    Ok(streamed)
}

fn stream(
    args: &Convert,
    address: &Address,
    settings: &Settings,
    place: &Path,
    printer: Printer,
) -> Result<bool> {
    let screen = Screen::new(printer);
    let hollow = Hub::open(printer).and_then(|hub| Ok(hub.hollow(address, place, &screen)?));
    screen.clear();
    let Some(hollow) = hollow? else {
        printer.detail("the model is in the cache; nothing is to be streamed");
        return Ok(false);
    };
    let directory = Directory::open(&hollow.directory).map_err(mlx_quant::Error::from)?;
    let model = mlx_quant::open(&directory)?;
    let plan = carry::plan(&model, settings.clone(), printer)?;
    drop(model);
    let threads = carry::threads(args);
    if args.target.dry_run {
        carry::dry_run(&plan, threads, printer)?;
        return Ok(true);
    }
    let mut fetch = |shard: &str| hollow.fetch(shard, &screen).map_err(mlx_quant::Error::from);
    let remote = Remote { directory: &hollow.directory, identity: &hollow.identity, fetch: &mut fetch };
    let done =
        mlx_quant::stream::convert_streamed(remote, &plan, args.target.destination(), threads, &screen);
    screen.clear();
    let asked = Asked::new(args.target.model.given(), args.hub.revision.as_deref());
    carry::show(&done?, &plan, (&args.target.mlx_path, asked), printer)?;
    Ok(true)
}
