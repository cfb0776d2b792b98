//! `nbn fold export` of an ONNX file: any classifier, with or without NBN.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use ndarray::{ArrayD, IxDyn};

use super::draft::Draft;
use super::expect::Expected;
use super::export::{self, ExportOptions, Exported, Preset, classes, file_name, read};
use super::onnx::passes::ends::{self, Ends};
use super::onnx::passes::{self, Folded};
use super::onnx::{Network, OnnxError};
use super::preprocessing::{PreprocessingChanges, PreprocessingSource, from_file};
use super::{FoldError, verify};
use crate::bundle::{
    Alpha, Color, FileDigest, FoldReport, LeftNorm, MANIFEST_FILE, MAX_SIDE, MODEL_FILE, Manifest, OnnxReport,
    OutputProof, Preprocessing, Proof, SCHEMA_VERSION, Size, sha256_hex, sha256_of_file,
};
use crate::listing::{Found, walk};
use crate::pixels::{DecodeError, DecodeLimits, Preprocessor};
use crate::runtime::{FEATURES, Library, NetworkSource, PlainSession, SessionOptions};
use crate::stop::Stop;

/// Most of the user's pictures that the proof looks at.
const MOST_PICTURES: usize = 64;

/// Whether `path` is an ONNX file, by its name or, under another one, by how it begins: with the field `ir_version`, where
/// checkpoints begin as archives, pickles, or a header's length and a brace.
pub fn is_onnx(path: &Path) -> bool {
    let begins_so = || {
        let mut begin = [0; 9];
        let read = File::open(path).and_then(|mut file| file.read_exact(&mut begin));
        read.is_ok() && begin[0] == 8 && (3..0x80).contains(&begin[1]) && begin[8] != b'{'
    };
    path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("onnx")) || begins_so()
}

/// Folds and proves the file at `options.checkpoint`. Gives the bundle's manifest and network.
pub(super) fn from_onnx(
    options: &ExportOptions,
    library: &Library,
    draft: &mut Draft,
    expected: Option<&Expected>,
) -> Result<export::Proved, FoldError> {
    let path = &options.checkpoint;
    // What the runtime says names no file.
    folded(options, library, draft, expected).map_err(|error| match error {
        FoldError::Runtime(cause) => {
            FoldError::Onnx { path: path.clone(), cause: OnnxError::Refused(cause.to_string()) }
        }
        error => error,
    })
}

fn folded(
    options: &ExportOptions,
    library: &Library,
    draft: &mut Draft,
    expected: Option<&Expected>,
) -> Result<export::Proved, FoldError> {
    let path = &options.checkpoint;
    let expert_logits = options.extras.expert_logits.then_some("--expert-logits");
    if let Some(flag) = options.overrides.given().or(expert_logits) {
        return Err(FoldError::Input(format!("{flag} is for checkpoints: leave it out for an ONNX file")));
    }
    let fail = |cause: OnnxError| match cause {
        OnnxError::Read { path, cause } => FoldError::File { path, cause },
        cause => FoldError::Onnx { path: path.clone(), cause },
    };
    let original = Network::load(path).map_err(fail)?;
    let mut network = original.clone();
    let (opset, producer) = (network.opset(), network.producer());
    // Refused before the work begins.
    let input = ends::input(&network).map_err(fail)?;
    let size = input_size(&input, options).map_err(fail)?;
    // Of another output than the bundle's, its manifest says nothing.
    let known = if options.logits.is_none() { bundle_of(path)? } else { None };
    if let Some(quantization) = known.as_ref().and_then(|known| known.fold.quantization.as_ref()) {
        return Err(FoldError::Input(format!(
            "{} is the network of a quantized bundle: export the one that it was made from, {}, and quantize that",
            path.display(),
            quantization.from
        )));
    }
    let (preprocessing, from) = match &known {
        Some(known) if options.preprocessing.is_none() => {
            let changed =
                if options.changes == PreprocessingChanges::default() { "" } else { ", but for what was given" };
            let settings = options.changes.apply(known.preprocessing.clone())?;
            settings.check().map_err(|error| FoldError::Input(error.to_string()))?;
            (settings, format!("{MANIFEST_FILE} beside it{changed}"))
        }
        _ => prepared(&input, size, options)?,
    };
    let pictures = options.images.as_deref().map_or(Ok(Vec::new()), |folder| pictures(folder, &preprocessing))?;
    let folded = passes::fold(&mut network).map_err(fail)?;
    draft.hold(&mut network)?;
    let data = original.data_files().map_err(fail)?;
    let shape = preprocessing.shape();
    let subject = Subject { options, library, draft, original, shape, size, pictures };
    let (network, ends, proof, one_by_one) = subject.proved(network)?;
    let classes = match &known {
        Some(known) if options.classes.is_none() && known.classes.len() == proof.classes => known.classes.clone(),
        _ => classes(options.classes.as_deref(), proof.classes)?,
    };
    let nodes = (folded.nodes.0, network.nodes());
    let model = network.encode();
    let mut proof = proof;
    if let Some(expected) = expected {
        let tolerance = proof.proof.outputs.first().map_or(0.0, |logits| logits.tolerance);
        let cause = || {
            Ok("either x and y are of another network, or of the same in training mode or with other weights than the file has"
                .into())
        };
        proof.proof.expected = Some(expected.hold(draft.source(&model), shape, tolerance, library, cause)?);
    }
    let mut manifest = Manifest {
        schema_version: SCHEMA_VERSION,
        arch: stem(path),
        classes,
        preprocessing,
        fold: FoldReport {
            by: format!("fold {}", env!("CARGO_PKG_VERSION")),
            head: None,
            kappa: options.kappa,
            preprocessing_from: Some(from.clone()),
            experts: 1,
            normalized_layers: folded.normalized.iter().map(|layer| layer.name.clone()).collect(),
            alphas: alphas(&folded),
            batch_norms_merged: folded.norms.merged.len(),
            batch_norms_left: folded
                .norms
                .left
                .iter()
                .map(|(name, reason)| LeftNorm { name: name.clone(), reason: (*reason).into() })
                .collect(),
            onnx: Some(OnnxReport {
                opset,
                producer,
                output: ends.output,
                data: data.iter().map(|path| digest(path)).collect::<Result<_, _>>()?,
                ending: ends.ending,
                nodes_before: nodes.0,
                nodes_after: nodes.1,
                unevaluated: folded.unevaluated,
                one_by_one,
            }),
            proof: proof.proof,
            quantization: None,
        },
        checkpoint: digest(path)?,
        model: FileDigest { file: MODEL_FILE.into(), sha256: sha256_hex(&model) },
        model_data: draft.data(),
        evaluation: None,
    };
    if let Some(known) = known {
        remember(&mut manifest, known);
    }
    manifest.schema_version = manifest.lowest_schema_version();
    Ok(export::Proved {
        exported: Exported { manifest, preprocessing_from: from, root: None, left_out: Vec::new(), unfinished: None },
        model,
    })
}

/// The manifest beside the file at `path`, if that is a bundle's network: a bundle is exported again.
fn bundle_of(path: &Path) -> Result<Option<Manifest>, FoldError> {
    let beside = path.with_file_name(MANIFEST_FILE);
    let manifest = std::fs::read(beside).ok().and_then(|bytes| serde_json::from_slice::<Manifest>(&bytes).ok());
    let Some(manifest) = manifest.filter(|manifest| manifest.check().is_ok()) else { return Ok(None) };
    Ok((manifest.model.sha256 == digest(path)?.sha256).then_some(manifest))
}

/// Adds to `manifest` what an earlier export knew of the same network, and what its file no longer tells.
fn remember(manifest: &mut Manifest, known: Manifest) {
    let FoldReport { head, kappa, experts, normalized_layers, alphas, batch_norms_merged, proof, .. } = known.fold;
    let fold = &mut manifest.fold;
    fold.head = head;
    fold.kappa = fold.kappa.or(kappa);
    fold.experts = experts;
    fold.batch_norms_merged += batch_norms_merged;
    if fold.normalized_layers.is_empty() {
        (fold.normalized_layers, fold.alphas) = (normalized_layers, alphas);
    }
    // What is proved now is that nothing changed since.
    fold.proof.assumed = proof.assumed;
    fold.proof.expected = fold.proof.expected.take().or(proof.expected);
    manifest.arch = known.arch;
    manifest.checkpoint = known.checkpoint;
    manifest.evaluation = known.evaluation;
}

fn digest(path: &Path) -> Result<FileDigest, FoldError> {
    let sha256 = sha256_of_file(path).map_err(|cause| FoldError::File { path: path.to_owned(), cause })?;
    Ok(FileDigest { file: file_name(path), sha256 })
}

/// The preprocessing of a network with this input, and where it comes from.
fn prepared(input: &ends::Input, size: Size, options: &ExportOptions) -> Result<(Preprocessing, String), FoldError> {
    let source = match &options.preprocessing {
        Some(PreprocessingSource::File(path)) => from_file(path, options.exif, Some(size))?,
        Some(PreprocessingSource::Preset(preset)) => preset.preprocessing(Some(size), options.exif),
        None => Preset::Imagenet.preprocessing(Some(size), options.exif),
    };
    let mut settings = options.changes.apply(Preprocessing { layout: input.layout, ..source })?;
    let guessed = options.preprocessing.is_none();
    if guessed && input.channels == 1 && options.changes.color.is_none() {
        // What is known of three channels says nothing of one.
        settings.color = Color::Grey;
        settings.mean = options.changes.mean.clone().unwrap_or(vec![0.0]);
        settings.std = options.changes.std.clone().unwrap_or(vec![1.0]);
    }
    let from = match &options.preprocessing {
        Some(source) if options.changes == PreprocessingChanges::default() => source.to_string(),
        Some(source) => format!("{source}, but for the single settings that were given"),
        None if input.channels == 1 => "guessed, but for what was given: an ONNX file does not say how its pictures were \
                                        prepared (--preprocessing FILE, or --mean and --std)"
            .into(),
        None if options.changes == PreprocessingChanges::default() => {
            "ImageNet's, guessed: an ONNX file does not say how its pictures were prepared (--preprocessing NAME or FILE does)".into()
        }
        None => "single settings as given, the others ImageNet's, guessed (--preprocessing NAME or FILE gives all)".into(),
    };
    if settings.color.channels() != input.channels {
        return Err(FoldError::Input(format!(
            "the network's input {:?} has {} channel{}, the preprocessing is {}: give --color {}, and --mean and \
             --std with a number for each channel",
            input.name,
            input.channels,
            if input.channels == 1 { "" } else { "s" },
            settings.color,
            if input.channels == 1 { "grey" } else { "rgb or bgr" }
        )));
    }
    settings.check().map_err(|error| FoldError::Input(error.to_string()))?;
    Ok((settings, from))
}

/// Height and width of the network's input.
fn input_size(input: &ends::Input, options: &ExportOptions) -> Result<Size, OnnxError> {
    const LARGEST: usize = MAX_SIDE as usize;
    if let Some(size) = [input.height, input.width].into_iter().flatten().find(|&size| size > LARGEST) {
        return OnnxError::refused(format!(
            "its input {:?} has {size} pixels a side; at most {LARGEST} are served: export the network at a smaller size",
            input.name
        ));
    }
    if let Some(batch) = input.batch.filter(|&batch| batch > LARGEST) {
        return OnnxError::refused(format!(
            "its input {:?} takes {batch} pictures at once; export the network with a dynamic batch",
            input.name
        ));
    }
    let given = options.input_size;
    let side = |own: Option<usize>, given: Option<u32>| own.and_then(|own| u32::try_from(own).ok()).or(given);
    let height = side(input.height, given.map(|given| given.height));
    let width = side(input.width, given.map(|given| given.width));
    let Some((height, width)) = height.zip(width) else {
        return OnnxError::refused(format!(
            "its input {:?} leaves the height or width open: give --input-size PIXELS, the size it was trained for",
            input.name
        ));
    };
    let size = Size { height, width };
    let shown = |side: Option<usize>| side.map_or_else(|| "any".to_owned(), |side| side.to_string());
    match given.filter(|given| *given != size) {
        Some(given) if input.height.is_some() && input.width.is_some() => OnnxError::refused(format!(
            "its input {:?} has {size} pixels, --input-size asks for {given}: leave the flag out, or export the network \
             at that size",
            input.name
        )),
        Some(given) => OnnxError::refused(format!(
            "its input {:?} has the height {} and the width {}, --input-size asks for {given}: give height and width that \
             agree, such as {}x{}",
            input.name,
            shown(input.height),
            shown(input.width),
            size.height,
            size.width
        )),
        None => Ok(size),
    }
}

fn alphas(folded: &Folded) -> Vec<Alpha> {
    let layers = folded.normalized.iter().enumerate();
    let alpha = |layer: &passes::NormalizedLayer| {
        layer.weight.as_ref().and_then(|d| d.alpha).or(layer.bias.as_ref().and_then(|d| d.alpha))
    };
    layers.filter_map(|(index, layer)| Some(Alpha { index, value: alpha(layer)? })).collect()
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// A network that is to be proved.
struct Subject<'a> {
    options: &'a ExportOptions,
    library: &'a Library,
    /// Where the bundle's weights lie that are not in its network's file.
    draft: &'a Draft,
    /// As the file has it; its weights are shared, not copied.
    original: Network,
    /// Of one picture, as the network takes it.
    shape: [usize; 3],
    size: Size,
    /// The user's own pictures, prepared.
    pictures: Vec<Vec<f32>>,
}

/// A proof, and what was learned on the way.
struct Proved {
    proof: Proof,
    classes: usize,
}

impl Subject<'_> {
    /// Names the network's ends and proves it, with a batch that is free if that works, else one picture at a time.
    fn proved(&self, network: Network) -> Result<(Network, Ends, Proved, bool), FoldError> {
        let path = &self.options.checkpoint;
        let fail = |cause: OnnxError| FoldError::Onnx { path: path.clone(), cause };
        let logits = self.options.logits.as_deref();
        let features = self.options.extras.features;
        let size = (self.size.height as usize, self.size.width as usize);
        let fixed = ends::input(&network).map_err(fail)?.batch;
        let mut free = network.clone();
        let found = ends::name(&mut free, logits, size, features, ends::Batch::Free).map_err(fail)?;
        free.check("naming the ends").map_err(fail)?;
        match self.prove(&free, &found) {
            Ok(proof) => Ok((free, found, proof, false)),
            // What is only wrong with several pictures may be right with one.
            Err(error) if fixed == Some(1) => {
                let reason = error.to_string();
                tracing::warn!(
                    reason,
                    "the network takes one picture at a time, because several do not work: export it with a dynamic batch"
                );
                let mut single = network;
                let found = ends::name(&mut single, logits, size, features, ends::Batch::One).map_err(fail)?;
                let proof = self.prove(&single, &found)?;
                Ok((single, found, proof, true))
            }
            Err(error) => match fixed {
                Some(pictures) => Err(fail(OnnxError::Refused(format!(
                    "it takes {pictures} pictures at a time, and not any other number ({error}): export it with a dynamic \
                     batch"
                )))),
                None => Err(error),
            },
        }
    }

    fn prove(&self, network: &Network, ends: &Ends) -> Result<Proved, FoldError> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let options = SessionOptions::on_processor(threads);
        // What is served may be no output of the file itself: the value before a softmax, and what the classifier sees.
        let fail = |cause: OnnxError| FoldError::Onnx { path: self.options.checkpoint.clone(), cause };
        let mut shown = self.original.clone().showing(&ends.value).map_err(fail)?;
        if let Some(value) = &ends.features {
            shown = shown.showing(value).map_err(fail)?;
        }
        let graph = shown.encode();
        drop(shown);
        let folder = (!self.original.fits_within()).then(|| self.original.folder());
        let mut original = PlainSession::open(self.library, NetworkSource { graph: &graph, folder }, options)?;
        drop(graph);
        let names: Vec<&str> = std::iter::once(&ends.value).chain(&ends.features).map(String::as_str).collect();
        let mut seen: Vec<f64> = Vec::new();
        let seeded = verify::varied_images(self.shape);
        let images: Vec<Vec<f32>> = seeded.iter().chain(&self.pictures).cloned().collect();
        let mut expected: Vec<f64> = Vec::new();
        let mut classes = 0;
        for image in &images {
            let n = ends.input.batch.unwrap_or(1).max(1);
            let input = self.array(image.repeat(n), n)?;
            let mut outputs = original.run(&ends.input.name, input.view(), &names)?.into_iter();
            let output = outputs.next().unwrap_or_default();
            let &[rows, k] = output.shape() else { return Err(not_rows(ends, output.shape())) };
            if rows != n || k < 2 {
                return Err(not_rows(ends, output.shape()));
            }
            classes = k;
            expected.extend(output.iter().take(k).map(|&v| f64::from(v)));
            if let Some(features) = outputs.next() {
                seen.extend(features.iter().take(features.len() / n).map(|&v| f64::from(v)));
            }
        }
        drop(original);
        let bytes = network.encode();
        let moved = |n: usize| {
            let mut moved = verify::perturbed(network).map_err(fail)?;
            let mut place = Draft::of(&self.options.out, false, false);
            place.hold(&mut moved)?;
            Ok(self.run(place.source(&moved.encode()), &images, ends, false)?.swap_remove(n))
        };
        let mut outputs: Vec<OutputProof> = Vec::new();
        // All at once, and a few at a time: what holds for one number of pictures may not for another.
        for in_parts in [true, false] {
            if !in_parts && ends.batch == ends::Batch::One {
                break;
            }
            let found = self.run(self.draft.source(&bytes), &images, ends, in_parts)?;
            let mut of_run = vec![verify::compare(ends::LOGITS, &expected, &found[0], classes, || moved(0))?];
            if let Some(found) = found.get(1) {
                of_run.push(verify::compare(FEATURES, &seen, found, seen.len() / images.len().max(1), || moved(1))?);
            }
            // The larger difference counts.
            for proof in of_run {
                match outputs.iter_mut().find(|kept| kept.output == proof.output) {
                    Some(kept) if kept.max_relative >= proof.max_relative => {}
                    Some(kept) => *kept = proof,
                    None => outputs.push(proof),
                }
            }
        }
        let proof = Proof {
            reference: crate::bundle::Reference::Original,
            images: seeded.len(),
            pictures: self.pictures.len(),
            seed: verify::SEED,
            outputs,
            assumed: Vec::new(),
            expected: None,
        };
        Ok(Proved { proof, classes })
    }

    fn array(&self, values: Vec<f32>, n: usize) -> Result<ArrayD<f32>, FoldError> {
        let [a, b, c] = self.shape;
        ArrayD::from_shape_vec(IxDyn(&[n, a, b, c]), values).map_err(|error| FoldError::Input(error.to_string()))
    }

    /// The bundle's logits, and its features where it has some: of all images at once, or one by one where the network
    /// takes no more.
    fn run(
        &self,
        model: NetworkSource<'_>,
        images: &[Vec<f32>],
        ends: &Ends,
        in_parts: bool,
    ) -> Result<Vec<Vec<f64>>, FoldError> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut session = PlainSession::open(self.library, model, SessionOptions::on_processor(threads))?;
        let mut rest = images;
        let mut sizes = [1, 3, 2].into_iter().cycle();
        let names = if ends.features.is_some() { vec![ends::LOGITS, FEATURES] } else { vec![ends::LOGITS] };
        let mut found = vec![Vec::new(); names.len()];
        while !rest.is_empty() {
            let size = match (ends.batch, in_parts) {
                (ends::Batch::One, _) => 1,
                (ends::Batch::Free, true) => sizes.next().unwrap_or(1),
                (ends::Batch::Free, false) => rest.len(),
            };
            let (part, behind) = rest.split_at(size.min(rest.len()));
            rest = behind;
            let input = self.array(part.concat(), part.len())?;
            let outputs = session.run(ends::IMAGES, input.view(), &names)?;
            for (found, output) in found.iter_mut().zip(outputs) {
                found.extend(output.iter().map(|&v| f64::from(v)));
            }
        }
        Ok(found)
    }
}

/// The first pictures in `folder` and below, by name, as the network's inputs.
fn pictures(folder: &Path, preprocessing: &Preprocessing) -> Result<Vec<Vec<f32>>, FoldError> {
    let mut files = Vec::new();
    let fail = |path: PathBuf, cause| FoldError::File { path, cause };
    let mut shut = None;
    walk(folder, &mut |found| match found {
        Found::Picture(file) => files.push(file),
        Found::Shut(path, cause) => shut = Some(fail(path, cause)),
        Found::Hidden(_) | Found::Link(_) | Found::Other(_) => {}
    })
    .map_err(|cause| fail(folder.to_owned(), cause))?;
    if let Some(error) = shut {
        return Err(error);
    }
    if files.is_empty() {
        return Err(FoldError::Input(format!("--images {}: no picture is in it or below", folder.display())));
    }
    let preprocessor = Preprocessor::new(preprocessing.clone(), DecodeLimits::OFFLINE);
    let prepared = |file: &PathBuf| {
        let refused = |error: DecodeError| FoldError::Input(format!("{}: {error}", file.display()));
        preprocessor.prepare(&read(file)?, &Stop::default()).map_err(refused)
    };
    files.iter().take(MOST_PICTURES).map(prepared).collect()
}

fn not_rows(ends: &Ends, shape: &[usize]) -> FoldError {
    FoldError::Input(format!(
        "output {:?} has the shape {shape:?} for one image; a classifier's has [1, K] with K from 2: export the network so \
         that it gives such an output, or name such a value by --logits NAME",
        ends.output
    ))
}
