//! What a manifest says of a network of whole numbers: how it was made, and what that changed.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::fold_report::LeftNorm;
use super::manifest::{FileDigest, ManifestError, check_name, value};

/// What a certificate compares where there is no calibration.
const SOFTMAX: &str = "softmax";

/// How a network was quantized.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Quantization {
    /// Program and version.
    pub by: String,
    /// The bundle that it was made from, NAME/VERSION.
    pub from: String,
    /// Its network.
    pub network: FileDigest,
    /// Bits of weights: 7 or 8. Values have 8.
    pub weight_bits: u32,
    /// Pictures that the ranges of values were taken from.
    pub images: usize,
    /// Seed that they were drawn with.
    pub seed: u64,
    /// Layers of whole numbers.
    pub layers: usize,
    /// Layers with weights that stay in floats, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub float_layers: Vec<LeftNorm>,
    /// Whether every bound of the certificate was kept, by figures and on a processor that stand for those that serve.
    pub proved: bool,
    /// What it changed.
    pub certificate: Certificate,
}

/// A quantized bundle beside the one it was made from, on the same labelled images, each with its own calibration.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// File name of the set.
    pub data: String,
    /// Whether the calibration was fitted to the same images.
    pub fitted_to_them: bool,
    /// Images.
    pub images: usize,
    /// What was compared: `calibrated`, or `softmax` where there is no calibration. Under the uniform prior.
    pub scorer: String,
    /// The calibration that was compared: the bundle's own, fitted anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
    /// Share of images of which both name the same class first.
    pub agreement: f64,
    /// The same by the softmax, where the scores are calibrated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub softmax_agreement: Option<f64>,
    /// Largest loss of top-1 that was accepted, as a share of all images.
    pub max_top1_loss: f64,
    /// The same of each group's images, where it was bounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_group_top1_loss: Option<f64>,
    /// Largest rise of the negative log-likelihood that was accepted, in nats.
    pub max_nll_rise: f64,
    /// The differences, of all images and by group.
    pub slices: Vec<CertifiedSlice>,
    /// Of calibrated scores: the differences of the softmax, in which no calibration has a part.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub softmax: Vec<CertifiedSlice>,
}

/// The differences on some of the images.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct CertifiedSlice {
    /// `overall`, `many`, `medium` or `few`.
    pub slice: String,
    /// Images of its classes.
    pub images: usize,
    /// By metric: quantized less original.
    pub differences: BTreeMap<String, Difference>,
}

/// A paired difference.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Difference {
    /// Its value.
    pub value: f64,
    /// Its 95 % interval, over resamples of the images.
    pub interval: [f64; 2],
}

impl Quantization {
    pub(super) fn check(&self) -> Result<(), ManifestError> {
        check_name("fold.quantization.by", &self.by)?;
        check_name("fold.quantization.from", &self.from)?;
        self.network.check("fold.quantization.network")?;
        if !(7..=8).contains(&self.weight_bits) {
            return Err(value("fold.quantization.weight_bits", &self.weight_bits, "it must be 7 or 8"));
        }
        for layer in &self.float_layers {
            check_name("a name in fold.quantization.float_layers", &layer.name)?;
            check_name("a reason in fold.quantization.float_layers", &layer.reason)?;
        }
        let certificate = &self.certificate;
        check_name("fold.quantization.certificate.data", &certificate.data)?;
        check_name("fold.quantization.certificate.scorer", &certificate.scorer)?;
        let finite = |what: &str, number: f64| match number.is_finite() {
            true => Ok(()),
            false => Err(value(format!("{what} in fold.quantization.certificate"), &number, "it must be finite")),
        };
        finite("agreement", certificate.agreement)?;
        finite("softmax_agreement", certificate.softmax_agreement.unwrap_or_default())?;
        finite("max_top1_loss", certificate.max_top1_loss)?;
        finite("max_nll_rise", certificate.max_nll_rise)?;
        finite("max_group_top1_loss", certificate.max_group_top1_loss.unwrap_or_default())?;
        for slice in certificate.slices.iter().chain(&certificate.softmax) {
            check_name("a slice in fold.quantization.certificate", &slice.slice)?;
            for (metric, difference) in &slice.differences {
                check_name("a metric in fold.quantization.certificate", metric)?;
                let [low, high] = difference.interval;
                [difference.value, low, high].into_iter().try_for_each(|number| finite(metric, number))?;
            }
        }
        Ok(())
    }
}

impl Certificate {
    /// Leaves out what was measured with another calibration than the bundle has now, and says whether there was any. What is
    /// left is of the softmax.
    pub(super) fn keep_what_holds(&mut self, calibration: Option<&str>) -> bool {
        let Some(measured) = &self.calibration else { return false };
        if Some(measured.as_str()) == calibration {
            return false;
        }
        self.calibration = None;
        self.scorer = SOFTMAX.into();
        // The softmax was fitted to nothing.
        self.fitted_to_them = false;
        self.agreement = self.softmax_agreement.take().unwrap_or(self.agreement);
        self.slices = std::mem::take(&mut self.softmax);
        true
    }
}

impl fmt::Display for Certificate {
    /// A line for all and one for each slice.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = if self.fitted_to_them { ", which its calibration was fitted to" } else { "" };
        writeln!(
            f,
            "certificate {} images of {}{own}; {} scores, uniform prior; both say the same of {:.2} %",
            self.images,
            self.data,
            self.scorer,
            100.0 * self.agreement
        )?;
        let softmax = self.softmax.iter().filter(|slice| slice.slice == "overall");
        for (scores, slice) in
            self.slices.iter().map(|slice| ("", slice)).chain(softmax.map(|slice| ("softmax ", slice)))
        {
            write!(f, "            {scores}{:<8}{:>7} images", slice.slice, slice.images)?;
            let shown = [
                ("top1", "top-1", 100.0, 2),
                ("nll", "NLL", 1.0, 4),
                ("classwise_ece", "cw-ECE", 100.0, 2),
                ("posterior_coverage", "coverage", 100.0, 2),
                ("posterior_size", "set size", 1.0, 3),
            ];
            for (metric, name, factor, digits) in shown {
                let Some(Difference { value, interval: [low, high] }) = slice.differences.get(metric) else { continue };
                let [value, low, high] = [value, low, high].map(|number| number * factor);
                write!(f, "  {name} {value:+.digits$} [{low:+.digits$}, {high:+.digits$}]")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
