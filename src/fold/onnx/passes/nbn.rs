//! Finds normalised BatchNorms: layers whose weight or bias is a direction times a magnitude (arXiv 2501.03122).
//!
//! Exporters write the normalisation in many forms: ε added to the norm or the norm clamped, only the weight or the bias
//! too, the affine step inside of BatchNormalization or as Mul and Add behind it. What they share is an L2 norm of a
//! vector, and a result that is proportional to that vector; both are looked for, and the rest does not matter.

use std::collections::{HashMap, HashSet};

use super::super::proto::Node;
use super::super::value::Value;
use super::super::{Network, OnnxError};
use super::constants::Constants;

/// Largest deviation of the effective weight from its direction, in parts of its largest value.
const PROPORTIONAL: f64 = 1e-5;
/// Largest relative difference between a magnitude and the constant that is taken for it.
const SAME: f64 = 1e-3;

/// A vector that is used as `α·v/‖v‖`.
#[derive(Debug, Clone, PartialEq)]
pub struct Direction {
    /// ‖v‖₂.
    pub norm: f64,
    /// α, where v is not 0.
    pub alpha: Option<f64>,
    /// Its length in values.
    pub channels: usize,
}

/// A normalised BatchNorm.
#[derive(Debug, Clone, PartialEq)]
pub struct NormalizedLayer {
    /// Name of the node.
    pub name: String,
    /// γ.
    pub weight: Option<Direction>,
    /// β.
    pub bias: Option<Direction>,
}

/// The normalised layers, in the order of the graph.
///
/// # Errors
/// When a weight cannot be read.
pub(crate) fn find(network: &Network, constants: &Constants) -> Result<Vec<NormalizedLayer>, OnnxError> {
    let graph = network.graph();
    let made: HashMap<&str, &Node> =
        graph.node.iter().flat_map(|node| node.output.iter().map(move |name| (name.as_str(), node))).collect();
    let search = Search { network, constants, made };
    let mut layers: Vec<NormalizedLayer> = Vec::new();
    // Values behind a BatchNorm, and its place in `layers` or its name.
    let mut behind: HashMap<&str, String> = HashMap::new();
    for node in &graph.node {
        let Some(output) = node.output.first() else { continue };
        if node.is("BatchNormalization") {
            let (weight, bias) = (search.direction(node.input(1))?, search.direction(node.input(2))?);
            add(&mut layers, node.label(), weight, bias);
            behind.insert(output, node.label().to_owned());
        } else if node.is("Mul") || node.is("Add") {
            let (a, b) = (node.input(0), node.input(1));
            let (data, factor) = match (a, b) {
                (Some(a), Some(b)) if constants.has(b) && !constants.has(a) => (a, b),
                (Some(a), Some(b)) if constants.has(a) && !constants.has(b) => (b, a),
                _ => continue,
            };
            let Some(norm) = behind.get(data).cloned() else { continue };
            let found = search.direction(Some(factor))?;
            if node.is("Mul") {
                add(&mut layers, &norm, found, None);
            } else {
                add(&mut layers, &norm, None, found);
            }
            behind.insert(output, norm);
        }
    }
    Ok(layers)
}

fn add(layers: &mut Vec<NormalizedLayer>, name: &str, weight: Option<Direction>, bias: Option<Direction>) {
    if weight.is_none() && bias.is_none() {
        return;
    }
    match layers.iter_mut().find(|layer| layer.name == name) {
        Some(layer) => {
            layer.weight = layer.weight.take().or(weight);
            layer.bias = layer.bias.take().or(bias);
        }
        None => layers.push(NormalizedLayer { name: name.to_owned(), weight, bias }),
    }
}

struct Search<'a> {
    network: &'a Network,
    constants: &'a Constants,
    made: HashMap<&'a str, &'a Node>,
}

impl<'a> Search<'a> {
    /// The direction that the constant `name` is computed from, if it is.
    fn direction(&self, name: Option<&'a str>) -> Result<Option<Direction>, OnnxError> {
        let Some(name) = name.filter(|name| self.constants.has(name)) else { return Ok(None) };
        // What it is computed from: names, and the vectors that a norm is taken of.
        let (mut open, mut seen, mut vectors) = (vec![name], HashSet::new(), Vec::new());
        while let Some(name) = open.pop() {
            if !seen.insert(name) {
                continue;
            }
            let Some(node) = self.made.get(name) else { continue };
            vectors.extend(self.normed(node));
            open.extend(node.input.iter().map(String::as_str).filter(|name| !name.is_empty()));
        }
        let Some(effective) = self.floats(name)? else { return Ok(None) };
        for vector in vectors {
            let Some(v) = self.floats(vector)?.filter(|v| v.len() == effective.len()) else { continue };
            let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
            let scale = effective.iter().zip(&v).map(|(e, x)| e * x).sum::<f64>() / norm;
            let largest = effective.iter().fold(0.0f64, |max, e| max.max(e.abs()));
            if norm == 0.0 && largest == 0.0 {
                return Ok(Some(Direction { norm, alpha: None, channels: v.len() }));
            }
            let off = effective.iter().zip(&v).map(|(e, x)| (e - scale * x / norm).abs()).fold(0.0, f64::max);
            if norm > 0.0 && off <= PROPORTIONAL * largest {
                let alpha = self.nearest(&seen, scale)?;
                return Ok(Some(Direction { norm, alpha: Some(alpha), channels: v.len() }));
            }
        }
        Ok(None)
    }

    /// The vector whose L2 norm, or whose sum of squares, the node gives.
    fn normed(&self, node: &'a Node) -> Option<&'a str> {
        let squared = |name: &str| {
            let node = self.made.get(name)?;
            let twice = node.is("Mul") && node.input(0).is_some() && node.input(0) == node.input(1);
            (twice || node.is("Pow")).then(|| node.input(0)).flatten()
        };
        match node.op() {
            _ if !node.is_standard() => None,
            "ReduceL2" | "ReduceSumSquare" | "LpNormalization" => node.input(0),
            "ReduceSum" => squared(node.input(0)?),
            _ => None,
        }
    }

    /// The stored magnitude: a single value among `names` that is within [`SAME`] of `scale`, else `scale` itself.
    fn nearest(&self, names: &HashSet<&str>, scale: f64) -> Result<f64, OnnxError> {
        let mut best = scale;
        let mut distance = SAME * scale.abs();
        let mut sorted: Vec<&&str> = names.iter().collect();
        sorted.sort_unstable();
        for name in sorted {
            if let Some([value]) = self.floats(name)?.as_deref()
                && (value - scale).abs() <= distance
                && self.made.get(*name).is_none_or(|node| self.normed(node).is_none())
            {
                (best, distance) = (*value, (value - scale).abs());
            }
        }
        Ok(best)
    }

    fn floats(&self, name: &str) -> Result<Option<Vec<f64>>, OnnxError> {
        let value = self.constants.value(self.network, name)?;
        Ok(value.as_ref().and_then(Value::floats).map(|values| values.iter().copied().collect()))
    }
}
