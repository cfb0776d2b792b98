//! `nbn fold export`'s command line.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use nbn::bundle::{Exif, Filter, Resize};
use nbn::fold::architecture::{Extras, NbnLayers, Overrides};
use nbn::fold::export::{ExportOptions, export};
use nbn::fold::inspect;
use nbn::fold::preprocessing::{PreprocessingChanges, PreprocessingSource};
use nbn::runtime::Library;

#[derive(Args)]
pub(crate) struct OverrideArgs {
    /// Refuse the checkpoint unless it is of this network, such as resnet50 or cifar_resnet20
    #[arg(long)]
    pub(crate) arch: Option<String>,
    /// Normalised layers, if not the usual ones: last-stage-outputs, last-stage-all, all, none, or names separated by
    /// commas
    #[arg(long)]
    pub(crate) nbn_layers: Option<NbnLayers>,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  nbn fold export checkpoint.pth.tar --classes classes.csv --out models/mine/1\n  nbn fold export runs/mine.safetensors --out models/mine/2 --input-size 96\n  nbn fold export network.onnx --classes classes.csv --preprocessing imagenet --out models/mine/3"
)]
pub(crate) struct Export {
    /// Checkpoint: a file written by torch.save (.pth, .pth.tar, .pt), or a .safetensors file; or a network in ONNX (.onnx)
    checkpoint: PathBuf,
    /// Folder of the new bundle: models/NAME/VERSION, where VERSION is a decimal number
    #[arg(long)]
    out: PathBuf,
    /// Labels: a CSV file with the header label,count (training images per class), or a text file with one label per
    /// line; a checkpoint of `nbn fold train` contains its own
    #[arg(long)]
    classes: Option<PathBuf>,
    /// Preprocessing of the images: imagenet, inaturalist, cifar, or a file, timm's config.json or Hugging Face's
    /// preprocessor_config.json [default: the checkpoint's own, or guessed from the network]
    #[arg(long, value_name = "NAME|FILE")]
    preprocessing: Option<PreprocessingSource>,
    /// Length that the shorter side, or with --squash both sides, are resized to before the crop
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=4096))]
    resize_to: Option<u32>,
    /// Resize both sides, whatever the ratio
    #[arg(long)]
    squash: bool,
    /// Filter that pictures are resized by
    #[arg(long)]
    filter: Option<Filter>,
    /// Factor that bytes are multiplied by, such as 1 for a network that takes 0 to 255 [default: 1/255]
    #[arg(long)]
    factor: Option<f64>,
    /// Mean that is subtracted from scaled values, three numbers separated by commas: red, green, blue
    #[arg(long, value_parser = three)]
    mean: Option<[f32; 3]>,
    /// Standard deviation that values are divided by then, as --mean
    #[arg(long, value_parser = three)]
    std: Option<[f32; 3]>,
    /// Side of the network's square input in pixels [default: as the preprocessing says]
    #[arg(long, value_parser = clap::value_parser!(u32).range(8..=4096))]
    input_size: Option<u32>,
    /// What nbn does with the EXIF orientation of a photo
    #[arg(long, default_value = "apply")]
    exif: ExifArg,
    /// JSON file with the measured accuracy, which the model card shows
    #[arg(long)]
    evaluation: Option<PathBuf>,
    /// Add the output expert_logits [N, experts, K]
    #[arg(long)]
    expert_logits: bool,
    /// Leave out the output features [N, D], the input of the classifier, which `nbn score --features` shows
    #[arg(long)]
    no_features: bool,
    /// As without it: features are written by default
    #[arg(long, hide = true, conflicts_with = "no_features")]
    features: bool,
    /// Output of an ONNX file that has a score for each class, if the file has several outputs
    #[arg(long, value_name = "NAME")]
    logits: Option<String>,
    /// Folder of pictures that the proof of an ONNX file looks at, up to 64, besides seeded inputs
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// How much of the training prior the loss took out of the logits, from 0 (none, as cross-entropy) to 1 (all, as
    /// Balanced Softmax), if the file does not say
    #[arg(long)]
    kappa: Option<f64>,
    /// Write the weights into files beside model.onnx, as is always done with more than 2 GiB of them
    #[arg(long)]
    external_data: bool,
    /// Replace an existing bundle
    #[arg(long)]
    force: bool,
    /// Path of ONNX Runtime's shared library, if it is not found automatically
    #[arg(long)]
    onnxruntime: Option<PathBuf>,
    #[command(flatten)]
    overrides: OverrideArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum ExifArg {
    /// Turn the picture upright
    Apply,
    /// Use the pixels as they are stored, as torchvision does
    Ignore,
}

/// Three numbers separated by commas.
fn three(text: &str) -> Result<[f32; 3], String> {
    let numbers: Option<Vec<f32>> = text.split(',').map(|part| part.trim().parse().ok()).collect();
    let three = numbers.and_then(|numbers| <[f32; 3]>::try_from(numbers).ok());
    three.ok_or_else(|| "expected three numbers separated by commas, such as 0.485,0.456,0.406".into())
}

pub(crate) fn run(args: Export) -> anyhow::Result<()> {
    let library = Library::load(args.onnxruntime.as_deref())?;
    let options = ExportOptions {
        checkpoint: args.checkpoint,
        out: args.out,
        classes: args.classes,
        preprocessing: args.preprocessing,
        changes: PreprocessingChanges {
            resize: args.squash.then_some(Resize::Both),
            shorter_side: args.resize_to,
            filter: args.filter,
            factor: args.factor,
            mean: args.mean,
            std: args.std,
        },
        input_size: args.input_size,
        exif: match args.exif {
            ExifArg::Apply => Exif::Apply,
            ExifArg::Ignore => Exif::Ignore,
        },
        evaluation: args.evaluation,
        extras: Extras { expert_logits: args.expert_logits, features: args.features || !args.no_features },
        force: args.force,
        overrides: args.overrides.into(),
        logits: args.logits,
        images: args.images,
        kappa: args.kappa,
        external_data: args.external_data,
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
