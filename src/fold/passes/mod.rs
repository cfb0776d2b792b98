//! The passes, in order: NBN to BatchNorm, BatchNorm into convolutions and classifiers, experts into one
//! classifier. Each checks the graph that it leaves.

mod batch_norm;
mod experts;
mod nbn;

pub use nbn::NORM_EPSILON;

use super::{FoldError, FoldedGraph, Graph};

/// Merges every norm and the mean over experts.
///
/// # Errors
/// When a layer cannot be normalised or merged; names it.
pub fn fold(mut graph: Graph) -> Result<FoldedGraph, FoldError> {
    graph.check("checkpoint")?;
    nbn::merge(&mut graph)?;
    graph.check("merge NBN")?;
    batch_norm::merge(&mut graph)?;
    graph.check("merge BatchNorm")?;
    experts::merge(&mut graph)?;
    graph.check("merge experts")?;
    FoldedGraph::try_new(graph)
}
