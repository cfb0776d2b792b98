//! `fold`: offline work on checkpoints and bundles.

// `tell!` and `show!` instead.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod calibrate;
mod dataset;
mod evaluate;
mod export;
mod quantize;
mod train;
mod training_set;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use nbn::bundle::Bundle;
use nbn::features::long_version;
use nbn::fold::architecture::Overrides;
use nbn::fold::{Checkpoint, inspect};
use nbn::memory::Counting;
use nbn::runtime::disable_telemetry;
use nbn::{show, tell};

/// Decoding is ended when it takes more memory than it may.
#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Folds networks trained with a normalised BatchNorm (NBN) into plain ONNX bundles that `nbn` serves.
#[derive(Parser)]
#[command(name = "nbn-fold", bin_name = "nbn fold", version, long_version = long_version(), arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Trains a network with NBN on labelled images, and writes a checkpoint that `export` reads
    Train(Box<train::Train>),
    /// Merges the NBN and BatchNorm layers of a checkpoint or an ONNX file, writes a bundle, and proves that its network
    /// computes the same
    Export(Box<export::Export>),
    /// Fits a bundle's scores to held-out images, so that they are probabilities, and writes calibration.json
    Calibrate(calibrate::Calibrate),
    /// Makes a bundle of 8-bit whole numbers of a bundle, about twice as fast on a processor, and proves what that changes
    Quantize(Box<quantize::Quantize>),
    /// Measures a bundle on a test set: accuracy, likelihood, calibration and prediction sets, with confidence
    /// intervals and a report
    Evaluate(evaluate::Evaluate),
    /// Shows a checkpoint's or a bundle's layers, magnitudes and warnings
    #[command(after_help = "Examples:\n  nbn fold inspect checkpoint.pth.tar\n  nbn fold inspect models/cifar10-lt/1")]
    Inspect {
        /// A checkpoint file, or a bundle's folder
        path: PathBuf,
        #[command(flatten)]
        overrides: export::OverrideArgs,
    },
}

pub(crate) fn main() -> ExitCode {
    disable_telemetry();
    // A negative number is out of range of most flags, which say so; it is not an unknown flag.
    let command = Cli::command().mut_subcommands(|command| command.allow_negative_numbers(true));
    // What clap has matched it can read.
    let cli = Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit());
    nbn::telemetry::init_command(tracing::Level::WARN);
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell!("nbn fold: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Train(args) => train::run(*args),
        Command::Export(args) => export::run(*args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Quantize(args) => quantize::run(*args),
        Command::Evaluate(args) => evaluate::run(args),
        Command::Inspect { path, overrides } if path.join("manifest.json").exists() => {
            refuse_flags(overrides, &path, "a folder")?;
            let bundle = Bundle::load(&path)?;
            show!("bundle      {}/{}", bundle.name, bundle.version)?;
            show!("{}", inspect::manifest(&bundle.manifest))?;
            match &bundle.calibration {
                Some(bound) => show!("{}", nbn::calibrate::describe(&bound.content, Some(&bound.id)))?,
                None => show!("calibration none: scores are the softmax of the logits (nbn fold calibrate)")?,
            }
            Ok(())
        }
        Command::Inspect { path, overrides } if nbn::fold::is_onnx(&path) => {
            refuse_flags(overrides, &path, "an ONNX file")?;
            show!("{}", inspect::onnx(&path)?)?;
            Ok(())
        }
        Command::Inspect { path, .. }
            if path.extension().is_some_and(|ending| ending == "state" || ending == "json") =>
        {
            anyhow::bail!(
                "{}: it belongs to a run of `nbn fold train`, whose checkpoint is NAME.safetensors: inspect that",
                path.display()
            )
        }
        Command::Inspect { path, overrides } => {
            let overrides: Overrides = overrides.into();
            let checkpoint = Checkpoint::choose(&path, &overrides.choice)?;
            show!("{}", inspect::checkpoint(&checkpoint, &overrides)?)?;
            Ok(())
        }
    }
}

fn refuse_flags(overrides: export::OverrideArgs, path: &Path, what: &str) -> anyhow::Result<()> {
    match Overrides::from(overrides).given() {
        Some(flag) => anyhow::bail!("{flag} is for checkpoints; {} is {what}", path.display()),
        None => Ok(()),
    }
}
