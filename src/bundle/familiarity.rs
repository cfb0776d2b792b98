//! `familiarity.safetensors`: what tells pictures that are like the training pictures from others. `calibration.json` names it
//! and has its digest.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::calibration::{CalibrationError, Limit, bad, within};
use super::{BundleError, Group, read, sha256_hex};

/// File name of what the questions are answered by.
pub const FAMILIARITY_FILE: &str = "familiarity.safetensors";

/// The file that belongs to the calibration at `path`: beside `calibration.json`, [`FAMILIARITY_FILE`]; beside one of another
/// name, `NAME.familiarity.safetensors`, so that calibrations in one folder have one each.
pub fn familiarity_file(path: &Path) -> PathBuf {
    if path.file_name().is_some_and(|name| name == super::CALIBRATION_FILE) {
        path.with_file_name(FAMILIARITY_FILE)
    } else {
        path.with_extension(FAMILIARITY_FILE)
    }
}

/// A question about a picture.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// Does it look otherwise than the training pictures (brightness, colours, details)?
    Look,
    /// Is what the network sees in it far from what it saw in the pictures of every class?
    Distance,
    /// Is no class convincing?
    Confidence,
}

impl Question {
    /// All, in the order of their parts in the file.
    pub const ALL: [Self; 3] = [Self::Look, Self::Distance, Self::Confidence];

    /// The name in answers and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Look => "look",
            Self::Distance => "distance",
            Self::Confidence => "confidence",
        }
    }

    /// What a picture has that stands out by it.
    pub fn told(self) -> &'static str {
        match self {
            Self::Look => "its brightness, colours or details are unusual",
            Self::Distance => "what the network sees in it is far from every class",
            Self::Confidence => "no class is convincing",
        }
    }
}

/// What `calibration.json` says of it.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct FamiliarityRecord {
    /// SHA-256 of `familiarity.safetensors`.
    pub sha256: String,
    /// Training pictures behind look and distance; 0 when there were none.
    pub training_images: u64,
    /// Of each question that is asked, how its values are distributed over the calibration pictures.
    pub questions: Vec<QuestionRecord>,
}

/// One question.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct QuestionRecord {
    /// Which.
    pub question: Question,
    /// Mean over the calibration pictures.
    pub mean: f64,
    /// Standard deviation over them; above 0.
    pub deviation: f64,
}

/// Values of questions and their deviations.
const VALUE: Limit = (-1e30, 1e30, "it must lie in -1e30..=1e30");
const DEVIATION: Limit = (1e-12, 1e30, "it must lie in 1e-12..=1e30");

impl FamiliarityRecord {
    pub(super) fn check(&self) -> Result<(), CalibrationError> {
        if self.questions.is_empty() {
            return Err(bad("familiarity.questions", &"empty", "at least one is needed"));
        }
        for (at, record) in self.questions.iter().enumerate() {
            let name = record.question.name();
            if self.questions[..at].iter().any(|earlier| earlier.question == record.question) {
                return Err(bad("familiarity.questions", &name, "each may stand there once"));
            }
            within(format!("familiarity's mean of {name}"), record.mean, VALUE)?;
            within(format!("familiarity's deviation of {name}"), record.deviation, DEVIATION)?;
        }
        Ok(())
    }
}

/// Gaussian clouds of one shape: squared distances from the nearest of M centres.
///
/// d²(x) = min over m of ‖B(x − μ) − ν_m‖² + (‖x − μ‖² − ‖R(x − μ)‖²)/σ², where B = diag(1/s)·R. The second term is there
/// only when R keeps fewer dimensions than x has.
#[derive(Debug, Clone, PartialEq)]
pub struct Clouds {
    /// μ, of D values.
    pub mean: Vec<f32>,
    /// R, `[r, D]`, row-major. Its rows are orthonormal when there is a residual.
    pub basis: Vec<f32>,
    /// s: the standard deviation along each of the r rows; above 0.
    pub spread: Vec<f32>,
    /// ν, `[M, r]`, in units of s.
    pub centres: Vec<f32>,
    /// σ: the standard deviation in each dimension that R leaves out; none when it leaves none out.
    pub residual: Option<f32>,
}

impl Clouds {
    /// D.
    pub fn dimensions(&self) -> usize {
        self.mean.len()
    }

    /// r.
    pub fn rank(&self) -> usize {
        self.spread.len()
    }

    fn check(&self) -> Result<(), &'static str> {
        let (dimensions, rank) = (self.dimensions(), self.rank());
        if rank == 0 || dimensions < rank || self.basis.len() != rank * dimensions {
            return Err("a basis has another size than its mean and spread");
        }
        if self.centres.is_empty() || !self.centres.len().is_multiple_of(rank) {
            return Err("the centres have another size than the basis");
        }
        let numbers = self.mean.iter().chain(&self.basis).chain(&self.centres);
        let spreads = self.spread.iter().chain(&self.residual);
        if !numbers.into_iter().all(|v| v.is_finite()) || !spreads.into_iter().all(|s| s.is_finite() && *s > 0.0) {
            return Err("it has values that are not finite, or spreads that are not above 0");
        }
        Ok(())
    }
}

/// Scores of calibration pictures, which those of others are ranked among.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranking {
    /// The pictures whose best class is of this group; all where it is none.
    pub group: Option<Group>,
    /// Ascending.
    pub scores: Vec<f64>,
}

impl Ranking {
    fn check(&self) -> Result<(), &'static str> {
        if self.scores.is_empty() || !self.scores.is_sorted() || !self.scores.iter().all(|s| s.is_finite()) {
            return Err("a ranking has no scores, or they are not ascending and finite");
        }
        Ok(())
    }
}

/// The content of `familiarity.safetensors`, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Familiarity {
    /// The training pictures' looks; one centre.
    pub look: Option<Clouds>,
    /// The features of the training pictures; a centre per class that has some.
    pub distance: Option<Clouds>,
    /// That over all pictures, and those over groups that have enough.
    pub rankings: Vec<Ranking>,
}

/// Why `familiarity.safetensors` cannot be used.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum FamiliarityError {
    /// The file is not the one that the calibration names.
    #[error(
        "SHA-256 is {found}, {} says {expected}: it is of another calibration, or was changed; run `nbn fold calibrate` again",
        super::CALIBRATION_FILE
    )]
    Digest {
        /// Of the file.
        found: String,
        /// In the calibration.
        expected: String,
    },
    /// It is not what `nbn fold calibrate` writes.
    #[error("{0}: run `nbn fold calibrate` again")]
    Form(String),
}

const RANKINGS: [(&str, Option<Group>); 4] =
    [("all", None), ("many", Some(Group::Many)), ("medium", Some(Group::Medium)), ("few", Some(Group::Few))];

impl Familiarity {
    /// Reads the file at `path` that `record` names.
    ///
    /// # Errors
    /// When it cannot be read, is another file, or has content that cannot be used.
    pub fn load(path: &Path, record: &FamiliarityRecord) -> Result<Self, BundleError> {
        let bytes = read(path)?;
        let fail = |cause| BundleError::Familiarity { path: path.to_owned(), cause };
        let found = sha256_hex(&bytes);
        if found != record.sha256 {
            return Err(fail(FamiliarityError::Digest { found, expected: super::manifest::cut(&record.sha256) }));
        }
        let content = Self::from_bytes(&bytes).map_err(fail)?;
        for (question, is_there) in
            [(Question::Look, content.look.is_some()), (Question::Distance, content.distance.is_some())]
        {
            if is_there != record.questions.iter().any(|q| q.question == question) {
                let name = question.name();
                return Err(fail(FamiliarityError::Form(format!(
                    "it and the calibration differ in asking for {name}"
                ))));
            }
        }
        Ok(content)
    }

    /// Reads what [`Familiarity::to_bytes`] writes.
    ///
    /// # Errors
    /// When it is something else, or has values that cannot be used.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, FamiliarityError> {
        let form = |reason: &str| FamiliarityError::Form(reason.to_owned());
        let file = SafeTensors::deserialize(bytes)
            .map_err(|error| form(&format!("it is not a safetensors file ({error})")))?;
        let has = |name: &str| file.tensor(name).is_ok();
        let values = |name: &str| -> Result<Vec<f32>, FamiliarityError> {
            let tensor = file.tensor(name).map_err(|_| form(&format!("it has no tensor {name}")))?;
            if tensor.dtype() != Dtype::F32 {
                return Err(form(&format!("its tensor {name} is not of f32")));
            }
            Ok(tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        };
        let doubles = |name: &str| -> Result<Vec<f64>, FamiliarityError> {
            let tensor = file.tensor(name).map_err(|_| form(&format!("it has no tensor {name}")))?;
            if tensor.dtype() != Dtype::F64 {
                return Err(form(&format!("its tensor {name} is not of f64")));
            }
            Ok(tensor.data().as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect())
        };
        let clouds = |question: Question| -> Result<Option<Clouds>, FamiliarityError> {
            let of = |part: &str| format!("{}.{part}", question.name());
            if !has(&of("mean")) {
                return Ok(None);
            }
            let residual = has(&of("residual")).then(|| values(&of("residual"))).transpose()?;
            let clouds = Clouds {
                mean: values(&of("mean"))?,
                basis: values(&of("basis"))?,
                spread: values(&of("spread"))?,
                centres: values(&of("centres"))?,
                residual: match residual.as_deref() {
                    None => None,
                    Some(&[residual]) => Some(residual),
                    Some(_) => return Err(form("a residual is not one number")),
                },
            };
            clouds.check().map_err(form)?;
            Ok(Some(clouds))
        };
        let mut rankings = Vec::new();
        for (name, group) in RANKINGS {
            let scores = format!("ranking.{name}");
            if group.is_none() || has(&scores) {
                let ranking = Ranking { group, scores: doubles(&scores)? };
                ranking.check().map_err(form)?;
                rankings.push(ranking);
            }
        }
        Ok(Self { look: clouds(Question::Look)?, distance: clouds(Question::Distance)?, rankings })
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// When lists have lengths that do not fit together.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FamiliarityError> {
        let mut parts: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        let single = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let double = |values: &[f64]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        for (question, clouds) in [(Question::Look, &self.look), (Question::Distance, &self.distance)] {
            let Some(clouds) = clouds else { continue };
            let (d, r) = (clouds.dimensions(), clouds.rank());
            let mut add = |part: &str, shape: Vec<usize>, values: &[f32]| {
                parts.push((format!("{}.{part}", question.name()), Dtype::F32, shape, single(values)));
            };
            add("mean", vec![d], &clouds.mean);
            add("basis", vec![r, d], &clouds.basis);
            add("spread", vec![r], &clouds.spread);
            add("centres", vec![clouds.centres.len() / r.max(1), r], &clouds.centres);
            if let Some(residual) = clouds.residual {
                add("residual", vec![1], &[residual]);
            }
        }
        for ranking in &self.rankings {
            let name = RANKINGS.iter().find(|(_, group)| *group == ranking.group).map_or("all", |(name, _)| name);
            let shape = vec![ranking.scores.len()];
            parts.push((format!("ranking.{name}"), Dtype::F64, shape, double(&ranking.scores)));
        }
        let mut views = Vec::with_capacity(parts.len());
        for (name, dtype, shape, bytes) in &parts {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            views.push((name.as_str(), view.map_err(|error| FamiliarityError::Form(error.to_string()))?));
        }
        safetensors::serialize(views, None).map_err(|error| FamiliarityError::Form(error.to_string()))
    }
}
