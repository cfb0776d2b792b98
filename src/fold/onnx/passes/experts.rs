//! Merges the mean over experts' classifiers into one classifier over all their features.

use bytes::Bytes;

use super::super::proto::{Attribute, Node, Tensor, kind};
use super::super::value::{Float, Value};
use super::super::{Network, OnnxError};

/// mean over e of (Wₑ·xₑ + cₑ) = \[W₀ … W_E\]/E · \[x₀ … x_E\] + Σcₑ/E, for each Mean of linear layers.
///
/// # Errors
/// When a weight cannot be read.
pub(crate) fn merge(network: &mut Network) -> Result<(), OnnxError> {
    let means = |network: &Network| {
        let nodes = network.graph().node.iter().enumerate();
        nodes.filter(|(_, node)| node.is("Mean") && node.input.len() > 1).map(|(n, _)| n).collect::<Vec<_>>()
    };
    // What comes later stays where it is.
    for n in means(network).into_iter().rev() {
        merge_one(network, n)?;
    }
    network.prune();
    Ok(())
}

fn merge_one(network: &mut Network, n: usize) -> Result<Option<()>, OnnxError> {
    let graph = network.graph();
    let mean = &graph.node[n];
    let count = mean.input.len();
    let (mut rows, mut sum, mut features): (Vec<Vec<f64>>, Vec<f64>, Vec<String>) = Default::default();
    for expert in &mean.input {
        let Some(gemm) = graph.node.iter().find(|node| node.output.first() == Some(expert)) else { return Ok(None) };
        let plain = gemm.float("alpha").unwrap_or(1.0) == 1.0 && gemm.float("beta").unwrap_or(1.0) == 1.0;
        if !gemm.is("Gemm") || gemm.int("transB") != Some(1) || gemm.int("transA") == Some(1) || !plain {
            return Ok(None);
        }
        let constant = |name: Option<&str>| graph.initializer.iter().find(|tensor| Some(tensor.name()) == name);
        let (Some(weight), Some(bias)) = (constant(gemm.input(1)), constant(gemm.input(2))) else { return Ok(None) };
        let (weight, bias) = (network.value_of(weight)?, network.value_of(bias)?);
        let (Some(weight), Some(bias)) =
            (weight.as_ref().and_then(Value::floats), bias.as_ref().and_then(Value::floats))
        else {
            return Ok(None);
        };
        if weight.ndim() != 2 || bias.len() != weight.shape()[0] {
            return Ok(None);
        }
        rows.resize(bias.len(), Vec::new());
        sum.resize(bias.len(), 0.0);
        if rows.len() != bias.len() {
            return Ok(None);
        }
        for (row, values) in rows.iter_mut().zip(weight.rows()) {
            row.extend(values.iter().map(|w| w / count as f64));
        }
        sum.iter_mut().zip(bias).for_each(|(total, b)| *total += b / count as f64);
        features.extend(gemm.input(0).map(str::to_owned));
    }
    let width = rows.first().map_or(0, Vec::len);
    if features.len() != count || rows.iter().any(|row| row.len() != width) {
        return Ok(None);
    }
    let output = mean.output.first().cloned().unwrap_or_default();
    let name = |part: &str| format!("experts.{part}");
    let raw: Vec<u8> = rows.iter().flatten().flat_map(|&w| (w as f32).to_le_bytes()).collect();
    let weight = Tensor {
        dims: vec![rows.len() as i64, width as i64],
        data_type: Some(kind::FLOAT),
        name: Some(name("weight")),
        raw_data: Some(Bytes::from(raw)),
        ..Tensor::default()
    };
    let bias = Float::Single.round(ndarray::Array1::from_vec(sum).into_dyn()).tensor(&name("bias"));
    let graph = network.graph_mut();
    graph.initializer.extend([weight, bias]);
    let node = |op: &str, input: Vec<String>, output: String, attribute: Attribute| Node {
        input,
        output: vec![output.clone()],
        name: Some(output),
        op_type: Some(op.into()),
        attribute: vec![attribute],
        ..Node::default()
    };
    graph.node[n] = node("Concat", features, name("features"), Attribute::int("axis", 1));
    let inputs = vec![name("features"), name("weight"), name("bias")];
    graph.node.insert(n + 1, node("Gemm", inputs, output, Attribute::int("transB", 1)));
    Ok(Some(()))
}
