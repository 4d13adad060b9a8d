//! What one of the quantizing commands is to do.

use mlx_quant::dynamic::{DynamicSettings, Target};

use super::request::Request;

/// What is to be done with a recipe that looks at text.
#[derive(Debug, PartialEq)]
pub(super) enum Mode {
    /// Compute the teacher's targets, and nothing else.
    Targets,
    /// Show the plan. A dry run measures nothing, so under dynamic all layers are still alike.
    Foresee,
    /// Show the plan that an earlier measurement leads to.
    ForeseeAllocated(DynamicSettings),
    /// Carry out the plan.
    Make,
    /// Give every layer its bits, and carry that out.
    Allocate(DynamicSettings),
    /// Find the smallest model whose measured divergence is at most so many nats a token.
    Settle(DynamicSettings, f64),
}

impl Mode {
    /// By the flags; `measured` says whether sensitivities lie in a file.
    pub(super) fn of(request: &Request<'_>, dynamic: Option<DynamicSettings>, measured: bool) -> Self {
        match (request.common.target.dry_run, dynamic) {
            (false, _) if request.targets_only() => Self::Targets,
            (true, Some(dynamic)) if measured => Self::ForeseeAllocated(dynamic),
            (true, _) => Self::Foresee,
            (false, None) => Self::Make,
            (false, Some(dynamic)) => match dynamic.target {
                Target::Divergence(wanted) => Self::Settle(dynamic, wanted),
                Target::BitsPerWeight(_) | Target::Bytes(_) => Self::Allocate(dynamic),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test panics to fail")]

    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn mode(line: &str, measured: bool) -> Mode {
        let cli = Cli::try_parse_from(["mlx-quant"].into_iter().chain(line.split(' '))).unwrap();
        let of = |request: Request<'_>| Mode::of(&request, request.allocation().unwrap(), measured);
        match &cli.command {
            Command::Gptq(args) => of(args.as_ref().into()),
            Command::DynamicQuant(args) => of(args.as_ref().into()),
            Command::Dwq(args) => of(args.as_ref().into()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_decide() {
        let dynamic = |target| DynamicSettings::new(target);
        let four = || dynamic(Target::BitsPerWeight(4.0));
        assert_eq!(mode("gptq", false), Mode::Make);
        assert_eq!(mode("gptq --dry-run", false), Mode::Foresee);
        assert_eq!(mode("dynamic-quant", false), Mode::Allocate(four()));
        assert_eq!(mode("dynamic-quant", true), Mode::Allocate(four()));
        assert_eq!(
            mode("dynamic-quant --target-size 1kB", false),
            Mode::Allocate(dynamic(Target::Bytes(1000)))
        );
        assert_eq!(mode("dynamic-quant --dry-run", false), Mode::Foresee);
        assert_eq!(mode("dynamic-quant --dry-run", true), Mode::ForeseeAllocated(four()));
        let settle = dynamic(Target::Divergence(0.1));
        assert_eq!(mode("dynamic-quant --target-kl 0.1", true), Mode::Settle(settle.clone(), 0.1));
        assert_eq!(mode("dynamic-quant --target-kl 0.1 --dry-run", false), Mode::Foresee);
        assert_eq!(mode("dwq --target-dir x --targets-only", false), Mode::Targets);
        assert_eq!(mode("dwq --target-dir x --targets-only --dry-run", false), Mode::Foresee);
        assert_eq!(mode("dwq --target-dir x", false), Mode::Make);
    }
}
