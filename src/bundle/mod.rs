//! The bundle: one folder per model version, written by `fold` and read by `nbn`.
//!
//! `models/<name>/<version>/` holds `model.onnx`, with weights of large networks in `model.data.0` and so on,
//! `manifest.json` and, when calibrated, `calibration.json`, perhaps with `familiarity.safetensors`; once evaluated,
//! `evaluation.json`. A [`Bundle`] in hand has a manifest that is consistent in itself, a model whose SHA-256 is the one the
//! manifest names, a calibration that was made for both, and figures that were measured with all three.

mod calibration;
mod card;
mod familiarity;
mod fold_report;
mod form;
mod manifest;
mod onnx_metadata;
mod preprocessing;
mod quantization;
mod repository;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};

pub use calibration::{
    CALIBRATION_SCHEMA_VERSION, Calibration, CalibrationError, ClassCalibration, FitMetrics, FitReport,
    GroupThresholds, KappaSource, MixThresholds, PosteriorTable, Rung, RungReport, ScoreTable, SetTables, Status,
    Thresholds, TrainingOverlap, inputs_sha256, train_prior,
};
pub use card::StaleCard;
pub use familiarity::{
    Clouds, FAMILIARITY_FILE, Familiarity, FamiliarityError, FamiliarityRecord, Question, QuestionRecord, Ranking,
    familiarity_file,
};
pub use fold_report::{
    Alpha, Ending, ExpectedProof, FoldReport, Head, LeftNorm, OnnxReport, OutputProof, Proof, Reference, check_kappa,
};
pub use form::{is_calibration, is_json_with, is_manifest};
pub use manifest::{
    Class, DATA_FILE, FileDigest, Group, Manifest, ManifestError, SCHEMA_VERSION, check_classes, is_data_file,
};
pub use preprocessing::{
    Color, CropOffset, Exif, Filter, Layout, MAX_SIDE, Pixels, Preprocessing, Resize, Scale, Size,
};
pub use quantization::{Certificate, CertifiedSlice, Difference, Quantization};
pub use repository::{Repository, VersionFolder, VersionPolicy};

/// File name of the network in a bundle.
pub const MODEL_FILE: &str = "model.onnx";
/// File name of the manifest in a bundle.
pub const MANIFEST_FILE: &str = "manifest.json";

/// How the name of the metadata in `model.onnx` begins that has the SHA-256 of a file with weights; the file's name follows.
pub const DIGEST_KEY: &str = "nbn.sha256.";

/// File name of the calibration in a bundle.
pub const CALIBRATION_FILE: &str = "calibration.json";
/// File name of the measured figures in a bundle.
pub const EVALUATION_FILE: &str = "evaluation.json";
/// The files of a bundle, but for those with weights.
pub const BUNDLE_FILES: [&str; 5] = [MODEL_FILE, MANIFEST_FILE, CALIBRATION_FILE, FAMILIARITY_FILE, EVALUATION_FILE];

/// A calibration and the name that answers give it.
#[derive(Debug, Clone, PartialEq)]
pub struct BoundCalibration {
    /// The first 12 hexadecimal digits of the file's SHA-256.
    pub id: String,
    /// The file's content, checked against the manifest.
    pub content: Calibration,
    /// What it names beside it.
    pub familiarity: Option<Arc<Familiarity>>,
}

impl BoundCalibration {
    /// Reads a calibration that belongs to `manifest`'s bundle.
    ///
    /// # Errors
    /// When the file cannot be read, is malformed, or is of another bundle.
    pub fn load(path: &Path, manifest: &Manifest) -> Result<Self, BundleError> {
        let bytes = read(path)?;
        let content: Calibration = serde_json::from_slice(&bytes)
            .map_err(|cause| BundleError::ParseCalibration { path: path.to_owned(), cause })?;
        content.check(manifest).map_err(|cause| BundleError::Calibration { path: path.to_owned(), cause })?;
        let beside = |record| Familiarity::load(&familiarity_file(path), record).map(Arc::new);
        let familiarity = content.familiarity.as_ref().map(beside).transpose()?;
        Ok(Self { id: sha256_hex(&bytes)[..12].to_owned(), content, familiarity })
    }
}

/// The network's file. Its bytes are read, and checked against the manifest's SHA-256, when they are first asked for; so are
/// the files with its weights.
#[derive(Debug, Clone)]
pub struct Network {
    /// Where it lies.
    pub path: PathBuf,
    /// SHA-256 in lower-case hexadecimal, from the manifest.
    pub sha256: String,
    /// Files with weights, and their SHA-256.
    data: Vec<(PathBuf, String)>,
    bytes: OnceLock<Vec<u8>>,
}

impl Network {
    fn new(folder: &Path, manifest: &Manifest) -> Self {
        let data = manifest.model_data.iter().map(|file| (folder.join(&file.file), file.sha256.clone())).collect();
        Self { path: folder.join(MODEL_FILE), sha256: manifest.model.sha256.clone(), data, bytes: OnceLock::new() }
    }

    /// Files that hold weights beside `model.onnx`.
    pub fn data_files(&self) -> Vec<PathBuf> {
        self.data.iter().map(|(path, _)| path.clone()).collect()
    }

    /// The bytes of `model.onnx`; it and the files with weights were checked.
    ///
    /// # Errors
    /// When a file cannot be read, or is not the one that the manifest describes.
    pub fn bytes(&self) -> Result<&[u8], BundleError> {
        if let Some(bytes) = self.bytes.get() {
            return Ok(bytes);
        }
        let bytes = read(&self.path)?;
        let is_as_described = |path: &Path, found: String, expected: &String| {
            if found == *expected {
                return Ok(());
            }
            Err(BundleError::Digest { path: path.to_owned(), found, expected: expected.clone() })
        };
        is_as_described(&self.path, sha256_hex(&bytes), &self.sha256)?;
        self.is_complete(&bytes)?;
        for (path, expected) in &self.data {
            is_within(path)?;
            let found = sha256_of_file(path).map_err(|cause| BundleError::Read { path: path.clone(), cause })?;
            is_as_described(path, found, expected)?;
        }
        Ok(self.bytes.get_or_init(|| bytes))
    }

    /// Whether the manifest describes exactly the files with weights that `model.onnx` names: its digest stands for them, in
    /// calibrations and in the cache.
    fn is_complete(&self, bytes: &[u8]) -> Result<(), BundleError> {
        let named =
            onnx_metadata::metadata(bytes).filter_map(|(key, value)| Some((key.strip_prefix(DIGEST_KEY)?, value)));
        let mut named: Vec<(&str, &str)> = named.collect();
        let name = |path: &'_ Path| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let described: Vec<(String, &str)> = self.data.iter().map(|(path, sha256)| (name(path), &**sha256)).collect();
        let mut described: Vec<(&str, &str)> = described.iter().map(|(name, sha256)| (&**name, *sha256)).collect();
        named.sort_unstable();
        described.sort_unstable();
        if named == described { Ok(()) } else { Err(BundleError::OtherWeights(self.path.clone())) }
    }
}

/// Refuses a link out of the bundle's folder: ONNX Runtime does not follow it.
fn is_within(path: &Path) -> Result<(), BundleError> {
    let folder = path.parent().unwrap_or(path);
    let read = |cause| BundleError::Read { path: path.to_owned(), cause };
    if fs::canonicalize(path).map_err(read)?.starts_with(fs::canonicalize(folder).map_err(read)?) {
        return Ok(());
    }
    let reason = "it is a link out of the bundle's folder, which ONNX Runtime does not follow: copy the file";
    Err(read(io::Error::new(io::ErrorKind::InvalidInput, reason)))
}

/// A bundle whose manifest is consistent and whose calibration was made for it. Unless it came from [`Bundle::open`], its
/// network was checked, too.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Name of the model: its folder's name under the model repository.
    pub name: String,
    /// Version: a decimal number, the name of the bundle's own folder.
    pub version: String,
    /// The bundle's description.
    pub manifest: Manifest,
    /// The network.
    pub network: Network,
    /// The calibration, when there is one.
    pub calibration: Option<BoundCalibration>,
    /// What `nbn fold evaluate --card` measured with this network and this calibration.
    pub evaluation: Option<serde_json::Value>,
    /// Why `evaluation.json` gives no figures, where there is such a file and it gives none.
    pub stale_card: Option<StaleCard>,
    /// The bundle's own folder.
    pub folder: PathBuf,
}

/// Why a bundle could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A file or folder could not be read.
    #[error("{path}: {cause}")]
    Read {
        /// What was read.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// `manifest.json` is not JSON of the expected form.
    #[error(
        "{path}: not a manifest of schema 1 to {SCHEMA_VERSION}: {cause}: make the bundle again with `nbn fold export`"
    )]
    Parse {
        /// The manifest.
        path: PathBuf,
        /// What the parser said.
        cause: serde_json::Error,
    },
    /// The manifest contradicts itself.
    #[error("{path}: {cause}")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Which rule is broken.
        cause: ManifestError,
    },
    /// `calibration.json` is not JSON of the expected form.
    #[error(
        "{path}: not a calibration of schema {CALIBRATION_SCHEMA_VERSION}: {cause}: run `nbn fold calibrate` again"
    )]
    ParseCalibration {
        /// The calibration.
        path: PathBuf,
        /// What the parser said.
        cause: serde_json::Error,
    },
    /// The calibration is of another bundle, or contradicts itself.
    #[error("{path}: {cause}")]
    Calibration {
        /// The calibration.
        path: PathBuf,
        /// Which rule is broken.
        cause: CalibrationError,
    },
    /// `familiarity.safetensors` is not the one that the calibration names, or cannot be used.
    #[error("{path}: {cause}")]
    Familiarity {
        /// The file.
        path: PathBuf,
        /// Which rule is broken.
        cause: FamiliarityError,
    },
    /// `model.onnx`, or a file with weights, is not the one that the manifest describes.
    #[error(
        "{path}: SHA-256 is {found}, the manifest says {expected}: the file was changed after `nbn fold export`; \
         restore it or export the checkpoint again"
    )]
    Digest {
        /// The model file.
        path: PathBuf,
        /// Digest of the file.
        found: String,
        /// Digest in the manifest.
        expected: String,
    },
    /// The manifest and `model.onnx` name different files with weights.
    #[error(
        "{}: it names other files with weights than the manifest's model_data, or other digests of them: restore the \
         bundle, or export it again", .0.display()
    )]
    OtherWeights(PathBuf),
    /// Nothing is where a bundle was expected.
    #[error("{}: no such folder{hint}", folder.display())]
    Missing {
        /// The folder.
        folder: PathBuf,
        /// What may have been meant.
        hint: String,
    },
    /// A file, where a bundle was expected.
    #[error(
        "{}: it is a file: a bundle is a folder, such as models/NAME/1, which `nbn fold export` makes of a checkpoint or an \
         ONNX file", .0.display()
    )]
    NotAFolder(PathBuf),
    /// No version folder below a model's folder.
    #[error("{path}: no version found: a bundle is a folder whose name is a decimal number, such as {path}/1, and \
             which holds {MANIFEST_FILE} and {MODEL_FILE}", path = .0.display())]
    NoVersion(PathBuf),
    /// A repository, where one of its models was expected.
    #[error("{}: it is a repository, which holds {models}: give one of them", folder.display())]
    Repository {
        /// The repository.
        folder: PathBuf,
        /// Its models' folders.
        models: String,
    },
    /// A version folder whose name is a number in another form.
    #[error("{}: a version's folder is named by its number alone: rename it to {number}", folder.display())]
    OddVersion {
        /// The folder.
        folder: PathBuf,
        /// Its number.
        number: u64,
    },
    /// None of the versions that are there is to be served.
    #[error("{}: none of the versions {policy} exists; {there} {}: change --versions", folder.display(), if there.contains(',') { "exist" } else { "exists" })]
    NotWanted {
        /// The model's folder.
        folder: PathBuf,
        /// Versions that are wanted.
        policy: String,
        /// Versions that are there.
        there: String,
    },
    /// A model's folder, or a bundle's, where the repository's was expected.
    #[error("{path}: {version} is a bundle: give the folder above, which holds NAME/VERSION/{MANIFEST_FILE}")]
    NotARepository {
        /// The folder given.
        path: PathBuf,
        /// A bundle right below it.
        version: PathBuf,
    },
    /// No model below the repository folder.
    #[error("{path}: no model found: give a folder that holds NAME/VERSION/{MANIFEST_FILE}", path = .0.display())]
    NoModel(PathBuf),
}

/// The version of a bundle whose folder is not named by one.
const NO_VERSION: &str = "-";

impl Bundle {
    /// Opens the bundle in `folder`, which holds `manifest.json` itself, or the highest version below it. Figures that do
    /// not belong to it are left out, with a warning in the log.
    ///
    /// # Errors
    /// When a file cannot be read, the manifest is malformed or inconsistent, the model's digest differs, or the
    /// calibration is of another bundle.
    pub fn load(folder: &Path) -> Result<Self, BundleError> {
        let bundle = Self::open(folder)?;
        bundle.network.bytes()?;
        Ok(bundle)
    }

    /// As [`Bundle::load`], but leaves the network unread and unchecked until [`Network::bytes`] is called.
    ///
    /// # Errors
    /// As [`Bundle::load`], but for the model's digest.
    pub fn open(folder: &Path) -> Result<Self, BundleError> {
        let mut bundle = Self::open_uncalibrated(folder)?;
        let path = bundle.folder.join(CALIBRATION_FILE);
        if path.exists() {
            bundle.calibration = Some(BoundCalibration::load(&path, &bundle.manifest)?);
        }
        let calibration = bundle.calibration.as_ref().map(|bound| bound.id.as_str());
        if let Some(quantization) = &mut bundle.manifest.fold.quantization
            && quantization.certificate.keep_what_holds(calibration)
        {
            tracing::warn!(
                bundle = %bundle.folder.display(),
                "what the certificate of this quantized network says of calibrated scores was measured with another calibration, \
                 and is withheld; what it says of the softmax stands"
            );
        }
        match bundle.card() {
            Ok(card) => bundle.evaluation = card,
            Err(stale) => {
                let file = bundle.folder.join(EVALUATION_FILE);
                tracing::warn!(
                    file = %file.display(), reason = %stale,
                    "the figures of a stale model card are withheld: run `nbn fold evaluate --card` again"
                );
                bundle.stale_card = Some(stale);
            }
        }
        Ok(bundle)
    }

    /// As [`Bundle::load`], but does not look at `calibration.json` and `evaluation.json`: to calibrate anew.
    ///
    /// # Errors
    /// As [`Bundle::load`].
    pub fn load_uncalibrated(folder: &Path) -> Result<Self, BundleError> {
        let bundle = Self::open_uncalibrated(folder)?;
        bundle.network.bytes()?;
        Ok(bundle)
    }

    /// A bundle that is not in its place yet: `manifest`'s, whose network is `model`, and whose files with weights lie in
    /// `folder`.
    #[must_use]
    pub fn provisional(name: String, version: String, manifest: Manifest, model: Vec<u8>, folder: PathBuf) -> Self {
        let network = Network { bytes: OnceLock::from(model), ..Network::new(&folder, &manifest) };
        Self { name, version, manifest, network, calibration: None, evaluation: None, stale_card: None, folder }
    }

    /// Where its files lie, or would lie.
    pub fn files(&self) -> Vec<PathBuf> {
        BUNDLE_FILES.iter().map(|name| self.folder.join(name)).chain(self.network.data_files()).collect()
    }

    fn open_uncalibrated(folder: &Path) -> Result<Self, BundleError> {
        if folder.is_file() {
            return Err(BundleError::NotAFolder(folder.to_owned()));
        }
        if !folder.exists() {
            let usual = Path::new("models").join(folder);
            let hint = if usual.is_dir() { format!("; is it {}?", usual.display()) } else { String::new() };
            return Err(BundleError::Missing { folder: folder.to_owned(), hint });
        }
        let folder = if folder.join(MANIFEST_FILE).exists() { folder.to_owned() } else { latest_version(folder)? };
        let folder = fs::canonicalize(&folder).map_err(|cause| BundleError::Read { path: folder, cause })?;
        let path = folder.join(MANIFEST_FILE);
        let manifest: Manifest =
            serde_json::from_slice(&read(&path)?).map_err(|cause| BundleError::Parse { path: path.clone(), cause })?;
        manifest.check().map_err(|cause| BundleError::Manifest { path, cause })?;
        let network = Network::new(&folder, &manifest);
        let part = |p: Option<&Path>| p.and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
        let own = part(Some(&folder));
        // A bundle that is not yet in a model's folder has a name, and no version.
        let (name, version) = match own.parse::<u64>() {
            Ok(_) => (part(folder.parent()), own),
            Err(_) => (own, NO_VERSION.to_owned()),
        };
        Ok(Self { name, version, manifest, network, calibration: None, evaluation: None, stale_card: None, folder })
    }
}

fn latest_version(folder: &Path) -> Result<PathBuf, BundleError> {
    if let Some(version) = repository::versions(folder)?.pop() {
        return Ok(version.folder);
    }
    // The folder above may have been given.
    let has_version = |path: &PathBuf| path.is_dir() && repository::versions(path).is_ok_and(|found| !found.is_empty());
    let mut models: Vec<PathBuf> = list(folder)?.into_iter().filter(has_version).collect();
    models.sort();
    if models.is_empty() {
        return Err(BundleError::NoVersion(folder.to_owned()));
    }
    let models: Vec<String> = models.iter().map(|model| model.display().to_string()).collect();
    Err(BundleError::Repository { folder: folder.to_owned(), models: models.join(", ") })
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, BundleError> {
    let fail = |cause| BundleError::Read { path: folder.to_owned(), cause };
    fs::read_dir(folder).map_err(fail)?.map(|entry| Ok(entry.map_err(fail)?.path())).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, BundleError> {
    let mut bytes = Vec::new();
    let read = open_file(path).and_then(|mut file| file.read_to_end(&mut bytes));
    read.map_err(|cause| BundleError::Read { path: path.to_owned(), cause })?;
    Ok(bytes)
}

/// Opens a file of a bundle, also through a link.
///
/// # Errors
/// When it cannot be opened, or is no regular file: a pipe or a device might have no end.
fn open_file(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        let reason = "it is not a regular file, but every file of a bundle must be one: replace it";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    File::open(path)
}

/// SHA-256 of the file at `path`, in lower-case hexadecimal.
///
/// # Errors
/// When it cannot be read, or is no regular file.
pub fn sha256_of_file(path: &Path) -> io::Result<String> {
    let mut digest = Sha256::new();
    let mut file = BufReader::with_capacity(1 << 20, open_file(path)?);
    loop {
        let part = file.fill_buf()?;
        if part.is_empty() {
            break;
        }
        digest.update(part);
        let read = part.len();
        file.consume(read);
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// SHA-256 of `bytes` in lower-case hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
