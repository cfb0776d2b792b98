//! `nbn fold inspect`: what a checkpoint or a bundle holds, in words.

use std::fmt::Write;
use std::path::Path;

use super::architecture::{self, Extras, Overrides};
use super::export::{Exported, Preset};
use super::graph::{BatchNorm, Op};
use super::onnx::{Network, OnnxError, passes};
use super::{Checkpoint, FoldError};
use crate::bundle::{Ending, Exif, Group, Manifest, Reference};

/// Longer metadata, such as a hundred classes, is for programs.
const LONGEST_VALUE: usize = 80;
/// A magnitude below this all but switches the layer off.
const SMALL_ALPHA: f64 = 1e-3;
/// An effective weight below this makes a channel constant.
const DEAD_WEIGHT: f64 = 1e-8;

/// A table of the checkpoint's BatchNorm layers, and warnings.
///
/// # Errors
/// When the checkpoint is of no known network.
pub fn checkpoint(checkpoint: &Checkpoint, overrides: &Overrides) -> Result<String, FoldError> {
    let family = architecture::family(checkpoint)?;
    let side = family.default_side();
    let network = architecture::build(checkpoint, side, Extras::default(), overrides)?;
    let parameters: usize = checkpoint.tensors.values().map(|t| t.values.len()).sum();
    let mut out = String::new();
    let mut warnings = Vec::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "network     {}, {} classes, head {}, experts {}",
        network.arch, network.classes, network.head, network.experts
    );
    let _ = writeln!(out, "tensors     {} with {parameters} values", checkpoint.tensors.len());
    if let Some(root) = &checkpoint.root {
        let _ = writeln!(out, "weights     {root}");
    }
    for what in &checkpoint.left_out {
        let _ = writeln!(out, "left out    {what}");
    }
    for what in &network.assumed {
        let _ = writeln!(out, "taken for   {what}");
    }
    if !checkpoint.metadata.contains_key(super::PREPROCESSING_KEY) {
        let preset = Preset::guess(family, network.classes);
        let p = preset.preprocessing(None, Exif::Apply);
        let _ = writeln!(
            out,
            "guessed     {}, centre crop {}, mean {:?}, std {:?} (--preprocessing, --mean and --std of export say otherwise)",
            p.resize, p.crop, p.mean, p.std
        );
    }
    for (key, value) in checkpoint.metadata.iter().filter(|(_, value)| value.len() <= LONGEST_VALUE) {
        let _ = writeln!(out, "{key:<11} {value}");
    }
    for alpha in &network.alphas {
        let _ = writeln!(out, "α[{}]        {:.6}", alpha.index, alpha.value);
        if alpha.value.abs() < SMALL_ALPHA {
            warnings.push(format!(
                "|α[{}]| is {:.1e}: the normalised layers are all but switched off",
                alpha.index,
                alpha.value.abs()
            ));
        }
    }
    let _ =
        writeln!(out, "\n{:<28} {:>4} {:>8} {:>12} {:>12} {:>5}", "BatchNorm", "NBN", "channels", "‖γ‖", "‖β‖", "dead");
    for node in &network.graph.nodes {
        let (norm, alpha) = match &node.op {
            Op::BatchNorm(norm) => (norm, None),
            Op::NormalizedBatchNorm { directions, alpha } => (directions, Some(*alpha)),
            _ => continue,
        };
        let dead = dead_channels(norm, alpha);
        let (gamma, beta) = (length(&norm.weight), length(&norm.bias));
        let mark = if alpha.is_some() { "yes" } else { "–" };
        let _ =
            writeln!(out, "{:<28} {mark:>4} {:>8} {gamma:>12.5} {beta:>12.5} {dead:>5}", node.name, norm.weight.len());
        if dead > 0 {
            warnings.push(format!("{}: {dead} of {} channels are dead (weight 0)", node.name, norm.weight.len()));
        }
        if alpha.is_some() && gamma == 0.0 {
            warnings.push(format!("{}: ‖γ‖ is 0; export will refuse it", node.name));
        }
    }
    for warning in warnings {
        let _ = writeln!(out, "warning: {warning}");
    }
    Ok(out)
}

fn dead_channels(norm: &BatchNorm, alpha: Option<f64>) -> usize {
    let scale = alpha.map_or(1.0, |alpha| alpha.abs() / (length(&norm.weight) + super::onnx::NORM_EPSILON));
    norm.weight.iter().filter(|w| w.abs() * scale < DEAD_WEIGHT).count()
}

fn length(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// What the ONNX file at `path` is, and what an export would merge.
///
/// # Errors
/// When it cannot be read or folded.
pub fn onnx(path: &Path) -> Result<String, FoldError> {
    let fail = |cause: OnnxError| FoldError::Onnx { path: path.to_owned(), cause };
    let mut network = Network::load(path).map_err(fail)?;
    let (producer, opset) = (network.producer(), network.opset());
    let folded = passes::fold(&mut network).map_err(fail)?;
    let mut out = String::new();
    let by = producer.map_or_else(String::new, |by| format!(" by {by}"));
    let _ = writeln!(out, "onnx        opset {opset}{by}; {} nodes, {} once folded", folded.nodes.0, folded.nodes.1);
    let (merged, left) = (folded.norms.merged.len(), folded.norms.left.len());
    let normalized = folded.normalized.len();
    let _ = writeln!(out, "merges      {merged} of {} BatchNorm layers; {normalized} are normalised", merged + left);
    for (name, reason) in &folded.norms.left {
        let _ = writeln!(out, "leaves      {name}: {reason}");
    }
    for layer in &folded.normalized {
        let told = |name: &str, direction: &Option<passes::Direction>| match direction {
            Some(passes::Direction { norm, alpha: Some(alpha), .. }) => format!(" ‖{name}‖ {norm:.6}, α {alpha:.6}"),
            Some(passes::Direction { norm, alpha: None, .. }) => format!(" ‖{name}‖ {norm:.6}"),
            None => String::new(),
        };
        let _ = writeln!(out, "normalised  {}:{}{}", layer.name, told("γ", &layer.weight), told("β", &layer.bias));
    }
    Ok(out)
}

/// The manifest's content, as `nbn fold inspect` prints it.
pub fn manifest(manifest: &Manifest) -> String {
    described(manifest, None)
}

/// As [`manifest`], and where the preprocessing comes from: what `nbn fold export` prints.
pub fn exported(exported: &Exported) -> String {
    let mut out = described(&exported.manifest, Some(&exported.preprocessing_from));
    if let Some(root) = &exported.root {
        let _ = writeln!(out, "weights     {root}");
    }
    for what in &exported.left_out {
        let _ = writeln!(out, "left out    {what}");
    }
    if let Some((done, all)) = exported.unfinished {
        let _ = writeln!(
            out,
            "warning: the training run of this checkpoint has done {done} of {all} epochs: finish it with `nbn fold train \
             --resume`, and export again"
        );
    }
    out
}

fn described(manifest: &Manifest, preprocessing_from: Option<&str>) -> String {
    let mut out = String::new();
    let preprocessing_from = preprocessing_from.or(manifest.fold.preprocessing_from.as_deref());
    let fold = &manifest.fold;
    let p = &manifest.preprocessing;
    let _ = writeln!(
        out,
        "network     {}, {} classes{}, experts {}",
        manifest.arch,
        manifest.classes.len(),
        fold.head.map_or_else(String::new, |head| format!(", head {head}")),
        fold.experts
    );
    if let Some(onnx) = &fold.onnx {
        let producer = onnx.producer.as_deref().unwrap_or("an unnamed program");
        let (before, after) = (onnx.nodes_before, onnx.nodes_after);
        let _ = writeln!(out, "onnx        opset {} by {producer}; {before} nodes, now {after}", onnx.opset);
        let _ = match onnx.ending {
            Ending::Logits => writeln!(out, "output      {:?}, served as logits", onnx.output),
            Ending::Softmax => writeln!(out, "output      {:?}, without the softmax that ends it", onnx.output),
            Ending::LogSoftmax => writeln!(out, "output      {:?}, without the log-softmax that ends it", onnx.output),
        };
        for node in &onnx.unevaluated {
            let _ = writeln!(out, "left        {node}: it depends on constants alone, and is computed by the runtime");
        }
        if onnx.one_by_one {
            let _ = writeln!(out, "batch       1: the network takes one picture at a time");
        }
    }
    let groups: Vec<String> = [Group::Many, Group::Medium, Group::Few]
        .into_iter()
        .map(|g| format!("{} {}", manifest.classes.iter().filter(|c| c.group() == Some(g)).count(), g.name()))
        .collect();
    if manifest.classes.iter().any(|c| c.count.is_some()) {
        let _ = writeln!(out, "groups      {}", groups.join(", "));
    } else {
        let _ = writeln!(out, "groups      unknown: no training counts were given (--classes FILE with label,count)");
    }
    let [x, y, z] = p.shape();
    let border = if p.fill == [0; 3] { String::new() } else { format!(", border {:?}", p.fill) };
    let _ = writeln!(
        out,
        "input       images [batch, {x}, {y}, {z}], {}; {}, {}, centre crop {}{border}, {}, mean {:?}, std {:?}",
        p.color, p.resize, p.filter, p.crop, p.scale, p.mean, p.std,
    );
    if let Some(from) = preprocessing_from {
        let _ = writeln!(out, "            from {from}");
    }
    let _ = writeln!(
        out,
        "merged      {} of {} BatchNorm layers; {} are normalised",
        fold.batch_norms_merged,
        fold.batch_norms_merged + fold.batch_norms_left.len(),
        fold.normalized_layers.len()
    );
    for layer in &fold.normalized_layers {
        let _ = writeln!(out, "            {layer}");
    }
    for left in &fold.batch_norms_left {
        let _ = writeln!(out, "left        {}: {}", left.name, left.reason);
    }
    for alpha in &fold.alphas {
        let _ = writeln!(out, "α[{}]        {:.6}", alpha.index, alpha.value);
        if alpha.value.abs() < SMALL_ALPHA {
            let _ = writeln!(
                out,
                "warning: |α[{}]| is below {SMALL_ALPHA}: the normalised layers are all but switched off",
                alpha.index
            );
        }
    }
    for proof in &fold.proof.outputs {
        let _ = writeln!(
            out,
            "proof       {}: max difference {:.2e}, {:.2e} of its standard deviation (tolerance {:.2e}; {} seeded images{}, {}{})",
            proof.output,
            proof.max_absolute,
            proof.max_relative,
            proof.tolerance,
            fold.proof.images,
            match fold.proof.pictures {
                0 => String::new(),
                pictures => format!(" and {pictures} pictures"),
            },
            match fold.proof.reference {
                Reference::Checkpoint => "f64 reference",
                Reference::Original => "the original in ONNX Runtime",
            },
            if fold.quantization.is_some() { "; before quantization" } else { "" }
        );
    }
    let proof = &fold.proof;
    if let Some(expected) = &proof.expected {
        let _ = writeln!(
            out,
            "expected    max difference {:.2e}, {:.2e} of the standard deviation (tolerance {:.2e}; {} inputs with the network's \
             own logits, {})",
            expected.max_absolute, expected.max_relative, expected.tolerance, expected.images, expected.file.file
        );
    }
    if !proof.assumed.is_empty() {
        let caveat = match proof.expected {
            Some(_) => "taken for what names do not tell, and right by what was expected:",
            None => {
                "the proof is relative to what names do not tell and was taken (--expect holds it to your network):"
            }
        };
        let _ = writeln!(out, "taken for   {caveat}");
        for what in &proof.assumed {
            let _ = writeln!(out, "            {what}");
        }
    }
    if let Some(quantization) = &fold.quantization {
        let _ = writeln!(
            out,
            "precision   int8, from {}: {} layers, weights in {} bits, ranges of {} pictures{}",
            quantization.from,
            quantization.layers,
            quantization.weight_bits,
            quantization.images,
            if quantization.proved { "" } else { "; unproved: not every bound of the certificate is kept" }
        );
        for layer in &quantization.float_layers {
            let _ = writeln!(out, "            {} in float32: {}", layer.name, layer.reason);
        }
        let _ = write!(out, "{}", quantization.certificate);
    }
    let _ = writeln!(out, "model       sha256 {}", manifest.model.sha256);
    out
}
