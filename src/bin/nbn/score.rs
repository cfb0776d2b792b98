//! `nbn score`.

mod target;

use std::collections::HashMap;
use std::io::{self, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use nbn::batch::{
    self, Columns, Form, Format, Labels, Origin, Parts, RunRecord, Scoring, Shard, Source, SourceOptions, Stopped,
    Stores, Summary, WriteError,
};
use nbn::bundle::{Bundle, Class, Pixels};
use nbn::classify::{Abstention, ScoreRequest};
use nbn::engine::Budget;
use nbn::files::Named;
use nbn::pixels::DecodeLimits;
use nbn::registry::{BatchChoice, ModelOptions, ServedModel};
use nbn::runtime::{FEATURES, Library};
use nbn::scores::{Prior, SetRung, SetScore};
use nbn::shutdown;
use nbn::tell;
use serde::Serialize;
use serde_json::json;

use crate::{EngineArgs, share};
use target::{Rows, SummaryFile};

/// Status after a signal, as shells report an interrupt.
const INTERRUPTED: u8 = 130;
/// Images that wait for each worker: enough for its largest batch, and for the reading of the next.
const QUEUE: usize = 64;

#[derive(Args)]
#[command(
    after_help = "Examples:\n  nbn score --model models/cifar10-lt photos/ > rows.jsonl\n  nbn score --model models/mine --output-dir rows --resume 'photos/**/*.jpg'"
)]
pub(crate) struct Score {
    /// The bundle: models/NAME (its highest version) or models/NAME/VERSION
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    rows: RowArgs,
    #[command(flatten)]
    scores: ScoreArgs,
    #[command(flatten)]
    source: SourceArgs,
    /// Write a summary of the run to this file as JSON, in addition to the text on stderr
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
    /// Exit with status 0 even if some images failed, for schedulers that retry failed jobs; if a source cannot be read
    /// to its end, the status is still 1
    #[arg(long)]
    errors_exit_zero: bool,
    /// Pixels of JPEGs that are decoded: exact, all of them, as Pillow does; fast, every second, fourth or eighth where twice
    /// as many are left as the picture is resized to
    #[arg(long, value_name = "MODE", default_value = "exact")]
    pixels: Pixels,
    #[command(flatten)]
    engine: EngineArgs,
    /// Images, folders, patterns such as 'photos/**/*.jpg', lists (.txt, .csv, .jsonl), tables (.parquet), archives
    /// (.tar, .tar.gz), or URLs of these (s3://, gs://, az://, file://; their patterns can contain * and [ only).
    /// Without inputs, or with -, a list of paths is read from stdin
    inputs: Vec<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = "Rows")]
struct RowArgs {
    /// Format of the rows [default: as the name of --output ends, else jsonl]
    #[arg(long)]
    format: Option<Format>,
    /// File for the rows [default: stdout]
    #[arg(long, conflicts_with = "output_dir")]
    output: Option<PathBuf>,
    /// Folder for the rows, which are written in parts that are committed one by one
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Rows per part
    #[arg(long, default_value_t = 10_000, requires = "output_dir", value_parser = clap::value_parser!(u64).range(1..))]
    part_rows: u64,
    /// Continue an earlier run: leave out images that already have a row in the folder
    #[arg(long, requires = "output_dir")]
    resume: bool,
    /// Classes per image, the best first
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    top_k: u32,
    /// Add the score of every class, in the order of the logits
    #[arg(long)]
    probabilities: bool,
    /// Add the logits, the network's raw output
    #[arg(long)]
    logits: bool,
    /// Add the features that the network's classifier receives; needs a bundle whose network gives them, as `nbn fold export`
    /// makes it unless told otherwise
    #[arg(long)]
    features: bool,
}

impl RowArgs {
    /// # Errors
    /// When the format can be told neither from --output nor from --format.
    fn check_ending(&self) -> anyhow::Result<()> {
        let Some(path) = self.output.as_ref().filter(|_| self.format.is_none()) else { return Ok(()) };
        let known = |ending: &std::ffi::OsStr| Format::of_ending(&ending.to_string_lossy()).is_some();
        // A pipe or a device has no ending.
        anyhow::ensure!(
            path.extension().is_none_or(known) || nbn::files::is_special(path),
            "--output {}: no format has this ending: name it .jsonl, .csv or .parquet, or give --format",
            path.display()
        );
        Ok(())
    }

    fn format(&self) -> Format {
        let ending = self.output.as_deref().and_then(Path::extension).and_then(|ending| ending.to_str());
        self.format.or(ending.and_then(Format::of_ending)).unwrap_or(Format::Jsonl)
    }
}

#[derive(Args)]
#[command(next_help_heading = "Scores")]
struct ScoreArgs {
    /// Class prior of the scores: uniform, train, or a JSON file with a list of one number per class or an object that
    /// maps labels to numbers [default: uniform]
    #[arg(long)]
    prior: Option<String>,
    /// Add prediction sets that miss the true class for at most this share of the images, such as 0.1
    #[arg(long)]
    alpha: Option<f64>,
    /// Score that prediction sets are built from [default: posterior; pas with --set-rung, or with a calibration of an
    /// earlier version]
    #[arg(long, requires = "alpha")]
    set_score: Option<SetScore>,
    /// Images over which the sets' coverage must hold [default: shrunk with posterior, else marginal]
    #[arg(long, requires = "alpha")]
    set_rung: Option<SetRung>,
    /// Leave out classes with a lower score; abstain if none is left
    #[arg(long, value_parser = share)]
    min_score: Option<f64>,
    /// Abstain if the prediction set has more classes than this
    #[arg(long, requires = "alpha", value_parser = clap::value_parser!(u32).range(1..))]
    max_set_size: Option<u32>,
    /// Abstain if the best class has no calibration images
    #[arg(long)]
    abstain_prior_only: bool,
    /// Abstain if the image is unlike the training images: of images like them, at most this share is withheld, such as
    /// 0.01. Adds the column familiarity; the model must have been calibrated with its training images
    #[arg(long, value_name = "SHARE", value_parser = share)]
    unlike: Option<f64>,
}

#[derive(Args)]
#[command(next_help_heading = "Source")]
struct SourceArgs {
    /// Where true classes are read from; if they are known, rows have a label and the summary has an accuracy
    #[arg(long, default_value = "given")]
    labels: Labels,
    /// Column of a list or table that holds the path or the encoded image [default: the first of path, image,
    /// image_path, file, file_name, filename and bytes]
    #[arg(long, value_name = "NAME")]
    image_column: Option<String>,
    /// Column that holds the true class, as label or index [default: the first of label, class and target]
    #[arg(long, value_name = "NAME")]
    label_column: Option<String>,
    /// What to do with an image that the source lists more than once
    #[arg(long, default_value = "keep")]
    duplicates: Duplicates,
    /// Score only this share of the images: INDEX/COUNT, or auto/COUNT to take the index from JOB_COMPLETION_INDEX
    /// (Kubernetes) or SLURM_ARRAY_TASK_ID (Slurm)
    #[arg(long, value_name = "SHARE", value_parser = shard)]
    shard: Option<Shard>,
    /// Largest accepted file, in MiB
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_file_mb: u32,
    /// Number of files to read at the same time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    readers: u16,
    /// Memory for images that are read but not yet scored, in MiB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    memory_mb: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Duplicates {
    /// Write a row each time
    Keep,
    /// Write a row only the first time
    Skip,
}

fn shard(text: &str) -> Result<Shard, String> {
    Shard::parse(text, |name| std::env::var(name).ok()).map_err(|error| error.to_string())
}

/// What workers have to end, once everything is written.
const LAST_MOMENT: Duration = Duration::from_secs(10);

pub(crate) fn score(args: Score) -> anyhow::Result<ExitCode> {
    let budget = Arc::new(Budget::new(args.engine.workers()));
    let result = run(args, &budget);
    // They close their sessions: the runtime should not be taken from under them.
    budget.wait_for_workers(Instant::now() + LAST_MOMENT);
    result
}

fn run(args: Score, budget: &Arc<Budget>) -> anyhow::Result<ExitCode> {
    args.rows.format().is_built()?;
    let signals = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (_sender, told) = signals.block_on(async { shutdown::on_signal() })?;
    let stopped = Stopped::when(move || *told.borrow());
    let shard = args.source.shard.unwrap_or_default();
    let options = SourceOptions {
        labels: args.source.labels,
        image_column: args.source.image_column.clone(),
        label_column: args.source.label_column.clone(),
        max_file_bytes: u64::from(args.source.max_file_mb) << 20,
        stores: Stores::default(),
        stopped: stopped.clone(),
        shard,
    };
    let stdin = [PathBuf::from("-")];
    let inputs = if args.inputs.is_empty() { &stdin[..] } else { &args.inputs };
    let source = Source::open(inputs, &options, BufReader::new(io::stdin()))?;
    let bundle = Bundle::open(&args.model)?;
    let bundle_files = bundle.files();
    let model = start(&args, bundle, budget)?;
    let classes = &model.manifest.classes;
    if args.rows.features && !model.manifest.has_output(FEATURES) {
        bail!(
            "--features: the network of {} has no output {FEATURES}: make the bundle again, by `nbn fold export` without --no-features",
            args.model.display()
        );
    }
    let columns = Columns {
        top_k: (args.rows.top_k as usize).min(classes.len()),
        label: source.has_labels(),
        set: args.scores.alpha.is_some(),
        familiarity: args.scores.asks_for_familiarity(),
        probabilities: args.rows.probabilities,
        logits: args.rows.logits,
        features: args.rows.features,
    };
    let rule = model.scorer.rule(args.scores.request(classes)?, &Prior::default())?;
    let min_score = args.scores.min_score.unwrap_or(0.0);
    let scoring = Scoring { manifest: &model.manifest, scorer: &model.scorer, rule, min_score, columns };
    let origin = Origin::new((&model.name, &model.version), &model.scorer, &scoring.rule, args.pixels);
    let form = Form { format: args.rows.format(), columns, classes, origin: &origin };
    // Everything is checked: from here on files may change.
    refuse_overwriting(&args, inputs, &bundle_files)?;
    args.rows.check_ending()?;
    let summary_file = args.summary.as_deref().map(SummaryFile::open).transpose()?;
    let mut committed = HashMap::new();
    let (mut output, place) = match (&args.rows.output_dir, &args.rows.output) {
        (Some(folder), _) => {
            let record = record(&args, &model, form);
            let (parts, done) = Parts::open(folder, shard, &record, form, args.rows.part_rows, args.rows.resume)?;
            committed = done;
            (Rows::Parts(parts), folder.display().to_string())
        }
        (None, Some(path)) => (Rows::file(path, form)?, path.display().to_string()),
        (None, None) => (Rows::stdout(form)?, "stdout".into()),
    };
    let bar = bar(source.len())?;
    let run = batch::BatchOptions {
        max_file_bytes: options.max_file_bytes,
        memory: u64::from(args.source.memory_mb) << 20,
        readers: args.source.readers.into(),
        skip_duplicates: args.source.duplicates == Duplicates::Skip,
        committed,
        stopped,
    };
    let result = batch::run(source, &model.engine, &scoring, &mut output, run, |summary| {
        bar.set_position(summary.images());
        if summary.failed > 0 {
            bar.set_message(format!("({} failed)", summary.failed));
        }
    });
    bar.finish_and_clear();
    let result = result.and_then(|summary| {
        // A run that ended early has nothing to take the place of an earlier run's rows.
        if summary.scored + summary.failed == 0 && summary.broken.is_empty() && !summary.interrupted {
            output.finish_empty()?;
        }
        Ok(summary)
    });
    let summary = match result {
        // The reader of a pipe has seen enough.
        Err(error) if error.kind() == Some(io::ErrorKind::BrokenPipe) => return Ok(ExitCode::SUCCESS),
        Err(error @ (WriteError::Full { .. } | WriteError::Part { .. })) => return Err(error.into()),
        result => result.with_context(|| format!("a row could not be written to {place}"))?,
    };
    tell!("{}", describe(&summary));
    for reason in &summary.broken {
        tell!("nbn: {reason}");
    }
    if let Some(file) = &summary_file {
        file.write(&serde_json::to_vec_pretty(&summary)?)?;
    }
    if summary.images() == 0 && summary.broken.is_empty() && !summary.interrupted {
        tell!(
            "nbn: nothing was scored: the source has no images{}",
            if shard.count() > 1 { " in this share" } else { "" }
        );
    }
    if summary.interrupted {
        let resume = if args.rows.output_dir.is_some() { ": continue with --resume" } else { "" };
        tell!("stopped before the end{resume}");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    let failed = !summary.broken.is_empty() || (summary.failed > 0 && !args.errors_exit_zero);
    Ok(ExitCode::from(u8::from(failed)))
}

/// Refuses files for the rows and the summary that the run reads, or needs for something else.
fn refuse_overwriting(args: &Score, inputs: &[PathBuf], bundle_files: &[PathBuf]) -> anyhow::Result<()> {
    let named = |role, path: &Path| Named { role, path: path.to_owned() };
    let output = args.rows.output.iter().map(|path| named("--output", path));
    let written = output.chain(args.summary.iter().map(|path| named("--summary", path)));
    let read = inputs.iter().map(|input| named("the input", file_of(input)));
    let prior = args.scores.prior.iter().map(Path::new).filter(|path| path.is_file());
    let prior = prior.map(|path| named("--prior", path));
    let bundle_files = bundle_files.iter().map(|path| named("the bundle's file", path));
    let library = args.engine.onnxruntime.iter().map(|path| named("--onnxruntime", path));
    let read: Vec<Named> = read.chain(prior).chain(bundle_files).chain(library).collect();
    target::refuse_overwriting(written.collect(), &read)?;
    if let (Some(folder), Some(path)) = (&args.rows.output_dir, &args.summary)
        && Parts::may_write(folder, path)
    {
        bail!(
            "--summary {} has a name that --output-dir {} needs for its rows: give another file",
            path.display(),
            folder.display()
        );
    }
    Ok(())
}

/// The file that `input` names on this machine.
fn file_of(input: &Path) -> &Path {
    match input.to_str() {
        Some("-") => Path::new("/dev/stdin"),
        Some(text) => Path::new(text.strip_prefix("file://").unwrap_or(text)),
        None => input,
    }
}

fn start(args: &Score, bundle: Bundle, budget: &Arc<Budget>) -> anyhow::Result<ServedModel> {
    let library = Library::load(args.engine.onnxruntime.as_deref())?;
    let workers = args.engine.workers();
    let options = ModelOptions {
        workers,
        place: args.engine.place(),
        limits: DecodeLimits { pixels: args.pixels, ..args.engine.limits() },
        queue: QUEUE * workers,
        batch: BatchChoice::Measured,
        features: args.rows.features,
        cache: args.engine.cache(),
    };
    Ok(ServedModel::start(bundle, library, &options, budget.clone())?)
}

impl ScoreArgs {
    /// 0 withholds nothing.
    fn asks_for_familiarity(&self) -> bool {
        self.unlike.is_some_and(|unlike| unlike > 0.0)
    }

    fn request(&self, classes: &[Class]) -> anyhow::Result<ScoreRequest> {
        Ok(ScoreRequest {
            prior: self.prior.as_deref().map(|text| prior(text, classes)).transpose()?,
            alpha: self.alpha,
            set_score: self.set_score,
            set_rung: self.set_rung,
            familiarity: self.asks_for_familiarity(),
            abstention: Abstention {
                unlike: self.unlike,
                min_score: self.min_score,
                max_set_size: self.max_set_size.map(|n| n as usize),
                prior_only: self.abstain_prior_only,
            },
        })
    }
}

/// What every part of a folder must have in common.
fn record(args: &Score, model: &ServedModel, form: Form<'_>) -> RunRecord {
    let (scores, source) = (&args.scores, &args.source);
    let calibration = model.scorer.calibration().map(|calibration| calibration.id.clone());
    let sets = scores.alpha.map(|alpha| {
        json!({"alpha": alpha, "score": format!("{:?}", scores.set_score), "rung": format!("{:?}", scores.set_rung)})
    });
    let record = json!({
        "nbn": env!("CARGO_PKG_VERSION"),
        "model": model.name,
        "version": model.version,
        "network": model.manifest.model.sha256,
        "calibration": calibration,
        "inputs": nbn::bundle::inputs_sha256(&model.manifest),
        "format": form.format,
        "columns": form.columns,
        "scale": form.origin.scale,
        "prior": form.origin.prior,
        "sets": sets,
        "min_score": scores.min_score,
        "max_set_size": scores.max_set_size,
        "abstain_prior_only": scores.abstain_prior_only,
        "unlike": scores.unlike,
        "labels": source.labels,
        "image_column": source.image_column,
        "label_column": source.label_column,
        "duplicates": source.duplicates,
        "max_file_mb": source.max_file_mb,
        "max_pixels": args.engine.max_pixels,
        "pixels": args.pixels,
    });
    record.as_object().cloned().unwrap_or_default()
}

fn bar(images: Option<u64>) -> anyhow::Result<indicatif::ProgressBar> {
    if !io::stderr().is_terminal() {
        return Ok(indicatif::ProgressBar::hidden());
    }
    let (bar, template) = match images {
        Some(images) => {
            (indicatif::ProgressBar::new(images), "{bar:32} {pos}/{len} images, {per_sec}, {eta} left {msg}")
        }
        None => (indicatif::ProgressBar::no_length(), "{spinner} {pos} images, {per_sec}, {elapsed} {msg}"),
    };
    Ok(bar.with_style(indicatif::ProgressStyle::with_template(template)?))
}

/// The run in words and a table, for people.
fn describe(summary: &Summary) -> String {
    let Summary { scored, failed, resumed, duplicates, abstained, unknown_labels, seconds, .. } = summary;
    let list = |counts: &std::collections::BTreeMap<&str, u64>| {
        counts.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", ")
    };
    let mut lines = vec![("scored", format!("{scored} images in {}{}", span(seconds.total), rate(summary)))];
    let mut line = |wanted: bool, name: &'static str, text: String| {
        if wanted {
            lines.push((name, text));
        }
    };
    line(*failed > 0, "failed", format!("{failed}: {}", list(&summary.errors)));
    line(*resumed > 0, "left out", format!("{resumed} that already had a row"));
    line(*duplicates > 0, "left out", format!("{duplicates} that the source names twice"));
    line(*scored > 0, "best class", format!("by training images: {}", list(&summary.predicted)));
    line(*abstained > 0, "abstained", format!("{abstained}"));
    if let Some(accuracy) = &summary.accuracy {
        let of =
            |name: &str, value: Option<f64>| value.map(|v| format!(", {name} {:.1} %", 100.0 * v)).unwrap_or_default();
        let groups = [("many", accuracy.many), ("medium", accuracy.medium), ("few", accuracy.few)];
        let groups: String = groups.map(|(name, value)| of(name, value)).concat();
        let (top1, recall) = (100.0 * accuracy.top1, 100.0 * accuracy.mean_recall);
        line(true, "right", format!("{top1:.1} % of {} images", accuracy.images));
        let of_accepted = accuracy.accepted_top1.map(|top1| format!(", of which {:.1} % are right", 100.0 * top1));
        line(*abstained > 0, "accepted", format!("{}{}", accuracy.accepted, of_accepted.unwrap_or_default()));
        line(true, "recall", format!("{recall:.1} % on average over classes{groups}"));
    }
    line(*unknown_labels > 0, "labels", format!("{unknown_labels} are not classes of the model"));
    let stages = [("reading", seconds.read), ("decoding", seconds.decode), ("preparing", seconds.preprocess)];
    let stages = stages.into_iter().chain([("network", seconds.infer), ("rows", seconds.write)]);
    let stages: Vec<String> = stages.map(|(name, s)| format!("{name} {}", span(s))).collect();
    line(*scored > 0, "time", format!("{}, summed over threads", stages.join(", ")));
    lines.into_iter().fold(String::new(), |all, (name, text)| all + &format!("{name:<11} {text}\n"))
}

/// How many images a second, or a minute where that is less than one.
fn rate(summary: &Summary) -> String {
    let rate = summary.images_per_second;
    match rate {
        _ if summary.scored == 0 || !rate.is_finite() => String::new(),
        100.0.. => format!(", {rate:.0} images/s"),
        1.0.. => format!(", {rate:.1} images/s"),
        _ => format!(", {:.1} images/min", 60.0 * rate),
    }
}

/// Seconds in the unit that people read.
fn span(seconds: f64) -> String {
    match seconds {
        60.0.. => format!("{}:{:02} min", (seconds / 60.0) as u64, (seconds % 60.0) as u64),
        1.0.. => format!("{seconds:.1} s"),
        0.001.. => format!("{:.0} ms", 1e3 * seconds),
        _ => "0 ms".into(),
    }
}

/// A prior by its name, or from a JSON file.
fn prior(text: &str, classes: &[Class]) -> anyhow::Result<Prior> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Weights {
        Vector(Vec<f64>),
        Map(std::collections::BTreeMap<String, f64>),
    }
    match text {
        "uniform" => return Ok(Prior::Uniform),
        "train" => return Ok(Prior::Train),
        _ => {}
    }
    let bytes = std::fs::read(text)
        .with_context(|| format!("--prior {text}: expected uniform, train, or a file that can be read"))?;
    let weights = serde_json::from_slice(&bytes).with_context(|| {
        format!("--prior {text}: expected JSON: a list of numbers, or an object that maps labels to numbers")
    })?;
    let prior = match weights {
        Weights::Vector(weights) => Prior::custom(weights, classes),
        Weights::Map(weights) => Prior::from_labels(weights.iter().map(|(l, w)| (l.as_str(), *w)), classes),
    };
    prior.with_context(|| format!("--prior {text}"))
}
