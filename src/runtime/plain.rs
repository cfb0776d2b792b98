//! A session that runs a network as its file has it, to compare networks: without optimisation, by any names.

use ndarray::{ArrayD, ArrayViewD};
use ort::logging::LogLevel;
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{OutputSelector, RunOptions, Session};
use ort::value::TensorRef;

use super::model::{builder, commit};
use super::{Library, NetworkSource, RuntimeError, SessionOptions};

/// A network as it is.
pub struct PlainSession(Session);

impl PlainSession {
    /// Opens a network.
    ///
    /// # Errors
    /// When it is no network that ONNX Runtime can open.
    pub fn open<'a>(
        library: &Library,
        model: impl Into<NetworkSource<'a>>,
        options: SessionOptions,
    ) -> Result<Self, RuntimeError> {
        let session = builder(library, options)
            .and_then(|b| Ok(b.with_optimization_level(GraphOptimizationLevel::Disable)?))
            // Weights are not laid out anew for a few runs.
            .and_then(|b| Ok(b.with_config_entry("session.disable_prepacking", "1")?))
            // What fails is told by its error, and may be tried another way.
            .and_then(|b| Ok(b.with_log_level(LogLevel::Fatal)?))
            .and_then(|b| commit(b, model.into()));
        session.map(Self).map_err(|error| RuntimeError::Open(error.to_string()))
    }

    /// The outputs of the names `outputs`, in their order, for `images`.
    ///
    /// # Errors
    /// When the runtime fails, or an output is not of 32-bit floats.
    pub fn run(
        &mut self,
        input: &str,
        images: ArrayViewD<'_, f32>,
        outputs: &[&str],
    ) -> Result<Vec<ArrayD<f32>>, RuntimeError> {
        let fail = |error: ort::Error| RuntimeError::Run(error.to_string());
        let tensor = TensorRef::from_array_view(images).map_err(fail)?;
        let wanted = outputs.iter().fold(OutputSelector::no_default(), |wanted, name| wanted.with(*name));
        let options = RunOptions::new().map_err(fail)?.with_outputs(wanted);
        let found = self.0.run_with_options(vec![(input, tensor)], &options).map_err(fail)?;
        let take = |name: &&str| {
            let value = found.get(name).ok_or_else(|| RuntimeError::Run(format!("there is no output {name:?}")))?;
            let floats = value.try_extract_array::<f32>().map_err(|_| {
                RuntimeError::Run(format!(
                    "its output {name:?} is not of 32-bit floats, as scores are: choose another one"
                ))
            })?;
            Ok(floats.to_owned())
        };
        outputs.iter().map(take).collect()
    }
}
