//! What a manifest says of the fold: what was merged, and the proof that it changed nothing.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::manifest::{FileDigest, ManifestError, check_name, cut, value};
use super::quantization::Quantization;

/// What `nbn fold export` merged, and its proof.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct FoldReport {
    /// Program and version.
    pub by: String,
    /// What the network ends in, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<Head>,
    /// κ: how much of the training prior the loss took out of the logits, where the checkpoint says so; 0 none, 1 all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kappa: Option<f64>,
    /// Experts whose logits are averaged; 1 for a single network.
    pub experts: usize,
    /// Names of the BatchNorm layers whose weight and bias were normalised.
    pub normalized_layers: Vec<String>,
    /// The acting magnitudes, one per expert.
    pub alphas: Vec<Alpha>,
    /// Plain BatchNorm layers merged, the normalised ones and the head's included.
    pub batch_norms_merged: usize,
    /// BatchNorm layers that could not be merged, and stay in the network.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub batch_norms_left: Vec<LeftNorm>,
    /// Where the preprocessing comes from, and what of it was guessed, unless it is the checkpoint's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preprocessing_from: Option<String>,
    /// Of a network that came as ONNX: what its file was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub onnx: Option<OnnxReport>,
    /// The comparison of the folded network with what it was made from.
    pub proof: Proof,
    /// Of a network of whole numbers: how it was made from the folded one, and what that changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
}

/// A BatchNorm that stays in the network.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct LeftNorm {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// The ONNX file that a network came as.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct OnnxReport {
    /// Version of ONNX's operators.
    pub opset: i64,
    /// What wrote it, where it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub producer: Option<String>,
    /// The file's own name of the output that is served as logits.
    pub output: String,
    /// Files with weights that lay beside it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<FileDigest>,
    /// What was cut off behind the logits.
    pub ending: Ending,
    /// Nodes of the file, its functions in their place.
    pub nodes_before: usize,
    /// Nodes of the bundle's network.
    pub nodes_after: usize,
    /// Nodes that depend on constants alone and are left to the runtime, with their operators.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unevaluated: Vec<String>,
    /// Whether the network takes one picture at a time only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub one_by_one: bool,
}

/// What turns logits into what a network's file gives.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// Nothing.
    Logits,
    /// A softmax over the classes.
    Softmax,
    /// Its logarithm.
    LogSoftmax,
}

/// What a network ends in.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Head {
    /// A linear layer.
    Linear,
    /// Logit rectification: a linear layer and a BatchNorm over the logits, with weight and bias.
    LrAffine,
    /// Logit rectification without weight and bias.
    LrPlain,
    /// The cosine between features and the weights of each class, times a scale.
    Cosine,
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linear => "linear",
            Self::LrAffine => "lr-affine",
            Self::LrPlain => "lr-plain",
            Self::Cosine => "cosine",
        })
    }
}

/// An acting element of `scale_factor`.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Alpha {
    /// Index in `scale_factor`.
    pub index: usize,
    /// The magnitude.
    pub value: f64,
}

/// The folded network in ONNX Runtime (f32) beside what it was made from.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    /// What it was compared with.
    #[serde(default, skip_serializing_if = "Reference::is_checkpoint")]
    pub reference: Reference,
    /// Number of random input images.
    pub images: usize,
    /// Number of the user's pictures that were compared, too.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pictures: usize,
    /// Seed of the inputs.
    pub seed: u64,
    /// One entry per output of the network.
    pub outputs: Vec<OutputProof>,
    /// What a checkpoint's names and shapes do not tell, and was taken: the proof is relative to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub assumed: Vec<String>,
    /// The comparison with outputs that the user's own network gave, which rests on nothing that was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<ExpectedProof>,
}

/// A bundle's logits beside those that the network itself gave, as `nbn fold export --expect` has them.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ExpectedProof {
    /// The file with inputs and outputs.
    pub file: FileDigest,
    /// Number of inputs.
    pub images: usize,
    /// Largest difference of a logit.
    pub max_absolute: f64,
    /// `max_absolute` divided by the standard deviation of the logits expected.
    pub max_relative: f64,
    /// The largest `max_relative` that would have been accepted.
    pub tolerance: f64,
}

/// What a folded network was compared with.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Reference {
    /// The unfolded checkpoint, computed from its formulas in f64.
    #[default]
    Checkpoint,
    /// The original file in ONNX Runtime, in f32, without optimisations.
    Original,
}

impl Reference {
    fn is_checkpoint(&self) -> bool {
        *self == Self::Checkpoint
    }
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// One output's largest differences.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct OutputProof {
    /// Name of the output.
    pub output: String,
    /// Largest |folded − unfolded|.
    pub max_absolute: f64,
    /// `max_absolute` divided by the standard deviation of the unfolded output.
    pub max_relative: f64,
    /// The largest `max_relative` that would have been accepted.
    pub tolerance: f64,
}

/// Checks κ, whichever file brings it.
///
/// # Errors
/// When it is out of range.
pub fn check_kappa(kappa: f64) -> Result<(), ManifestError> {
    if (0.0..=10.0).contains(&kappa) { Ok(()) } else { Err(value("kappa", &kappa, "it must lie in 0..=10")) }
}

impl FoldReport {
    pub(super) fn check(&self) -> Result<(), ManifestError> {
        check_name("fold.by", &self.by)?;
        check_name("fold.preprocessing_from", self.preprocessing_from.as_deref().unwrap_or_default())?;
        self.normalized_layers.iter().try_for_each(|layer| check_name("a name in fold.normalized_layers", layer))?;
        for left in &self.batch_norms_left {
            check_name("a name in fold.batch_norms_left", &left.name)?;
            check_name("a reason in fold.batch_norms_left", &left.reason)?;
        }
        if let Some(onnx) = &self.onnx {
            onnx.unevaluated.iter().try_for_each(|node| check_name("a name in fold.onnx.unevaluated", node))?;
            check_name("fold.onnx.output", &onnx.output)?;
            onnx.data.iter().try_for_each(|file| file.check("fold.onnx.data"))?;
            check_name("fold.onnx.producer", onnx.producer.as_deref().unwrap_or_default())?;
        }
        self.kappa.map_or(Ok(()), check_kappa)?;
        if !(1..=100).contains(&self.experts) {
            return Err(value("fold.experts", &self.experts, "it must lie in 1..=100"));
        }
        let single = -f64::from(f32::MAX)..=f64::from(f32::MAX);
        if let Some(alpha) = self.alphas.iter().find(|alpha| !single.contains(&alpha.value)) {
            let what = format!("the value of magnitude {} in fold.alphas", alpha.index);
            return Err(value(what, &alpha.value, "it must fit in a 32-bit float"));
        }
        self.proof.assumed.iter().try_for_each(|what| check_name("a text in fold.proof.assumed", what))?;
        if let Some(expected) = &self.proof.expected {
            expected.file.check("fold.proof.expected.file")?;
            check_numbers("fold.proof.expected", [expected.max_absolute, expected.max_relative, expected.tolerance])?;
        }
        self.quantization.as_ref().map_or(Ok(()), Quantization::check)?;
        self.proof.outputs.iter().try_for_each(OutputProof::check)
    }
}

impl OutputProof {
    fn check(&self) -> Result<(), ManifestError> {
        check_name("a name in fold.proof.outputs", &self.output)?;
        let of = format!("output {:?} in fold.proof", cut(&self.output));
        check_numbers(&of, [self.max_absolute, self.max_relative, self.tolerance])
    }
}

/// Checks `max_absolute`, `max_relative` and `tolerance`.
fn check_numbers(of: &str, numbers: [f64; 3]) -> Result<(), ManifestError> {
    let mut named = ["max_absolute", "max_relative", "tolerance"].into_iter().zip(numbers);
    match named.find(|(_, number)| !(number.is_finite() && *number >= 0.0)) {
        Some((what, number)) => Err(value(format!("{what} of {of}"), &number, "it must be finite and at least 0")),
        None => Ok(()),
    }
}
