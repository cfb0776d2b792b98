//! What quantization changed: a quantized bundle beside the one it was made from, on the same labelled images, and whether that
//! stays within bounds.

use crate::bundle::{Bundle, Certificate, CertifiedSlice, Difference};
use crate::data::LabelledLogits;
use crate::evaluate::{EvaluateError, EvaluateOptions, compare};
use crate::scores::argmax;

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
    /// Of the mean negative log-likelihood, in nats.
    pub nll_rise: f64,
}

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
    let top = |logits: &LabelledLogits, row: usize| {
        let row: Vec<f64> = logits.row(row).iter().map(|&z| z.into()).collect();
        argmax(&row)
    };
    let agreed = (0..labels.len()).filter(|&n| top(quantized.logits, n) == top(original.logits, n)).count();
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
    let slices = found.iter().flat_map(|scorer| &scorer.slices).filter(|slice| slice.slice != "macro");
    let slices = slices
        .map(|slice| CertifiedSlice {
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
        })
        .collect();
    Ok(Certificate {
        data: data.0.to_owned(),
        fitted_to_them: data.1,
        images: labels.len(),
        scorer: found.map_or("none", |scorer| scorer.scorer).to_owned(),
        agreement: agreed as f64 / labels.len().max(1) as f64,
        max_top1_loss: bounds.top1_loss,
        max_nll_rise: bounds.nll_rise,
        slices,
    })
}

/// The bounds that `certificate` does not keep, in words; none where it keeps them all.
pub fn broken(certificate: &Certificate) -> Vec<String> {
    let overall = certificate.slices.iter().find(|slice| slice.slice == OVERALL);
    let of = |metric: &str| overall.and_then(|slice| slice.differences.get(metric));
    let mut broken = Vec::new();
    match of("top1") {
        Some(top1) if -top1.interval[0] <= certificate.max_top1_loss => {}
        Some(top1) => broken.push(format!(
            "top-1 changes by {:+.2} points, with 95 % certainty by no less than {:+.2}; {:.2} may be lost (--max-top1-loss)",
            100.0 * top1.value,
            100.0 * top1.interval[0],
            100.0 * certificate.max_top1_loss
        )),
        None => broken.push("top-1 could not be compared".into()),
    }
    match of("nll") {
        Some(nll) if nll.interval[1] <= certificate.max_nll_rise => {}
        Some(nll) => broken.push(format!(
            "NLL changes by {:+.4}, with 95 % certainty by no more than {:+.4}; it may rise by {:.4} (--max-nll-rise)",
            nll.value, nll.interval[1], certificate.max_nll_rise
        )),
        None => broken.push("NLL could not be compared".into()),
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
