//! `nbn fold export`'s command line.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use nbn::bundle::Exif;
use nbn::fold::architecture::{Extras, NbnLayers, Overrides};
use nbn::fold::export::{ExportOptions, Preset, export};
use nbn::fold::inspect;
use nbn::runtime::Library;

#[derive(Args)]
pub(crate) struct OverrideArgs {
    /// Refuse unless the tensors are of this network, e.g. resnet50, cifar_resnet20
    #[arg(long)]
    pub(crate) arch: Option<String>,
    /// Normalised layers, when not the usual: last-stage-outputs, last-stage-all, all, none, or names with commas
    #[arg(long)]
    pub(crate) nbn_layers: Option<NbnLayers>,
}

#[derive(Args)]
pub(crate) struct Export {
    /// A file written by torch.save (.pth, .pth.tar, .pt), or .safetensors
    checkpoint: PathBuf,
    /// Folder of the new bundle: models/NAME/VERSION, with a decimal number for VERSION
    #[arg(long)]
    out: PathBuf,
    /// Labels: a CSV with the header label,count (training images per class), or one label a line; a checkpoint of
    /// `nbn fold train` brings its own
    #[arg(long)]
    classes: Option<PathBuf>,
    /// Evaluation pipeline; the checkpoint's own, or guessed from the network, when absent
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
    /// Add the output features [N, D], what the classifier sees, for `nbn score --features`
    #[arg(long)]
    features: bool,
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

pub(crate) fn run(args: Export) -> anyhow::Result<()> {
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
        extras: Extras { expert_logits: args.expert_logits, features: args.features },
        force: args.force,
        overrides: args.overrides.into(),
    };
    let manifest = export(&options, library)?;
    eprint!("{}", inspect::manifest(&manifest));
    println!("{}", options.out.display());
    Ok(())
}

impl From<OverrideArgs> for Overrides {
    fn from(args: OverrideArgs) -> Self {
        Self { arch: args.arch, nbn_layers: args.nbn_layers }
    }
}
