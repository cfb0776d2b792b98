//! `nbn score`.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use nbn::bundle::{Bundle, Class};
use nbn::classify::{Abstention, ScoreRequest};
use nbn::engine::Budget;
use nbn::registry::{BatchChoice, ModelOptions, ServedModel};
use nbn::runtime::Library;
use nbn::score::{self, Format, Scoring, Sink};
use nbn::scores::{Prior, SetRung, SetScore};

use crate::EngineArgs;

#[derive(Args)]
pub(crate) struct Score {
    /// The bundle: models/NAME (its highest version) or models/NAME/VERSION
    #[arg(long)]
    model: PathBuf,
    /// Form of the rows
    #[arg(long, default_value = "jsonl")]
    format: Format,
    /// File for the rows [default: stdout]
    #[arg(long)]
    output: Option<PathBuf>,
    /// Classes per image, the best first
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    top_k: u32,
    /// Class prior to score under: uniform, train, or a JSON file with a number per class or an object from label to
    /// number [default: uniform]
    #[arg(long)]
    prior: Option<String>,
    /// Add prediction sets that miss the true class at most this often
    #[arg(long)]
    alpha: Option<f64>,
    /// Score of the prediction sets
    #[arg(long, default_value = "pas", requires = "alpha")]
    set_score: SetScore,
    /// For whom the sets' coverage shall hold
    #[arg(long, default_value = "marginal", requires = "alpha")]
    set_rung: SetRung,
    /// Leave out classes that score less; abstain when that leaves none
    #[arg(long, value_parser = probability)]
    min_score: Option<f64>,
    /// Abstain when the set is larger
    #[arg(long, requires = "alpha", value_parser = clap::value_parser!(u32).range(1..))]
    max_set_size: Option<u32>,
    /// Abstain when the best class has no calibration image
    #[arg(long)]
    abstain_prior_only: bool,
    /// Largest file, in MiB
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_file_mb: u32,
    #[command(flatten)]
    engine: EngineArgs,
    /// Image files and folders; without any, or with -, a list of paths on stdin
    inputs: Vec<PathBuf>,
}

fn probability(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|p| (0.0..=1.0).contains(p)).ok_or_else(|| "it must be a number from 0 to 1".into())
}

pub(crate) fn score(args: Score) -> anyhow::Result<ExitCode> {
    let from_stdin = args.inputs.is_empty() || args.inputs == [Path::new("-")];
    let paths = if from_stdin { score::from_list(io::stdin().lock())? } else { score::expand(&args.inputs)? };
    let library = Library::load(args.engine.onnxruntime.as_deref())?;
    let workers = args.engine.workers();
    let options = ModelOptions {
        workers,
        session: args.engine.session(),
        limits: args.engine.limits(),
        queue: 4 * workers,
        batch: BatchChoice::Measured,
        cache: args.engine.cache(),
    };
    let bundle = Bundle::open(&args.model)?;
    let model = ServedModel::start(bundle, library, &options, Arc::new(Budget::new(workers)))?;
    let top_k = (args.top_k as usize).min(model.manifest.classes.len());
    let request = ScoreRequest {
        prior: args.prior.as_deref().map(|text| prior(text, &model.manifest.classes)).transpose()?,
        alpha: args.alpha,
        set_score: args.set_score,
        set_rung: args.set_rung,
        abstention: Abstention {
            min_score: args.min_score,
            max_set_size: args.max_set_size.map(|n| n as usize),
            prior_only: args.abstain_prior_only,
        },
    };
    let rule = model.scorer.rule(request, &Prior::default())?;
    let min_score = args.min_score.unwrap_or(0.0);
    let scoring = Scoring { manifest: &model.manifest, scorer: &model.scorer, rule, top_k, min_score };
    let output: Box<dyn Write> = match &args.output {
        Some(path) => Box::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?),
        None => Box::new(io::stdout().lock()),
    };
    let mut sink = Sink::new(BufWriter::new(output), args.format, scoring)?;
    let bar = if io::stderr().is_terminal() {
        let style =
            indicatif::ProgressStyle::with_template("{bar:32} {pos}/{len} images, {per_sec}, {eta} left {msg}")?;
        indicatif::ProgressBar::new(paths.len() as u64).with_style(style)
    } else {
        indicatif::ProgressBar::hidden()
    };
    let limit = u64::from(args.max_file_mb) << 20;
    let result = score::run(paths.into_iter(), &model.engine, limit, &mut sink, |summary| {
        bar.inc(1);
        if summary.failed > 0 {
            bar.set_message(format!("({} failed)", summary.failed));
        }
    });
    bar.finish_and_clear();
    let summary = match result {
        // The reader of a pipe has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
        result => result.context("a row could not be written")?,
    };
    eprintln!("{} images scored, {} failed", summary.scored, summary.failed);
    Ok(ExitCode::from(u8::from(summary.failed > 0)))
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
    let bytes =
        std::fs::read(text).with_context(|| format!("--prior {text}: neither uniform, train, nor a file to read"))?;
    let weights = serde_json::from_slice(&bytes).with_context(|| {
        format!("--prior {text}: expected JSON, a list of numbers or an object from label to number")
    })?;
    let prior = match weights {
        Weights::Vector(weights) => Prior::custom(weights, classes),
        Weights::Map(weights) => Prior::from_labels(weights.iter().map(|(l, w)| (l.as_str(), *w)), classes),
    };
    prior.with_context(|| format!("--prior {text}"))
}
