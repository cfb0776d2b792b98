//! Checkpoint → graph → passes → ONNX, with a proof that nothing changed.
//!
//! [`Checkpoint`] (names → tensors) → [`architecture::build`] → [`Graph`] with norms → [`passes::fold`] →
//! [`FoldedGraph`] without any → [`onnx::write`] → [`verify::prove`] → a bundle on disk.

pub mod architecture;
pub mod checkpoint;
mod error;
pub mod export;
pub mod graph;
pub mod inspect;
pub mod onnx;
pub mod passes;
pub mod reference;
pub mod verify;

/// Metadata of a checkpoint: its classes, as a JSON list of the manifest's.
pub const CLASSES_KEY: &str = "nbn.classes";
/// Metadata of a checkpoint: the preprocessing it was trained with, as the manifest's JSON.
pub const PREPROCESSING_KEY: &str = "nbn.preprocessing";
/// Metadata of a checkpoint: how much of the training prior its loss took out of the logits, a number.
pub const KAPPA_KEY: &str = "nbn.kappa";

pub use checkpoint::Checkpoint;
pub use error::FoldError;
pub use graph::{FoldedGraph, Graph};
