//! `nbn fold quantize`'s command line.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use nbn::bundle::{
    BoundCalibration, Bundle, CALIBRATION_FILE, FAMILIARITY_FILE, Familiarity, FileDigest, KappaSource, LeftNorm,
    Quantization, sha256_hex,
};
use nbn::calibrate::Kappa;
use nbn::data::{Form, in_turn_by};
use nbn::evaluate::EvaluateOptions;
use nbn::fold::quantize::{Layer, Quantizer, Sensitivity, WeightBits, check_target};
use nbn::fold::remove_drafts_and_exit;
use nbn::pixels::{DecodeLimits, Preprocessor};
use nbn::quantize::{Bounds, Side, adds_in_32_bits, broken, certify};
use nbn::stop::with_hangup_kept;
use nbn::{show, tell};

use super::calibrate::{Fit, Fitted};
use super::dataset::{Dataset, RuntimeArgs, bar, images};
use super::training_set::{TrainingSet, Unseen};

/// Layers that a refusal names.
const NAMED: usize = 3;
/// Fewest pictures whose ranges say something.
const FEWEST: usize = 2;

#[derive(Args)]
#[command(
    after_help = "Examples:\n  nbn fold quantize models/mine/1 --data held-out/ --out models/mine/2\n  nbn fold quantize models/mine/1 --data held-out/ --training-data train/ --test test/ --out models/mine/2"
)]
pub(crate) struct Quantize {
    /// The bundle: models/NAME (its highest version) or models/NAME/VERSION
    bundle: PathBuf,
    #[command(flatten)]
    set: Dataset,
    #[command(flatten)]
    training: TrainingSet,
    /// Folder of the new bundle: models/NAME/VERSION, where VERSION is a decimal number
    #[arg(long)]
    out: PathBuf,
    /// Pictures of --data that the ranges of values are taken from, classes in turn
    #[arg(long, value_name = "N", default_value_t = 64)]
    images: usize,
    /// Seed for the choice of these pictures, and for the resamples
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Labelled images to measure on what is lost [default: those of --data]
    #[arg(long, value_name = "SET")]
    test: Option<PathBuf>,
    /// Format of --test, if it is not recognised correctly
    #[arg(long, value_name = "FORMAT", requires = "test")]
    test_format: Option<Form>,
    /// Bits of weights: 7, which every processor adds exactly, or 8, for processors with VNNI
    #[arg(long, value_name = "BITS", default_value = "7", value_parser = bits)]
    weight_bits: WeightBits,
    /// Layer that stays in 32 bits, with the values that it reads and writes; may be repeated
    #[arg(long, value_name = "LAYER")]
    keep_float: Vec<String>,
    /// Most points of top-1 that may be lost, at the far end of the 95 % interval
    #[arg(long, value_name = "POINTS", default_value_t = 1.0, value_parser = bound)]
    max_top1_loss: f64,
    /// The same for the images of each group, many, medium and few [default: no bound]
    #[arg(long, value_name = "POINTS", value_parser = bound)]
    max_group_top1_loss: Option<f64>,
    /// Most that the negative log-likelihood may rise by, at the far end of the 95 % interval, in nats
    #[arg(long, value_name = "NATS", default_value_t = 0.02, value_parser = bound)]
    max_nll_rise: f64,
    /// Most training images to learn what is familiar from, as in `calibrate`
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    familiarity_images: usize,
    /// Write the bundle although a bound is not kept; its card says that it is unproved
    #[arg(long)]
    unproved: bool,
    /// Replace an existing bundle
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

fn bound(text: &str) -> Result<f64, String> {
    let found = text.parse().ok().filter(|bound: &f64| (0.0..=100.0).contains(bound));
    found.ok_or_else(|| "expected a number from 0 to 100".into())
}

fn bits(text: &str) -> Result<WeightBits, String> {
    match text {
        "7" => Ok(WeightBits::Seven),
        "8" => Ok(WeightBits::Eight),
        _ => Err("it must be 7 or 8".into()),
    }
}

pub(crate) fn run(args: Quantize) -> anyhow::Result<()> {
    let original = Bundle::load(&args.bundle)?;
    if let Some(done) = &original.manifest.fold.quantization {
        bail!("{} is quantized already, from {}: quantize that one", args.bundle.display(), done.from);
    }
    if args.set.form(&original)? == Form::Logits {
        bail!("--data {}: ranges of values need images, not a file of logits", args.set.data.display());
    }
    check_target(&original, &args.out, args.force)?;
    let test = args.test.as_ref().map(|test| Dataset { data: test.clone(), form: args.test_format, records: None });
    if let Some(test) = &test
        && test.form(&original)? == Form::Logits
    {
        bail!("--test {}: a file of logits belongs to one bundle: give images", test.data.display());
    }
    // Half a bundle may be gigabytes.
    with_hangup_kept(|| ctrlc::set_handler(|| remove_drafts_and_exit(130)))?;
    let library = args.runtime.library()?;
    let inputs = inputs(&args, &original)?;
    let drawn = inputs.len();
    tell!("ranges      from {drawn} pictures of {}", args.set.data.display());
    let quantizer = Quantizer::new(&original, library, inputs, args.keep_float.clone(), args.weight_bits)?;
    let mut quantized = quantizer.quantized(&args.out, args.force)?;
    let whole = quantized.layers.iter().filter(|layer| layer.kept.is_none()).count();
    tell!("layers      {whole} of {} in 8 bits, weights in {}", quantized.layers.len(), args.weight_bits.number());
    for layer in quantized.layers.iter().filter(|layer| layer.kept.is_some()) {
        tell!("            {} stays in 32 bits: {}", layer.name, layer.kept.unwrap_or_default());
    }
    let fitted = calibration(&args, &original, &quantized.bundle)?;
    let files = fitted.as_ref().map(Files::of).transpose()?;
    if let (Some(fitted), Some(files)) = (&fitted, &files) {
        quantized.bundle.calibration = Some(files.bound(fitted)?);
    }
    let certificate = measured(&args, test.as_ref(), &original, &quantized.bundle, fitted.as_ref())?;
    tell!("{}", certificate.to_string());
    let mut reasons = broken(&certificate);
    if args.weight_bits == WeightBits::Eight && !adds_in_32_bits() {
        reasons.push(
            "this processor adds products of 8-bit weights in 16 bits (no VNNI), so that its figures are not those of one that \
             does not: certify on such a machine, or take --weight-bits 7"
                .into(),
        );
    }
    if !reasons.is_empty() && !args.unproved {
        let worst = worst(&quantizer, whole)?;
        bail!(
            "the quantized network is not within bounds, and nothing was written:\n  {}\n{}\nkeep the worst in 32 bits with --keep-float, \
             measure on more images (--test), or write it anyway with --unproved",
            reasons.join("\n  "),
            worst
        );
    }
    reasons.iter().for_each(|reason| tell!("unproved    {reason}"));
    let mut manifest = quantized.bundle.manifest.clone();
    manifest.fold.quantization = Some(Quantization {
        by: format!("fold {}", env!("CARGO_PKG_VERSION")),
        from: format!("{}/{}", original.name, original.version),
        network: FileDigest { file: manifest.model.file.clone(), sha256: original.manifest.model.sha256.clone() },
        weight_bits: args.weight_bits.number(),
        images: drawn,
        seed: args.seed,
        layers: whole,
        float_layers: quantized.layers.iter().filter_map(kept).collect(),
        proved: reasons.is_empty(),
        certificate,
    });
    let others = files.iter().flat_map(Files::named).collect::<Vec<_>>();
    quantized.publish(&manifest, &others)?;
    if files.is_none() {
        tell!("calibration none, as the original has none: scores are the softmax");
    }
    show!("{}", args.out.display())?;
    Ok(())
}

fn kept(layer: &Layer) -> Option<LeftNorm> {
    Some(LeftNorm { name: layer.name.clone(), reason: layer.kept?.into() })
}

/// The pictures whose ranges count, as the network takes them.
fn inputs(args: &Quantize, bundle: &Bundle) -> anyhow::Result<Vec<Vec<f32>>> {
    let form = args.set.form(bundle)?;
    let manifest = &bundle.manifest;
    let records = args.set.records.as_deref().map(|path| (path, "--records", nbn::data::Purpose::Training));
    let (images, _) = images(&args.set.data, Some(form), records, &manifest.classes)?;
    let chosen = in_turn_by(images.labels(), args.images, args.seed);
    if chosen.len() < FEWEST {
        bail!(
            "--data {} gives {} picture{} to take ranges from (--images {}); give at least {FEWEST}, better 64",
            args.set.data.display(),
            chosen.len(),
            if chosen.len() == 1 { "" } else { "s" },
            args.images
        );
    }
    let preprocessor = Preprocessor::new(
        manifest.preprocessing.clone(),
        DecodeLimits { pixels: args.runtime.pixels, ..DecodeLimits::OFFLINE },
    );
    let prepared = |&n: &usize| {
        let exif = manifest.preprocessing.exif;
        let picture = images.picture_at_least(n, exif, &DecodeLimits::OFFLINE, preprocessor.least());
        let picture = picture.map_err(|reason| anyhow::anyhow!("{}: {reason}", images.name(n)))?;
        Ok(preprocessor.normalize(&picture))
    };
    chosen.iter().map(prepared).collect()
}

/// Fits the quantized network's own calibration, where the original has one.
fn calibration(args: &Quantize, original: &Bundle, quantized: &Bundle) -> anyhow::Result<Option<Fitted>> {
    let Some(bound) = &original.calibration else { return Ok(None) };
    let recipe = &bound.content;
    let asked = |flag: &str| recipe.fit.command.split_whitespace().any(|word| word.split('=').next() == Some(flag));
    if asked("--group-by") {
        tell!(
            "warning: the original was calibrated with --group-by, which has no part here: use `nbn fold calibrate` afterwards"
        );
    }
    let questions = recipe.familiarity.as_ref().map_or(0, |record| record.questions.len());
    if questions > 1 && !args.training.is_given() {
        tell!(
            "warning: the original tells unfamiliar images by {questions} questions, this one by confidence alone: give --training-data"
        );
    }
    let fit = Fit {
        set: &args.set,
        training: &args.training,
        kappa: (recipe.kappa_source == KappaSource::Given).then_some(Kappa::Fixed(recipe.kappa)),
        // The rung that was chosen is chosen anew; the one that was asked for is asked for.
        rung: asked("--rung").then_some(recipe.rung),
        seed: args.seed,
        group_by: None,
        familiarity_images: args.familiarity_images,
    };
    let fitted = fit.of(quantized, &args.runtime)?;
    let (own, theirs) = (fitted.calibration.fit.images, bound.content.fit.images);
    if own != theirs {
        tell!("warning: the original was calibrated with {theirs} images, this one with the {own} of --data");
    }
    Ok(Some(fitted))
}

/// A calibration as the files that it is written as.
struct Files {
    calibration: Vec<u8>,
    familiarity: Option<Vec<u8>>,
}

impl Files {
    fn of(fitted: &Fitted) -> anyhow::Result<Self> {
        let calibration = (serde_json::to_string_pretty(&fitted.calibration)? + "\n").into_bytes();
        Ok(Self { calibration, familiarity: fitted.familiarity.clone() })
    }

    fn bound(&self, fitted: &Fitted) -> anyhow::Result<BoundCalibration> {
        let familiarity = self.familiarity.as_deref().map(Familiarity::from_bytes).transpose()?;
        Ok(BoundCalibration {
            id: sha256_hex(&self.calibration)[..12].to_owned(),
            content: fitted.calibration.clone(),
            familiarity: familiarity.map(std::sync::Arc::new),
        })
    }

    fn named(&self) -> Vec<(&str, &[u8])> {
        let familiarity = self.familiarity.as_deref().map(|bytes| (FAMILIARITY_FILE, bytes));
        std::iter::once((CALIBRATION_FILE, self.calibration.as_slice())).chain(familiarity).collect()
    }
}

/// What the quantization changed, on `test`, else on --data.
fn measured(
    args: &Quantize,
    test: Option<&Dataset>,
    original: &Bundle,
    quantized: &Bundle,
    fitted: Option<&Fitted>,
) -> anyhow::Result<nbn::bundle::Certificate> {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let logits = |bundle: &Bundle, set: &Dataset| set.logits(bundle, &args.runtime);
    let (ours, theirs, data) = match (test, fitted) {
        (Some(set), _) => {
            let (ours, images, _) = logits(quantized, set)?;
            // None of them may have been trained on, either.
            let Unseen { logits: ours, kept, .. } = args.training.without(quantized, ours, None, images)?;
            let theirs = logits(original, set)?.0;
            let theirs = kept.map_or_else(|| theirs.clone(), |kept| theirs.select(&kept));
            let is_same = fitted.is_some() && nbn::files::is_same(&set.data, &args.set.data);
            (ours, theirs, (name(&set.data), is_same))
        }
        (None, Some(fitted)) => {
            let theirs = logits(original, &args.set)?.0;
            let theirs = fitted.kept.as_ref().map_or_else(|| theirs.clone(), |kept| theirs.select(kept));
            (fitted.logits.clone(), theirs, (name(&args.set.data), true))
        }
        (None, None) => {
            (logits(quantized, &args.set)?.0, logits(original, &args.set)?.0, (name(&args.set.data), false))
        }
    };
    let first = theirs.row(0).to_vec();
    if (1..theirs.len()).all(|row| theirs.row(row) == first) {
        bail!("the network's logits are the same for all {} images: it does not look at them", theirs.len());
    }
    let bounds = Bounds {
        top1_loss: args.max_top1_loss / 100.0,
        group_top1_loss: args.max_group_top1_loss.map(|points| points / 100.0),
        nll_rise: args.max_nll_rise,
    };
    let options = EvaluateOptions { alpha: 0.1, resamples: 400, seed: args.seed };
    certify(
        Side { bundle: quantized, logits: &ours },
        Side { bundle: original, logits: &theirs },
        (&data.0, data.1),
        bounds,
        &options,
    )
    .context("the two networks cannot be compared")
}

/// The layers that move the logits most when they alone are quantized, in words.
fn worst(quantizer: &Quantizer<'_>, layers: usize) -> anyhow::Result<String> {
    let bar = bar(layers, "layers one by one");
    let found = quantizer.sensitivities(&|| bar.inc(1))?;
    bar.finish_and_clear();
    let shown = |Sensitivity { layer, change }: &Sensitivity| {
        format!("  {layer} moves the logits by {change:.3} of their standard deviation")
    };
    let lines: Vec<String> = found.iter().take(NAMED).map(shown).collect();
    Ok(format!("layers that change most, each quantized alone:\n{}", lines.join("\n")))
}
