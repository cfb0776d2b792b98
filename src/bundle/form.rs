//! Whether a file is one that this program wrote, as its form shows: only such a file is replaced.

use std::collections::BTreeMap;
use std::io::{self, BufReader};
use std::path::Path;

use serde::de::IgnoredAny;

use super::open_file;

/// Whether a manifest of this program lies at `path`. It may be of another version, or have values that no bundle has.
pub fn is_manifest(path: &Path) -> bool {
    is_json_with(path, &["schema_version", "arch", "classes", "preprocessing", "fold", "model"])
}

/// Whether a calibration of this program lies at `path`. It may be of another bundle or version.
pub fn is_calibration(path: &Path) -> bool {
    is_json_with(path, &["model_sha256", "rung", "classes"])
}

/// Whether a regular file at `path`, or where it leads, holds a JSON object that has all of `keys`.
pub fn is_json_with(path: &Path, keys: &[&str]) -> bool {
    let read = || -> io::Result<BTreeMap<String, IgnoredAny>> {
        Ok(serde_json::from_reader(BufReader::new(open_file(path)?))?)
    };
    read().is_ok_and(|object| keys.iter().all(|key| object.contains_key(*key)))
}
