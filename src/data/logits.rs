//! A bundle's logits of a labelled set.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use super::source::{content, read};
use super::{DataError, LabelledImages};
use crate::bundle::{Bundle, Exif, Pixels};
use crate::classify::{Classifier, ClassifyError, Prediction};
use crate::files;
use crate::pixels::{DecodeLimits, Picture, Preprocessor};
use crate::runtime::{Library, Place};
use crate::scores::{Logits, LogitsError, centre};

/// Logits [N, K] of N images, and the index of each one's class. All are finite; every label is below K.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledLogits {
    classes: usize,
    values: Vec<f32>,
    labels: Vec<u32>,
}

/// Images whose unreadable examples are quoted in an error.
const QUOTED: usize = 20;
/// SHA-256 of an image's size and RGB bytes.
pub type PixelHash = [u8; 32];

impl LabelledLogits {
    /// Accepts row-major `values` [N, K] with one label a row.
    ///
    /// # Errors
    /// When the sizes do not fit, a value is not finite, or a label is beyond the classes.
    pub fn try_new(classes: usize, values: Vec<f32>, labels: Vec<u32>) -> Result<Self, String> {
        if classes == 0 || Some(values.len()) != labels.len().checked_mul(classes) {
            return Err(format!("has {} logits for {} labels and {classes} classes", values.len(), labels.len()));
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(format!("the logit of class {} in row {} is {}", at % classes, at / classes, values[at]));
        }
        if let Some(row) = labels.iter().position(|&l| l as usize >= classes) {
            return Err(format!(
                "row {row} has label {}; there are {classes} classes, 0 to {}",
                labels[row],
                classes - 1
            ));
        }
        Ok(Self { classes, values, labels })
    }

    /// Those of the images with these numbers, each below N.
    #[must_use]
    pub fn select(&self, numbers: &[usize]) -> Self {
        Self {
            classes: self.classes,
            values: numbers.iter().flat_map(|&n| self.row(n).iter().copied()).collect(),
            labels: numbers.iter().map(|&n| self.labels[n]).collect(),
        }
    }

    /// Each row less its [`centre`].
    #[must_use]
    pub fn centred(&self) -> Self {
        let row = |row: &[f32]| {
            let centre = centre(row);
            let moved = |z: &f32| (f64::from(*z) - centre).clamp(f32::MIN.into(), f32::MAX.into()) as f32;
            row.iter().map(moved).collect::<Vec<f32>>()
        };
        let values = self.values.chunks(self.classes).flat_map(row).collect();
        Self { classes: self.classes, values, labels: self.labels.clone() }
    }

    /// Reads `logits` [N, K] (f32 or f64) and `labels` [N] (i64 or i32) from a safetensors file.
    ///
    /// # Errors
    /// When the file has another form, another number of classes than `classes`, or values that are not finite.
    pub fn load(path: &Path, classes: usize) -> Result<Self, DataError> {
        let bytes = read(path)?;
        let wrong = |reason: &str| content(path, reason);
        let file =
            SafeTensors::deserialize(&bytes).map_err(|error| wrong(&format!("is not a safetensors file: {error}")))?;
        let missing = "expected the tensors `logits` [N, K] (f32 or f64) and `labels` [N] (i64 or i32)";
        let logits = file.tensor("logits").map_err(|_| wrong(missing))?;
        let labels = file.tensor("labels").map_err(|_| wrong(missing))?;
        let &[rows, columns] = logits.shape() else { return Err(wrong(missing)) };
        if columns != classes {
            return Err(wrong(&format!("has logits of {columns} classes; the bundle has {classes}")));
        }
        if labels.shape() != [rows] || rows == 0 {
            return Err(wrong(&format!(
                "has logits of shape {:?} and labels of shape {:?}; {missing}",
                logits.shape(),
                labels.shape()
            )));
        }
        let values = match logits.dtype() {
            Dtype::F32 => chunks(logits.data(), |b: [u8; 4]| f32::from_le_bytes(b)),
            Dtype::F64 => chunks(logits.data(), |b: [u8; 8]| f64::from_le_bytes(b) as f32),
            _ => return Err(wrong(missing)),
        };
        let whole: Vec<i64> = match labels.dtype() {
            Dtype::I64 => chunks(labels.data(), i64::from_le_bytes),
            Dtype::I32 => chunks(labels.data(), |b: [u8; 4]| i32::from_le_bytes(b).into()),
            _ => return Err(wrong(missing)),
        };
        // A negative label is beyond the classes, too.
        let labels = whole.into_iter().map(|l| u32::try_from(l).unwrap_or(u32::MAX)).collect();
        Self::try_new(classes, values, labels).map_err(|reason| wrong(&reason))
    }

    /// Writes the file that [`LabelledLogits::load`] reads, or leaves what was there.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), DataError> {
        let values: Vec<u8> = self.values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let labels: Vec<u8> = self.labels.iter().flat_map(|&l| i64::from(l).to_le_bytes()).collect();
        let view = |dtype, shape, data| TensorView::new(dtype, shape, data).map_err(|e| content(path, &e.to_string()));
        let tensors = [
            ("logits", view(Dtype::F32, vec![self.len(), self.classes], &values)?),
            ("labels", view(Dtype::I64, vec![self.len()], &labels)?),
        ];
        let bytes = safetensors::serialize(tensors, None).map_err(|error| content(path, &error.to_string()))?;
        files::replace(path, &bytes).map_err(|error| content(path, &format!("cannot be written: {error}")))
    }

    /// K.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// N.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// One row's logits.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.classes..(row + 1) * self.classes]
    }

    /// One row's logits, as the scorers take them.
    ///
    /// # Errors
    /// Never, since construction checked the same; the type wants it.
    pub fn logits(&self, row: usize) -> Result<Logits, LogitsError> {
        Logits::try_new(self.row(row).to_vec(), self.classes)
    }

    /// The class of each row.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// Rows per class.
    pub fn counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.classes];
        self.labels.iter().for_each(|&l| counts[l as usize] += 1);
        counts
    }
}

fn chunks<const N: usize, T>(bytes: &[u8], of: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| of(*chunk)).collect()
}

/// What a bundle's network says of images.
#[derive(Debug, Clone)]
pub struct Answers {
    /// Its logits.
    pub logits: LabelledLogits,
    /// What its classifier sees, by image; none where the network does not give it.
    pub features: Option<Vec<Vec<f32>>>,
    /// What each image looks like.
    pub looks: Vec<Vec<f32>>,
    /// Each image's [`pixel_hashes`] hash.
    pub hashes: Vec<PixelHash>,
}

impl Answers {
    /// Those of the images with these numbers, each below N.
    #[must_use]
    pub fn select(&self, numbers: &[usize]) -> Self {
        let of = |rows: &Vec<Vec<f32>>| numbers.iter().map(|&n| rows[n].clone()).collect();
        Self {
            logits: self.logits.select(numbers),
            features: self.features.as_ref().map(of),
            looks: of(&self.looks),
            hashes: numbers.iter().map(|&n| self.hashes[n]).collect(),
        }
    }
}

/// Runs `bundle`'s network over `images`, decoded as `pixels` says, through the runtime that serves, on all processors.
/// `progress` is called once per image, from any thread. The hashes are always of all pixels.
///
/// # Errors
/// When images cannot be decoded, or the network fails.
pub fn answers_of(
    bundle: &Bundle,
    library: &Library,
    place: &Place,
    images: &LabelledImages,
    pixels: Pixels,
    progress: &(dyn Fn() + Sync),
) -> Result<Answers, DataError> {
    let rows: Mutex<Vec<Option<(Prediction, PixelHash)>>> = Mutex::new(vec![None; images.len()]);
    each_answer(bundle, library, place, images, pixels, progress, &|index, prediction, picture| {
        let row = (prediction, hash_of(picture));
        rows.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[index] = Some(row);
    })?;
    let rows = rows.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut values = Vec::with_capacity(images.len() * bundle.manifest.classes.len());
    let (mut features, mut looks, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
    // Every image was answered.
    for (prediction, hash) in rows.into_iter().flatten() {
        values.extend_from_slice(prediction.logits.values());
        features.extend(prediction.features);
        looks.extend(prediction.look);
        hashes.push(hash);
    }
    let classes = bundle.manifest.classes.len();
    let logits = LabelledLogits { classes, values, labels: images.labels().to_vec() };
    let features = (features.len() == images.len()).then_some(features);
    Ok(Answers { logits, features, looks, hashes })
}

/// As [`answers_of`], and hands each image's number, answer and picture to `take` instead of keeping them.
///
/// # Errors
/// As [`answers_of`].
pub fn each_answer(
    bundle: &Bundle,
    library: &Library,
    place: &Place,
    images: &LabelledImages,
    pixels: Pixels,
    progress: &(dyn Fn() + Sync),
    take: &(dyn Fn(usize, Prediction, &Picture) + Sync),
) -> Result<(), DataError> {
    let limits = DecodeLimits { pixels, ..DecodeLimits::OFFLINE };
    let exif = bundle.manifest.preprocessing.exif;
    let least = Preprocessor::new(bundle.manifest.preprocessing.clone(), limits).least();
    each(images, exif, progress, || {
        let (classifier, _) = Classifier::open(bundle, library, place, limits)?;
        let mut classifier = classifier.map_network(|network| network.with_features().with_looks());
        Ok(move |index: usize, picture: &Picture| {
            // What can be decoded whole can be decoded in part.
            let fewer = least.and_then(|least| images.picture_at_least(index, exif, &limits, Some(least)).ok());
            take(index, classifier.answer(fewer.as_ref().unwrap_or(picture))?, picture);
            Ok(())
        })
    })
}

/// Numbers of at most `most` of the images with these labels: of each class one after another, as long as it has some, in an
/// order that is always the same; ascending.
pub fn in_turn(labels: &[u32], most: usize) -> Vec<usize> {
    in_turn_by(labels, most, 0)
}

/// As [`in_turn`], in the order that `seed` gives.
pub fn in_turn_by(labels: &[u32], most: usize, seed: u64) -> Vec<usize> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut order: Vec<usize> = (0..labels.len()).collect();
    random.shuffle(&mut order);
    let mut seen = vec![0usize; labels.iter().max().map_or(0, |label| *label as usize + 1)];
    let mut turns: Vec<(usize, usize)> = order
        .into_iter()
        .map(|n| {
            let turn = &mut seen[labels[n] as usize];
            *turn += 1;
            (*turn, n)
        })
        .collect();
    // Stable: within a turn, in the drawn order.
    turns.sort_by_key(|(turn, _)| *turn);
    let mut chosen: Vec<usize> = turns.into_iter().take(most).map(|(_, n)| n).collect();
    chosen.sort_unstable();
    chosen
}

/// The hash of every image's size and pixels, the same whatever file form it came in, and the first image that has it.
///
/// # Errors
/// When images cannot be decoded.
pub fn pixel_hashes(
    images: &LabelledImages,
    exif: Exif,
    progress: &(dyn Fn() + Sync),
) -> Result<HashMap<PixelHash, usize>, DataError> {
    let hashes = Mutex::new(HashMap::new());
    each(images, exif, progress, || {
        Ok(|index: usize, picture: &Picture| {
            let hash = hash_of(picture);
            let mut hashes = hashes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let first = hashes.entry(hash).or_insert(index);
            *first = index.min(*first);
            Ok(())
        })
    })?;
    Ok(hashes.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// What became of a set's images when each was decoded.
#[derive(Debug, Clone, Default)]
pub struct Checked {
    /// Those that cannot be decoded, in order, each with the reason.
    pub broken: Vec<(usize, String)>,
    /// The hash of each one's pixels; none of those that cannot be decoded.
    pub hashes: Vec<Option<PixelHash>>,
}

/// Decodes every image, to find those that cannot be, and which have the same pixels.
///
/// # Errors
/// Never for what is wrong with an image.
pub fn check_pictures(images: &LabelledImages, exif: Exif, progress: &(dyn Fn() + Sync)) -> Result<Checked, DataError> {
    let hashes = Mutex::new(vec![None; images.len()]);
    let broken = unreadable(images, exif, progress, || {
        Ok(|index: usize, picture: &Picture| {
            let hash = hash_of(picture);
            hashes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[index] = Some(hash);
            Ok(())
        })
    })?;
    Ok(Checked { broken, hashes: hashes.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) })
}

fn hash_of(picture: &Picture) -> PixelHash {
    let mut hash = Sha256::new();
    hash.update(picture.width().to_le_bytes());
    hash.update(picture.height().to_le_bytes());
    hash.update(picture.as_raw());
    hash.finalize().into()
}

/// Decodes every image on all processors and hands it to a worker made once per thread.
fn each<W>(
    images: &LabelledImages,
    exif: Exif,
    progress: &(dyn Fn() + Sync),
    worker: impl Fn() -> Result<W, ClassifyError> + Sync,
) -> Result<(), DataError>
where
    W: FnMut(usize, &Picture) -> Result<(), ClassifyError>,
{
    let unreadable = unreadable(images, exif, progress, worker)?;
    if unreadable.is_empty() {
        return Ok(());
    }
    let examples: Vec<String> =
        unreadable.iter().take(QUOTED).map(|(n, reason)| format!("  {}: {reason}", images.name(*n))).collect();
    let more = unreadable.len().saturating_sub(QUOTED);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    Err(DataError::Images { failed: unreadable.len(), total: images.len(), examples: examples.join("\n") + &more })
}

/// As [`each`], and gives the images that cannot be decoded, in order, each with the reason.
fn unreadable<W>(
    images: &LabelledImages,
    exif: Exif,
    progress: &(dyn Fn() + Sync),
    worker: impl Fn() -> Result<W, ClassifyError> + Sync,
) -> Result<Vec<(usize, String)>, DataError>
where
    W: FnMut(usize, &Picture) -> Result<(), ClassifyError>,
{
    let next = AtomicUsize::new(0);
    let limits = DecodeLimits::OFFLINE;
    let unreadable = Mutex::new(Vec::new());
    let run = || {
        let mut worker = worker()?;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= images.len() {
                return Ok(());
            }
            match images.picture(index, exif, &limits) {
                Ok(picture) => worker(index, &picture)?,
                Err(reason) => {
                    let mut unreadable = unreadable.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    unreadable.push((index, reason));
                }
            }
            progress();
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(images.len().max(1));
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        threads.into_iter().try_for_each(|t| {
            t.join().unwrap_or_else(|_| Err(ClassifyError::Panic("while running the network".into())))
        })
    })?;
    let mut unreadable = unreadable.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    unreadable.sort();
    Ok(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_take_turns_as_long_as_they_have_images() {
        let labels = [0, 0, 0, 0, 0, 1, 2, 2];
        let of = |most| {
            let mut counts = [0; 3];
            in_turn(&labels, most).into_iter().for_each(|n| counts[labels[n] as usize] += 1);
            counts
        };
        assert_eq!((of(3), of(5), of(7), of(99)), ([1, 1, 1], [2, 1, 2], [4, 1, 2], [5, 1, 2]));
        assert_eq!(in_turn(&labels, 99), (0..8).collect::<Vec<_>>());
        assert!(in_turn(&[], 9).is_empty());
    }
}
