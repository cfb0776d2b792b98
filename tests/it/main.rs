//! One binary for all integration tests: a module per subject.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::type_complexity)]

#[cfg(not(feature = "dev"))]
compile_error!("the tests need every feature: cargo test --features dev");

mod accelerator;
mod batch;
mod calibration;
mod cli;
mod codings;
mod connections;
mod data;
mod echoes;
mod engine;
mod export;
mod familiarity;
mod field;
mod fold_properties;
mod hostile;
mod imports;
#[cfg(feature = "train")]
mod kernels;
mod kills;
mod memory;
mod onnx;
mod operations;
mod origins;
mod pixels;
mod quantize;
mod server;
mod support;
#[cfg(feature = "train")]
mod training;
mod words;
