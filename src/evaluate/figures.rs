//! What an evaluation holds, as report.json has it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::familiarity::FamiliarityFigures;
use super::measure::Figure;
use crate::bundle::Group;

/// Name of the part of a card that says what `unlike` withholds.
const FAMILIARITY_KEY: &str = "familiarity";

/// All that was measured of one bundle.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// Name and version.
    pub bundle: String,
    /// SHA-256 of its network.
    pub model_sha256: String,
    /// Id of its calibration.
    pub calibration: Option<String>,
    /// What the calibration fits: the rung of the ladder of methods.
    pub rung: Option<&'static str>,
    /// File name of the set.
    pub data: String,
    /// Images.
    pub images: usize,
    /// When, in UTC.
    pub created: String,
    /// Level of the prediction sets.
    pub alpha: f64,
    /// Resamples behind the intervals.
    pub resamples: usize,
    /// Images that were left out because they were trained on.
    pub left_out: usize,
    /// Classes without an image: no figure counts them.
    pub absent_classes: usize,
    /// Under the uniform and, where counts are known, the training prior.
    pub priors: Vec<PriorFigures>,
    /// By class, in the order of the logits, under the uniform prior.
    pub classes: Vec<ClassFigures>,
    /// The most frequent confusions, by the share of the true class's images.
    pub confusions: Vec<Confusion>,
    /// Images by size of their set, from size 1, under the uniform prior; empty without calibration.
    pub set_sizes: BTreeMap<&'static str, Vec<u64>>,
    /// What `unlike` withholds; none without images, or where the calibration knows nothing of it.
    pub familiarity: Option<FamiliarityFigures>,
}

/// Figures under one prior.
#[derive(Debug, Clone, Serialize)]
pub struct PriorFigures {
    /// `uniform` or `train`.
    pub prior: &'static str,
    /// The softmax, the softmax with one temperature, and the calibrated scores.
    pub scorers: Vec<ScorerFigures>,
}

/// Figures of one way of scoring.
#[derive(Debug, Clone, Serialize)]
pub struct ScorerFigures {
    /// `softmax`, `temperature` or `calibrated`.
    pub scorer: &'static str,
    /// Overall, macro, and each group.
    pub slices: Vec<SliceFigures>,
    /// Of a comparison: the share of images of which both bundles name the same class first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
}

/// Figures over some images.
#[derive(Debug, Clone, Serialize)]
pub struct SliceFigures {
    /// `overall`, `macro` (every class the same), `many`, `medium` or `few`.
    pub slice: &'static str,
    /// By metric; sets only for calibrated scores.
    pub metrics: BTreeMap<&'static str, Figure>,
    /// Reliability: mean score and accuracy in each of 15 bins of the best class's score.
    pub reliability: Vec<ReliabilityBin>,
}

/// One bin of a reliability diagram.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ReliabilityBin {
    /// Images.
    pub images: u64,
    /// Share of the slice's weight.
    pub share: f64,
    /// Mean score of the best class.
    pub confidence: f64,
    /// Share of images whose best class is right.
    pub accuracy: f64,
}

/// Shares of images by what they were counted for.
pub(super) type Shares = BTreeMap<&'static str, f64>;

/// One class.
#[derive(Debug, Clone, Serialize)]
pub struct ClassFigures {
    /// Its label.
    pub label: String,
    /// Its group, when known.
    pub group: Option<Group>,
    /// Its training images, when known.
    pub training_images: Option<u64>,
    /// Its test images.
    pub images: u64,
    /// Share of them whose best class is right, by the softmax and by the calibrated scores.
    pub recall: Shares,
    /// Share of them whose set holds the class: PAS and plain.
    pub coverage: Shares,
}

/// How often one class is taken for another.
#[derive(Debug, Clone, Serialize)]
pub struct Confusion {
    /// The true class.
    pub label: String,
    /// What it is taken for.
    pub taken_for: String,
    /// Images.
    pub images: u64,
    /// Of the true class's images.
    pub share: f64,
}

/// Two bundles on the same images.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// The first.
    pub bundle: String,
    /// The second.
    pub against: String,
    /// First minus second by prior, slice and metric, with paired intervals.
    pub differences: Vec<PriorFigures>,
}

impl ScorerFigures {
    /// Of a comparison: whether both bundles have the same figures, in every resample.
    pub fn is_unchanged(&self) -> bool {
        self.slices.iter().all(|slice| slice.metrics.values().all(Figure::is_zero))
    }
}

impl Evaluation {
    /// That some classes have no images, and which; nothing where all have.
    pub(super) fn absent(&self) -> Option<String> {
        const NAMED: usize = 5;
        let absent: Vec<&str> = self.classes.iter().filter(|c| c.images == 0).map(|c| c.label.as_str()).collect();
        if absent.is_empty() {
            return None;
        }
        let named = absent.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
        let more = if absent.len() > NAMED { ", …" } else { "" };
        let (classes, are) = if absent.len() == 1 { ("class has", "is") } else { ("classes have", "are") };
        Some(format!("{} {classes} no images here and {are} left out of all figures: {named}{more}", absent.len()))
    }

    /// What goes into the bundle and onto its card: values without intervals, rounded to 4 decimals.
    pub fn card(&self) -> serde_json::Value {
        let rounded = |figure: &Figure| (figure.value * 1e4).round() / 1e4;
        let mut figures = serde_json::Map::new();
        for prior in &self.priors {
            let scorers: BTreeMap<_, BTreeMap<_, BTreeMap<_, _>>> = prior
                .scorers
                .iter()
                .map(|s| {
                    let slices = s.slices.iter().map(|slice| {
                        (slice.slice, slice.metrics.iter().map(|(name, figure)| (*name, rounded(figure))).collect())
                    });
                    (s.scorer, slices.collect())
                })
                .collect();
            figures.insert(prior.prior.to_owned(), serde_json::json!(scorers));
        }
        let familiarity = self.familiarity.as_ref().map(|familiarity| {
            let shares = |shares: &[f64]| shares.iter().map(|share| (share * 1e4).round() / 1e4).collect::<Vec<_>>();
            let withheld: BTreeMap<_, _> =
                familiarity.withheld.iter().map(|of| (of.slice, shares(&of.shares))).collect();
            let mut found = serde_json::json!({ "unlike": familiarity.levels, "withheld": withheld });
            if let Some(foreign) = &familiarity.foreign {
                found["foreign"] = serde_json::json!({
                    "data": foreign.data,
                    "images": foreign.images,
                    "auroc": (foreign.auroc * 1e4).round() / 1e4,
                    "withheld": shares(&foreign.shares),
                });
            }
            found
        });
        let mut card = serde_json::json!({
            "model_sha256": self.model_sha256,
            "calibration": self.calibration,
            "data": self.data,
            "images": self.images,
            "created": self.created,
            "how": "nbn fold evaluate --card; by prior, scorer, slice and metric",
            "alpha": self.alpha,
            "figures": figures,
        });
        if let Some(familiarity) = familiarity {
            card[FAMILIARITY_KEY] = familiarity;
        }
        card
    }
}
