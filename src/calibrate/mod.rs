//! Labelled logits → `calibration.json`: prior-aware structured vector scaling, shrunk as cross-validation says, and the
//! thresholds of prediction sets. The method and its formulas: docs/calibration.md.

mod command;
mod conformal;
mod cross_validate;
mod describe;
mod familiarity;
mod ladder;
mod optimize;

use std::time::SystemTime;

use crate::bundle::{
    CALIBRATION_SCHEMA_VERSION, Calibration, ClassCalibration, FitMetrics, FitReport, KappaSource, Manifest, Pixels,
    PosteriorTable, Rung, SetTables, Status, TrainingOverlap, inputs_sha256, train_prior,
};
use crate::data::LabelledLogits;
use crate::metrics;
use crate::scores::{argmax, softmax_in_place};
use cross_validate::{Candidate, CrossValidation, candidates, fit_all, folds_of};

pub use command::command_line;
pub use conformal::{threshold, weighted_threshold};
pub use cross_validate::divided;
pub use describe::describe;
pub use familiarity::{FamiliarityFitError, LEAST_TRAINING, MOST_FEATURES, Training, familiarity};
pub use ladder::{Kappa, Parameters, Problem, TOWARDS_UNIFORM, temperature_alone};

/// Fewer images than this allow the prior shift only.
const LEAST_FOR_TEMPERATURE: usize = 30;
/// A class is `fitted` whose own images say at least this share of its scale; else it is `pooled`.
const LEAST_OWN_SHARE: f64 = 0.5;

/// How to calibrate.
#[derive(Debug, Clone)]
pub struct CalibrateOptions {
    /// Whether the prior was taken out of the logits. When absent, what the checkpoint says of its loss; learned where that
    /// says nothing or a logit-rectification head stands behind it.
    pub kappa: Option<Kappa>,
    /// Fit no more than this rung allows, with λ 1; a higher one than the samples allow is refused.
    pub rung: Option<Rung>,
    /// Seed of the folds.
    pub seed: u64,
    /// The group of each image; none is divided between folds. Without them, every image is one of its own.
    pub groups: Option<Vec<usize>>,
    /// Whether the images were compared with the training images.
    pub training_overlap: TrainingOverlap,
    /// Which pixels of JPEGs the network saw.
    pub pixels: Pixels,
    /// The command line, for the record.
    pub command: String,
}

/// Why a bundle was not calibrated.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum CalibrateError {
    /// The training prior is unknown.
    #[error(
        "the bundle has no training count above 0 for class {0:?}, so its class prior is unknown: export the checkpoint \
         again with --classes and a file of label,count"
    )]
    NoCount(String),
    /// All labels are the same.
    #[error("all {images} calibration images are of class {label:?}: calibration needs images of at least 2 classes")]
    OneClass {
        /// Number of images.
        images: usize,
        /// The class.
        label: String,
    },
    /// A rung was asked for that the samples do not allow.
    #[error(
        "{images} calibration images allow no more than {highest}; {rung} was asked for: calibrate with more images"
    )]
    Rung {
        /// What was asked for.
        rung: &'static str,
        /// Number of images.
        images: usize,
        /// The most that they allow.
        highest: &'static str,
    },
    /// Images that are too good to be true.
    #[error(
        "all {0} calibration images are classified right: were they held out of training? Give the training images with \
         --training-data, to make sure"
    )]
    AllRight(usize),
    /// T runs away.
    #[error("the fitted temperature reached its limit, {temperature} (accepted: above 0.05, below 20): {hint}")]
    Temperature {
        /// The limit that was reached.
        temperature: f64,
        /// What it most likely means.
        hint: &'static str,
    },
}

/// Fits `manifest`'s bundle to its `logits` of held-out images. `progress` is told what is being done.
///
/// # Errors
/// When the training prior is unknown, the labels are of one class, or no temperature fits.
pub fn calibrate(
    logits: &LabelledLogits,
    manifest: &Manifest,
    options: &CalibrateOptions,
    progress: &dyn Fn(&str),
) -> Result<Calibration, CalibrateError> {
    let train = train_prior(&manifest.classes).ok_or_else(|| {
        let without = manifest.classes.iter().find(|c| c.count.is_none_or(|n| n == 0));
        CalibrateError::NoCount(without.map_or_else(String::new, |c| c.label.clone()))
    })?;
    let centred = logits.centred();
    let logits = &centred;
    let counts = logits.counts();
    if let Some(only) = counts.iter().position(|&n| n == logits.len() as u64) {
        return Err(CalibrateError::OneClass { images: logits.len(), label: manifest.classes[only].label.clone() });
    }
    let log_train: Vec<f64> = train.iter().map(|p| p.ln()).collect();
    let n = logits.len() as f64;
    // A class without an image has π_cal = 0 and takes no part in the fit.
    let shift: Vec<f64> =
        counts.iter().zip(&log_train).map(|(&count, prior)| (count as f64 / n).ln() - prior).collect();
    let highest = if logits.len() < LEAST_FOR_TEMPERATURE { Rung::PriorShift } else { Rung::StructuredVectorScaling };
    if let Some(rung) = options.rung.filter(|r| *r > highest) {
        return Err(CalibrateError::Rung { rung: rung.name(), images: logits.len(), highest: highest.name() });
    }
    let problem = |kappa: Kappa, rows: Vec<u32>| {
        let ridge = logits.classes() as f64 / rows.len() as f64;
        Problem { logits, rows, log_train: &log_train, shift: &shift, kappa, ridge, towards_uniform: TOWARDS_UNIFORM }
    };
    let folds = folds_of(logits, options.groups.as_deref(), options.seed);
    let cross_validate = |kappa: Kappa, candidates: &[Candidate]| {
        CrossValidation::run(logits, &folds, &|rows| problem(kappa, rows), candidates, progress)
    };
    let (asked, source) = match (options.kappa, manifest.fold.kappa) {
        (Some(kappa), _) => (kappa, KappaSource::Given),
        (None, Some(kappa)) => (Kappa::Around(kappa), KappaSource::Checkpoint),
        (None, None) => (Kappa::Learned, KappaSource::Learned),
    };
    let (kappa, source) = match asked {
        Kappa::Fixed(_) | Kappa::Around(_) => (asked, source),
        Kappa::Learned => {
            progress("choosing κ: around 0, around 1, or learned");
            let shared = [Candidate { rung: highest.min(Rung::Temperature), strength: 1.0 }];
            let mut around = vec![Kappa::Fixed(0.0), Kappa::Fixed(1.0)];
            // Where nothing else is fitted, there are too few images for κ, too.
            if highest > Rung::PriorShift {
                around.push(Kappa::Learned);
            }
            let around: Vec<_> = around.into_iter().map(|kappa| (kappa, cross_validate(kappa, &shared))).collect();
            match CrossValidation::choose_kappa(&around) {
                Some(Kappa::Fixed(kappa)) => (Kappa::Around(kappa), KappaSource::Chosen),
                _ => (Kappa::Learned, KappaSource::Learned),
            }
        }
    };
    let candidates = candidates(highest);
    let validation = cross_validate(kappa, &candidates);
    let chosen = match options.rung {
        None => validation.choose(logits),
        Some(rung) => {
            let usual = |c: &Candidate| c.rung == rung && c.strength == 1.0;
            candidates.iter().position(usual).unwrap_or(candidates.len() - 1)
        }
    };
    let Candidate { rung, strength } = candidates[chosen];
    progress("fitting all images");
    let whole = problem(kappa, (0..logits.len() as u32).collect());
    // As in the folds: from the temperature, by way of the stronger ones.
    let fits = fit_all(&whole, &candidates[..=chosen]);
    let fit = &fits[chosen];
    let shares = match rung {
        Rung::StructuredVectorScaling => whole.own_shares(fit, strength),
        _ => vec![0.0; logits.classes()],
    };
    let report = report(logits, options, &validation, chosen);
    if rung >= Rung::Temperature {
        // That all are right says how easy they are, or that they were trained on.
        if report.before.accuracy == 1.0 && options.training_overlap == TrainingOverlap::NotChecked {
            return Err(CalibrateError::AllRight(logits.len()));
        }
        check_temperature(fit.inverse_temperature.recip())?;
    }
    progress("prediction sets");
    let own = validation.own_class_probabilities(logits, chosen, &log_train, false);
    let own_uniform = validation.own_class_probabilities(logits, chosen, &log_train, true);
    let adjusted: Vec<f64> = own.iter().zip(logits.labels()).map(|(p, &l)| -p / train[l as usize]).collect();
    let plain: Vec<f64> = own.iter().map(|p| -p).collect();
    let table = |scores: &[f64]| conformal::table(scores, logits.labels(), &manifest.classes, &train);
    let even: Vec<f64> = own_uniform.iter().map(|p| -p).collect();
    let shrunk = |scores: &[f64], target: &dyn Fn(usize) -> f64| {
        conformal::shrunk(scores, logits.labels(), &manifest.classes, target)
    };
    let posterior = PosteriorTable {
        calibration: shrunk(&plain, &|k| counts[k] as f64),
        uniform: shrunk(&even, &|_| 1.0),
        train: shrunk(&plain, &|k| train[k]),
    };
    let status = |support: u64, share: f64| match support {
        0 => Status::PriorOnly,
        _ if share >= LEAST_OWN_SHARE => Status::Fitted,
        _ => Status::Pooled,
    };
    let classes = manifest.classes.iter().zip(fit.a()).zip(fit.c(&log_train)).zip(&train).zip(&counts).zip(&shares);
    Ok(Calibration {
        schema_version: CALIBRATION_SCHEMA_VERSION,
        model_sha256: manifest.model.sha256.clone(),
        inputs_sha256: inputs_sha256(manifest),
        rung,
        temperature: fit.inverse_temperature.recip(),
        kappa: fit.kappa,
        kappa_source: source,
        trend: fit.trend,
        shrinkage: strength,
        temperature_alone: temperature_alone(logits),
        classes: classes
            .map(|(((((class, a), c), &train_prior), &support), &share)| ClassCalibration {
                label: class.label.clone(),
                a,
                c,
                train_prior,
                support,
                status: status(support, share),
            })
            .collect(),
        sets: SetTables {
            alphas: conformal::ALPHAS.to_vec(),
            pas: table(&adjusted),
            plain: table(&plain),
            posterior: Some(posterior),
        },
        familiarity: None,
        fit: report,
    })
}

fn check_temperature(temperature: f64) -> Result<(), CalibrateError> {
    let [least, most] = ladder::TEMPERATURE;
    let hint = if temperature <= least * 1.0001 {
        "the calibration images are (nearly) all classified right; were they held out of training?"
    } else if temperature >= most * 0.9999 {
        "the logits say almost nothing about the labels; are the labels in the order of the bundle's classes?"
    } else {
        return Ok(());
    };
    Err(CalibrateError::Temperature { temperature, hint })
}

fn report(
    logits: &LabelledLogits,
    options: &CalibrateOptions,
    validation: &CrossValidation,
    chosen: usize,
) -> FitReport {
    let ladder = validation.report(chosen);
    let mut confidence = Vec::with_capacity(logits.len());
    let mut hits = Vec::with_capacity(logits.len());
    let (mut nll, mut flips) = (0.0, 0);
    let mut p = Vec::with_capacity(logits.classes());
    let chosen = &validation.tried[chosen];
    for (row, &label) in logits.labels().iter().enumerate() {
        p.clear();
        p.extend(logits.row(row).iter().map(|z| f64::from(*z)));
        let own = p[label as usize];
        nll += softmax_in_place(&mut p) - own;
        let best = argmax(&p);
        confidence.push(p[best]);
        hits.push(f64::from(u8::from(best == label as usize)));
        flips += u64::from(chosen.predicted[row] as usize != best);
    }
    let n = logits.len() as f64;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / n;
    FitReport {
        by: format!("fold {}", env!("CARGO_PKG_VERSION")),
        created: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        command: options.command.clone(),
        images: logits.len() as u64,
        training_overlap: options.training_overlap,
        pixels: options.pixels,
        ladder,
        before: FitMetrics { nll: nll / n, ece: metrics::ece(&confidence, &hits), accuracy: mean(&hits) },
        after: FitMetrics {
            nll: mean(&chosen.nll),
            ece: metrics::ece(&chosen.confidence, &chosen.hits),
            accuracy: mean(&chosen.hits),
        },
        top1_flips: flips,
    }
}
