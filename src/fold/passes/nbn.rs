//! Replaces a normalised BatchNorm by the plain one that it equals.

use super::super::graph::{BatchNorm, Op};
use super::super::{FoldError, Graph};

/// Added to the norm of a direction (arXiv 2501.03122, the authors' code).
pub const NORM_EPSILON: f64 = 1e-6;

/// g ← α·g / (‖g‖₂ + 1e-6), b ← α·b / (‖b‖₂ + 1e-6); a zero b stays zero.
pub(super) fn merge(graph: &mut Graph) -> Result<(), FoldError> {
    for node in &mut graph.nodes {
        if let Op::NormalizedBatchNorm { directions, alpha } = &node.op {
            let weight = normalize(&directions.weight, *alpha)
                .ok_or_else(|| FoldError::ZeroDirection { name: format!("{}.weight", node.name) })?;
            let bias = normalize(&directions.bias, *alpha).unwrap_or_else(|| vec![0.0; directions.bias.len()]);
            let (mean, variance) = (directions.mean.clone(), directions.variance.clone());
            node.op = Op::BatchNorm(BatchNorm { weight, bias, mean, variance });
        }
    }
    Ok(())
}

/// `alpha · v / (‖v‖₂ + 1e-6)`, or none when the norm is 0.
fn normalize(v: &[f64], alpha: f64) -> Option<Vec<f64>> {
    let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
    (norm > 0.0).then(|| v.iter().map(|x| alpha * x / (norm + NORM_EPSILON)).collect())
}
