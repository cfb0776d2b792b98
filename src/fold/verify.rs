//! Proves a fold: the written network in ONNX Runtime (f32) beside the unfolded checkpoint in f64.

use std::thread;

use ndarray::ArrayView4;

use super::onnx::passes::ends::LOGITS;
use super::onnx::{Network, OnnxError};
use super::reference::{self, Precision};
use super::{FoldError, Graph};
use crate::bundle::{OutputProof, Proof, Reference};
use crate::runtime::{Library, NetworkSource, OnnxModel, SessionOptions};

/// Largest difference accepted, in standard deviations of the output.
pub const TOLERANCE: f64 = 1e-4;
/// Seed of the inputs.
pub(super) const SEED: u64 = 2501_03122;

/// Compares `model` with the `unfolded` graph on seeded inputs. Where f32 itself cannot hold
/// [`TOLERANCE`], because variances near the BatchNorm's epsilon amplify rounding, twice the unfolded network's own
/// f32-to-f64 difference is accepted instead.
///
/// # Errors
/// When an output differs by more, or ONNX Runtime cannot run the network.
pub fn prove<'a>(unfolded: &Graph, model: impl Into<NetworkSource<'a>>, library: &Library) -> Result<Proof, FoldError> {
    let inputs = images(unfolded.side);
    let images = inputs.len();
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut session = OnnxModel::open(library, model, SessionOptions::on_processor(threads))?;
    let batch: Vec<f32> = inputs.concat();
    let shape = (images, 3, unfolded.side, unfolded.side);
    let view = ArrayView4::from_shape(shape, &batch).map_err(|error| FoldError::Input(error.to_string()))?;
    let folded = session.run_batch(view)?;
    drop(session);
    let exact = evaluate_all::<f64>(unfolded, &inputs)?;
    let mut rounded = None;
    let mut outputs = Vec::new();
    for (n, (output, _)) in unfolded.outputs.iter().enumerate() {
        let expected: Vec<f64> = exact.iter().flat_map(|image| image[n].iter().copied()).collect();
        let found: Vec<f64> = folded[n].iter().map(|&v| f64::from(v)).collect();
        let spread = standard_deviation(&expected);
        let max_absolute = max_difference(&found, &expected);
        let max_relative = max_absolute / spread;
        let mut tolerance = TOLERANCE;
        if exceeds(max_relative, tolerance) {
            if rounded.is_none() {
                rounded = Some(evaluate_all::<f32>(unfolded, &inputs)?);
            }
            let unfolded_f32 = rounded.iter().flatten().flat_map(|image| image[n].iter().copied()).collect::<Vec<_>>();
            let own = max_difference(&unfolded_f32, &expected) / spread;
            if own.is_finite() {
                tolerance = tolerance.max(2.0 * own);
            }
        }
        if exceeds(max_relative, tolerance) {
            return Err(FoldError::Proof { output: output.clone(), found: max_relative, tolerance });
        }
        outputs.push(OutputProof { output: output.clone(), max_absolute, max_relative, tolerance });
    }
    Ok(Proof {
        reference: Reference::Checkpoint,
        images,
        pictures: 0,
        seed: SEED,
        outputs,
        assumed: Vec::new(),
        expected: None,
    })
}

/// The seeded inputs for networks of `side` pixels: few large ones, more small ones.
pub(super) fn images(side: usize) -> Vec<Vec<f32>> {
    inputs(if side > 64 { 2 } else { 8 }, 3 * side * side)
}

/// Most that a network's own sensitivity may raise [`TOLERANCE`] by.
const MOST: f64 = 10.0;

/// As [`images`], of any shape, and others that noise does not stand for: of one brightness, of large values, and smooth
/// ones.
pub(super) fn varied_images(shape: [usize; 3]) -> Vec<Vec<f32>> {
    let [_, rows, columns] = shape;
    let length = shape.iter().product();
    let mut all = inputs(if length > 3 * 64 * 64 { 2 } else { 8 }, length);
    // By the axes as they lie, whatever they mean.
    let plane = rows * columns;
    let smooth = |n: usize| {
        let (y, x) = (n % plane / columns, n % columns);
        let part = |at: usize, of: usize| at as f32 / of.max(1) as f32;
        2.0 * (3.0 * part(x, columns) + part(n, plane)).sin() - 1.5 * part(y, rows)
    };
    all.push(vec![-1.8; length]);
    all.push((0..length).map(|n| 1.5 + 0.5 * (n / plane) as f32 / shape[0].max(1) as f32).collect());
    all.push((0..length).map(smooth).collect());
    all.push(all[0].iter().map(|v| 1.0 + v.abs()).collect());
    all
}

/// Compares what the bundle's `output` gives, `found`, with what the original gives, `expected`, both with `row` values an
/// image. `moved` gives the bundle's output when every weight moves by one unit in the last place; it is asked where the
/// difference exceeds [`TOLERANCE`], and its own difference is accepted then, up to ten times that.
pub(super) fn compare(
    output: &str,
    expected: &[f64],
    found: &[f64],
    row: usize,
    moved: impl FnOnce() -> Result<Vec<f64>, FoldError>,
) -> Result<OutputProof, FoldError> {
    if let Some(value) = expected.iter().find(|value| !value.is_finite()) {
        return Err(FoldError::Input(format!(
            "the original gives {value} as a value of {output} for a seeded image: a weight of it is not finite, or its \
             values overflow"
        )));
    }
    let varies = |at: usize| {
        let mut values = expected.iter().skip(at).step_by(row.max(1));
        let first = values.next();
        values.any(|value| Some(value) != first)
    };
    if !(0..row).any(varies) {
        return Err(FoldError::Input(format!(
            "{output} is the same for every image: the network does not look at them, is not trained, or another output \
             holds its logits"
        )));
    }
    if output == LOGITS && expected.chunks_exact(row.max(1)).all(is_distribution) {
        return Err(FoldError::Input(
            "the values that would be served as logits are probabilities, of each image between 0 and 1 and 1 in sum: a \
             softmax is written out in the network; export it without, or name the values before it by --logits NAME"
                .into(),
        ));
    }
    if output == LOGITS && expected.iter().all(|value| (0.0..=1.0).contains(value)) {
        tracing::warn!(
            "every value that will be served as a logit lies between 0 and 1, as probabilities do: if the network ends in a \
             function that makes them, name the values before it by --logits NAME"
        );
    }
    // Most features may be 0.
    let spread = if output == LOGITS { spread(expected) } else { standard_deviation(expected) };
    let max_absolute = max_difference(found, expected);
    let max_relative = max_absolute / spread;
    let mut tolerance = TOLERANCE;
    if exceeds(max_relative, tolerance) {
        let own = max_difference(&moved()?, found) / spread;
        if own.is_finite() {
            tolerance = own.clamp(TOLERANCE, MOST * TOLERANCE);
        }
        if exceeds(max_relative, tolerance) {
            return Err(FoldError::Proof { output: output.into(), found: max_relative, tolerance });
        }
        tracing::warn!(
            output,
            difference = max_relative,
            tolerance,
            "the network is sensitive to rounding: its proof is held to what one unit in the last place of its weights does"
        );
    }
    Ok(OutputProof { output: output.into(), max_absolute, max_relative, tolerance })
}

/// Whether these are the probabilities of classes that exclude each other.
fn is_distribution(row: &[f64]) -> bool {
    row.iter().all(|p| (0.0..=1.0).contains(p)) && (row.iter().sum::<f64>() - 1.0).abs() < 1e-4
}

/// The standard deviation, or a robust estimate of it (1.4826 times the median distance from the median) where that is
/// smaller: a class that is masked by a huge constant must not hide the others.
fn spread(values: &[f64]) -> f64 {
    let median = |mut values: Vec<f64>| {
        values.sort_unstable_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    let middle = median(values.to_vec());
    let robust = 1.4826 * median(values.iter().map(|value| (value - middle).abs()).collect());
    let deviation = standard_deviation(values);
    if robust > 0.0 { robust.min(deviation) } else { deviation }
}

/// The network with every weight moved by one unit in the last place, up or down by a seeded coin.
///
/// # Errors
/// When a weight cannot be read.
pub(super) fn perturbed(network: &Network) -> Result<Network, OnnxError> {
    let mut state = SEED;
    network.clone().with_floats(&mut |value| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if state >> 63 == 0 { value.next_up() } else { value.next_down() }
    })
}

/// NaN exceeds everything.
fn exceeds(difference: f64, tolerance: f64) -> bool {
    difference > tolerance || difference.is_nan()
}

fn evaluate_all<T: Precision>(graph: &Graph, inputs: &[Vec<f32>]) -> Result<Vec<Vec<Vec<f64>>>, FoldError> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let each = inputs.len().div_ceil(threads);
    thread::scope(|scope| {
        let parts: Vec<_> = inputs
            .chunks(each)
            .map(|part| {
                scope.spawn(|| part.iter().map(|x| reference::evaluate::<T>(graph, x)).collect::<Result<Vec<_>, _>>())
            })
            .collect();
        let mut all = Vec::new();
        for part in parts {
            all.extend(part.join().map_err(|_| FoldError::Input("the reference evaluation panicked".into()))??);
        }
        Ok(all)
    })
}

/// Approximately normal values (a sum of twelve uniform ones), from SplitMix64.
fn inputs(images: usize, length: usize) -> Vec<Vec<f32>> {
    let mut state = SEED;
    let mut uniform = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut normal = move || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
    (0..images).map(|_| (0..length).map(|_| normal()).collect()).collect()
}

fn max_difference(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    // f64::max would drop a NaN.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |max, d| if d > max || d.is_nan() { d } else { max })
}

fn standard_deviation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}
