//! The models that are being served, each version with its own engine; loading, swapping and unloading them.

mod error;
mod index;
mod model;
mod requests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, TryLockError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::bundle::{Bundle, BundleError, Pixels, Repository, VersionFolder, VersionPolicy, sha256_hex};
use crate::engine::Budget;
use crate::pixels::DecodeLimits;
use crate::runtime::{Library, NetworkCache, Place};

pub use error::RegistryError;
pub use index::{IndexEntry, ModelState};
pub use model::{BatchChoice, ServedModel};
pub use requests::{RequestCounts, RequestStats};

/// How a model is opened.
#[derive(Debug, Clone)]
pub struct ModelOptions {
    /// Where it runs, and how sessions are opened there.
    pub place: Place,
    /// Pictures that are decoded at once; on the processor, each by a worker with a session of its own.
    pub workers: usize,
    /// How large a picture may be.
    pub limits: DecodeLimits,
    /// Pictures that may wait.
    pub queue: usize,
    /// Pictures in a run of the network.
    pub batch: BatchChoice,
    /// Whether predictions hold what the classifier of the network sees.
    pub features: bool,
    /// Where optimised networks are kept.
    pub cache: NetworkCache,
}

/// How a repository is opened.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// The folder that holds NAME/VERSION/.
    pub repository: PathBuf,
    /// Which versions are served.
    pub versions: VersionPolicy,
    /// The model that `/v1/classify` uses.
    pub default_model: Option<String>,
    /// Refuse bundles without calibration.
    pub require_calibration: bool,
    /// How each model is opened.
    pub model: ModelOptions,
    /// Which pixels of JPEGs the models of these names see, if not those of `model`.
    pub pixels: BTreeMap<String, Pixels>,
}

struct Slot {
    model: Option<Arc<ServedModel>>,
    /// Digest of the files that describe the version, as served.
    fingerprint: String,
    loading: bool,
    reason: String,
}

type Versions = BTreeMap<u64, Slot>;

/// All models by name.
pub struct Registry {
    source: Option<(RegistryOptions, &'static Library)>,
    default: Option<String>,
    models: RwLock<BTreeMap<String, Versions>>,
    /// Held while a model is opened: one at a time.
    loading: Mutex<()>,
    budget: Arc<Budget>,
    filled: AtomicBool,
    closing: AtomicBool,
    loaded: AtomicU64,
    failed: AtomicU64,
}

impl Registry {
    /// A registry of `models`, without a repository. The default is `default`, or the only model.
    ///
    /// # Errors
    /// When `default` is not among them.
    pub fn new(models: Vec<ServedModel>, default: Option<String>) -> Result<Self, RegistryError> {
        let registry = Self::empty(None, default, 1);
        for model in models {
            let slot =
                |model| Slot { model: Some(model), fingerprint: String::new(), loading: false, reason: String::new() };
            let (name, number) = (model.name.clone(), model.version.parse().unwrap_or(0));
            registry.write(|all| all.entry(name).or_default().insert(number, slot(Arc::new(model))));
        }
        registry.check_default()?;
        registry.filled.store(true, Ordering::Release);
        Ok(registry)
    }

    /// A registry over a repository from which nothing is loaded yet.
    pub fn over(options: RegistryOptions, library: &'static Library) -> Self {
        let (default, workers) = (options.default_model.clone(), options.model.workers);
        Self::empty(Some((options, library)), default, workers)
    }

    fn empty(source: Option<(RegistryOptions, &'static Library)>, default: Option<String>, places: usize) -> Self {
        Self {
            source,
            default,
            models: RwLock::default(),
            loading: Mutex::default(),
            budget: Arc::new(Budget::new(places)),
            filled: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            loaded: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// Opens the wanted versions of every model. Afterwards the registry is filled.
    ///
    /// # Errors
    /// When any of them fails: a server that starts serves all of its models. A folder without any version is none, and is
    /// left out with a warning, unless there is nothing else.
    pub fn fill(&self) -> Result<(), RegistryError> {
        let mut empty = None;
        for name in self.repository()?.models()? {
            match self.load(&name) {
                Err(RegistryError::Bundle(error @ BundleError::NoVersion(_))) => {
                    tracing::warn!(
                        folder = name,
                        "a folder of the repository holds no version of a model: it is left out"
                    );
                    empty = Some(error);
                }
                loaded => loaded?,
            }
        }
        if let Some(error) = empty.filter(|_| self.read(BTreeMap::is_empty)) {
            return Err(error.into());
        }
        self.check_default()?;
        self.filled.store(true, Ordering::Release);
        Ok(())
    }

    /// Opens what has changed in the repository, and drops the models whose folders have gone. What cannot be opened
    /// leaves what was served before, and stands in the log and in the index.
    pub fn refresh(&self) {
        let names = match self.repository().and_then(|r| Ok(r.models()?)) {
            Ok(names) => names,
            Err(error) => {
                tracing::error!(%error, "the repository cannot be read; the same models are served as before");
                return;
            }
        };
        for name in &names {
            // Logged and noted where it happens.
            let _ = self.load_versions(name, false);
        }
        // As it is by now: a model may have come and been loaded meanwhile.
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(names) = self.repository().and_then(|r| Ok(r.models()?)) else { return };
        let gone: Vec<String> = self.read(|all| all.keys().filter(|name| !names.contains(name)).cloned().collect());
        for name in gone {
            tracing::warn!(model = name, "the model's folder no longer exists, so the model is no longer served");
            let _ = self.write(|all| all.remove(&name));
        }
    }

    /// Opens the wanted versions of a model beside those that are served, and swaps each once it is warm. Versions that are
    /// no longer wanted are dropped when all has gone well.
    ///
    /// # Errors
    /// When the model does not exist, or any version fails; that leaves what was served before.
    pub fn load(&self, name: &str) -> Result<(), RegistryError> {
        self.load_versions(name, true)
    }

    /// Drops a model. Requests that it is at are still answered.
    ///
    /// # Errors
    /// When no such model is loaded.
    pub fn unload(&self, name: &str) -> Result<(), RegistryError> {
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let dropped = self.write(|all| {
            let versions = all.get_mut(name)?;
            let models: Vec<_> = versions
                .values_mut()
                .filter_map(|slot| {
                    slot.reason = "unloaded".into();
                    slot.model.take()
                })
                .collect();
            (!models.is_empty()).then_some(models)
        });
        match dropped {
            Some(_) => {
                tracing::info!(model = name, "model unloaded");
                Ok(())
            }
            None if self.read(|all| all.contains_key(name)) => Err(RegistryError::NotLoaded(name.to_owned())),
            None => Err(RegistryError::NoModel(name.to_owned())),
        }
    }

    /// Opens nothing more, drops all models, and waits for what is being opened and for the workers, at most until `deadline`.
    /// Says whether all have ended.
    pub fn close(&self, deadline: Instant) -> bool {
        self.closing.store(true, Ordering::Release);
        while matches!(self.loading.try_lock(), Err(TryLockError::WouldBlock)) {
            if deadline <= Instant::now() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // Dropped outside the lock.
        drop(self.write(std::mem::take));
        self.budget.wait_for_workers(deadline)
    }

    fn load_versions(&self, name: &str, unchanged_too: bool) -> Result<(), RegistryError> {
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if self.closing.load(Ordering::Acquire) {
            return Err(RegistryError::Closing);
        }
        let wanted = self.wanted(name).inspect_err(|error| {
            // A folder that never held a version is no model: whoever fills the registry says so once.
            let is_no_model = match error {
                RegistryError::NoModel(_) => true,
                RegistryError::Bundle(BundleError::NoVersion(_)) => !self.read(|all| all.contains_key(name)),
                _ => false,
            };
            if !is_no_model {
                self.failed.fetch_add(1, Ordering::Relaxed);
                tracing::error!(model = name, %error, "the model cannot be loaded");
                let reason =
                    format!("still serving the previous state; the new one cannot be loaded: {}", self.public(error));
                let served = |slot: &&mut Slot| slot.model.is_some();
                self.write(|all| {
                    let slots = all.get_mut(name).into_iter().flat_map(BTreeMap::values_mut);
                    slots.filter(served).for_each(|slot| slot.reason.clone_from(&reason));
                });
            }
        })?;
        let mut outcome = Ok(());
        for version in &wanted {
            if self.closing.load(Ordering::Acquire) {
                return Err(RegistryError::Closing);
            }
            let fingerprint = fingerprint(version);
            let served = |slot: &Slot| slot.model.is_some() && slot.fingerprint == fingerprint;
            if !unchanged_too && self.read(|all| all.get(name)?.get(&version.number).map(served)).unwrap_or(false) {
                continue;
            }
            if let Err(error) = self.load_version(name, version, fingerprint) {
                tracing::error!(model = name, version = version.number, %error, "the model cannot be loaded");
                outcome = Err(error);
            }
        }
        if outcome.is_ok() {
            // Dropped outside the lock: the last of a model's requests may still be running.
            let retired = self.write(|all| {
                let versions = all.get_mut(name)?;
                let unwanted = |number: &u64| !wanted.iter().any(|v| v.number == *number);
                let numbers: Vec<u64> = versions.keys().copied().filter(unwanted).collect();
                Some(numbers.iter().filter_map(|number| versions.remove(number)).collect::<Vec<_>>())
            });
            for slot in retired.into_iter().flatten() {
                if let Some(model) = slot.model {
                    tracing::info!(model = name, version = %model.version, "version retired");
                }
            }
        }
        outcome
    }

    fn load_version(&self, name: &str, version: &VersionFolder, fingerprint: String) -> Result<(), RegistryError> {
        let Some((options, library)) = &self.source else { return Err(RegistryError::NoRepository) };
        let number = version.number;
        self.write(|all| {
            let empty = || Slot { model: None, fingerprint: String::new(), loading: true, reason: String::new() };
            all.entry(name.to_owned()).or_default().entry(number).or_insert_with(empty).loading = true;
        });
        let started = Bundle::open(&version.folder).map_err(RegistryError::from).and_then(|bundle| {
            // As the repository calls it, also where a link leads elsewhere.
            let own = version.folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let bundle = Bundle { name: name.to_owned(), version: own, ..bundle };
            if options.require_calibration && bundle.calibration.is_none() {
                return Err(RegistryError::NotCalibrated { name: name.into(), version: number.to_string() });
            }
            let mut own = options.model.clone();
            own.limits.pixels = options.pixels.get(&bundle.name).copied().unwrap_or(own.limits.pixels);
            ServedModel::start(bundle, library, &own, self.budget.clone())
        });
        let outcome = match started {
            Ok(model) => {
                announce(&model, &options.model);
                self.loaded.fetch_add(1, Ordering::Relaxed);
                Ok(Arc::new(model))
            }
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                Err(error)
            }
        };
        let mut replaced = None;
        let outcome = self.write(|all| {
            let Some(slot) = all.get_mut(name).and_then(|versions| versions.get_mut(&number)) else { return Ok(()) };
            slot.loading = false;
            match outcome {
                Ok(model) => {
                    slot.reason.clear();
                    slot.fingerprint = fingerprint;
                    replaced = slot.model.replace(model);
                    Ok(())
                }
                Err(error) => {
                    let reason = self.public_of(&error, name, version);
                    let serving = slot.model.is_some();
                    slot.reason = if serving {
                        format!("still serving the previous state; the new one cannot be loaded: {reason}")
                    } else {
                        reason
                    };
                    Err(error)
                }
            }
        });
        drop(replaced);
        outcome
    }

    /// As [`Self::public`], also where the version's folder is a link that leads out of the repository.
    fn public_of(&self, error: &RegistryError, name: &str, version: &VersionFolder) -> String {
        let text = self.public(error);
        let target = std::fs::canonicalize(&version.folder).map(|folder| folder.display().to_string());
        target.map_or(text.clone(), |target| text.replace(&target, &format!("{name}/{}", version.number)))
    }

    /// The error without the folder in which the repository lies.
    fn public(&self, error: &RegistryError) -> String {
        let mut text = error.to_string();
        if let Some((options, _)) = &self.source {
            for folder in [std::fs::canonicalize(&options.repository).ok(), Some(options.repository.clone())] {
                let Some(folder) = folder.map(|f| f.display().to_string()).filter(|f| f.len() > 1) else { continue };
                text = text.replace(&format!("{}/", folder.trim_end_matches('/')), "");
            }
        }
        text
    }

    /// The versions of a model that the policy wants.
    fn wanted(&self, name: &str) -> Result<Vec<VersionFolder>, RegistryError> {
        let (options, _) = self.source.as_ref().ok_or(RegistryError::NoRepository)?;
        let wanted = self.repository()?.wanted(name, &options.versions)?;
        wanted.ok_or_else(|| RegistryError::NoModel(name.to_owned()))
    }

    fn repository(&self) -> Result<Repository, RegistryError> {
        let (options, _) = self.source.as_ref().ok_or(RegistryError::NoRepository)?;
        Ok(Repository::at(&options.repository))
    }

    fn check_default(&self) -> Result<(), RegistryError> {
        match &self.default {
            Some(name) if !self.read(|all| all.contains_key(name)) => {
                let known = self.read(|all| all.keys().cloned().collect::<Vec<_>>().join(", "));
                Err(RegistryError::Default { name: name.clone(), known })
            }
            _ => Ok(()),
        }
    }

    fn read<T>(&self, look: impl FnOnce(&BTreeMap<String, Versions>) -> T) -> T {
        look(&self.models.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, change: impl FnOnce(&mut BTreeMap<String, Versions>) -> T) -> T {
        change(&mut self.models.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether every model was opened once.
    pub fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Why a model has no device left, once one has none.
    pub fn lost_devices(&self) -> watch::Receiver<Option<String>> {
        self.budget.lost()
    }

    /// Panics of workers outside of what guards each picture.
    pub fn worker_panics(&self) -> u64 {
        self.budget.panics()
    }

    /// How often a version was opened, and how often that failed.
    pub fn loads(&self) -> (u64, u64) {
        (self.loaded.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }

    /// The model of that name, in that version or in the highest that is ready.
    pub fn get(&self, name: &str, version: Option<&str>) -> Option<Arc<ServedModel>> {
        self.read(|all| {
            let versions = all.get(name)?;
            let ready = |slot: &Slot| slot.model.clone();
            match version {
                None => versions.values().rev().find_map(ready),
                Some(version) => versions.values().filter_map(ready).find(|model| model.version == version),
            }
        })
    }

    /// The model that `/v1/classify` uses: the option's, or the only one.
    pub fn default_model(&self) -> Option<Arc<ServedModel>> {
        let name = match &self.default {
            Some(name) => name.clone(),
            None => {
                let names = self.names();
                let [only] = names.as_slice() else { return None };
                only.clone()
            }
        };
        self.get(&name, None)
    }

    /// The name that `--default-model` gives.
    pub fn default_name(&self) -> Option<&str> {
        self.default.as_deref()
    }

    /// Names of the models of which a version is ready.
    pub fn names(&self) -> Vec<String> {
        let ready = |versions: &Versions| versions.values().any(|slot| slot.model.is_some());
        self.read(|all| all.iter().filter(|(_, versions)| ready(versions)).map(|(name, _)| name.clone()).collect())
    }

    /// All versions that are ready, by name and version.
    pub fn models(&self) -> Vec<Arc<ServedModel>> {
        self.read(|all| all.values().flat_map(|versions| versions.values().filter_map(|s| s.model.clone())).collect())
    }
}

/// Digest of the files that describe a version; the manifest names the network's.
fn fingerprint(version: &VersionFolder) -> String {
    let mut all = Vec::new();
    for name in [crate::bundle::MANIFEST_FILE, crate::bundle::CALIBRATION_FILE, crate::bundle::EVALUATION_FILE] {
        let content = std::fs::read(version.folder.join(name)).unwrap_or_default();
        all.extend(sha256_hex(&content).into_bytes());
    }
    sha256_hex(&all)
}

fn announce(model: &ServedModel, options: &ModelOptions) {
    let (calibration, scale) = match model.scorer.calibration() {
        Some(bound) => (bound.id.as_str(), "scores are calibrated probabilities"),
        None => ("none", "not calibrated: scores are the softmax of the logits"),
    };
    let devices: Vec<String> = model.devices.iter().map(ToString::to_string).collect();
    tracing::info!(
        model = %model.name, version = %model.version, arch = %model.manifest.arch,
        classes = model.manifest.classes.len(), device = devices.join(","), workers = options.workers,
        threads = options.place.session.threads, max_batch = model.max_batch, calibration, "model ready ({scale})"
    );
}
