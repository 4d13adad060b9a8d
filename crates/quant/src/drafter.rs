//! Writing a drafter: the heads of a model that predict tokens beyond the next one, which mlx-vlm loads beside it.
//!
//! It lies beside the model, under its name with `-mtp` behind it, as mlx-vlm's own `--mtp` writes it. It is written before
//! the model and as a model is: complete or not at all. What a run that was stopped later has written already stays, known
//! by a line of its card, so that the same command goes on; any other directory of that name is refused.

use std::path::{Path, PathBuf};

use mlx_format::checkpoint::{Destination, Run, WriteError, Writer};

use crate::card::drafter_card;
use crate::carry::Carrier;
use crate::convert::{fingerprint, open_writer, write_companions};
use crate::observer::{Event, Observer};
use crate::plan::DrafterPlan;
use crate::{Error, Model, threads};

/// What stands before the identity of a run in a drafter's card.
const IDENTITY: &str = "<!-- drafter: ";

/// Where the drafter of a model at `target` lies.
pub fn path(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push("-mtp");
    target.with_file_name(name)
}

/// Refuses what is in the way of a drafter, before anything is known of the model: `target` is the drafter's. One that an
/// earlier run has written passes here, and is looked at by [`write()`].
///
/// # Errors
/// As [`Writer::check_target`].
pub fn check(target: Destination<'_>) -> Result<(), Error> {
    if card(target.path).contains(IDENTITY) {
        return Ok(());
    }
    Ok(Writer::check_target(target)?)
}

/// Writes a drafter, unless the same one is there already. `true`: this call has made it where nothing was, and whoever
/// does not come further than this may [`discard`] it.
///
/// # Errors
/// As [`crate::convert()`].
pub fn write(
    model: &Model,
    drafter: &DrafterPlan,
    target: Destination<'_>,
    threads: usize,
    observer: &dyn Observer,
) -> Result<bool, Error> {
    let DrafterPlan { plan, files } = drafter;
    let identity = fingerprint(model, plan)?;
    let line = format!("{IDENTITY}{identity} -->");
    if card(target.path).contains(&line) && is_whole(target.path, drafter) {
        return Ok(false);
    }
    let fresh = target.path.symlink_metadata().is_err();
    let mut companions = model.companions()?;
    companions.retain(|name| files.contains(&name.as_str()));
    for file in &companions {
        model.checkpoint.directory().check_readable(file)?;
    }
    let pool = threads::pool(threads)?;
    let observer = Unseen(observer);
    let mut writer = open_writer(target, plan, Run::from(&*identity), &observer)?;
    let carrier = Carrier { model, plan, pool: &pool, observer: &observer, search: None, careful: None };
    if let Err(error) = carrier.carry(&mut writer, 0..plan.items.len()) {
        if error.is_refusal() {
            writer.discard_if_fresh()?;
        }
        return Err(error);
    }
    write_companions(&writer, model, plan, companions)?;
    writer.write_file("README.md", drafter_card(plan, model, &line).as_bytes())?;
    writer.finish()?;
    Ok(fresh)
}

/// Removes a drafter that this process has written, whose model was refused afterwards.
///
/// # Errors
/// If the disk does not let it.
pub fn discard(path: &Path) -> Result<(), Error> {
    // Under a name that nobody takes for a model.
    let gone = Writer::partial_path(path)?;
    fs_err::rename(path, &gone).and_then(|()| fs_err::remove_dir_all(&gone)).map_err(WriteError::from)?;
    Ok(())
}

/// The card of a directory, or nothing.
fn card(path: &Path) -> String {
    let text = std::fs::read(path.join("README.md")).unwrap_or_default();
    String::from_utf8_lossy(&text).into_owned()
}

/// Whether every file of the plan is there in its length.
fn is_whole(path: &Path, drafter: &DrafterPlan) -> bool {
    let length = |name: &str| path.join(name).metadata().map(|found| found.len()).ok();
    drafter.plan.layout.shards().all(|(name, bytes)| length(name) == Some(bytes))
        && length("config.json").is_some()
}

/// Passes on that a run is to stop, and what everybody should know: a drafter is no step of its own.
struct Unseen<'o>(&'o dyn Observer);

impl Observer for Unseen<'_> {
    fn event(&self, event: Event<'_>) {
        if matches!(event, Event::Warning { .. } | Event::Note { .. }) {
            self.0.event(event);
        }
    }

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}
