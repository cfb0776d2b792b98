//! Checkpoint → graph → passes → ONNX, with a proof that nothing changed.
//!
//! [`Checkpoint`] (names → tensors) → [`architecture::build`] → [`Graph`] with norms → [`fold()`] → ONNX without any →
//! [`verify::prove`] → a bundle on disk.

pub mod architecture;
pub mod checkpoint;
mod draft;
mod error;
mod expect;
pub mod export;
pub mod graph;
mod ingest;
pub mod inspect;
pub mod onnx;
pub mod preprocessing;
pub mod quantize;
pub mod reference;
pub mod verify;

/// Metadata of a checkpoint: its classes, as a JSON list of the manifest's.
pub const CLASSES_KEY: &str = "nbn.classes";
/// Metadata of a checkpoint: the preprocessing it was trained with, as the manifest's JSON.
pub const PREPROCESSING_KEY: &str = "nbn.preprocessing";
/// Metadata of a checkpoint: how much of the training prior its loss took out of the logits, a number.
pub const KAPPA_KEY: &str = "nbn.kappa";
/// Key of the epochs that were done, in a checkpoint's metadata.
pub const EPOCH_KEY: &str = "nbn.epoch";
/// Key of what the run was told, in a checkpoint's metadata; it has `epochs`, those that were to be done.
pub const RECIPE_KEY: &str = "nbn.recipe";

pub use checkpoint::Checkpoint;
pub use draft::remove_drafts_and_exit;
pub use error::FoldError;
pub use graph::Graph;
pub use ingest::is_onnx;

/// The network of a checkpoint in ONNX, every norm and the mean over experts merged.
///
/// # Errors
/// When a direction is 0, or a norm cannot be merged; names the layer.
pub fn fold(graph: &Graph) -> Result<onnx::Network, FoldError> {
    let pass = "merge BatchNorm";
    for node in &graph.nodes {
        if let graph::Op::NormalizedBatchNorm { directions, .. } = &node.op
            && directions.weight.iter().all(|&w| w == 0.0)
        {
            return Err(FoldError::ZeroDirection { name: format!("{}.weight", node.name) });
        }
    }
    let mut network = onnx::lower(graph);
    let fail = |node: String, reason: String| FoldError::Graph { pass, node, reason };
    let folded = onnx::passes::fold(&mut network).map_err(|error| fail("the network".into(), error.to_string()))?;
    match folded.norms.left.into_iter().next() {
        Some((node, reason)) => Err(fail(node, reason.into())),
        None => {
            let failed = |error: onnx::OnnxError| fail("the experts".into(), error.to_string());
            onnx::passes::merge_experts(&mut network).map_err(failed)?;
            Ok(network)
        }
    }
}
