//! The passes, in order. The graph is checked after each.

mod constants;
pub mod ends;
mod experts;
mod merge;
mod nbn;
pub mod quantize;

pub use merge::Merged;
pub use nbn::{Direction, NormalizedLayer};

use super::inline::inline;
use super::proto::Node;
use super::{Network, OnnxError};
use constants::Constants;

/// What the passes found and did.
#[derive(Debug, Clone, PartialEq)]
pub struct Folded {
    /// Normalised BatchNorms.
    pub normalized: Vec<NormalizedLayer>,
    /// BatchNorms that were merged, and those that are left.
    pub norms: Merged,
    /// Nodes that depend on constants alone and are left to the runtime: their operator is not evaluated here.
    pub unevaluated: Vec<String>,
    /// Nodes before and after.
    pub nodes: (usize, usize),
}

/// Merges the mean over a checkpoint's experts into one classifier.
///
/// # Errors
/// When a weight cannot be read.
pub fn merge_experts(network: &mut Network) -> Result<(), OnnxError> {
    experts::merge(network)?;
    network.check("merging experts")
}

/// Puts functions in their place, evaluates constants, and merges norms into the layers before them.
///
/// # Errors
/// When the network is of a form that cannot be folded; names what is in the way.
pub fn fold(network: &mut Network) -> Result<Folded, OnnxError> {
    inline(&mut network.model)?;
    network.check("putting functions in their place")?;
    // What nobody needs is not computed.
    network.prune();
    let before = network.graph().node.len();
    let constants = Constants::of(network)?;
    let normalized = nbn::find(network, &constants)?;
    let unevaluated = constants.left.clone();
    constants.put(network);
    network.check("evaluating constants")?;
    is_for_inference(network)?;
    let norms = merge::merge(network)?;
    network.check("merging BatchNorms")?;
    Ok(Folded { normalized, norms, unevaluated, nodes: (before, network.graph().node.len()) })
}

/// Refuses layers that work on batches or draw, as they do in training.
fn is_for_inference(network: &Network) -> Result<(), OnnxError> {
    let graph = network.graph();
    let is_true = |name: &str| {
        let tensor = graph.initializer.iter().find(|tensor| tensor.name() == name);
        let value = tensor.and_then(|tensor| network.value_of(tensor).ok().flatten());
        value.and_then(|value| value.list()).is_some_and(|list| list.iter().any(|&v| v != 0))
    };
    let trains = |node: &&Node| match node.op() {
        // Before opset 14, what its further outputs give says so.
        "BatchNormalization" => {
            let outputs = node.output.iter().filter(|name| !name.is_empty()).count();
            node.int("training_mode").unwrap_or(0) != 0 || outputs > 1
        }
        "Dropout" => node.input(2).is_some_and(is_true),
        _ => false,
    };
    match graph.node.iter().filter(|node| node.is_standard()).find(trains) {
        Some(node) => OnnxError::refused(format!(
            "node {} is a {} in training mode: export the network in evaluation mode (model.eval() in PyTorch)",
            super::network::quoted(node.label()),
            node.op()
        )),
        None => Ok(()),
    }
}
