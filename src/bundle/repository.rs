//! The model repository: `REPOSITORY/NAME/VERSION/`, and which versions of a model are wanted.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{BundleError, MANIFEST_FILE, list};

/// A folder that holds models.
#[derive(Debug, Clone)]
pub struct Repository {
    folder: PathBuf,
}

/// One version's folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct VersionFolder {
    /// The number that names it.
    pub number: u64,
    /// Where it lies.
    pub folder: PathBuf,
}

/// Which of a model's versions are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum VersionPolicy {
    /// The one with the highest number.
    #[default]
    Latest,
    /// Each.
    All,
    /// Those with these numbers, where a model has them.
    Specific(Vec<u64>),
}

impl FromStr for VersionPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "latest" => Ok(Self::Latest),
            "all" => Ok(Self::All),
            numbers => {
                let numbers: Result<Vec<u64>, _> = numbers.split(',').map(|n| n.trim().parse()).collect();
                let numbers =
                    numbers.map_err(|_| "expected latest, all, or numbers separated by commas, such as 1,3")?;
                Ok(Self::Specific(numbers))
            }
        }
    }
}

impl fmt::Display for VersionPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::All => f.write_str("all"),
            Self::Specific(numbers) => {
                let numbers: Vec<_> = numbers.iter().map(u64::to_string).collect();
                f.write_str(&numbers.join(","))
            }
        }
    }
}

impl Repository {
    /// The repository in `folder`.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Names of the models, in order. Folders whose names begin with a dot are none, nor is `lost+found`.
    ///
    /// # Errors
    /// When the folder cannot be read, holds no model, or is a model's folder itself.
    pub fn models(&self) -> Result<Vec<String>, BundleError> {
        let mut folders: Vec<PathBuf> = list(&self.folder)?.into_iter().filter(|path| path.is_dir()).collect();
        folders.sort();
        let own = [self.folder.clone()];
        let bundle = |folder: &&PathBuf| folder.join(MANIFEST_FILE).exists();
        if let Some(version) = own.iter().chain(&folders).find(bundle) {
            return Err(BundleError::NotARepository { path: self.folder.clone(), version: version.clone() });
        }
        let names: Vec<String> = folders
            .iter()
            .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
            // A disk's own folder, in which its repair puts what it finds.
            .filter(|name| !name.starts_with('.') && name != "lost+found")
            .collect();
        if names.is_empty() { Err(BundleError::NoModel(self.folder.clone())) } else { Ok(names) }
    }

    /// The wanted versions of a model, the lowest first. None when it has no folder.
    ///
    /// # Errors
    /// When the folder cannot be read, or holds no version that is wanted.
    pub fn wanted(&self, model: &str, policy: &VersionPolicy) -> Result<Option<Vec<VersionFolder>>, BundleError> {
        // A client's string must not leave the repository.
        let plain = !model.is_empty() && !model.starts_with('.') && !model.contains(['/', '\\', '\0']);
        let folder = self.folder.join(model);
        if !plain || !folder.is_dir() {
            return Ok(None);
        }
        let mut found = versions(&folder)?;
        let there: Vec<String> = found.iter().map(|version| version.number.to_string()).collect();
        match policy {
            VersionPolicy::Latest => found = found.pop().into_iter().collect(),
            VersionPolicy::All => {}
            VersionPolicy::Specific(numbers) => found.retain(|version| numbers.contains(&version.number)),
        }
        match (found.is_empty(), there.is_empty()) {
            (false, _) => Ok(Some(found)),
            (true, true) => Err(BundleError::NoVersion(folder)),
            (true, false) => {
                Err(BundleError::NotWanted { folder, policy: policy.to_string(), there: there.join(", ") })
            }
        }
    }
}

/// The versions in a model's folder, the lowest first.
pub(super) fn versions(model: &Path) -> Result<Vec<VersionFolder>, BundleError> {
    let mut versions = Vec::new();
    for folder in list(model)?.into_iter().filter(|folder| folder.join(MANIFEST_FILE).exists()) {
        let Some(name) = folder.file_name().and_then(|name| name.to_str()) else { continue };
        let Ok(number) = name.parse::<u64>() else { continue };
        // `01` and `1` would be one version.
        if name != number.to_string() {
            return Err(BundleError::OddVersion { folder, number });
        }
        versions.push(VersionFolder { number, folder });
    }
    versions.sort();
    Ok(versions)
}
