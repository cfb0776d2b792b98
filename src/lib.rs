//! Folds and serves image classifiers that were trained on long-tailed data with a normalised BatchNorm
//! (NBN, arXiv 2501.03122).
//!
//! The rooms, from the bottom up; ARCHITECTURE.md says which may use which:
//!
//! - [`bundle`]: what `fold` writes and `nbn` reads: manifest, labels, preprocessing, digests
//! - [`pixels`]: encoded bytes → normalised tensor, under limits
//! - [`scores`]: logits → probabilities → top-k
//! - [`runtime`]: one ONNX model, one caller at a time; the only room that names `ort`
//! - `classify`: bytes → prediction, the one composition that serving and batch scoring share
//! - `engine`: worker threads that own classifiers, behind a bounded queue
//! - `serve`, `score`: HTTP, and batch scoring
//! - `fold`: checkpoint → graph → passes → ONNX, with a proof

pub mod bundle;
pub mod pixels;
pub mod runtime;
pub mod scores;
pub mod telemetry;

#[cfg(feature = "serve")]
pub mod classify;
#[cfg(feature = "serve")]
pub mod engine;
#[cfg(feature = "fold")]
pub mod fold;
#[cfg(feature = "serve")]
pub mod score;
#[cfg(feature = "serve")]
pub mod serve;
#[cfg(feature = "serve")]
pub mod shutdown;
