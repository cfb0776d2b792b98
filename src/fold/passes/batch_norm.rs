//! Merges each BatchNorm into the convolution or the linear classifier before it.

use ndarray::Axis;

use super::super::graph::{BATCH_NORM_EPSILON, BatchNorm, Op};
use super::super::{FoldError, Graph};

/// s = g/√(σ² + ε); W'\[o\] = s\[o\]·W\[o\]; c\[o\] = s\[o\]·(c₀\[o\] − μ\[o\]) + b\[o\], with c₀ the bias that was there.
/// Output channels are scaled, so groups do not matter. f64, rounded to f32 once.
pub(super) fn merge(graph: &mut Graph) -> Result<(), FoldError> {
    let readers = graph.readers();
    for id in 0..graph.nodes.len() {
        let Op::BatchNorm(norm) = &graph.nodes[id].op else { continue };
        let norm = norm.clone();
        let name = graph.nodes[id].name.clone();
        let before = graph.nodes[id].inputs[0];
        let fail =
            |reason: &str| FoldError::Graph { pass: "merge BatchNorm", node: name.clone(), reason: reason.into() };
        if readers[before] != 1 {
            return Err(fail("the operation before it has other readers"));
        }
        let scale: Vec<f64> =
            norm.weight.iter().zip(&norm.variance).map(|(g, v)| g / (v + BATCH_NORM_EPSILON).sqrt()).collect();
        match &mut graph.nodes[before].op {
            Op::Conv { weight, bias, .. } => {
                for (mut kernel, &s) in weight.axis_iter_mut(Axis(0)).zip(&scale) {
                    kernel.mapv_inplace(|w| (f64::from(w) * s) as f32);
                }
                *bias = Some(shift(bias.as_deref(), &norm, &scale));
            }
            Op::Gemm { weight, bias } => {
                for (mut row, &s) in weight.axis_iter_mut(Axis(0)).zip(&scale) {
                    row.mapv_inplace(|w| w * s);
                }
                *bias = shift(Some(bias), &norm, &scale);
            }
            _ => return Err(fail("it does not follow a convolution or a linear layer")),
        }
        for node in &mut graph.nodes {
            node.inputs.iter_mut().filter(|input| **input == id).for_each(|input| *input = before);
        }
        graph.outputs.iter_mut().filter(|(_, output)| *output == id).for_each(|(_, output)| *output = before);
    }
    graph.prune();
    Ok(())
}

fn shift(before: Option<&[f64]>, norm: &BatchNorm, scale: &[f64]) -> Vec<f64> {
    (0..scale.len()).map(|o| scale[o] * (before.map_or(0.0, |b| b[o]) - norm.mean[o]) + norm.bias[o]).collect()
}
