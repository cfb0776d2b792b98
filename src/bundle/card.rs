//! `evaluation.json`, the model card: figures that hold for one network with one calibration.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde_json::Value;

use super::manifest::cut;
use super::{Bundle, EVALUATION_FILE};

/// Longest card that is read, in bytes. A card has a few kilobytes, whatever the number of classes.
const MAX_BYTES: u64 = 1 << 20;

/// Why the figures in `evaluation.json` are withheld.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StaleCard {
    /// They were measured with another network or calibration.
    #[error("it was measured with {key} {found}, this bundle's is {expected}")]
    Other {
        /// Which of the two differs: `model_sha256` or `calibration`.
        key: &'static str,
        /// In the card, cut where it is long; `none` where the card has none.
        found: String,
        /// The bundle's; `none` where it has none.
        expected: String,
    },
    /// The file is not JSON.
    #[error("it is not JSON: {0}")]
    NotJson(String),
    /// The file is longer than any card.
    #[error("it is longer than {MAX_BYTES} bytes")]
    TooLong,
    /// The file cannot be read.
    #[error("it cannot be read: {0}")]
    Unread(String),
}

impl Bundle {
    /// The content of `evaluation.json`, when there is such a file.
    ///
    /// # Errors
    /// When it was not measured with this bundle's network and calibration, or is no card.
    pub fn card(&self) -> Result<Option<Value>, StaleCard> {
        let bytes = match read(&self.folder.join(EVALUATION_FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.map_err(|error| StaleCard::Unread(error.to_string()))?,
        };
        if bytes.len() as u64 > MAX_BYTES {
            return Err(StaleCard::TooLong);
        }
        let card: Value = serde_json::from_slice(&bytes).map_err(|error| StaleCard::NotJson(error.to_string()))?;
        let expected = [
            ("model_sha256", Some(self.manifest.model.sha256.as_str())),
            ("calibration", self.calibration.as_ref().map(|c| c.id.as_str())),
        ];
        for (key, expected) in expected {
            let found = match card.get(key) {
                None | Some(Value::Null) => None,
                Some(Value::String(text)) => Some(cut(text)),
                Some(other) => Some(cut(&other.to_string())),
            };
            if found.as_deref() != expected {
                let (found, expected) = (found.unwrap_or("none".into()), expected.unwrap_or("none").to_owned());
                return Err(StaleCard::Other { key, found, expected });
            }
        }
        Ok(Some(card))
    }
}

/// The file's bytes, of a longer one than a card's only the first.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
