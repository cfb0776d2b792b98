//! `fold`: offline work on checkpoints and bundles.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use nbn::bundle::{Bundle, Exif};
use nbn::fold::architecture::{NbnLayers, Overrides};
use nbn::fold::export::{ExportOptions, Preset, export};
use nbn::fold::{Checkpoint, inspect};
use nbn::runtime::{Library, disable_telemetry};

/// Folds networks trained with a normalised BatchNorm (NBN) into plain ONNX bundles that `nbn` serves.
#[derive(Parser)]
#[command(name = "fold", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Merges a checkpoint's NBN, BatchNorm, LR head and experts into a bundle, and proves it equal
    Export(Export),
    /// Shows a checkpoint's or a bundle's layers, magnitudes and warnings
    Inspect {
        /// A checkpoint file, or a bundle's folder
        path: PathBuf,
        #[command(flatten)]
        overrides: OverrideArgs,
    },
}

#[derive(Args)]
struct OverrideArgs {
    /// Refuse unless the tensors are of this network, e.g. resnet50, cifar_resnet20
    #[arg(long)]
    arch: Option<String>,
    /// Normalised layers, when not the usual: last-stage-outputs, last-stage-all, all, none, or names with commas
    #[arg(long)]
    nbn_layers: Option<NbnLayers>,
}

#[derive(Args)]
struct Export {
    /// A file written by torch.save (.pth, .pth.tar, .pt), or .safetensors
    checkpoint: PathBuf,
    /// Folder of the new bundle: models/NAME/VERSION, with a decimal number for VERSION
    #[arg(long)]
    out: PathBuf,
    /// Labels: a CSV with the header label,count (training images per class), or one label a line
    #[arg(long)]
    classes: Option<PathBuf>,
    /// Evaluation pipeline; guessed from the network when absent
    #[arg(long)]
    preprocessing: Option<Preset>,
    /// Side of the network's square input in pixels, when not the pipeline's own
    #[arg(long, value_parser = clap::value_parser!(u32).range(8..=4096))]
    input_size: Option<u32>,
    /// What serving does with a photo's EXIF orientation
    #[arg(long, default_value = "apply")]
    exif: ExifArg,
    /// JSON with the measured accuracy, shown on the model card
    #[arg(long)]
    evaluation: Option<PathBuf>,
    /// Add the output expert_logits [N, experts, K]
    #[arg(long)]
    expert_logits: bool,
    /// Replace a bundle that is already there
    #[arg(long)]
    force: bool,
    /// ONNX Runtime's shared library, when not found by itself
    #[arg(long)]
    onnxruntime: Option<PathBuf>,
    #[command(flatten)]
    overrides: OverrideArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum ExifArg {
    /// Turn the picture upright
    Apply,
    /// Take the stored pixels, as torchvision does
    Ignore,
}

fn main() -> ExitCode {
    disable_telemetry();
    let cli = Cli::parse();
    nbn::telemetry::init("warn");
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fold: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Export(args) => {
            let library = Library::load(args.onnxruntime.as_deref())?;
            let options = ExportOptions {
                checkpoint: args.checkpoint,
                out: args.out,
                classes: args.classes,
                preset: args.preprocessing,
                input_size: args.input_size,
                exif: match args.exif {
                    ExifArg::Apply => Exif::Apply,
                    ExifArg::Ignore => Exif::Ignore,
                },
                evaluation: args.evaluation,
                expert_logits: args.expert_logits,
                force: args.force,
                overrides: args.overrides.into(),
            };
            let manifest = export(&options, library)?;
            eprint!("{}", inspect::manifest(&manifest));
            println!("{}", options.out.display());
        }
        Command::Inspect { path, overrides } if path.is_dir() => {
            anyhow::ensure!(
                overrides.arch.is_none() && overrides.nbn_layers.is_none(),
                "--arch and --nbn-layers are for checkpoints; {} is a folder",
                path.display()
            );
            let bundle = Bundle::load(&path)?;
            println!("bundle      {}/{}", bundle.name, bundle.version);
            print!("{}", inspect::manifest(&bundle.manifest));
        }
        Command::Inspect { path, overrides } => {
            print!("{}", inspect::checkpoint(&Checkpoint::load(&path)?, &overrides.into())?);
        }
    }
    Ok(())
}

impl From<OverrideArgs> for Overrides {
    fn from(args: OverrideArgs) -> Self {
        Self { arch: args.arch, nbn_layers: args.nbn_layers }
    }
}
