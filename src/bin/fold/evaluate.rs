//! `nbn fold evaluate`'s command line.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use nbn::bundle::{BoundCalibration, Bundle, EVALUATION_FILE, is_json_with};
use nbn::data::{Answers, Form, LabelledImages, answers_of};
use nbn::evaluate::{EvaluateOptions, Evaluation, compare, evaluate, familiarity, html};
use nbn::{show, tell};

use super::calibrate::replace;
use super::calibrate::target::{given, is_logits, of_bundle, refuse_foreign};
use super::dataset::{Dataset, RuntimeArgs, bar, say};
use super::training_set::{TrainingSet, Unseen};
use nbn::files::{Named, refuse_same};

const REPORT_JSON: &str = "report.json";
const REPORT_HTML: &str = "report.html";

#[derive(Args)]
#[command(
    after_help = "Examples:\n  nbn fold evaluate models/mine/1 --data test/ --report report --card\n  nbn fold evaluate models/mine/2 --data test/ --against models/mine/1"
)]
pub(crate) struct Evaluate {
    /// The bundle: models/NAME (its highest version) or models/NAME/VERSION
    bundle: PathBuf,
    #[command(flatten)]
    set: Dataset,
    #[command(flatten)]
    training: TrainingSet,
    /// Folder for report.html and report.json
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Folder of images that are unlike the training images, of anything and without classes: measures how many of them
    /// `unlike` withholds
    #[arg(long, value_name = "FOLDER")]
    unlike_data: Option<PathBuf>,
    /// Another bundle with the same classes, to compare with on the same images
    #[arg(long, value_name = "BUNDLE")]
    against: Option<PathBuf>,
    /// A calibration.json to evaluate instead of the bundle's own
    #[arg(long, value_name = "FILE", conflicts_with = "card")]
    calibration: Option<PathBuf>,
    /// Level of the prediction sets: the share of images whose set may miss the true class
    #[arg(long, default_value_t = 0.1)]
    alpha: f64,
    /// Number of resamples for the 95 % intervals and the null bands
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(20..=10_000))]
    resamples: u32,
    /// Seed for the resamples
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write the main figures into the bundle (evaluation.json), for its model card
    #[arg(long)]
    card: bool,
    /// Write the logits and labels to a safetensors file, which --data accepts
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

pub(crate) fn run(args: Evaluate) -> anyhow::Result<()> {
    let bundle = open(&args.bundle, args.calibration.as_ref())?;
    let options = EvaluateOptions { alpha: args.alpha, resamples: args.resamples as usize, seed: args.seed };
    if args.against.is_some() && args.set.form(&bundle)? == Form::Logits {
        bail!("--against needs the images themselves: a file of logits belongs to one bundle");
    }
    check_unlike(&args, &bundle)?;
    let other = args.against.as_ref().map(|path| open_other(path, &bundle, &args)).transpose()?;
    check_targets(&args, &bundle, other.as_ref())?;
    let (logits, images, _) = args.set.logits(&bundle, &args.runtime)?;
    let all = logits.len();
    let Unseen { logits, kept, answers, .. } = args.training.without(&bundle, logits, None, images)?;
    if let Some(path) = &args.logits {
        logits.save(path)?;
    }
    let data = args.set.data.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut evaluation = evaluate(&bundle, &logits, &data, &options, &say)?;
    evaluation.left_out = all - logits.len();
    evaluation.familiarity = match &answers {
        None => None,
        Some(answers) => {
            let foreign =
                args.unlike_data.as_deref().map(|folder| foreign(&bundle, folder, &args.runtime)).transpose()?;
            let foreign = foreign.as_ref().map(|(name, answers)| (name.as_str(), answers));
            familiarity(&bundle, answers, foreign)?
        }
    };
    let comparison = match &other {
        None => None,
        Some(other) => {
            let (theirs, ..) = args.set.logits(other, &args.runtime)?;
            let theirs = match &kept {
                Some(kept) => theirs.select(kept),
                None => theirs,
            };
            Some(compare(&bundle, &logits, other, &theirs, &options)?)
        }
    };
    if let Some(folder) = &args.report {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let json = serde_json::json!({ "evaluation": evaluation, "comparison": comparison });
        replace(&folder.join(REPORT_JSON), (serde_json::to_string_pretty(&json)? + "\n").as_bytes())?;
        replace(&folder.join(REPORT_HTML), html::page(&evaluation, comparison.as_ref())?.as_bytes())?;
        tell!("report      {}", folder.join(REPORT_HTML).display());
    }
    if args.card {
        write_card(&bundle, &evaluation)?;
    }
    show!("{}", evaluation.describe())?;
    if let Some(comparison) = &comparison {
        show!("{}", comparison.describe())?;
    }
    Ok(())
}

/// The name of `folder`, and what the bundle's network says of the pictures in it.
fn foreign(bundle: &Bundle, folder: &Path, runtime: &RuntimeArgs) -> anyhow::Result<(String, Answers)> {
    let images = LabelledImages::without_classes(folder)?;
    let bar = bar(images.len(), "unlike");
    let answers = answers_of(bundle, runtime.library()?, &runtime.place(), &images, runtime.pixels, &|| bar.inc(1))?;
    bar.finish_and_clear();
    Ok((folder.file_name().unwrap_or_default().to_string_lossy().into_owned(), answers))
}

/// Refuses --unlike-data where nothing can be measured with it.
fn check_unlike(args: &Evaluate, bundle: &Bundle) -> anyhow::Result<()> {
    let Some(folder) = &args.unlike_data else { return Ok(()) };
    let folder = folder.display();
    if args.set.form(bundle)? == Form::Logits {
        bail!(
            "--unlike-data {folder} needs images in --data, too: a file of logits says nothing of what images look like"
        );
    }
    if bundle.calibration.as_ref().is_none_or(|calibration| calibration.familiarity.is_none()) {
        bail!(
            "--unlike-data {folder}: this calibration does not tell what is unlike training: run `nbn fold calibrate` on the bundle \
             anew, with --training-data"
        );
    }
    Ok(())
}

/// The bundle at `path`, with `calibration` in the place of its own where one is given.
fn open(path: &Path, calibration: Option<&PathBuf>) -> anyhow::Result<Bundle> {
    let Some(file) = calibration else { return Ok(Bundle::load(path)?) };
    let mut bundle = Bundle::load_uncalibrated(path)?;
    bundle.calibration = Some(BoundCalibration::load(file, &bundle.manifest)?);
    Ok(bundle)
}

/// The bundle at `path`, to compare `bundle` with.
fn open_other(path: &Path, bundle: &Bundle, args: &Evaluate) -> anyhow::Result<Bundle> {
    let other = open(path, None)?;
    let labels = |bundle: &Bundle| bundle.manifest.classes.iter().map(|c| c.label.clone()).collect::<Vec<_>>();
    if labels(bundle) != labels(&other) {
        bail!(
            "{} and {} have different classes: only bundles with the same classes can be compared",
            args.bundle.display(),
            path.display()
        );
    }
    Ok(other)
}

/// Refuses to write over a file that the run reads, a file of a bundle, or one that no evaluation wrote.
fn check_targets(args: &Evaluate, bundle: &Bundle, other: Option<&Bundle>) -> anyhow::Result<()> {
    let mut read = args.set.files();
    read.extend(args.training.files());
    read.extend(given("--calibration", args.calibration.as_ref()));
    read.extend([Some(bundle), other].into_iter().flatten().flat_map(of_bundle));
    let report = |name: &str| args.report.as_ref().map(|folder| folder.join(name));
    let (json, page) = (report(REPORT_JSON), report(REPORT_HTML));
    let written = [("--logits", args.logits.as_ref()), ("--report", json.as_ref()), ("--report", page.as_ref())];
    let written: Vec<Named> = written.into_iter().filter_map(|(flag, path)| given(flag, path)).collect();
    refuse_same(&written, &read)?;
    if let Some(path) = &args.logits {
        let is_own = |path: &Path| nbn::files::is_special(path) || is_logits(path);
        refuse_foreign(path, "file of logits and labels as --logits writes it", is_own)?;
    }
    if let Some(folder) = args.report.as_ref().filter(|folder| folder.exists() && !folder.is_dir()) {
        bail!("--report {}: it is a file: give a folder, which will hold {REPORT_HTML}", folder.display());
    }
    if let Some(path) = &json {
        refuse_foreign(path, "report of `nbn fold evaluate`", |path| {
            is_json_with(path, &["evaluation", "comparison"])
        })?;
    }
    if let Some(path) = &page {
        refuse_foreign(path, "report of `nbn fold evaluate`", html::is_page)?;
    }
    if args.card {
        refuse_foreign(&bundle.folder.join(EVALUATION_FILE), "regular file", Path::is_file)?;
    }
    Ok(())
}

fn write_card(bundle: &Bundle, evaluation: &Evaluation) -> anyhow::Result<()> {
    let path = bundle.folder.join(EVALUATION_FILE);
    replace(&path, (serde_json::to_string_pretty(&evaluation.card())? + "\n").as_bytes())?;
    tell!("card        {}", path.display());
    Ok(())
}
