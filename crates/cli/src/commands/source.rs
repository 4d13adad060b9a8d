//! Where a command's model and data come from: this machine, the hub, or the binary.

use std::any::Any;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use anyhow::Result;
use mlx_format::Scheme;
use mlx_format::checkpoint::Directory;
use mlx_quant::plan::Overrides;
use mlx_quant::recipes::Device;
use mlx_quant::spelling::nearest;
use mlx_quant::{DataSource, Model};

use crate::args::DeviceFlags;
#[cfg(feature = "hub")]
use crate::hub::{Address, Hub, check_revision};
use crate::printer::Printer;
use crate::refusal::Refusal;
#[cfg(feature = "hub")]
use crate::screen::Screen;

/// The environment variable with which a command on a card says at its end what the card's time went into.
const PROFILE: &str = "MLX_QUANT_PROFILE";

/// What a command computes with.
pub(crate) fn device(flags: &DeviceFlags) -> Result<Device, Refusal> {
    Ok(noting(flags.device.device_with(flags.precision)?))
}

/// All that a command computes with, for those that know how to use several.
pub(crate) fn devices(flags: &DeviceFlags) -> Result<Vec<Device>, Refusal> {
    Ok(flags.device.devices_with(flags.precision)?.into_iter().map(noting).collect())
}

/// A device that notes what its time goes into, where somebody wants to know.
fn noting(device: Device) -> Device {
    if std::env::var_os(PROFILE).is_some() {
        device.note_times();
    }
    device
}

/// Says for curious people what a card left to the processor, when a command ends.
pub(crate) struct Left<'d>(pub(crate) &'d Device, pub(crate) Printer);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        for (operation, why) in self.0.left() {
            self.1.detail(&format!("on the processor: {operation} ({why})"));
        }
        for spent in self.0.profile().into_iter().flatten() {
            self.1.say(&format!("profile: {:10.3} s {:8} times  {}", spent.seconds, spent.times, spent.what));
        }
    }
}

/// What of a model a command looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Names and shapes: of a model on the hub only headers are fetched.
    Headers,
    /// Everything.
    Weights,
}

impl Need {
    /// What a command needs that may only have to show its plan.
    pub(crate) fn of(only_plan: bool) -> Self {
        if only_plan { Self::Headers } else { Self::Weights }
    }
}

/// A model that was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    /// Directory or hub id; nothing for the built-in demo model.
    pub(crate) model: Option<&'a Path>,
    /// Hub revision.
    pub(crate) revision: Option<&'a str>,
}

impl<'a> Asked<'a> {
    pub(crate) fn new(model: Option<&'a Path>, revision: Option<&'a str>) -> Self {
        Self { model, revision }
    }

    /// As one word, for command lines.
    pub(crate) fn word(&self) -> Option<PathBuf> {
        let model = self.model?;
        // A page's URL is longer than the id.
        #[cfg(feature = "hub")]
        if let Ok(Some(address)) = self.address() {
            let id = address.id();
            return Some(
                address.revision.map_or_else(|| id.clone(), |revision| format!("{id}@{revision}")).into(),
            );
        }
        Some(match self.revision {
            Some(revision) if !model.exists() => PathBuf::from(format!("{}@{revision}", model.display())),
            _ => model.to_owned(),
        })
    }

    /// Its address on the hub, if it is not a directory here.
    #[cfg(feature = "hub")]
    pub(crate) fn address(&self) -> Result<Option<Address>, Refusal> {
        let Some(model) = self.model.filter(|model| !model.exists()) else { return Ok(None) };
        let Some(mut address) = address(model, false)? else { return Ok(None) };
        if let Some(revision) = self.revision {
            check_revision(revision)
                .map_err(|why| Refusal(format!("--revision: {why}; hint: as in --revision main")))?;
            if address.revision.as_deref().is_some_and(|own| own != revision) {
                let why = format!("{} and --revision {revision} name two revisions", model.display());
                return Err(Refusal(format!("{why}; hint: leave out one")));
            }
            address.revision = Some(revision.to_owned());
        }
        Ok(Some(address))
    }
}

/// Says which model a command is about: the demo model is easily worked on by mistake.
pub(crate) fn tell(asked: Asked<'_>, printer: Printer) {
    match asked.word() {
        Some(word) => printer.say(&format!("model    {}", word.display())),
        None if cfg!(feature = "demo") => {
            printer.say("model    the built-in demo model (--model takes your own)");
        }
        None => {}
    }
}

/// Refuses what is not here and no id, before anything is fetched for a command.
pub(crate) fn check(models: &[Asked<'_>], data: &[Option<&Path>]) -> Result<(), Refusal> {
    let models = models.iter().filter_map(|asked| asked.model).map(|path| (path, false));
    let data = data.iter().copied().flatten().map(|path| (path, true));
    for (path, data) in models.chain(data).filter(|(path, _)| !path.exists()) {
        #[cfg(feature = "hub")]
        if address(path, data)?.is_some() {
            continue;
        }
        // Without the hub two parts may be an id, of which more is said later.
        if cfg!(feature = "hub") || path.components().count() != 2 {
            return Err(absent(path, data));
        }
    }
    Ok(())
}

/// Reads an address, with a word on what is wrong with it.
#[cfg(feature = "hub")]
pub(crate) fn address(text: &Path, data: bool) -> Result<Option<Address>, Refusal> {
    Address::parse(text, data).transpose().map_err(|why| {
        let text = text.display();
        let id = if data { "allenai/c4" } else { "Qwen/Qwen3-8B" };
        Refusal(format!("{text} is not here, and not a hub id: {why}; hint: hub ids are ORG/NAME, as {id}"))
    })
}

/// Refuses a directory that is not here.
#[cfg(feature = "hub")]
pub(crate) fn check_here(path: &Path) -> Result<(), Refusal> {
    if path.exists() { Ok(()) } else { Err(absent(path, false)) }
}

/// A path that is not here, and cannot be an id: with what it may stand for, and what an id looks like.
fn absent(path: &Path, data: bool) -> Refusal {
    let (what, id) = if data { ("file or directory", "allenai/c4") } else { ("directory", "Qwen/Qwen3-8B") };
    let meant = near(path).map_or_else(String::new, |near| format!("did you mean {}? ", near.display()));
    let hub = if cfg!(feature = "hub") {
        format!("; an id on the hub is ORG/NAME, as {id}")
    } else {
        String::new()
    };
    Refusal(format!(
        "{}: there is no such {what}; hint: {meant}give the path of a {what}{hub}",
        path.display()
    ))
}

/// A path that is here, with the name most like the first one of `path` that is not.
fn near(path: &Path) -> Option<PathBuf> {
    let mut here = PathBuf::new();
    let mut parts = path.components();
    for part in parts.by_ref() {
        let next = here.join(part);
        if next.symlink_metadata().is_ok() {
            here = next;
            continue;
        }
        let place = if here.as_os_str().is_empty() { Path::new(".") } else { &here };
        let entries = std::fs::read_dir(place).ok()?.flatten();
        let names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        let visible = names.iter().map(String::as_str).filter(|name| !name.starts_with('.'));
        let found = here.join(nearest(part.as_os_str().to_str()?, visible)?);
        let whole = found.join(parts.as_path());
        return Some(if parts.as_path().as_os_str().is_empty() || !whole.exists() { found } else { whole });
    }
    None
}

/// What went wrong with an id, with the name of something here that it may stand for.
#[cfg(feature = "hub")]
fn or_here(error: anyhow::Error, text: &Path) -> anyhow::Error {
    let refused = error.is::<Refusal>();
    let Some(near) = near(text).filter(|_| !error.is::<mlx_quant::Error>()) else { return error };
    let told = format!("{error:#}");
    let joint = if told.contains("; hint: ") { ", or" } else { "; hint:" };
    let told = format!("{told}{joint} did you mean {}, which is here?", near.display());
    if refused { Refusal(told).into() } else { anyhow::Error::msg(told) }
}

/// A directory, and what keeps it there while it is used.
pub(crate) struct Located {
    pub(crate) directory: Directory,
    guard: Option<Box<dyn Any>>,
}

/// An opened model, and what keeps its files there while it is used.
pub(crate) struct Opened {
    model: Model,
    _guard: Option<Box<dyn Any>>,
}

impl Deref for Opened {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

impl Opened {
    /// Computed on a device.
    #[must_use]
    pub(crate) fn on(mut self, device: &Device) -> Self {
        self.model.device = device.clone();
        self
    }

    /// Computed on several devices.
    #[must_use]
    pub(crate) fn on_all(mut self, devices: &[Device]) -> Self {
        if let [first, helpers @ ..] = devices {
            self.model.device = first.clone();
            self.model.helpers = helpers.to_vec();
        }
        self
    }

    /// With tensors that no part of the model reads let pass, or not.
    #[must_use]
    pub(crate) fn allow_unread(mut self, allow: bool) -> Self {
        self.model.allow_unread = allow;
        self
    }
}

impl Located {
    /// Opens the model in it by `open`.
    pub(crate) fn open(
        self,
        open: impl FnOnce(&Directory) -> Result<Model, mlx_quant::Error>,
    ) -> Result<Opened> {
        Ok(Opened { model: open(&self.directory)?, _guard: self.guard })
    }
}

/// The directory of a model, downloaded if it is on the hub, or the built-in demo model.
pub(crate) fn directory(asked: Asked<'_>, need: Need, printer: Printer) -> Result<Located> {
    let here = |directory| Ok(Located { directory, guard: None });
    let Some(path) = asked.model else {
        if asked.revision.is_some() {
            printer.warn("--revision has no effect on the built-in model");
        }
        #[cfg(feature = "demo")]
        return here(mlx_quant::demo());
        #[cfg(not(feature = "demo"))]
        return Err(
            Refusal("this build has no demo model; hint: give the directory of a model".to_owned()).into()
        );
    };
    #[cfg(feature = "hub")]
    if let Some(address) = asked.address()? {
        return downloaded(&address, need, printer).map_err(|error| or_here(error, path));
    }
    #[cfg(not(feature = "hub"))]
    let _ = need;
    if asked.revision.is_some() && path.exists() {
        printer.warn("--revision has no effect on a local model");
    }
    #[cfg(not(feature = "hub"))]
    if !path.exists() && path.components().count() == 2 {
        let what = format!("{} is not a directory", path.display());
        return Err(Refusal::no_hub(&what, "download it first (`hf download`) and give the directory").into());
    }
    if !path.exists() {
        return Err(absent(path, false).into());
    }
    here(Directory::open(path).map_err(mlx_quant::Error::from)?)
}

#[cfg(feature = "hub")]
fn downloaded(address: &Address, need: Need, printer: Printer) -> Result<Located> {
    let screen = Screen::new(printer);
    let located = || {
        if need == Need::Headers {
            let root = tempfile::tempdir()?;
            if let Some(hollow) = Hub::open(printer)?.hollow(address, root.path(), &screen)? {
                let directory = Directory::open(&hollow.directory).map_err(mlx_quant::Error::from)?;
                return Ok(Located { directory, guard: Some(Box::new(root)) });
            }
        }
        let path = Hub::open(printer)?.model(address, &screen)?;
        Ok(Located { directory: Directory::open(&path).map_err(mlx_quant::Error::from)?, guard: None })
    };
    let located = located();
    screen.clear();
    located
}

/// Opens a model, with a word on files that are not part of it.
pub(crate) fn open(asked: Asked<'_>, need: Need, printer: Printer) -> Result<Opened> {
    let opened = directory(asked, need, printer)?.open(mlx_quant::open)?;
    for file in opened.checkpoint.ignored() {
        printer.warn(&format!("{file} is not in the index and is not used"));
    }
    Ok(opened)
}

/// Text from a path or a dataset on the hub, or the built-in one.
pub(crate) fn data(path: Option<&Path>, builtin: DataSource, printer: Printer) -> Result<DataSource> {
    let Some(path) = path else { return Ok(builtin) };
    #[cfg(feature = "hub")]
    if !path.exists()
        && let Some(address) = address(path, true)?
    {
        let screen = Screen::new(printer);
        let files = Hub::open(printer).and_then(|hub| Ok(hub.dataset(&address, &screen)?));
        screen.clear();
        let files = files.map_err(|error| or_here(error, path))?;
        let names: Vec<_> = files.iter().filter_map(|file| file.file_name()?.to_str()).collect();
        printer.say(&format!("data     {} ({})", address.id(), names.join(", ")));
        return Ok(DataSource::Files(files));
    }
    #[cfg(not(feature = "hub"))]
    let _ = printer;
    if !path.exists() {
        return Err(absent(path, true).into());
    }
    Ok(DataSource::Path(path.to_owned()))
}

/// A recipe file, what it leaves out being taken from `base`.
pub(crate) fn overrides(path: Option<&Path>, base: Scheme) -> Result<Option<Overrides>, Refusal> {
    let Some(path) = path else { return Ok(None) };
    let text = fs_err::read_to_string(path).map_err(|error| {
        let meant = near(path).map_or_else(String::new, |near| format!("did you mean {}? ", near.display()));
        Refusal(format!("{error}; hint: {meant}--recipe-file takes a TOML file"))
    })?;
    let overrides = Overrides::parse(&text, base);
    Ok(Some(overrides.map_err(|error| Refusal(format!("{}: {error}", path.display())))?))
}
