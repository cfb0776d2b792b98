//! `evaluation.json`, the model card: figures that hold for one network with one calibration.

use std::io::{self, Read};
use std::path::Path;

use serde_json::{Map, Value};

use super::calibration::{Limit, SHARE};
use super::manifest::{check_name, cut};
use super::{Bundle, EVALUATION_FILE, open_file};

/// Longest card that is read, in bytes. A card has a few kilobytes, whatever the number of classes.
const MAX_BYTES: u64 = 1 << 20;
/// What every card has.
const KEYS: [&str; 8] = ["model_sha256", "calibration", "data", "images", "created", "how", "alpha", "figures"];
/// What a card may have besides.
const FAMILIARITY: &str = "familiarity";
/// The levels of `figures` above the metrics: prior, scorer and slice.
const LEVELS: [&[&str]; 3] =
    [&["uniform", "train"], &["softmax", "temperature", "calibrated"], &["overall", "macro", "many", "medium", "few"]];
/// Counts, sizes of sets, and likelihoods in nats.
const AMOUNT: Limit = (0.0, 1e12, "it must lie in 0..=1e12");
/// Brier scores.
const BRIER: Limit = (0.0, 2.0, "it must lie in 0..=2");
/// The metrics, and where each lies.
const METRICS: [(&str, Limit); 16] = [
    ("top1", SHARE),
    ("top5", SHARE),
    ("nll", AMOUNT),
    ("brier", BRIER),
    ("ece", SHARE),
    ("ece_equal_mass", SHARE),
    ("classwise_ece", SHARE),
    ("pas_coverage", SHARE),
    ("pas_size", AMOUNT),
    ("plain_coverage", SHARE),
    ("plain_size", AMOUNT),
    ("posterior_coverage", SHARE),
    ("posterior_size", AMOUNT),
    ("pas_gap", SHARE),
    ("plain_gap", SHARE),
    ("posterior_gap", SHARE),
];

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
    /// A value that no evaluation gives.
    #[error("{what} is {value}; {limit}")]
    Value {
        /// Which.
        what: String,
        /// Its value, cut where it is long.
        value: String,
        /// What it must be.
        limit: &'static str,
    },
    /// It has something that no card has, or lacks something that every card has.
    #[error("it does not have the form of a card: {0}")]
    Form(String),
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
    /// When it was not measured with this bundle's network and calibration, is no card, or has a figure that cannot be
    /// right.
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
        check(&card)?;
        Ok(Some(card))
    }
}

/// Checks that `card` has the form that `nbn fold evaluate --card` writes, and that every number of it is possible.
fn check(card: &Value) -> Result<(), StaleCard> {
    let at = "the card";
    let map = object(at, card)?;
    if let Some(key) = map.keys().find(|key| !KEYS.contains(&key.as_str()) && *key != FAMILIARITY) {
        return Err(unknown(at, key));
    }
    let get = |key: &str| map.get(key).ok_or_else(|| StaleCard::Form(format!("{at} has no {key}")));
    KEYS.iter().try_for_each(|key| get(key).map(drop))?;
    for key in ["data", "created", "how"] {
        text(key, get(key)?)?;
    }
    number("images", get("images")?, AMOUNT)?;
    number("alpha", get("alpha")?, SHARE)?;
    figures("figures", get("figures")?, &LEVELS)?;
    map.get(FAMILIARITY).map_or(Ok(()), familiarity)
}

/// Checks what a card says of `unlike`.
fn familiarity(value: &Value) -> Result<(), StaleCard> {
    let map = object(FAMILIARITY, value)?;
    let shares = |what: &str, value: &Value| {
        let list = value.as_array().ok_or_else(|| StaleCard::Form(format!("{what} is not a list")))?;
        list.iter().try_for_each(|share| number(what, share, SHARE))
    };
    for (key, value) in map {
        match key.as_str() {
            "unlike" => shares("familiarity.unlike", value)?,
            "withheld" => {
                for (slice, list) in object("familiarity.withheld", value)? {
                    if !LEVELS[2].contains(&slice.as_str()) {
                        return Err(unknown("familiarity.withheld", slice));
                    }
                    shares(&format!("familiarity.withheld.{slice}"), list)?;
                }
            }
            "foreign" => {
                for (key, value) in object("familiarity.foreign", value)? {
                    let what = format!("familiarity.foreign.{key}");
                    match key.as_str() {
                        "data" => text(&what, value)?,
                        "images" => number(&what, value, AMOUNT)?,
                        "auroc" => number(&what, value, SHARE)?,
                        "withheld" => shares(&what, value)?,
                        _ => return Err(unknown("familiarity.foreign", key)),
                    }
                }
            }
            _ => return Err(unknown(FAMILIARITY, key)),
        }
    }
    Ok(())
}

/// Checks the figures at `at`, which have `levels` above their metrics.
fn figures(at: &str, value: &Value, levels: &[&[&str]]) -> Result<(), StaleCard> {
    let map = object(at, value)?;
    for (key, value) in map {
        let below = format!("{at}.{key}");
        match levels {
            [names, levels @ ..] if names.contains(&key.as_str()) => figures(&below, value, levels)?,
            [_, ..] => return Err(unknown(at, key)),
            [] => {
                let metric = METRICS.iter().find(|(name, _)| name == key);
                number(&below, value, metric.ok_or_else(|| unknown(at, key))?.1)?;
            }
        }
    }
    Ok(())
}

fn object<'a>(at: &str, value: &'a Value) -> Result<&'a Map<String, Value>, StaleCard> {
    value.as_object().ok_or_else(|| StaleCard::Form(format!("{at} is not an object")))
}

fn unknown(at: &str, key: &str) -> StaleCard {
    StaleCard::Form(format!("{at} has an unknown key {:?}", cut(key)))
}

fn text(what: &str, value: &Value) -> Result<(), StaleCard> {
    if value.as_str().is_some_and(|text| check_name(what, text).is_ok()) {
        return Ok(());
    }
    Err(wrong(what, value, "it must be text of at most 1000 characters"))
}

fn number(what: &str, value: &Value, (least, most, limit): Limit) -> Result<(), StaleCard> {
    if value.as_f64().is_some_and(|number| (least..=most).contains(&number)) {
        return Ok(());
    }
    Err(wrong(what, value, limit))
}

fn wrong(what: &str, value: &Value, limit: &'static str) -> StaleCard {
    StaleCard::Value { what: what.to_owned(), value: cut(&value.to_string()), limit }
}

/// The file's bytes, of a longer one than a card's only the first.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_file(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
