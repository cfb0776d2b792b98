//! Bundles and networks that take nothing from the disk.

use std::sync::Arc;

use ndarray::{Array2, ArrayView4, Axis};
use serde_json::{Value, json};

use crate::bundle::{BoundCalibration, Calibration, Class, Manifest, Pixels, inputs_sha256};
use crate::classify::{Classifier, ClassifyError, Input, Prediction, Scorer};
use crate::engine::{Budget, Crew, Engine};
use crate::pixels::DecodeLimits;
use crate::registry::{RequestStats, ServedModel};
use crate::runtime::{Device, Outputs, Runner, RuntimeError};
use crate::stop::Stop;

/// Height and width of the networks' input, in pixels.
const SIDE: usize = 8;
/// How large a picture may be: small enough for many a second.
const LIMITS: DecodeLimits = DecodeLimits { max_pixels: 1 << 20, max_decoded_bytes: 16 << 20, pixels: Pixels::Exact };

/// A bundle's description with so many classes, whose preprocessing leaves bytes as they are.
pub(super) fn manifest(classes: usize) -> Manifest {
    let std = [1.0 / 255.0; 3];
    let text = json!({
        "schema_version": 1,
        "arch": "fuzz",
        "classes": [],
        "preprocessing": {
            "shorter_side": SIDE, "crop": SIDE, "mean": [0, 0, 0], "std": std, "exif": "apply",
        },
        "fold": {
            "by": "fuzz", "head": "linear", "experts": 1, "normalized_layers": [], "alphas": [],
            "batch_norms_merged": 0, "proof": {"images": 0, "seed": 0, "outputs": []},
        },
        "checkpoint": {"file": "fuzz.pth", "sha256": "0"},
        "model": {"file": "model.onnx", "sha256": "0"},
    });
    let manifest: Manifest = serde_json::from_value(text).expect("this is a manifest");
    Manifest { classes: self::classes(classes), ..manifest }
}

/// So many classes, with one training image more in each.
pub(super) fn classes(count: usize) -> Vec<Class> {
    (0..count).map(|k| Class { label: format!("class {k}"), count: Some(k as u64 + 1) }).collect()
}

/// A calibration of `manifest` that changes nothing.
fn calibration(manifest: &Manifest) -> Calibration {
    let total: u64 = manifest.classes.iter().filter_map(|class| class.count).sum();
    let class = |class: &Class| {
        let share = class.count.unwrap_or(0) as f64 / total as f64;
        json!({"label": class.label, "a": 1, "c": 0, "train_prior": share, "support": 9, "status": "pooled"})
    };
    let classes: Vec<Value> = manifest.classes.iter().map(class).collect();
    let marginal = json!({"calibration": [-0.1, -0.3], "uniform": [-0.1, -0.3], "train": [-0.1, -0.3]});
    let table = json!({"marginal": marginal, "groups": [], "classes": vec![json!([null, null]); classes.len()]});
    let metrics = json!({"nll": 1, "ece": 0, "accuracy": 1});
    let text = json!({
        "schema_version": 1,
        "model_sha256": manifest.model.sha256,
        "inputs_sha256": inputs_sha256(manifest),
        "rung": "temperature", "temperature": 1, "kappa": 0, "kappa_source": "given", "temperature_alone": 1,
        "classes": classes,
        "sets": {"alphas": [0.1, 0.5], "pas": table, "plain": table},
        "fit": {
            "by": "fuzz", "created": "", "command": "", "images": 27, "training_overlap": "none", "ladder": [],
            "before": metrics, "after": metrics, "top1_flips": 0,
        },
    });
    serde_json::from_value(text).expect("this is a calibration")
}

/// Gives its input as logits.
struct Mirror;

impl Runner for Mirror {
    fn run(&mut self, pictures: ArrayView4<'_, f32>, _: &Stop) -> Result<Outputs, RuntimeError> {
        let row = |picture: ndarray::ArrayView3<'_, f32>| picture.iter().copied().collect::<Vec<_>>();
        rows(pictures.axis_iter(Axis(0)).map(row).collect())
    }
}

/// Gives the sum of each channel as the logit of a class.
struct Sums;

impl Runner for Sums {
    fn run(&mut self, pictures: ArrayView4<'_, f32>, _: &Stop) -> Result<Outputs, RuntimeError> {
        let sums = |picture: ndarray::ArrayView3<'_, f32>| picture.axis_iter(Axis(0)).map(|c| c.sum()).collect();
        rows(pictures.axis_iter(Axis(0)).map(sums).collect())
    }
}

fn rows(rows: Vec<Vec<f32>>) -> Result<Outputs, RuntimeError> {
    let shape = (rows.len(), rows.first().map_or(0, Vec::len));
    let array = Array2::from_shape_vec(shape, rows.concat()).map_err(|error| RuntimeError::Run(error.to_string()))?;
    Ok(array.into())
}

/// A description whose classes are as many as the values of its input.
pub(super) fn mirrored() -> Manifest {
    manifest(3 * SIDE * SIDE)
}

/// A classifier that answers with what it sees. The description's classes must be as many as the values of its input.
pub(super) fn mirror(manifest: Manifest) -> Classifier {
    Classifier::new(Arc::new(manifest), LIMITS, Box::new(Mirror)).with_max_batch(2)
}

/// The answers to pictures that are classified together, for as long as that takes.
pub(super) fn classify(
    classifier: &mut Classifier,
    inputs: &[Input],
) -> impl Iterator<Item = Result<Prediction, ClassifyError>> + use<> {
    let stop = Stop::default();
    let pictures: Vec<(&Input, &Stop)> = inputs.iter().map(|input| (input, &stop)).collect();
    classifier.classify(&pictures, &stop).into_iter()
}

/// A calibrated model with three classes and one worker.
pub(super) fn served() -> ServedModel {
    let manifest = Arc::new(manifest(3));
    let calibration = BoundCalibration { id: "fuzz".into(), content: calibration(&manifest), familiarity: None };
    let classifier = Classifier::new(manifest.clone(), LIMITS, Box::new(Sums)).with_max_batch(4);
    let max_batch = classifier.max_batch();
    let engine =
        Engine::start(Crew::Together(vec![classifier]), 64, Arc::new(Budget::new(1))).expect("a thread can be started");
    ServedModel {
        name: "test".into(),
        version: "1".into(),
        scorer: Scorer::new(manifest.clone(), Some(calibration)),
        manifest,
        evaluation: None,
        devices: vec![Device::Cpu],
        max_batch,
        pixels: Pixels::Exact,
        engine,
        requests: RequestStats::default(),
    }
}

/// A BMP file of 16×16 pixels of one colour.
pub(super) fn bmp([red, green, blue]: [u8; 3]) -> Vec<u8> {
    let (width, height, head) = (16i32, 16i32, 54u32);
    let pixels = [blue, green, red].repeat((width * height) as usize);
    let mut file = b"BM".to_vec();
    for field in [head + pixels.len() as u32, 0, head, 40] {
        file.extend(field.to_le_bytes());
    }
    file.extend(width.to_le_bytes());
    file.extend(height.to_le_bytes());
    // One plane of 24 bits, not compressed; the rest may be 0.
    file.extend([1, 0, 24, 0]);
    file.resize(head as usize, 0);
    file.extend(pixels);
    file
}
