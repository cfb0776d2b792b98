//! Figures in words, as `nbn fold evaluate` prints them.

use std::fmt::Write;

use super::{Comparison, Evaluation, FamiliarityFigures, Figure, PriorFigures};

/// Columns of the printed tables: heading, metric, factor.
const COLUMNS: [(&str, &str, f64); 8] = [
    ("top-1 %", "top1", 100.0),
    ("NLL", "nll", 1.0),
    ("Brier", "brier", 1.0),
    ("ECE %", "ece", 100.0),
    ("(null)", "ece", 100.0),
    ("cw-ECE %", "classwise_ece", 100.0),
    ("cover %", "posterior_coverage", 100.0),
    ("set size", "posterior_size", 1.0),
];

impl Evaluation {
    /// A table per prior.
    pub fn describe(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{} on {}: {} images", self.bundle, self.data, self.images);
        if self.left_out > 0 {
            let _ = writeln!(out, "{} more were trained on, and are left out", self.left_out);
        }
        if let Some(absent) = self.absent() {
            let _ = writeln!(out, "{absent}");
        }
        for prior in &self.priors {
            let _ = writeln!(out, "\nunder the {} prior", prior.prior);
            table(&mut out, prior, &|figure, heading| match heading {
                "(null)" => figure.null,
                _ => Some(figure.value),
            });
        }
        let _ = writeln!(
            out,
            "\ncw-ECE: mean classwise ECE of the classes; (null): 95 % quantile of ECE under perfect calibration; sets: \
             as `alpha` alone asks for, α = {}",
            self.alpha
        );
        if let Some(familiarity) = &self.familiarity {
            describe_familiarity(&mut out, familiarity);
        }
        out
    }
}

fn describe_familiarity(out: &mut String, familiarity: &FamiliarityFigures) {
    let _ = write!(
        out,
        "\nwithheld as unlike the training images, %; of the test images, as much as is asked for\n{:<25}",
        "unlike"
    );
    for level in &familiarity.levels {
        let _ = write!(out, "{level:>10}");
    }
    out.push('\n');
    let mut line = |name: &str, shares: &[f64], more: String| {
        let _ = write!(out, "{name:<25}");
        for share in shares {
            let _ = write!(out, "{:>10.2}", 100.0 * share);
        }
        let _ = writeln!(out, "{more}");
    };
    for of in &familiarity.withheld {
        line(&format!("test images, {}", of.slice), &of.shares, String::new());
    }
    if let Some(foreign) = &familiarity.foreign {
        let more = format!("   AUROC {:.3}, {} images", foreign.auroc, foreign.images);
        line(&foreign.data, &foreign.shares, more);
    }
}

impl Comparison {
    /// Differences with their 95 % intervals.
    pub fn describe(&self) -> String {
        let mut out = format!("\n{} minus {}, 95 % paired intervals\n", self.bundle, self.against);
        for prior in &self.differences {
            for scorer in &prior.scorers {
                if scorer.is_unchanged() {
                    let _ = writeln!(out, "{:<8} {:<11} the same in every figure", prior.prior, scorer.scorer);
                    continue;
                }
                for slice in &scorer.slices {
                    let _ = write!(out, "{:<8} {:<11} {:<8}", prior.prior, scorer.scorer, slice.slice);
                    for (name, factor) in [("top1", 100.0), ("nll", 1.0), ("ece", 100.0)] {
                        let Some(figure) = slice.metrics.get(name) else { continue };
                        let [low, high] = figure.interval.unwrap_or([f64::NAN; 2]).map(|v| v * factor);
                        let _ = write!(out, "  {name} {:+.3} [{low:+.3}, {high:+.3}]", figure.value * factor);
                    }
                    out.push('\n');
                }
            }
        }
        out
    }
}

fn table(out: &mut String, prior: &PriorFigures, pick: &dyn Fn(&Figure, &str) -> Option<f64>) {
    let _ = write!(out, "{:<9}{:<12}", "", "");
    for (heading, ..) in COLUMNS {
        let _ = write!(out, "{heading:>10}");
    }
    out.push('\n');
    let Some(first) = prior.scorers.first() else { return };
    for (n, slice) in first.slices.iter().enumerate() {
        for scorer in &prior.scorers {
            let _ = write!(out, "{:<9}{:<12}", slice.slice, scorer.scorer);
            for (heading, metric, factor) in COLUMNS {
                // A calibration of the first schema has no other sets.
                let metrics = &scorer.slices[n].metrics;
                let metric = metric
                    .replace("posterior", if metrics.contains_key("posterior_size") { "posterior" } else { "pas" });
                let value = metrics.get(metric.as_str()).and_then(|f| pick(f, heading));
                let _ = match value {
                    Some(value) if factor > 1.0 => write!(out, "{:>10.2}", value * factor),
                    Some(value) => write!(out, "{value:>10.4}"),
                    None => write!(out, "{:>10}", "–"),
                };
            }
            out.push('\n');
        }
    }
}
