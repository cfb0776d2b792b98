//! What quantization changed: a quantized bundle beside the one it was made from, on the same labelled images, and whether that
//! stays within bounds.

use crate::bundle::{Bundle, Certificate, CertifiedSlice, Difference};
use crate::data::LabelledLogits;
use crate::evaluate::{EvaluateError, EvaluateOptions, SliceFigures, compare};

/// The slice of all images.
const OVERALL: &str = "overall";
/// Metrics of a certificate; those of sets are of calibrated bundles.
const KEPT: [&str; 5] = ["top1", "nll", "classwise_ece", "posterior_coverage", "posterior_size"];
/// Scorers in the order in which they decide, the best one that both bundles have.
const SCORERS: [&str; 2] = ["calibrated", "softmax"];

/// The most that may be lost, by the far end of an interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Of top-1, as a share of all images.
    pub top1_loss: f64,
    /// The same of the images of each group.
    pub group_top1_loss: Option<f64>,
    /// Of the mean negative log-likelihood, in nats.
    pub nll_rise: f64,
}

/// Images that may be lost although none of those looked at was, with 95 % certainty: the "rule of three". Resamples of images
/// that lost nothing lose nothing, however few they are.
const UNSEEN: f64 = 3.0;

/// One bundle with its logits of the labelled images.
pub struct Side<'a> {
    /// The bundle.
    pub bundle: &'a Bundle,
    /// Its logits.
    pub logits: &'a LabelledLogits,
}

/// Compares `quantized` with `original` under the uniform prior: paired differences with 95 % intervals, by group. `data` is
/// the name of the set, to which the calibration of `quantized` may have been fitted.
///
/// # Errors
/// When the images differ, or sets cannot be had.
pub fn certify(
    quantized: Side<'_>,
    original: Side<'_>,
    data: (&str, bool),
    bounds: Bounds,
    options: &EvaluateOptions,
) -> Result<Certificate, EvaluateError> {
    let comparison = compare(quantized.bundle, quantized.logits, original.bundle, original.logits, options)?;
    let labels = original.logits.labels();
    let uniform = comparison.differences.iter().find(|figures| figures.prior == "uniform");
    let scorers = uniform.map(|figures| figures.scorers.as_slice()).unwrap_or_default();
    let found = SCORERS.iter().find_map(|name| scorers.iter().find(|scorer| scorer.scorer == *name));
    let classes = &original.bundle.manifest.classes;
    let images = |slice: &str| {
        let of = |label: &u32| {
            let group = classes.get(*label as usize).and_then(crate::bundle::Class::group);
            slice == OVERALL || group.is_some_and(|group| group.name() == slice)
        };
        labels.iter().filter(|label| of(label)).count()
    };
    let certified = |name: &str| -> Vec<CertifiedSlice> {
        let of_scorer = scorers.iter().filter(|scorer| scorer.scorer == name).flat_map(|scorer| &scorer.slices);
        let certified = |slice: &SliceFigures| CertifiedSlice {
            slice: slice.slice.to_owned(),
            images: images(slice.slice),
            differences: slice
                .metrics
                .iter()
                .filter(|(metric, _)| KEPT.contains(metric))
                .filter_map(|(metric, figure)| {
                    let difference = Difference { value: figure.value, interval: figure.interval? };
                    Some(((*metric).to_owned(), difference))
                })
                .collect(),
        };
        of_scorer.filter(|slice| slice.slice != "macro").map(certified).collect()
    };
    let scorer = found.map_or("none", |scorer| scorer.scorer);
    let agreement = |name: &str| scorers.iter().find(|scorer| scorer.scorer == name)?.agreement;
    Ok(Certificate {
        data: data.0.to_owned(),
        fitted_to_them: data.1,
        images: labels.len(),
        scorer: scorer.to_owned(),
        calibration: quantized
            .bundle
            .calibration
            .as_ref()
            .filter(|_| scorer == "calibrated")
            .map(|bound| bound.id.clone()),
        agreement: found.and_then(|scorer| scorer.agreement).unwrap_or_default(),
        softmax_agreement: (scorer == "calibrated").then(|| agreement("softmax")).flatten(),
        max_top1_loss: bounds.top1_loss,
        max_group_top1_loss: bounds.group_top1_loss,
        max_nll_rise: bounds.nll_rise,
        slices: certified(scorer),
        softmax: if scorer == "softmax" { Vec::new() } else { certified("softmax") },
    })
}

/// The bounds that `certificate` does not keep, in words; none where it keeps them all. Of top-1, three images more than were
/// lost must be within them.
pub fn broken(certificate: &Certificate) -> Vec<String> {
    let mut broken = Vec::new();
    let own = certificate.slices.iter().map(|slice| (certificate.scorer.as_str(), slice));
    for (scorer, slice) in own.chain(certificate.softmax.iter().map(|slice| ("softmax", slice))) {
        let (is_whole, name) = (slice.slice == OVERALL, &slice.slice);
        let of = if is_whole { scorer.to_owned() } else { format!("{scorer}, {name}") };
        let bound = if is_whole { Some(certificate.max_top1_loss) } else { certificate.max_group_top1_loss };
        if let (Some(bound), true) = (bound, slice.images > 0) {
            let flag = if is_whole { "--max-top1-loss" } else { "--max-group-top1-loss" };
            let Some(top1) = slice.differences.get("top1") else {
                broken.push(format!("{of}: top-1 could not be compared"));
                continue;
            };
            let loss = UNSEEN / slice.images as f64 - top1.interval[0].min(top1.value);
            if loss > bound {
                broken.push(format!(
                    "{of}: top-1 changes by {:+.2} points on {} images, which may stand for a loss of {:.2}; {:.2} may be lost \
                     ({flag})",
                    100.0 * top1.value,
                    slice.images,
                    100.0 * loss,
                    100.0 * bound
                ));
            }
        }
        match slice.differences.get("nll") {
            _ if !is_whole => {}
            Some(nll) if nll.interval[1] <= certificate.max_nll_rise => {}
            Some(nll) => broken.push(format!(
                "{of}: NLL changes by {:+.4}, with 95 % certainty by no more than {:+.4}; it may rise by {} (--max-nll-rise)",
                nll.value, nll.interval[1], certificate.max_nll_rise
            )),
            None => broken.push(format!("{of}: NLL could not be compared")),
        }
    }
    broken
}

/// Whether this processor adds products of 8-bit numbers in 32 bits, so that weights of 8 bits give the sums that they stand for.
pub fn adds_in_32_bits() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512vnni") || std::arch::is_x86_feature_detected!("avxvnni");
    #[cfg(not(target_arch = "x86_64"))]
    true
}
