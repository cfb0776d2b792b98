//! A calibration in words, as `nbn fold calibrate` and `nbn fold inspect` print it.

use std::fmt::Write;

use crate::bundle::{Calibration, KappaSource, Rung, Status, TrainingOverlap};

/// Classes named in a line before "and others".
const NAMED: usize = 8;

/// What was fitted, on what, and what it changed. `id` is the name that answers give it, once it is written.
pub fn describe(calibration: &Calibration, id: Option<&str>) -> String {
    let mut out = String::new();
    let fit = &calibration.fit;
    let overlap = match fit.training_overlap {
        TrainingOverlap::NotChecked => "not compared with the training images",
        TrainingOverlap::None => "none of them used in training",
    };
    // Writing to a String cannot fail.
    if let Some(id) = id {
        let _ = writeln!(out, "calibration {id}, {}", fit.created);
    }
    let supports = calibration.classes.iter().map(|c| c.support);
    let _ = writeln!(
        out,
        "images      {}, {} to {} per class; {overlap}",
        fit.images,
        supports.clone().min().unwrap_or(0),
        supports.max().unwrap_or(0)
    );
    let _ = writeln!(
        out,
        "ladder      cross-validated NLL, classes balanced; standard error of its difference from the best; NLL of this mix"
    );
    for rung in &fit.ladder {
        let mark = if rung.rung == calibration.rung { "  <- chosen" } else { "" };
        let (name, error) = (rung.rung.name(), rung.standard_error);
        let _ = writeln!(out, "            {name:<34} {:.4}  {error:.4}  {:.4}{mark}", rung.balanced_nll, rung.nll);
    }
    let source = match calibration.kappa_source {
        KappaSource::Given => "given",
        KappaSource::Checkpoint => "shrunk to what the checkpoint's loss implies",
        KappaSource::Chosen => "shrunk to 0 or 1, whichever cross-validation preferred",
        KappaSource::Learned => "learned",
    };
    let _ = writeln!(
        out,
        "fit         T {:.4}, κ {:.3} ({source}); temperature alone would be {:.4}",
        calibration.temperature, calibration.kappa, calibration.temperature_alone
    );
    let _ = match calibration.rung {
        Rung::PriorShift => writeln!(
            out,
            "            nothing but the prior. Where κ is 1, scores under the uniform prior are the softmax"
        ),
        Rung::Temperature => Ok(()),
        Rung::TemperatureBias => writeln!(out, "            a bias per class"),
        Rung::StructuredVectorScaling if calibration.shrinkage == 0.0 => {
            writeln!(out, "            a scale and a bias per class")
        }
        Rung::StructuredVectorScaling => writeln!(
            out,
            "            a scale and a bias per class, shrunk (λ {}) to a trend over the classes' frequencies (t {:+.3})",
            calibration.shrinkage, calibration.trend
        ),
    };
    let (before, after) = (&fit.before, &fit.after);
    let _ = writeln!(
        out,
        "before      NLL {:.4}, ECE {:.4}, accuracy {:.4}: softmax, which knows nothing of this class mix",
        before.nll, before.ece, before.accuracy
    );
    let _ = writeln!(
        out,
        "after       NLL {:.4}, ECE {:.4}, accuracy {:.4}: each image scored by a fit that did not use it, under this \
         class mix; {} best classes changed",
        after.nll, after.ece, after.accuracy, fit.top1_flips
    );
    for status in [Status::Fitted, Status::Pooled, Status::PriorOnly] {
        let of: Vec<_> = calibration.classes.iter().filter(|c| c.status == status).collect();
        if of.is_empty() {
            continue;
        }
        let named: Vec<String> = of.iter().take(NAMED).map(|c| format!("{} {}", c.label, c.support)).collect();
        let more = if of.len() > NAMED { ", …" } else { "" };
        let _ = writeln!(out, "{:<11} {} classes: {}{more}", status.name(), of.len(), named.join(", "));
    }
    let finest = calibration.sets.alphas.iter().zip(&calibration.sets.pas.marginal.uniform).find(|(_, t)| t.is_some());
    let _ = match finest {
        Some((alpha, _)) => writeln!(out, "sets        for α of {alpha} and more, under the uniform prior"),
        None => writeln!(out, "sets        none: too few images"),
    };
    if let Some(familiarity) = &calibration.familiarity {
        let asked: Vec<&str> = familiarity.questions.iter().map(|asked| asked.question.name()).collect();
        let from = match familiarity.training_images {
            0 => "no training images".to_owned(),
            n => format!("{n} training images"),
        };
        let _ = writeln!(out, "familiarity by {}; {from}", asked.join(", "));
    }
    out
}
