//! Why a model cannot be served.

use crate::bundle::BundleError;
use crate::classify::ClassifyError;

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A bundle cannot be opened.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A bundle's network cannot be run.
    #[error("model {name}/{version}: {cause}")]
    Model {
        /// The model.
        name: String,
        /// Its version.
        version: String,
        /// What failed.
        cause: Box<ClassifyError>,
    },
    /// A worker thread could not be started.
    #[error("a worker thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
    /// `--require-calibration` and a bundle without.
    #[error(
        "model {name}/{version} is not calibrated and --require-calibration is set: run `nbn fold calibrate` on it"
    )]
    NotCalibrated {
        /// The model.
        name: String,
        /// Its version.
        version: String,
    },
    /// `--default-model` names no model.
    #[error("--default-model {name:?} is not among the models: {known}")]
    Default {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// No folder of that name, or no model of that name is loaded.
    #[error("the repository has no model {0:?}")]
    NoModel(String),
    /// It is loaded no longer.
    #[error("model {0:?} is not loaded: load it first")]
    NotLoaded(String),
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Closing,
    /// The registry has no repository to load from.
    #[error("this server has no model repository to load from")]
    NoRepository,
}
