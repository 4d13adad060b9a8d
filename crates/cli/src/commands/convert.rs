//! `mlx-quant convert`.

use anyhow::Result;
use mlx_format::checkpoint::Writer;
use mlx_quant::Settings;
use mlx_quant::device::{DeviceChoice, Precision};
use mlx_quant::plan::PackedSource;

use super::carry::{carry_out, plan, threads};
use super::drafter;
use super::parents::Parents;
use crate::args::{Convert, DeviceFlags};
use crate::commands::source::{self, Asked, Need};
use crate::commands::upload::Target;
use crate::printer::Printer;
use crate::refusal::Refusal;

/// Runs the command.
pub(crate) fn run(args: &Convert, printer: Printer) -> Result<()> {
    // Rounding to nearest waits for the disk: a card that nobody named is left closed.
    let mut flags = args.machine.device.clone();
    if !args.search && flags.device == DeviceChoice::Auto {
        flags = DeviceFlags { device: DeviceChoice::Cpu, precision: Precision::default() };
    }
    let device = source::device(&flags)?;
    let _left = source::Left(&device, printer);
    let settings = settings(args, printer)?;
    let _parents = Parents::of(&args.target.mlx_path, args.target.dry_run)?;
    if !args.target.dry_run {
        Writer::check_target(args.target.destination()).map_err(mlx_quant::Error::from)?;
        if args.target.mtp {
            drafter::check(args.target.destination())?;
        }
    }
    if args.stream && args.target.mtp {
        let why = "--mtp reads all heads at once, and --stream has one shard at a time";
        return Err(Refusal(format!("{why}; hint: leave out one of them")).into());
    }
    let upload = Target::of(&args.hub, args.target.dry_run, printer)?;
    let asked = Asked::new(args.target.model.given(), args.hub.revision.as_deref());
    #[cfg(feature = "hub")]
    if args.stream && super::stream::run(args, asked, &settings, upload.as_ref(), printer)? {
        return Ok(());
    }
    #[cfg(not(feature = "hub"))]
    if args.stream {
        return Err(Refusal::no_hub(
            "--stream fetches from the hub",
            "leave it out, and download the model with `hf download`",
        )
        .into());
    }
    let model = source::open(asked, Need::of(args.target.dry_run), printer)?;
    let model = model.allow_unread(args.target.allow_unread).on(&device);
    let plan = plan(&model, settings, printer)?;
    let (target, threads) = (&args.target.mlx_path, threads(args));
    let destination = args.target.destination();
    let only_plan = args.target.dry_run;
    let drafter = plan.drafter.as_deref().filter(|_| !only_plan);
    let beside = drafter::write(&model, drafter, destination, threads, printer)?;
    let made = carry_out((&model, asked), &plan, destination, only_plan, threads, printer);
    drafter::conclude(beside.as_ref(), made, printer)?;
    upload.map_or(Ok(()), |upload| upload.push(target, Some(&model), printer))
}

fn settings(args: &Convert, printer: Printer) -> Result<Settings> {
    let flags = args.scheme;
    let scheme = flags.scheme()?;
    let sizes = flags.bits.is_some() || flags.group_size.is_some();
    if !args.quantize && (sizes || args.quant_predicate.is_some()) {
        printer.warn("bits, group size and recipe have no effect without -q");
    }
    // What says nothing of bits wants no others than the source's own.
    let asks = sizes
        || scheme.mode() != mlx_format::Mode::Affine
        || args.quant_predicate.is_some()
        || args.target.recipe_file.is_some()
        || args.search;
    let overrides = source::overrides(args.target.recipe_file.as_deref(), scheme)?;
    Ok(Settings {
        quantize: args.quantize.then_some(scheme),
        mixed: args.quant_predicate.filter(|_| args.quantize).map(Into::into),
        overrides,
        keep_unreached: false,
        search: args.search && args.quantize,
        global_scale: args.q_global_scale && args.quantize,
        schemes: std::collections::BTreeMap::new(),
        packed: if asks { PackedSource::Match } else { PackedSource::Keep },
        dequantize: args.dequantize,
        dtype: args.target.dtype.map(Into::into),
        keep_dtypes: false,
        allow_nonfinite: args.allow_nonfinite,
        allow_unread: args.target.allow_unread,
        text_only: args.target.text_only,
        mtp: args.target.mtp,
        keep_eos: args.target.keep_eos,
    })
}
