//! Merges the mean over the experts' classifiers into one classifier over all their features.

use ndarray::{Axis, concatenate};

use super::super::graph::Op;
use super::super::{FoldError, Graph};

/// mean over e of (Wₑ·xₑ + cₑ) = \[W₀ … W_E\]/E · \[x₀ … x_E\] + Σcₑ/E.
pub(super) fn merge(graph: &mut Graph) -> Result<(), FoldError> {
    let Some(id) = graph.nodes.iter().position(|node| node.op == Op::Mean) else { return Ok(()) };
    let name = graph.nodes[id].name.clone();
    let fail = |reason: String| FoldError::Graph { pass: "merge experts", node: name.clone(), reason };
    let experts = graph.nodes[id].inputs.clone();
    let count = experts.len() as f64;
    let (mut weights, mut sum, mut features) = (Vec::new(), Vec::new(), Vec::new());
    for expert in experts {
        let node = &graph.nodes[expert];
        let Op::Gemm { weight, bias } = &node.op else {
            return Err(fail(format!("it averages {}, which is not a linear layer", node.name)));
        };
        weights.push(weight / count);
        sum.resize(bias.len(), 0.0);
        sum.iter_mut().zip(bias).for_each(|(total, b)| *total += b);
        features.push(node.inputs[0]);
    }
    let views: Vec<_> = weights.iter().map(|w| w.view()).collect();
    let weight = concatenate(Axis(1), &views).map_err(|error| fail(error.to_string()))?;
    let bias = sum.iter().map(|total| total / count).collect();
    // The mean's own place becomes the concatenation, and the new classifier comes last.
    graph.nodes[id].op = Op::Concat;
    graph.nodes[id].inputs = features;
    graph.nodes[id].name = "experts.features".into();
    let merged = graph.push("experts.classifier", Op::Gemm { weight, bias }, &[id]);
    graph.outputs.iter_mut().filter(|(_, output)| *output == id).for_each(|(_, output)| *output = merged);
    graph.prune();
    Ok(())
}
