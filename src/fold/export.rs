//! `nbn fold export`: a checkpoint in, a proved bundle out.

use std::fs;
use std::path::{Path, PathBuf};

use super::architecture::{self, Extras, Family, Overrides};
use super::draft::{Draft, own_files};
use super::expect::Expected;
use super::ingest::{from_onnx, is_onnx};
use super::preprocessing::{PreprocessingChanges, PreprocessingSource, at_size, from_file};
use super::{
    CLASSES_KEY, Checkpoint, EPOCH_KEY, FoldError, KAPPA_KEY, PREPROCESSING_KEY, RECIPE_KEY, reference, verify,
};
use crate::bundle::{
    Class, Exif, FileDigest, FoldReport, MANIFEST_FILE, MODEL_FILE, Manifest, ManifestError, Preprocessing,
    SCHEMA_VERSION, Size, check_classes, check_kappa, is_manifest, sha256_hex,
};
use crate::files::foreign;
use crate::runtime::Library;

/// Where preprocessing comes from that a checkpoint has itself.
const OWN_PREPROCESSING: &str = "the checkpoint";
/// Flags for what names and shapes do not tell.
const UNTOLD_FLAGS: &str =
    "--batch-norm-epsilon, --activation, --stride-in, --stem-pool, --global-pool, --classifier-form, --magnitude";
/// Files of others that an error names.
const NAMED: usize = 3;

/// The published evaluation pipelines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// ImageNet-LT and Places-LT: shorter side 256, crop 224.
    Imagenet,
    /// iNaturalist 2018: as for ImageNet, with its own mean and std.
    Inaturalist,
    /// CIFAR-10-LT and CIFAR-100-LT: 32×32.
    Cifar,
}

impl Preset {
    /// The preset that the network was most likely trained with: iNaturalist 2018 is known by its 8,142 classes.
    pub fn guess(family: Family, classes: usize) -> Self {
        match (family, classes) {
            (Family::Cifar, _) => Self::Cifar,
            (_, 8142) => Self::Inaturalist,
            _ => Self::Imagenet,
        }
    }

    /// The pipeline; `size` overrules the crop, and the resize keeps its ratio to it.
    pub fn preprocessing(self, size: Option<Size>, exif: Exif) -> Preprocessing {
        let (shorter_side, crop, mean, std) = match self {
            Self::Imagenet => (256, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            Self::Inaturalist => (256, 224, [0.466, 0.471, 0.380], [0.195, 0.194, 0.192]),
            Self::Cifar => (32, 32, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
        };
        let (mean, std) = (Vec::from(mean), Vec::from(std));
        let own = Preprocessing { mean, std, exif, ..Preprocessing::bilinear(shorter_side, crop) };
        at_size(own, size.unwrap_or(Size::square(crop)))
    }
}

/// What to export, and how.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// The checkpoint file.
    pub checkpoint: PathBuf,
    /// The bundle's folder, `models/NAME/VERSION`.
    pub out: PathBuf,
    /// Labels, and training counts where known.
    pub classes: Option<PathBuf>,
    /// The pipeline; the checkpoint's own, or guessed from the network, when absent.
    pub preprocessing: Option<PreprocessingSource>,
    /// What overrules single settings of the pipeline.
    pub changes: PreprocessingChanges,
    /// The size of the network's input, when it differs from the preset's.
    pub input_size: Option<Size>,
    /// What serving does with EXIF orientation.
    pub exif: Exif,
    /// Measured accuracy, JSON, for the model card.
    pub evaluation: Option<PathBuf>,
    /// Outputs beside the logits.
    pub extras: Extras,
    /// Replaces a bundle that is there.
    pub force: bool,
    /// What overrules names and shapes.
    pub overrides: Overrides,
    /// Of an ONNX file: the name of its output with a score for each class, where it has several.
    pub logits: Option<String>,
    /// Of an ONNX file: a folder of pictures that the proof looks at besides seeded inputs.
    pub images: Option<PathBuf>,
    /// Inputs, and the logits that the user's own network gave for them, that the bundle is held to.
    pub expect: Option<PathBuf>,
    /// How much of the training prior the loss took out of the logits, where the file does not say.
    pub kappa: Option<f64>,
    /// Puts weights into files of their own; without it only those that one file cannot hold.
    pub external_data: bool,
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Exported {
    /// The bundle's manifest.
    pub manifest: Manifest,
    /// Where its preprocessing comes from, and what of it was guessed; a sentence.
    pub preprocessing_from: String,
    /// Where in the checkpoint the network was found, if not at its top.
    pub root: Option<String>,
    /// What the checkpoint holds besides.
    pub left_out: Vec<String>,
    /// Of a run that has not finished: the epochs that are done, and those that were to be.
    pub unfinished: Option<(usize, usize)>,
}

/// A bundle that was proved, not written yet.
pub(super) struct Proved {
    pub(super) exported: Exported,
    /// `model.onnx`.
    pub(super) model: Vec<u8>,
}

/// Folds, proves, and only then writes.
///
/// # Errors
/// Nothing is written on an error.
pub fn export(options: &ExportOptions, library: &Library) -> Result<Exported, FoldError> {
    let inputs =
        [Some(&options.checkpoint), options.classes.as_ref(), options.evaluation.as_ref(), options.expect.as_ref()];
    let inputs: Vec<&Path> = inputs.into_iter().flatten().map(PathBuf::as_path).collect();
    check_place(&options.out, options.force, &inputs)?;
    let expected = options.expect.as_deref().map(Expected::load).transpose()?;
    let mut draft = Draft::of(&options.out, options.external_data, options.force);
    let Proved { mut exported, model } = if is_onnx(&options.checkpoint) {
        from_onnx(options, library, &mut draft, expected.as_ref())?
    } else {
        from_checkpoint(options, library, &mut draft, expected.as_ref())?
    };
    let manifest = &mut exported.manifest;
    if let Some(path) = options.evaluation.as_deref() {
        manifest.evaluation = Some(evaluation(path)?);
    }
    manifest.check().map_err(|error| FoldError::Input(error.to_string()))?;
    draft.publish(manifest, &model)?;
    Ok(exported)
}

fn from_checkpoint(
    options: &ExportOptions,
    library: &Library,
    draft: &mut Draft,
    expected: Option<&Expected>,
) -> Result<Proved, FoldError> {
    for (given, flag) in [(options.logits.is_some(), "--logits"), (options.images.is_some(), "--images")] {
        if given {
            return Err(FoldError::Input(format!("{flag} is for ONNX files: leave it out for a checkpoint")));
        }
    }
    let checkpoint = Checkpoint::choose(&options.checkpoint, &options.overrides.choice)?;
    // What the checkpoint was trained with holds unless the command line says otherwise.
    let stored = match &options.preprocessing {
        Some(PreprocessingSource::File(path)) => Some(from_file(path, options.exif, options.input_size)?),
        Some(PreprocessingSource::Preset(_)) => None,
        None => metadata(&checkpoint, PREPROCESSING_KEY, Preprocessing::check, "--preprocessing")?,
    };
    let preset = match options.preprocessing {
        Some(PreprocessingSource::Preset(preset)) => Some(preset),
        _ => None,
    };
    let size = match (options.input_size, preset, &stored) {
        (Some(size), ..) => size,
        (None, Some(preset), _) => preset.preprocessing(None, options.exif).crop,
        (None, None, Some(stored)) => stored.crop,
        (None, None, None) if expected.is_some() => expected.map_or(Size::square(224), Expected::size),
        (None, None, None) => Size::square(architecture::family(&checkpoint)?.default_side() as u32),
    };
    if size.height != size.width {
        return Err(FoldError::Input(format!(
            "its input would be {size}; checkpoints are read for square inputs only: give --input-size SIDE, or export the \
             network as ONNX"
        )));
    }
    let network = architecture::build(&checkpoint, size.height as usize, options.extras, &options.overrides)?;
    if options.extras.expert_logits && network.experts == 1 {
        let reason = "--expert-logits: this network has only one expert, whose logits are those of the network: leave \
                      the flag out";
        return Err(FoldError::Input(reason.into()));
    }
    let stored_classes = match options.classes {
        Some(_) => None,
        None => metadata(&checkpoint, CLASSES_KEY, |classes: &Vec<Class>| check_classes(classes), "--classes")?,
    };
    let classes = match stored_classes {
        Some(stored) => fitting(stored, network.classes)?,
        None => classes(options.classes.as_deref(), network.classes)?,
    };
    let kappa = metadata(&checkpoint, KAPPA_KEY, |kappa: &f64| check_kappa(*kappa), "another checkpoint")?;
    let (preprocessing, from) = match (stored, &options.preprocessing) {
        (Some(stored), source) => {
            let from = source.as_ref().map_or(OWN_PREPROCESSING.into(), PreprocessingSource::to_string);
            (Preprocessing { exif: options.exif, ..at_size(stored, size) }, from)
        }
        (None, source) => {
            let preset = preset.unwrap_or_else(|| Preset::guess(network.family, network.classes));
            let name = PreprocessingSource::Preset(preset).to_string();
            let from = match source {
                Some(_) => name,
                None => {
                    format!("{name}, guessed from the network's kind (--preprocessing NAME or FILE says otherwise)")
                }
            };
            (preset.preprocessing(Some(size), options.exif), from)
        }
    };
    let preprocessing = options.changes.apply(preprocessing)?;
    // Found out now, not after the proof.
    preprocessing.check().map_err(|error| {
        FoldError::Input(match options.input_size {
            Some(given) => format!("--input-size {given}: {error}"),
            None => error.to_string(),
        })
    })?;
    if preprocessing.shape() != [3, size.height as usize, size.width as usize] {
        let reason = "the preprocessing is for one channel, or for channels last; networks of checkpoints take three \
                      channels first: give another --preprocessing";
        return Err(FoldError::Input(reason.into()));
    }
    let batch_norms_merged = network.graph.nodes.iter().filter(|node| is_norm(&node.op)).count();
    let mut folded = super::fold(&network.graph)?;
    draft.hold(&mut folded)?;
    let model = folded.encode();
    let mut proof = verify::prove(&network.graph, draft.source(&model), library)?;
    if let Some(expected) = expected {
        let side = size.height as usize;
        let tolerance = proof.outputs.first().map_or(0.0, |logits| logits.tolerance);
        let cause = || {
            let fits = fitting_flag(&checkpoint, side, &options.overrides, expected)?;
            Ok(match fits {
                Some(flag) => format!("with {flag} it agrees"),
                None => format!(
                    "names and shapes do not tell the network's own arithmetic, and what was taken is not it ({}): say what \
                     differs ({UNTOLD_FLAGS}), or export the network itself as ONNX",
                    network.assumed.join("; ")
                ),
            })
        };
        let held = expected.hold(draft.source(&model), [3, side, side], tolerance, library, cause)?;
        proof.expected = Some(held);
    }
    proof.assumed = network.assumed;
    let (root, left_out) = (checkpoint.root.clone(), checkpoint.left_out.clone());
    let unfinished = unfinished(&checkpoint);
    drop(checkpoint);
    let mut manifest = Manifest {
        schema_version: SCHEMA_VERSION,
        arch: network.arch,
        classes,
        preprocessing,
        fold: FoldReport {
            by: format!("fold {}", env!("CARGO_PKG_VERSION")),
            head: Some(network.head),
            kappa: options.kappa.or(kappa),
            preprocessing_from: (from != OWN_PREPROCESSING).then(|| from.clone()),
            experts: network.experts,
            normalized_layers: network.normalized_layers,
            alphas: network.alphas,
            batch_norms_merged,
            batch_norms_left: Vec::new(),
            onnx: None,
            proof,
            quantization: None,
        },
        checkpoint: FileDigest {
            file: file_name(&options.checkpoint),
            sha256: sha256_hex(&read(&options.checkpoint)?),
        },
        model: FileDigest { file: MODEL_FILE.into(), sha256: sha256_hex(&model) },
        model_data: draft.data(),
        evaluation: None,
    };
    manifest.schema_version = manifest.lowest_schema_version();
    Ok(Proved { exported: Exported { manifest, preprocessing_from: from, root, left_out, unfinished }, model })
}

/// The flag that makes the checkpoint the network that gave what is expected, if one alone does.
fn fitting_flag(
    checkpoint: &Checkpoint,
    side: usize,
    overrides: &Overrides,
    expected: &Expected,
) -> Result<Option<String>, FoldError> {
    for (flag, other) in overrides.others() {
        let Ok(network) = architecture::build(checkpoint, side, Extras::default(), &other) else { continue };
        let outputs = reference::evaluate::<f64>(&network.graph, expected.first())?;
        let Some(logits) = outputs.first() else { continue };
        if expected.agrees_on_first(logits) {
            return Ok(Some(flag));
        }
        // A cosine's scale is found by its logits.
        if let (Some(form), Some(factor)) = (flag.strip_suffix(":1"), expected.factor_of_first(logits)) {
            return Ok(Some(format!("{form}:{factor}")));
        }
    }
    Ok(None)
}

/// Refuses a link at `out`: what it leads to has another name, and may belong to somebody else.
fn refuse_link(out: &Path) -> Result<(), FoldError> {
    // With a slash at its end, a link's name is that of the folder it leads to.
    let out: PathBuf = out.components().collect();
    let Ok(target) = fs::read_link(&out) else { return Ok(()) };
    Err(FoldError::Input(format!(
        "{} is a link to {}, and a bundle does not replace a link: give the folder itself, or remove the link",
        out.display(),
        target.display()
    )))
}

/// Refuses a place that no bundle can have, that is taken, or that holds one of the `inputs`: these would be removed with
/// what is replaced.
pub(super) fn check_place(out: &Path, force: bool, inputs: &[&Path]) -> Result<(), FoldError> {
    let version = file_name(out);
    if version.parse::<u64>().ok().map(|number| number.to_string()) != Some(version.clone()) {
        let numbered = version.strip_prefix(['v', 'V']).and_then(|number| number.parse::<u64>().ok());
        let instead = match numbered {
            Some(number) => out.with_file_name(number.to_string()),
            None => out.join("1"),
        };
        return Err(FoldError::Input(format!(
            "--out ends in {version:?}; a bundle's folder is named after its version, a decimal number: give {}, for \
             example",
            instead.display()
        )));
    }
    refuse_link(out)?;
    if !out.exists() {
        return Ok(());
    }
    check_replaceable(out, force)?;
    let inside = |path: &Path| match (fs::canonicalize(path), fs::canonicalize(out)) {
        (Ok(path), Ok(out)) => path.starts_with(out),
        _ => false,
    };
    match inputs.iter().find(|path| inside(path)) {
        None => Ok(()),
        Some(path) => Err(FoldError::Input(format!(
            "{} lies in {}, which --force would replace: copy it elsewhere, or give the next version number",
            path.display(),
            out.display()
        ))),
    }
}

/// Refuses to replace what stands at `out`, unless it is a bundle, nothing else lies in it, and `force` asks for it.
fn check_replaceable(out: &Path, force: bool) -> Result<(), FoldError> {
    let refuse = |reason: String| Err(FoldError::Input(format!("{} {reason}", out.display())));
    if !force {
        return refuse("already exists: give the next version number, or replace it with --force".into());
    }
    if !is_manifest(&out.join(MANIFEST_FILE)) {
        return refuse("is not a bundle: --force replaces bundles only; give another folder, or remove it".into());
    }
    let own = own_files(out);
    let others = foreign(out, &own.iter().map(String::as_str).collect::<Vec<_>>());
    let Some((named, more)) = others.split_at_checked(NAMED.min(others.len())).filter(|_| !others.is_empty()) else {
        return Ok(());
    };
    let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
    refuse(format!(
        "holds {}{more}, which `fold` did not write: --force would remove it with the bundle; move it elsewhere, or \
         give the next version number",
        named.join(", ")
    ))
}

fn is_norm(op: &super::graph::Op) -> bool {
    use super::graph::Op;
    matches!(op, Op::BatchNorm(_) | Op::NormalizedBatchNorm { .. })
}

/// What the checkpoint's metadata says under `key`, where it says something. `instead` is what the user can give in its
/// place.
///
/// # Errors
/// When it cannot be read, or `check` refuses it.
fn metadata<T: serde::de::DeserializeOwned>(
    checkpoint: &Checkpoint,
    key: &str,
    check: impl Fn(&T) -> Result<(), ManifestError>,
    instead: &str,
) -> Result<Option<T>, FoldError> {
    let wrong = |reason: String| {
        FoldError::Input(format!("the checkpoint's metadata {key} cannot be used: {reason}: give {instead}"))
    };
    let Some(text) = checkpoint.metadata.get(key) else { return Ok(None) };
    let value = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
    check(&value).map_err(|error| wrong(error.to_string()))?;
    Ok(Some(value))
}

/// The epochs that are done, and those that were to be, where the first are fewer.
fn unfinished(checkpoint: &Checkpoint) -> Option<(usize, usize)> {
    let done = checkpoint.metadata.get(EPOCH_KEY)?.parse().ok()?;
    let recipe: serde_json::Value = serde_json::from_str(checkpoint.metadata.get(RECIPE_KEY)?).ok()?;
    let all = usize::try_from(recipe["epochs"].as_u64()?).ok()?;
    (done < all).then_some((done, all))
}

fn fitting(classes: Vec<Class>, expected: usize) -> Result<Vec<Class>, FoldError> {
    if classes.len() == expected {
        return Ok(classes);
    }
    let found = classes.len();
    Err(FoldError::Input(format!("the checkpoint's {CLASSES_KEY} names {found} classes; its network has {expected}")))
}

/// Labels from a CSV with the header `label,count` (or `label`), or one label a line; `class 0` … without a file.
pub(super) fn classes(path: Option<&Path>, expected: usize) -> Result<Vec<Class>, FoldError> {
    let Some(path) = path else {
        return Ok((0..expected).map(|k| Class { label: format!("class {k}"), count: None }).collect());
    };
    let input = |line: usize, reason: &str| FoldError::Input(format!("{}: line {line}: {reason}", path.display()));
    let text = String::from_utf8(read(path)?).map_err(|_| input(1, "not UTF-8"))?;
    // Spreadsheets begin UTF-8 files with a byte-order mark.
    let text = text.trim_start_matches('\u{feff}');
    let first = text.lines().next().unwrap_or_default().trim().to_ascii_lowercase();
    let has_header = first == "label,count" || first == "label";
    let mut lines = text.lines().filter(|line| !line.trim().is_empty()).peekable();
    if !has_header && lines.peek().is_some() && lines.all(has_a_number_at_the_end) {
        return Err(input(1, "looks like labels with counts, but has no header: make the first line label,count"));
    }
    let mut classes = Vec::new();
    if has_header {
        for (n, record) in csv::Reader::from_reader(text.as_bytes()).records().enumerate() {
            let record = record.map_err(|error| input(n + 2, &error.to_string()))?;
            let count =
                match record.get(1).map(str::trim) {
                    None | Some("") => None,
                    Some(text) => Some(text.parse().map_err(|_| {
                        input(n + 2, &format!("count {text:?} is not a whole number of training images"))
                    })?),
                };
            classes.push(Class { label: record[0].to_owned(), count });
        }
    } else {
        let labels = text.lines().map(str::trim).filter(|l| !l.is_empty());
        classes.extend(labels.map(|label| Class { label: label.to_owned(), count: None }));
    }
    if classes.len() != expected {
        return Err(FoldError::Input(format!(
            "{} names {} classes; the network has {expected}: list every class once, in the order of the logits{}",
            path.display(),
            classes.len(),
            if has_header { "" } else { " (its first line is taken for a class: a header must be label,count)" }
        )));
    }
    check_classes(&classes).map_err(|error| FoldError::Input(format!("{}: {error}", path.display())))?;
    Ok(classes)
}

/// Whether `line` is `something,12` or the like.
fn has_a_number_at_the_end(line: &str) -> bool {
    let last = line.trim().rsplit_once([',', ';', '\t']).map(|(_, last)| last.trim());
    last.is_some_and(|last| !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()))
}

fn evaluation(path: &Path) -> Result<serde_json::Value, FoldError> {
    serde_json::from_slice(&read(path)?)
        .map_err(|error| FoldError::Input(format!("{}: not JSON: {error}", path.display())))
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, FoldError> {
    fs::read(path).map_err(|cause| FoldError::File { path: path.to_owned(), cause })
}

pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
