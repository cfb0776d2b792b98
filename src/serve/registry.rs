//! The models that are being served, each with its own engine.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use crate::bundle::{Bundle, BundleError, Manifest};
use crate::classify::{Classifier, ClassifyError, Scorer};
use crate::engine::Engine;
use crate::pixels::DecodeLimits;
use crate::runtime::{Device, Library, SessionOptions};

/// One model and its workers.
pub struct ServedModel {
    /// Name in the repository.
    pub name: String,
    /// Version that is served.
    pub version: String,
    /// Its description.
    pub manifest: Arc<Manifest>,
    /// What its scores are.
    pub scorer: Scorer,
    /// What `fold evaluate --card` measured.
    pub evaluation: Option<serde_json::Value>,
    /// Where it runs.
    pub device: Device,
    /// Its queue and workers.
    pub engine: Engine,
}

/// All models by name.
pub struct Registry {
    models: BTreeMap<String, ServedModel>,
    default: Option<String>,
}

/// How a repository is opened.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The model that `/v1/classify` uses.
    pub default_model: Option<String>,
    /// Refuse bundles without calibration.
    pub require_calibration: bool,
    /// Sessions per model.
    pub workers: usize,
    /// How each is opened.
    pub session: SessionOptions,
    /// How large a picture may be.
    pub limits: DecodeLimits,
    /// Pictures that may wait, per model.
    pub queue: usize,
}

/// Why the registry could not be filled.
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
        cause: ClassifyError,
    },
    /// A worker thread could not be started.
    #[error("a worker thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
    /// `--require-calibration` and a bundle without.
    #[error("model {name}/{version} is not calibrated and --require-calibration is set: run `fold calibrate` on it")]
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
}

impl ServedModel {
    /// Opens `workers` sessions over `bundle`, warms them, and starts their engine.
    ///
    /// # Errors
    /// When the network does not open or does not fit its manifest.
    pub fn start(
        bundle: Bundle,
        library: &'static Library,
        workers: usize,
        options: SessionOptions,
        limits: DecodeLimits,
        queue: usize,
    ) -> Result<Self, RegistryError> {
        let opened: Vec<_> = thread::scope(|scope| {
            let open = || Classifier::open(&bundle, library, options, limits);
            let threads: Vec<_> = (0..workers).map(|_| scope.spawn(open)).collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|_| Err(ClassifyError::Panic("while opening the model".into()))))
                .collect()
        });
        let mut classifiers = Vec::new();
        let mut device = options.device;
        for result in opened {
            let (classifier, runs_on) = result.map_err(|cause| RegistryError::Model {
                name: bundle.name.clone(),
                version: bundle.version.clone(),
                cause,
            })?;
            device = runs_on;
            classifiers.push(classifier);
        }
        let engine = Engine::start(classifiers, queue)?;
        let Bundle { name, version, manifest, calibration, evaluation, .. } = bundle;
        let manifest = Arc::new(manifest);
        let scorer = Scorer::new(manifest.clone(), calibration);
        Ok(Self { name, version, manifest, scorer, evaluation, device, engine })
    }
}

impl Registry {
    /// A registry of `models`. The default is `default`, or the only model.
    ///
    /// # Errors
    /// When `default` is not among them.
    pub fn new(models: Vec<ServedModel>, default: Option<String>) -> Result<Self, RegistryError> {
        let models: BTreeMap<_, _> = models.into_iter().map(|model| (model.name.clone(), model)).collect();
        let default = match default {
            Some(name) if !models.contains_key(&name) => {
                let known = models.keys().cloned().collect::<Vec<_>>().join(", ");
                return Err(RegistryError::Default { name, known });
            }
            Some(name) => Some(name),
            None if models.len() == 1 => models.keys().next().cloned(),
            None => None,
        };
        Ok(Self { models, default })
    }

    /// Starts every model's latest version below `repository`.
    ///
    /// # Errors
    /// When any of them fails; a server that starts serves all of its models.
    pub fn load(repository: &Path, library: &'static Library, options: &LoadOptions) -> Result<Self, RegistryError> {
        let LoadOptions { default_model, require_calibration, workers, session, limits, queue } = options;
        let bundles = Bundle::load_all(repository)?;
        if let Some(bundle) = bundles.iter().find(|b| *require_calibration && b.calibration.is_none()) {
            let (name, version) = (bundle.name.clone(), bundle.version.clone());
            return Err(RegistryError::NotCalibrated { name, version });
        }
        let mut models = Vec::new();
        for bundle in bundles {
            let model = ServedModel::start(bundle, library, *workers, *session, *limits, *queue)?;
            let (calibration, scale) = match model.scorer.calibration() {
                Some(bound) => (bound.id.as_str(), "scores are calibrated probabilities"),
                None => ("none", "not calibrated: scores are the softmax of the logits"),
            };
            tracing::info!(
                model = %model.name, version = %model.version, arch = %model.manifest.arch,
                classes = model.manifest.classes.len(), device = %model.device, workers, threads = session.threads,
                calibration, "model ready ({scale})"
            );
            models.push(model);
        }
        Self::new(models, default_model.clone())
    }

    /// The model of that name.
    pub fn get(&self, name: &str) -> Option<&ServedModel> {
        self.models.get(name)
    }

    /// The model that `/v1/classify` uses.
    pub fn default_model(&self) -> Option<&ServedModel> {
        self.models.get(self.default.as_ref()?)
    }

    /// All models, by name.
    pub fn iter(&self) -> impl Iterator<Item = &ServedModel> {
        self.models.values()
    }
}
