//! Folds and serves image classifiers that were trained on long-tailed data with a normalised BatchNorm
//! (NBN, arXiv 2501.03122).
//!
//! The rooms, from the bottom up; ARCHITECTURE.md says which may use which:
//!
//! - [`features`]: what this build has
//! - [`console`]: lines on a terminal that may be gone
//! - [`files`]: files that are whole or not there
//! - `gzip`: unpacks within a share of the packed size
//! - [`memory`]: what each thread holds
//! - `shipped`: the bundle and the pictures inside the program
//! - [`stop`]: ends work that nobody waits for
//! - [`bundle`]: what `fold` writes and `nbn` reads: manifest, labels, preprocessing, digests
//! - [`pixels`]: encoded bytes → normalised tensor, under limits
//! - [`scores`]: logits → calibrated probabilities → top-k, prediction sets
//! - [`runtime`]: one ONNX model, one caller at a time; the only room that names `ort`
//! - [`classify`]: bytes → prediction → scores, the one composition that all programs share
//! - `engine`: worker threads that own classifiers, behind a bounded queue
//! - `registry`: the models that are served: loading, swapping, unloading
//! - `serve`, `score`: HTTP and gRPC, and batch scoring
//! - `data`: labelled image sets, and a bundle's logits of them
//! - `metrics`: accuracy, likelihood and calibration errors
//! - `calibrate`: labelled logits → calibration.json
//! - `evaluate`: labelled logits → figures, intervals, a report
//! - `fold`: checkpoint → graph → passes → ONNX, with a proof
//! - `train`: labelled images → checkpoint

// `tell!` and `show!` instead.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod bundle;
pub mod classify;
pub mod console;
pub mod features;
pub mod files;
#[cfg(any(feature = "serve", feature = "fold"))]
mod gzip;
#[cfg(any(feature = "serve", feature = "fold"))]
pub mod listing;
pub mod memory;
pub mod pixels;
pub mod runtime;
pub mod scores;
pub mod stop;
pub mod telemetry;

#[cfg(feature = "serve")]
pub mod batch;
#[cfg(feature = "fold")]
pub mod calibrate;
#[cfg(feature = "fold")]
pub mod data;
#[cfg(feature = "serve")]
pub mod engine;
#[cfg(feature = "fold")]
pub mod evaluate;
#[cfg(feature = "fold")]
pub mod fold;
#[cfg(feature = "fold")]
pub mod metrics;
#[cfg(feature = "fold")]
pub mod quantize;
#[cfg(feature = "serve")]
pub mod registry;
#[cfg(feature = "serve")]
pub mod serve;
#[cfg(feature = "serve")]
pub mod shipped;
#[cfg(feature = "serve")]
pub mod shutdown;
#[cfg(feature = "train")]
pub mod train;

#[cfg(all(any(test, fuzzing), feature = "full", feature = "fold"))]
#[doc(hidden)]
pub mod fuzz;
