//! `nbn fold export --expect`: holds a bundle to what the user's own network gave.
//!
//! A checkpoint's names and shapes cannot tell strides, activations or epsilons, so that a proof is relative to the network
//! that was recognised. A few inputs with the outputs of the network itself tell them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use half::f16;
use ndarray::{ArrayD, IxDyn};
use safetensors::{Dtype, SafeTensors};
use zip::ZipArchive;

use super::FoldError;
use super::onnx::passes::ends;
use super::verify::TOLERANCE;
use crate::bundle::{ExpectedProof, FileDigest, Size, sha256_of_file};
use crate::runtime::{Library, NetworkSource, PlainSession, SessionOptions};

/// Most values of one array.
const MAX_VALUES: usize = 1 << 28;
/// Most arrays of a file that are looked at.
const MAX_ARRAYS: usize = 100;
/// Longest header of an array of NumPy.
const MAX_HEADER: usize = 1 << 16;
/// Differences up to this one, in standard deviations, are what faster arithmetic makes.
const FAST_ARITHMETIC: f64 = 5e-3;

/// How such a file is made, for errors.
const HOW: &str = "in PyTorch: x = torch.randn(4, 3, 224, 224); y = model.eval()(x); numpy.savez(\"expected.npz\", x=x, \
                   y=y.detach())";

/// Inputs of a network, as it takes them, and the logits that it gave.
#[derive(Debug)]
pub(super) struct Expected {
    path: PathBuf,
    /// Inputs [N, …] of three axes each.
    shape: [usize; 3],
    x: Vec<f32>,
    /// Logits [N, K].
    classes: usize,
    y: Vec<f64>,
}

struct Array {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Expected {
    /// Reads `x` and `y` from a file of `numpy.savez` or safetensors.
    ///
    /// # Errors
    /// When it is neither, or they are not there, or are not a network's inputs and outputs.
    pub(super) fn load(path: &Path) -> Result<Self, FoldError> {
        let refuse = |reason: String| FoldError::Expectation { path: path.to_owned(), reason };
        let mut arrays = arrays(path)?;
        let there: Vec<String> = arrays.keys().take(6).cloned().collect();
        let mut take = |name: &str| {
            arrays.remove(name).ok_or_else(|| {
                let there = if there.is_empty() { "none".into() } else { there.join(", ") };
                refuse(format!("it has no array {name:?} (there: {there}); {HOW}"))
            })
        };
        let (x, y) = (take("x")?, take("y")?);
        let ([n, a, b, c], [rows, classes]) = (&x.shape[..], &y.shape[..]) else {
            return Err(refuse(format!(
                "x has the shape {:?} and y {:?}; expected [N, 3, height, width] and [N, classes]",
                x.shape, y.shape
            )));
        };
        if n != rows || *n == 0 || *classes < 2 {
            return Err(refuse(format!(
                "x has {n} images and y {rows} rows of {classes} values; expected as many of both, and a logit for each class"
            )));
        }
        for (name, array) in [("x", &x), ("y", &y)] {
            if let Some(value) = array.values.iter().find(|value| !value.is_finite()) {
                return Err(refuse(format!("{name} holds {value}")));
            }
        }
        let is_probable =
            |row: &[f64]| row.iter().all(|p| (0.0..=1.0).contains(p)) && (row.iter().sum::<f64>() - 1.0).abs() < 1e-3;
        if y.values.chunks_exact(*classes).all(is_probable) {
            return Err(refuse("y holds probabilities; save the logits, before the softmax".into()));
        }
        if y.values.iter().all(|value| Some(value) == y.values.first()) {
            return Err(refuse("y is the same for all images and classes".into()));
        }
        Ok(Self {
            path: path.to_owned(),
            shape: [*a, *b, *c],
            x: x.values.iter().map(|&v| v as f32).collect(),
            classes: *classes,
            y: y.values,
        })
    }

    /// Height and width of channels-first inputs.
    pub(super) fn size(&self) -> Size {
        let side = |at: usize| u32::try_from(self.shape[at]).unwrap_or(u32::MAX);
        Size { height: side(1), width: side(2) }
    }

    /// The first input.
    pub(super) fn first(&self) -> &[f32] {
        &self.x[..self.shape.iter().product()]
    }

    /// Whether `logits` of the first input are those expected.
    pub(super) fn agrees_on_first(&self, logits: &[f64]) -> bool {
        logits.len() == self.classes && self.difference(logits, &self.y[..self.classes]).1 <= TOLERANCE
    }

    /// The number that these logits of the first input have to be multiplied by to be those expected, to four digits.
    pub(super) fn factor_of_first(&self, logits: &[f64]) -> Option<f64> {
        let expected = self.y.get(..self.classes).filter(|expected| expected.len() == logits.len())?;
        let found = factor(logits, expected, TOLERANCE)?;
        format!("{found:.4}").parse().ok()
    }

    /// Compares what `model` gives for the inputs, which have the shape `input` each. A network that rounding is known to
    /// move further may differ by `tolerance`.
    ///
    /// # Errors
    /// When it gives something else; `cause` says what may be the matter.
    pub(super) fn hold(
        &self,
        model: NetworkSource<'_>,
        input: [usize; 3],
        tolerance: f64,
        library: &Library,
        cause: impl FnOnce() -> Result<String, FoldError>,
    ) -> Result<ExpectedProof, FoldError> {
        let refuse = |reason: String| FoldError::Expectation { path: self.path.clone(), reason };
        if self.shape != input {
            return Err(refuse(format!(
                "x has inputs of {:?}; the network takes {input:?}: give inputs of this shape, or --input-size",
                self.shape
            )));
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut session = PlainSession::open(library, model, SessionOptions::on_processor(threads))?;
        let mut found: Vec<f64> = Vec::new();
        let [a, b, c] = self.shape;
        for image in self.x.chunks_exact(a * b * c) {
            let input = ArrayD::from_shape_vec(IxDyn(&[1, a, b, c]), image.to_vec())
                .map_err(|error| refuse(error.to_string()))?;
            let outputs = session.run(ends::IMAGES, input.view(), &[ends::LOGITS])?;
            found.extend(outputs.iter().take(1).flat_map(|output| output.iter().map(|&v| f64::from(v))));
        }
        if found.len() != self.y.len() {
            let classes = found.len() / (self.y.len() / self.classes).max(1);
            return Err(refuse(format!("y has {} classes; the network has {classes}", self.classes)));
        }
        let tolerance = tolerance.max(TOLERANCE);
        let (max_absolute, max_relative) = self.difference(&found, &self.y);
        if max_relative > tolerance || max_relative.is_nan() {
            let mut reason = format!(
                "its y differs from the bundle's logits by up to {} of its standard deviation; the limit is {}",
                shown(max_relative),
                shown(tolerance)
            );
            if let Some(factor) = factor(&found, &self.y, tolerance) {
                reason += &format!(": it is {factor:.4} times them; {}", cause()?);
            } else {
                reason += &format!(": {}", cause()?);
                if max_relative < FAST_ARITHMETIC {
                    reason += "; so do outputs that a GPU computed in TF32 or 16 bits: compute y in 32 or 64 bits";
                }
            }
            return Err(refuse(reason));
        }
        let sha256 = sha256_of_file(&self.path).map_err(|cause| FoldError::File { path: self.path.clone(), cause })?;
        Ok(ExpectedProof {
            file: FileDigest { file: super::export::file_name(&self.path), sha256 },
            images: self.y.len() / self.classes,
            max_absolute,
            max_relative,
            tolerance,
        })
    }

    /// The largest difference, and the same in standard deviations of all that is expected.
    fn difference(&self, found: &[f64], expected: &[f64]) -> (f64, f64) {
        let mean = self.y.iter().sum::<f64>() / self.y.len() as f64;
        let deviation = (self.y.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / self.y.len() as f64).sqrt();
        let largest = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        (largest, largest / deviation)
    }
}

/// A number to two digits, without a power of ten where it can do without.
fn shown(number: f64) -> String {
    if (0.01..1000.0).contains(&number) { format!("{number:.2}") } else { format!("{number:.1e}") }
}

/// The number that `found` has to be multiplied by to be `expected`, if one does.
fn factor(found: &[f64], expected: &[f64], tolerance: f64) -> Option<f64> {
    let product: f64 = found.iter().zip(expected).map(|(f, e)| f * e).sum();
    let square: f64 = found.iter().map(|f| f * f).sum();
    let factor = product / square;
    let size = (expected.iter().map(|e| e * e).sum::<f64>() / expected.len() as f64).sqrt();
    let fits = found.iter().zip(expected).all(|(f, e)| (f * factor - e).abs() <= tolerance * size);
    (fits && factor.is_finite()).then_some(factor)
}

fn arrays(path: &Path) -> Result<BTreeMap<String, Array>, FoldError> {
    let refuse = |reason: String| FoldError::Expectation { path: path.to_owned(), reason };
    let unread = |cause| FoldError::File { path: path.to_owned(), cause };
    let mut head = Vec::new();
    File::open(path).and_then(|file| file.take(9).read_to_end(&mut head)).map_err(unread)?;
    if head.starts_with(b"PK") {
        let mut archive = ZipArchive::new(BufReader::new(File::open(path).map_err(unread)?))
            .map_err(|error| refuse(format!("damaged or truncated ({error})")))?;
        let mut arrays = BTreeMap::new();
        let names: Vec<String> = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned())).collect();
        for file in names.iter().take(MAX_ARRAYS) {
            let Some(name) = file.strip_suffix(".npy") else { continue };
            if !["x", "y"].contains(&name) {
                // Named where one of the two is missing.
                arrays.insert(name.to_owned(), Array { shape: Vec::new(), values: Vec::new() });
                continue;
            }
            let inside = archive.by_name(file).map_err(|error| refuse(error.to_string()))?;
            let array = numpy(inside).map_err(|reason| refuse(format!("its array {name:?}: {reason}")))?;
            arrays.insert(name.to_owned(), array);
        }
        return Ok(arrays);
    }
    if head.get(8) != Some(&b'{') {
        return Err(refuse(format!("expected a file of numpy.savez or safetensors with x and y; {HOW}")));
    }
    let bytes = std::fs::read(path).map_err(unread)?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| refuse(error.to_string()))?;
    let mut arrays = BTreeMap::new();
    for (name, view) in tensors.tensors() {
        let kind = match view.dtype() {
            Dtype::F64 => "<f8",
            Dtype::F32 => "<f4",
            Dtype::F16 => "<f2",
            _ => continue,
        };
        let Some(values) = floats(view.data(), kind) else { continue };
        arrays.insert(name, Array { shape: view.shape().to_vec(), values });
    }
    Ok(arrays)
}

fn floats(bytes: &[u8], kind: &str) -> Option<Vec<f64>> {
    fn each<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        let (chunks, _) = bytes.as_chunks::<N>();
        chunks.iter().map(|chunk| convert(*chunk)).collect()
    }
    Some(match kind {
        "<f8" => each(bytes, f64::from_le_bytes),
        "<f4" => each(bytes, |b| f32::from_le_bytes(b).into()),
        "<f2" => each(bytes, |b| f16::from_le_bytes(b).to_f64()),
        _ => return None,
    })
}

/// An array in NumPy's own form (numpy/lib/format.py): a line of Python behind the magic bytes, then the values.
fn numpy(mut file: impl Read) -> Result<Array, String> {
    let unread = |error: std::io::Error| error.to_string();
    let mut begin = [0; 8];
    file.read_exact(&mut begin).map_err(unread)?;
    if !begin.starts_with(b"\x93NUMPY") {
        return Err("it is not in NumPy's form".into());
    }
    let mut length = vec![0; if begin[6] == 1 { 2 } else { 4 }];
    file.read_exact(&mut length).map_err(unread)?;
    let length = length.iter().rev().fold(0, |length, byte| length << 8 | usize::from(*byte));
    if length > MAX_HEADER {
        return Err(format!("its header has {length} bytes; at most {MAX_HEADER} are read"));
    }
    let mut header = vec![0; length];
    file.read_exact(&mut header).map_err(unread)?;
    let header = String::from_utf8_lossy(&header);
    let after = |key: &str| header.split_once(&format!("'{key}':")).map(|(_, rest)| rest.trim_start());
    let quoted = |text: &str| text.strip_prefix('\'').and_then(|text| text.split_once('\'')).map(|(q, _)| q.to_owned());
    let kind = after("descr").and_then(quoted).ok_or("its header names no type")?;
    if after("fortran_order").is_none_or(|order| order.starts_with("True")) {
        return Err("it is stored column by column: save numpy.ascontiguousarray of it".into());
    }
    let shape = after("shape").and_then(|text| text.strip_prefix('(')).and_then(|text| text.split_once(')'));
    let sizes = shape.ok_or("its header has no shape")?.0.split(',').map(str::trim).filter(|size| !size.is_empty());
    let shape: Vec<usize> =
        sizes.map(|size| size.parse().map_err(|_| format!("its size {size:?} is none"))).collect::<Result<_, _>>()?;
    let count =
        shape.iter().try_fold(1usize, |count, size| count.checked_mul(*size)).filter(|count| *count <= MAX_VALUES);
    let count = count.ok_or_else(|| format!("its shape is {shape:?}; at most {MAX_VALUES} values are read"))?;
    let mut bytes = Vec::new();
    file.take(8 * count as u64).read_to_end(&mut bytes).map_err(unread)?;
    let values = floats(&bytes, &kind).ok_or_else(|| format!("its type is {kind}; expected float32 or float64"))?;
    if values.len() != count {
        return Err(format!("it has {} values, its shape is {shape:?}", values.len()));
    }
    Ok(Array { shape, values })
}
