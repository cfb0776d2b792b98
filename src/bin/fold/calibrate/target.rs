//! What `fold` may write over: no file that the same run reads, and only files of the kind that it writes.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::bail;
use nbn::bundle::Bundle;
use nbn::files::Named;
use serde_json::{Map, Value};

/// Longest header, in bytes, of a file of logits. It names two tensors.
const MAX_HEADER: u64 = 1000;

/// What `flag` names, where it was given.
pub(crate) fn given(flag: &'static str, path: Option<&PathBuf>) -> Option<Named> {
    path.map(|path| Named { role: flag, path: path.clone() })
}

/// The files of `bundle`, those included that it has not yet.
pub(crate) fn of_bundle(bundle: &Bundle) -> impl Iterator<Item = Named> + use<> {
    bundle.files().into_iter().map(|path| Named { role: "the bundle's file", path })
}

/// Refuses to replace what stands at `path`, unless `is_own` says that it is a `kind`. A path where nothing
/// stands is accepted.
///
/// # Errors
/// When it is something else, or a link that leads nowhere.
pub(crate) fn refuse_foreign(path: &Path, kind: &str, is_own: impl Fn(&Path) -> bool) -> anyhow::Result<()> {
    if fs::symlink_metadata(path).is_err() || is_own(path) {
        return Ok(());
    }
    bail!("{} is not a {kind}, and it would be overwritten: give another file, or move it", path.display())
}

/// Whether a file of logits and labels lies at `path`, as `nbn fold evaluate --logits` writes it.
pub(crate) fn is_logits(path: &Path) -> bool {
    let Some(header) = header_of(path) else { return false };
    let has = |name: &str, kind: &str| header.get(name).is_some_and(|tensor| tensor["dtype"] == kind);
    header.len() == 2 && has("logits", "F32") && has("labels", "I64")
}

/// The header of the safetensors file at `path`, if there is one and it is short.
fn header_of(path: &Path) -> Option<Map<String, Value>> {
    fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let mut file = File::open(path).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let length = u64::from_le_bytes(length);
    let mut header = Vec::new();
    file.take(length.min(MAX_HEADER)).read_to_end(&mut header).ok()?;
    serde_json::from_slice(&header).ok().filter(|_| header.len() as u64 == length)
}
