//! `nbn fold calibrate`'s command line.

mod familiarity;
pub(crate) mod target;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use nbn::bundle::{
    BoundCalibration, Bundle, CALIBRATION_FILE, Calibration, EVALUATION_FILE, Rung, TrainingOverlap, familiarity_file,
    is_calibration,
};
use nbn::calibrate::{CalibrateOptions, Kappa, calibrate, command_line, describe, divided};
use nbn::data::{GroupBy, LabelledLogits, Records};
use nbn::{show, tell};

use super::dataset::{Dataset, RuntimeArgs, say};
use super::training_set::{TrainingSet, Unseen};
use nbn::files::{Named, is_same, refuse_same};
use target::{of_bundle, refuse_foreign};

#[derive(Args)]
#[command(
    after_help = "Examples:\n  nbn fold calibrate models/mine/1 --data held-out/ --training-data train/\n  nbn fold calibrate models/mine/1 --data photos/ --records runs/mine.calibration.json"
)]
pub(crate) struct Calibrate {
    /// The bundle: models/NAME (its highest version) or models/NAME/VERSION
    bundle: PathBuf,
    #[command(flatten)]
    set: Dataset,
    #[command(flatten)]
    training: TrainingSet,
    /// How much of the class prior the training has removed from the logits: 0 (cross-entropy), 1 (Balanced Softmax,
    /// logit adjustment), or learned (logit-rectification head, or if in doubt) [default: from the loss that the
    /// checkpoint records, otherwise learned]
    #[arg(long, value_parser = kappa)]
    kappa: Option<Kappa>,
    /// Fit no more than this, and with the usual shrinkage: the prior alone, with one temperature, or with a bias per class,
    /// too [default: a scale per class as well, where the images allow it and accuracy is not lost]
    #[arg(long)]
    rung: Option<Rung>,
    /// Seed for the folds of the cross-validation
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Keep images of one object, camera or patient in one fold of the cross-validation: folder, for images in one folder; a
    /// column of the table; or a regular expression whose first group (or match) in the image's path says what it belongs to
    /// [default: as the list in --records says]
    #[arg(long, value_name = "folder|COLUMN|REGEX", value_parser = str::parse::<GroupBy>)]
    group_by: Option<GroupBy>,
    /// Most training images to learn what is familiar from, classes in turn: the network runs over them all; 0 for none
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    familiarity_images: usize,
    /// File to write [default: calibration.json in the bundle]. What tells unfamiliar images is written beside it, as
    /// NAME.familiarity.safetensors
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Replace an existing calibration
    #[arg(long)]
    force: bool,
    /// Show what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

fn kappa(text: &str) -> Result<Kappa, String> {
    match text {
        "learned" => Ok(Kappa::Learned),
        "0" => Ok(Kappa::Fixed(0.0)),
        "1" => Ok(Kappa::Fixed(1.0)),
        _ => Err("it must be 0, 1 or learned".into()),
    }
}

pub(crate) fn run(args: Calibrate) -> anyhow::Result<()> {
    // The old calibration may be the very reason for this run: it is not looked at.
    let bundle = Bundle::load_uncalibrated(&args.bundle)?;
    let out = args.out.clone().unwrap_or_else(|| bundle.folder.join(CALIBRATION_FILE));
    if !args.dry_run {
        check_out(&args, &bundle, &out)?;
    }
    if out.exists() && !args.force && !args.dry_run {
        bail!("{} already exists: replace it with --force, or only show the result with --dry-run", out.display());
    }
    if nbn::files::is_special(&out) {
        tell!("familiarity not learned: {} is not a file, and has no place beside it", out.display());
    }
    let fit = Fit {
        set: &args.set,
        training: &args.training,
        kappa: args.kappa,
        rung: args.rung,
        seed: args.seed,
        group_by: args.group_by.as_ref(),
        familiarity_images: if nbn::files::is_special(&out) { 0 } else { args.familiarity_images },
    };
    let Fitted { calibration, familiarity, training_overlap, .. } = fit.of(&bundle, &args.runtime)?;
    tell!("{}", describe(&calibration, None));
    if training_overlap == TrainingOverlap::NotChecked {
        tell!("warning: these images were not compared with the training images (--training-data SET)");
    }
    if args.dry_run {
        return Ok(());
    }
    // A file that no program would load must not take the place of one that loads.
    calibration.check(&bundle.manifest).context("no usable calibration can be fitted to these images")?;
    familiarity::write(&out, calibration, familiarity.as_deref())?;
    warn_of_a_stale_card(bundle, &out)?;
    show!("{}", out.display())?;
    Ok(())
}

/// What a calibration is fitted to, and how.
pub(crate) struct Fit<'a> {
    pub(crate) set: &'a Dataset,
    pub(crate) training: &'a TrainingSet,
    pub(crate) kappa: Option<Kappa>,
    pub(crate) rung: Option<Rung>,
    pub(crate) seed: u64,
    pub(crate) group_by: Option<&'a GroupBy>,
    pub(crate) familiarity_images: usize,
}

/// A calibration, and what it was fitted to.
pub(crate) struct Fitted {
    pub(crate) calibration: Calibration,
    /// The file beside it.
    pub(crate) familiarity: Option<Vec<u8>>,
    pub(crate) training_overlap: TrainingOverlap,
    /// Of the images, those left out that were trained on.
    pub(crate) logits: LabelledLogits,
    /// Numbers of the images that were not left out, if some were.
    pub(crate) kept: Option<Vec<usize>>,
}

impl Fit<'_> {
    /// Runs the bundle's network over the set and fits its calibration.
    pub(crate) fn of(&self, bundle: &Bundle, runtime: &RuntimeArgs) -> anyhow::Result<Fitted> {
        let (logits, images, records) = self.set.logits(bundle, runtime)?;
        let group_by = match (self.group_by, records.as_ref().and_then(Records::group_by)) {
            (None, Some(by)) => {
                tell!("groups      --group-by {by}, as the run had it");
                Some(by.parse().map_err(anyhow::Error::msg)?)
            }
            (by, _) => by.cloned(),
        };
        let groups = match (&group_by, &images) {
            (None | Some(GroupBy::Apart), _) => None,
            (Some(by), Some((images, _))) => Some(by.groups(images)?),
            (Some(by), None) => {
                bail!("--group-by {by}: a file of logits has no paths: give --data the images themselves")
            }
        };
        let Unseen { logits, groups, answers, training, kept } =
            self.training.without(bundle, logits, groups, images)?;
        let training_overlap = if training.is_some() { TrainingOverlap::None } else { TrainingOverlap::NotChecked };
        let groups = groups.map(|groups| {
            let (groups, alone) = divided(&logits, &groups);
            if let Some(first) = alone.first() {
                tell!(
                    "warning: of {} of {} classes, such as {:?}, all images here are of one group (--group-by): they are divided \
                     between the folds all the same, so that scores may be overconfident; hold out images of several groups",
                    alone.len(),
                    bundle.manifest.classes.len(),
                    bundle.manifest.classes[*first].label
                );
            }
            groups
        });
        let Self { kappa, rung, seed, .. } = *self;
        let here = std::env::current_dir().unwrap_or_default();
        let options = CalibrateOptions {
            kappa,
            rung,
            seed,
            groups,
            training_overlap,
            pixels: runtime.pixels,
            command: command_line(std::env::args_os().skip(1), &here),
        };
        let mut calibration = calibrate(&logits, &bundle.manifest, &options, &say)?;
        let seen = familiarity::Source { bundle, answers: answers.as_ref(), training, most: self.familiarity_images };
        let familiar = familiarity::fit(seen, &calibration, runtime)?;
        calibration.familiarity = familiar.as_ref().map(|(record, _)| record.clone());
        let familiarity = familiar.map(|(_, bytes)| bytes);
        Ok(Fitted { calibration, familiarity, training_overlap, logits, kept })
    }
}

/// Refuses an `out` that the run reads, that is another file of the bundle, or something else than a calibration.
fn check_out(args: &Calibrate, bundle: &Bundle, out: &Path) -> anyhow::Result<()> {
    let own = bundle.folder.join(CALIBRATION_FILE);
    let mut read = args.set.files();
    read.extend(args.training.files());
    read.extend(of_bundle(bundle).filter(|file| file.path != own));
    let beside = familiarity_file(out);
    refuse_same(&[Named { role: "--out", path: out.to_owned() }], &read)?;
    if args.out.is_none() || is_same(out, &own) {
        // The bundle's own calibration may be damaged: that can be the reason for this run.
        refuse_foreign(&beside, "regular file", Path::is_file)?;
        return refuse_foreign(out, "calibration", Path::is_file);
    }
    if !nbn::files::is_special(out) {
        refuse_same(&[Named { role: "the file beside --out", path: beside.clone() }], &read)?;
        refuse_foreign(&beside, "file of a calibration", familiarity::is_own)?;
    }
    refuse_foreign(out, "calibration", |path| nbn::files::is_special(path) || is_calibration(path))
}

/// Says so when the bundle's card was measured with another calibration than the one just written to `out`.
fn warn_of_a_stale_card(mut bundle: Bundle, out: &Path) -> anyhow::Result<()> {
    let canonical = |path: &Path| std::fs::canonicalize(path).ok();
    if canonical(out) != canonical(&bundle.folder.join(CALIBRATION_FILE)) {
        return Ok(());
    }
    bundle.calibration = Some(BoundCalibration::load(out, &bundle.manifest)?);
    let certified = bundle.manifest.fold.quantization.as_ref().and_then(|q| q.certificate.calibration.as_ref());
    if certified.is_some_and(|certified| bundle.calibration.as_ref().is_none_or(|bound| bound.id != *certified)) {
        tell!(
            "stale       the certificate of this quantized bundle: it was measured with the calibration that was replaced"
        );
        tell!(
            "            what it says of the softmax stands; `nbn fold quantize` measures calibrated scores again, and"
        );
        tell!("            `nbn fold evaluate --against` shows them beside the original's");
    }
    if let Err(stale) = bundle.card() {
        let card = bundle.folder.join(EVALUATION_FILE);
        tell!("stale       {}: {stale}", card.display());
        tell!("            its figures are not shown until `nbn fold evaluate --card` has measured them again");
    }
    Ok(())
}

/// Writes the whole file or leaves it as it was.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    nbn::files::replace(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}
