//! A bundle's network in whole numbers: the ranges of its values, the rewriting, and the bundle that it becomes.

use std::collections::HashMap;
use std::path::Path;

use ndarray::{ArrayD, ArrayView4, IxDyn};

use super::FoldError;
use super::draft::Draft;
use super::export::check_place;
use super::onnx::passes::ends;
pub use super::onnx::passes::quantize::{Layer, Range, WeightBits};
use super::onnx::passes::quantize::{Plan, apply};
use super::onnx::{Network, OnnxError};
use crate::bundle::{Bundle, FileDigest, MODEL_FILE, Manifest, SCHEMA_VERSION, sha256_hex};
use crate::runtime::{Library, NetworkSource, OnnxModel, PlainSession, SessionOptions};

/// Pictures that layers are looked at with, one by one.
const LOOKED_AT: usize = 16;

/// A bundle's network, to be made one of whole numbers.
pub struct Quantizer<'a> {
    library: &'a Library,
    bundle: &'a Bundle,
    network: Network,
    /// Pictures as the network takes them.
    inputs: Vec<Vec<f32>>,
    /// Of every value that may be of whole numbers.
    ranges: HashMap<String, Range>,
    keep: Vec<String>,
    bits: WeightBits,
}

/// A bundle that is made and in no place yet.
pub struct Quantized {
    draft: Draft,
    /// The bundle, without calibration. Its manifest says nothing of the quantization.
    pub bundle: Bundle,
    /// Its layers with weights.
    pub layers: Vec<Layer>,
}

/// How far a layer alone, of whole numbers, moves the logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivity {
    /// The layer.
    pub layer: String,
    /// Root mean square of the change, in standard deviations of the logits.
    pub change: f64,
}

/// Refuses a place for a bundle that is made of `bundle`: one that none can have, that is taken, or within that bundle.
///
/// # Errors
/// Names what is in the way.
pub fn check_target(bundle: &Bundle, out: &Path, force: bool) -> Result<(), FoldError> {
    check_place(out, force, &[&bundle.network.path])?;
    let above = out.ancestors().skip(1).find_map(|above| above.canonicalize().ok());
    if above.is_some_and(|above| above.starts_with(&bundle.folder)) {
        return Err(FoldError::Input(format!(
            "--out {} lies within the bundle {}: give a folder beside it",
            out.display(),
            bundle.folder.display()
        )));
    }
    Ok(())
}

impl<'a> Quantizer<'a> {
    /// Runs `bundle`'s network over `inputs` and notes the range of each value. Layers named in `keep` stay in floats.
    ///
    /// # Errors
    /// When the network cannot be read or run, has no layer of such a name, or gives values that are not finite.
    pub fn new(
        bundle: &'a Bundle,
        library: &'a Library,
        inputs: Vec<Vec<f32>>,
        keep: Vec<String>,
        bits: WeightBits,
    ) -> Result<Self, FoldError> {
        let path = &bundle.network.path;
        let network = Network::load(path).map_err(|cause| FoldError::Onnx { path: path.clone(), cause })?;
        let mut quantizer = Self { library, bundle, network, inputs, ranges: HashMap::new(), keep, bits };
        // Also those of values that only some layers alone would have.
        let plan = quantizer.plan(&[], None)?;
        if quantizer.plan(&quantizer.keep, None)?.quantized() == 0 {
            let kept = if quantizer.keep.is_empty() { "" } else { " that --keep-float does not keep" };
            return Err(FoldError::Input(format!(
                "the network has no convolution or linear layer{kept} of a form that 8 bits gain by, so nothing would be quantized"
            )));
        }
        quantizer.measure(&plan)?;
        Ok(quantizer)
    }

    fn fail(&self, cause: OnnxError) -> FoldError {
        FoldError::Onnx { path: self.bundle.network.path.clone(), cause }
    }

    fn plan(&self, keep: &[String], only: Option<&str>) -> Result<Plan, FoldError> {
        Plan::of(&self.network, keep, only).map_err(|cause| self.fail(cause))
    }

    fn measure(&mut self, plan: &Plan) -> Result<(), FoldError> {
        let names: Vec<&str> = plan.values().into_iter().filter(|name| *name != ends::IMAGES).collect();
        let mut ranges: HashMap<String, Range> = HashMap::new();
        let mut note = |name: &str, values: &mut dyn Iterator<Item = f32>| {
            let range = ranges.entry(name.to_owned()).or_insert((f32::INFINITY, f32::NEG_INFINITY));
            for value in values {
                // A comparison with NaN would leave it out.
                if !value.is_finite() {
                    return Err(FoldError::Input(format!(
                        "the network's value {name:?} is {value} for one of the pictures: it cannot be quantized"
                    )));
                }
                *range = (range.0.min(value), range.1.max(value));
            }
            Ok(())
        };
        let mut shown = self.network.clone();
        for name in &names {
            shown = shown.showing(name).map_err(|cause| self.fail(cause))?;
        }
        let graph = shown.encode();
        let folder = (!self.network.fits_within()).then(|| self.network.folder());
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let options = SessionOptions::on_processor(threads);
        let mut session = PlainSession::open(self.library, NetworkSource { graph: &graph, folder }, options)?;
        let [a, b, c] = self.bundle.manifest.preprocessing.shape();
        for input in &self.inputs {
            note(ends::IMAGES, &mut input.iter().copied())?;
            let array = ArrayD::from_shape_vec(IxDyn(&[1, a, b, c]), input.clone())
                .map_err(|error| FoldError::Input(error.to_string()))?;
            for (name, values) in names.iter().zip(session.run(ends::IMAGES, array.view(), &names)?) {
                note(name, &mut values.iter().copied())?;
            }
        }
        self.ranges = ranges;
        Ok(())
    }

    fn rewritten(&self, plan: &Plan) -> Result<Network, FoldError> {
        let mut network = self.network.clone();
        apply(&mut network, plan, &self.ranges, self.bits).map_err(|cause| self.fail(cause))?;
        Ok(network)
    }

    /// The bundle of whole numbers, to be put at `out`, as [`check_target`] allows.
    ///
    /// # Errors
    /// When a weight cannot be read or written.
    pub fn quantized(&self, out: &Path, force: bool) -> Result<Quantized, FoldError> {
        let plan = self.plan(&self.keep, None)?;
        let mut network = self.rewritten(&plan)?;
        let mut draft = Draft::of(out, false, force);
        draft.hold(&mut network)?;
        let model = network.encode();
        let mut manifest = self.bundle.manifest.clone();
        manifest.schema_version = SCHEMA_VERSION;
        manifest.model = FileDigest { file: MODEL_FILE.into(), sha256: sha256_hex(&model) };
        manifest.model_data = draft.data();
        manifest.evaluation = None;
        let part =
            |path: Option<&Path>| path.and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
        let (name, version) = (part(out.parent()), part(Some(out)));
        let bundle = Bundle::provisional(name, version, manifest, model, draft.folder().to_owned());
        Ok(Quantized { draft, bundle, layers: plan.layers })
    }

    /// Every layer that is of whole numbers, measured with no other one so, the worst first. `progress` is called for each.
    ///
    /// # Errors
    /// When the runtime fails.
    pub fn sensitivities(&self, progress: &dyn Fn()) -> Result<Vec<Sensitivity>, FoldError> {
        let inputs = &self.inputs[..self.inputs.len().min(LOOKED_AT)];
        let whole = self.plan(&self.keep, None)?;
        let original = self.logits(&self.network, inputs)?;
        let mean = original.iter().sum::<f64>() / original.len().max(1) as f64;
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>() / original.len() as f64;
        let deviation = square(&mut original.iter().map(|v| v - mean)).sqrt();
        let mut found = Vec::new();
        for layer in whole.layers.iter().filter(|layer| layer.kept.is_none()) {
            let plan = self.plan(&[], Some(&layer.name))?;
            let changed = self.logits(&self.rewritten(&plan)?, inputs)?;
            let change = square(&mut changed.iter().zip(&original).map(|(a, b)| a - b)).sqrt() / deviation;
            found.push(Sensitivity { layer: layer.name.clone(), change });
            progress();
        }
        found.sort_by(|a, b| b.change.total_cmp(&a.change));
        Ok(found)
    }

    fn logits(&self, network: &Network, inputs: &[Vec<f32>]) -> Result<Vec<f64>, FoldError> {
        let graph = network.encode();
        let folder = (!network.fits_within()).then(|| self.network.folder());
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let options = SessionOptions::on_processor(threads);
        let mut session = OnnxModel::open(self.library, NetworkSource { graph: &graph, folder }, options)?;
        let [a, b, c] = self.bundle.manifest.preprocessing.shape();
        let mut all = Vec::new();
        for input in inputs {
            let view = ArrayView4::from_shape((1, a, b, c), input).map_err(|e| FoldError::Input(e.to_string()))?;
            let outputs = session.run_batch(view)?;
            all.extend(outputs.iter().take(1).flat_map(|logits| logits.iter().map(|&v| f64::from(v))));
        }
        Ok(all)
    }
}

impl Quantized {
    /// Puts the bundle in its place with `manifest`, and `others` of its files by name.
    ///
    /// # Errors
    /// When it cannot be written; what was there stays.
    pub fn publish(self, manifest: &Manifest, others: &[(&str, &[u8])]) -> Result<(), FoldError> {
        manifest.check().map_err(|error| FoldError::Input(error.to_string()))?;
        let model = self.bundle.network.bytes().map_err(|error| FoldError::Input(error.to_string()))?;
        self.draft.publish_with(manifest, model, others)
    }
}
