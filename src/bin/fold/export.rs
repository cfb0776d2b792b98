//! `nbn fold export`'s command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};
use nbn::bundle::{Color, CropOffset, Exif, Filter, Scale, Size};
use nbn::fold::architecture::{
    Activation, ClassifierForm, Extras, GlobalPool, Magnitude, NbnLayers, Overrides, StemPool, StrideIn,
};
use nbn::fold::checkpoint::Choice;
use nbn::fold::export::{ExportOptions, export};
use nbn::fold::preprocessing::{PreprocessingChanges, PreprocessingSource, ResizeMode};
use nbn::fold::{inspect, remove_drafts_and_exit};
use nbn::runtime::Library;
use nbn::stop::with_hangup_kept;
use nbn::{show, tell};

#[derive(Args)]
#[command(next_help_heading = "Of checkpoints")]
pub(crate) struct OverrideArgs {
    /// Refuse the checkpoint unless it is of this network, such as resnet50 or cifar_resnet20
    #[arg(long)]
    arch: Option<String>,
    /// Weights to take of a file with several, such as model_ema, by their dictionary or the prefix of their names ("." for
    /// names without)
    #[arg(long, value_name = "KEY", value_parser = NonEmptyStringValueParser::new())]
    weights: Option<String>,
    /// Layer that gives the logits, if it has none of the usual names
    #[arg(long, value_name = "NAME")]
    classifier: Option<String>,
    /// Tensors that the network's outputs do not depend on, by the beginning of their names; may be repeated
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    ignore: Vec<String>,
    /// Normalised layers, if not the usual ones: last-stage-outputs, last-stage-all, all, none, or names separated by
    /// commas
    #[arg(long)]
    nbn_layers: Option<NbnLayers>,
    /// What has a magnitude of its own in scale_factor: expert (one for all layers of a network, as in the authors' code),
    /// stage or layer
    #[arg(long)]
    magnitude: Option<Magnitude>,
    /// Form of the classifier: linear, cosine:SCALE, normed-linear:SCALE (a cosine whose weight is [features, classes]), or
    /// squashed-cosine:SCALE (features over 1 + their length) [default: as its tensors' shapes say; 30, 30 and 16]
    #[arg(long, value_name = "FORM")]
    classifier_form: Option<ClassifierForm>,
    /// Epsilon of every BatchNorm [default: 1e-5]
    #[arg(long, value_name = "NUMBER", value_parser = epsilon)]
    batch_norm_epsilon: Option<f64>,
    /// Activation: relu, leaky-relu:SLOPE or silu [default: relu]
    #[arg(long)]
    activation: Option<Activation>,
    /// Convolution of a bottleneck block that has its stride [default: conv2]
    #[arg(long)]
    stride_in: Option<StrideIn>,
    /// Stride of the stem [default: 2 for a stem of 7x7, 1 for one of 3x3]
    #[arg(long, value_name = "PIXELS", value_parser = stride)]
    stem_stride: Option<usize>,
    /// Pooling behind the stem [default: max for a stem of 7x7, none for one of 3x3]
    #[arg(long)]
    stem_pool: Option<StemPool>,
    /// Pooling of the last map [default: average]
    #[arg(long)]
    global_pool: Option<GlobalPool>,
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
    /// Channels of the network's input [default: as the preprocessing says; grey for a network with one]
    #[arg(long)]
    color: Option<Color>,
    /// What is resized before the crop
    #[arg(long, value_name = "MODE")]
    resize: Option<ResizeMode>,
    /// Pixels that it is resized to, such as 256, or height and width, such as 192x256
    #[arg(long, value_name = "PIXELS")]
    resize_to: Option<Size>,
    /// Share of the resized image's sides that the crop keeps, as timm's crop_pct: another way to give --resize-to
    #[arg(long, value_parser = fraction, conflicts_with = "resize_to")]
    crop_fraction: Option<f64>,
    /// Filter that pictures are resized by
    #[arg(long)]
    filter: Option<Filter>,
    /// Where an odd number of spare pixels goes
    #[arg(long)]
    crop_offset: Option<CropOffset>,
    /// Colour of the border around pictures that are smaller than the crop: red, green, blue from 0 to 255
    #[arg(long, value_parser = color)]
    fill: Option<[u8; 3]>,
    /// Factor that bytes are multiplied by, such as 1 for a network that takes 0 to 255 [default: 1/255]
    #[arg(long)]
    factor: Option<f64>,
    /// Number that bytes are divided by, in 32 bits, such as 127.5
    #[arg(long, conflicts_with = "factor")]
    divisor: Option<f32>,
    /// Mean that is subtracted from scaled values, a number for each channel in the network's order, separated by commas
    #[arg(long, value_parser = channels)]
    mean: Option<Channels>,
    /// Standard deviation that values are divided by then, as --mean
    #[arg(long, value_parser = channels)]
    std: Option<Channels>,
    /// Size of the network's input in pixels, such as 224, or height and width, such as 192x256 [default: as the
    /// network's file or the preprocessing says]
    #[arg(long, value_name = "PIXELS", value_parser = input_size)]
    input_size: Option<Size>,
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
    /// Output of an ONNX file, or value within it, that has a score for each class, if the file has several outputs or
    /// ends in something else
    #[arg(long, value_name = "NAME")]
    logits: Option<String>,
    /// Folder of pictures that the proof of an ONNX file looks at, up to 64, besides seeded inputs
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// File of numpy.savez or safetensors with inputs x and the logits y that your own network gives for them, which the
    /// bundle is held to
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
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

/// Least height and width of a network's input, in pixels.
const SMALLEST: u32 = 8;

#[derive(Clone, Copy, ValueEnum)]
enum ExifArg {
    /// Turn the picture upright
    Apply,
    /// Use the pixels as they are stored, as torchvision does
    Ignore,
}

/// A number for each channel. (A `Vec` would be taken for a flag that may be repeated.)
#[derive(Clone)]
struct Channels(Vec<f32>);

fn numbers<T: FromStr>(text: &str) -> Option<Vec<T>> {
    text.split(',').map(|part| part.trim().parse().ok()).collect()
}

fn channels(text: &str) -> Result<Channels, String> {
    let found = numbers(text).filter(|found: &Vec<f32>| [1, 3].contains(&found.len()));
    let wrong = "expected three numbers separated by commas, such as 0.485,0.456,0.406, or one for a grey network";
    found.map(Channels).ok_or_else(|| wrong.into())
}

fn color(text: &str) -> Result<[u8; 3], String> {
    let found: Vec<u8> = numbers(text).unwrap_or_default();
    match found[..] {
        [grey] => Ok([grey; 3]),
        [red, green, blue] => Ok([red, green, blue]),
        _ => Err("expected three whole numbers from 0 to 255, such as 124,116,104, or one".into()),
    }
}

fn fraction(text: &str) -> Result<f64, String> {
    let found = text.parse().ok().filter(|fraction| (0.01..=1.0).contains(fraction));
    found.ok_or_else(|| "expected a number from 0.01 to 1, such as 0.875".into())
}

fn input_size(text: &str) -> Result<Size, String> {
    let size: Size = text.parse()?;
    let fits = size.height >= SMALLEST && size.width >= SMALLEST;
    if fits { Ok(size) } else { Err(format!("a network's input has {SMALLEST} pixels a side or more")) }
}

pub(crate) fn run(args: Export) -> anyhow::Result<()> {
    let library = Library::load(args.onnxruntime.as_deref())?;
    let options = ExportOptions {
        checkpoint: args.checkpoint,
        out: args.out,
        classes: args.classes,
        preprocessing: args.preprocessing,
        changes: PreprocessingChanges {
            color: args.color,
            resize: args.resize,
            resize_to: args.resize_to,
            crop_fraction: args.crop_fraction,
            filter: args.filter,
            crop_offset: args.crop_offset,
            fill: args.fill,
            scale: args.factor.map(Scale::Factor).or(args.divisor.map(Scale::Divisor)),
            mean: args.mean.map(|channels| channels.0),
            std: args.std.map(|channels| channels.0),
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
        expect: args.expect,
        kappa: args.kappa,
        external_data: args.external_data,
    };
    // Half a bundle may be gigabytes.
    with_hangup_kept(|| ctrlc::set_handler(|| remove_drafts_and_exit(130)))?;
    let exported = export(&options, library)?;
    tell!("{}", inspect::exported(&exported));
    show!("{}", options.out.display())?;
    Ok(())
}

fn stride(text: &str) -> Result<usize, String> {
    let found = text.parse().ok().filter(|stride| (1..=4).contains(stride));
    found.ok_or_else(|| "expected a whole number from 1 to 4".into())
}

fn epsilon(text: &str) -> Result<f64, String> {
    let found = text.parse().ok().filter(|epsilon| (0.0..=1.0).contains(epsilon));
    found.ok_or_else(|| "expected a number from 0 to 1, such as 1e-3".into())
}

impl From<OverrideArgs> for Overrides {
    fn from(args: OverrideArgs) -> Self {
        Self {
            choice: Choice { weights: args.weights, classifier: args.classifier, ignore: args.ignore },
            arch: args.arch,
            nbn_layers: args.nbn_layers,
            magnitude: args.magnitude,
            classifier: args.classifier_form,
            batch_norm_epsilon: args.batch_norm_epsilon,
            activation: args.activation,
            stride_in: args.stride_in,
            stem_stride: args.stem_stride,
            stem_pool: args.stem_pool,
            global_pool: args.global_pool,
        }
    }
}
