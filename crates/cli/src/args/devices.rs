//! Arguments of `devices`.

use clap::Args;

use super::Output;

const DEVICES_EXAMPLES: &str = "\
Examples:
  mlx-quant devices
      the processor and every graphics adapter, with the word for --device and the rate of a float32 product
  mlx-quant devices --measure --json

The first call measures each for about two seconds and keeps that for forecasts.";

/// Arguments of `devices`.
#[derive(Debug, Args)]
#[command(after_help = DEVICES_EXAMPLES)]
pub(crate) struct Devices {
    /// Measure again instead of using what was measured before
    #[arg(long)]
    pub(crate) measure: bool,

    /// Threads of the processor [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,

    #[command(flatten)]
    pub(crate) output: Output,
}
