//! Checkpoints that PyTorch wrote, folded and compared with PyTorch's own f64 logits, and refusals.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nbn::bundle::{Bundle, Exif, Manifest, Size};
use nbn::fold::architecture::{self, Extras, NbnLayers, Overrides};
use nbn::fold::export::{ExportOptions, export};
use nbn::fold::preprocessing::{PreprocessingChanges, PreprocessingSource};
use nbn::fold::{Checkpoint, FoldError};
use nbn::runtime::{OnnxModel, Runner, SessionOptions};
use nbn::stop::Stop;
use ndarray::ArrayView4;
use safetensors::SafeTensors;

use crate::support::{Owned, data, fold, library, nbn, picture, root, text};

fn options(checkpoint: &Path, out: &Path, side: u32) -> ExportOptions {
    ExportOptions {
        checkpoint: checkpoint.to_owned(),
        out: out.to_owned(),
        classes: None,
        preprocessing: None,
        changes: PreprocessingChanges::default(),
        input_size: Some(Size::square(side)),
        exif: Exif::Apply,
        evaluation: None,
        extras: Extras::default(),
        force: false,
        overrides: Overrides::default(),
        logits: None,
        images: None,
        expect: None,
        kappa: None,
        external_data: false,
    }
}

fn floats(tensors: &SafeTensors<'_>, key: &str) -> Vec<f64> {
    let tensor = tensors.tensor(key).unwrap_or_else(|e| panic!("{key}: {e}"));
    match tensor.dtype() {
        safetensors::Dtype::F64 => {
            tensor.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
        }
        _ => tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
    }
}

#[test]
fn every_layout_gives_pytorchs_own_logits() {
    let bytes = fs::read(data("checkpoints/expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("resnet50", "linear", 1, 0),
        ("resnext50", "linear", 1, 0),
        ("resnet50_nbn", "linear", 1, 3),
        ("resnet50_nbn_lr", "lr-affine", 1, 3),
        ("resnet50_nbn_lr_plain", "lr-plain", 1, 3),
        ("resnext50_nbn", "linear", 1, 3),
        ("ride_nbn", "linear", 3, 21),
        ("ride_nbn_lr_plain", "lr-plain", 3, 21),
        ("ride", "linear", 3, 0),
        ("cifar_a", "lr-plain", 1, 2),
        ("cifar_b", "lr-affine", 1, 3),
        ("cifar_bn", "linear", 1, 0),
    ];
    for (name, head, experts, normalized) in cases {
        let side = if name.starts_with("cifar") { 32 } else { 64 };
        let out = folder.path().join(name).join("1");
        let manifest =
            export(&options(&data(&format!("checkpoints/{name}.pth.tar")), &out, side), library()).unwrap().manifest;
        assert_eq!(
            (manifest.fold.head.unwrap().to_string(), manifest.fold.experts),
            (head.to_owned(), experts),
            "{name}"
        );
        assert_eq!(manifest.fold.normalized_layers.len(), normalized, "{name}: {:?}", manifest.fold.normalized_layers);
        assert!(manifest.fold.alphas.iter().all(|a| (8.0..14.0).contains(&a.value)), "{name}");
        let bundle = Bundle::load(&out).unwrap();
        let mut model = OnnxModel::open(library(), bundle.network.bytes().unwrap(), SessionOptions::default()).unwrap();
        let images: Vec<f32> = floats(&expected, &format!("{name}.images")).iter().map(|&v| v as f32).collect();
        let view = ArrayView4::from_shape((2, 3, side as usize, side as usize), &images).unwrap();
        let found = model.run_batch(view).unwrap().swap_remove(0);
        let exact = floats(&expected, &format!("{name}.logits"));
        let mean = exact.iter().sum::<f64>() / exact.len() as f64;
        let spread = (exact.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / exact.len() as f64).sqrt();
        let worst = found.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(worst <= 1e-4 * spread, "{name}: {worst:.2e} of {spread:.2e}");
    }
}

#[test]
fn a_module_prefix_a_wrapper_and_the_file_format_change_nothing() {
    let load = |name: &str| Checkpoint::load(&data(&format!("checkpoints/{name}"))).unwrap().tensors;
    for name in ["resnet50", "resnext50_nbn", "ride_nbn_lr_plain"] {
        assert_eq!(load(&format!("{name}.pth.tar")), load(&format!("{name}_other.pth.tar")), "{name}");
    }
    let plain = load("cifar_a.pth.tar");
    assert_eq!(plain, load("cifar_a.safetensors"));
    assert_eq!(plain, load("cifar_a_bare.pt"));
    let half = load("cifar_a_half.pt");
    assert_eq!(half.keys().collect::<Vec<_>>(), plain.keys().collect::<Vec<_>>());
}

#[test]
fn a_pickle_with_a_foreign_call_is_read_and_nothing_runs() {
    let _ = fs::remove_file("/tmp/nbn-pickle-ran");
    let tensors = Checkpoint::load(&data("checkpoints/cifar_a_foreign.pth.tar")).unwrap().tensors;
    assert!(tensors.contains_key("conv1.weight"));
    assert!(!Path::new("/tmp/nbn-pickle-ran").exists(), "the pickle was run");
}

#[test]
fn expert_logits_are_a_second_output_whose_mean_is_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("ride/1");
    let extras = Extras { expert_logits: true, features: false };
    let with_experts = ExportOptions { extras, ..options(&data("checkpoints/ride_nbn.pth.tar"), &out, 64) };
    export(&with_experts, library()).unwrap();
    let bundle = Bundle::load(&out).unwrap();
    let mut model = OnnxModel::open(library(), bundle.network.bytes().unwrap(), SessionOptions::default()).unwrap();
    let images: Vec<f32> = (0..2 * 3 * 64 * 64).map(|n| (n % 17) as f32 / 8.0 - 1.0).collect();
    let outputs = model.run_batch(ArrayView4::from_shape((2, 3, 64, 64), &images).unwrap()).unwrap();
    assert_eq!(outputs[1].shape(), [2, 3, 7]);
    let mean = outputs[1].mean_axis(ndarray::Axis(1)).unwrap();
    for (a, b) in mean.iter().zip(&outputs[0]) {
        assert!((a - b).abs() < 1e-3 * b.abs().max(1.0), "{a} {b}");
    }
}

#[test]
fn features_are_what_the_classifier_sees() {
    let folder = tempfile::tempdir().unwrap();
    for (name, side, heads) in [
        ("cifar_bn", 32, &["fc"][..]),
        ("resnet50", 64, &["fc"]),
        ("ride", 64, &["linears.0", "linears.1", "linears.2"]),
    ] {
        let path = data(&format!("checkpoints/{name}.pth.tar"));
        let out = folder.path().join(name).join("1");
        let extras = Extras { expert_logits: false, features: true };
        let manifest = export(&ExportOptions { extras, ..options(&path, &out, side) }, library()).unwrap().manifest;
        assert!(manifest.has_output("features") && !manifest.has_output("expert_logits"));
        let bundle = Bundle::load(&out).unwrap();
        let mut model = OnnxModel::open(library(), bundle.network.bytes().unwrap(), SessionOptions::default()).unwrap();
        let side = side as usize;
        let images: Vec<f32> = (0..2 * 3 * side * side).map(|n| (n % 17) as f32 / 8.0 - 1.0).collect();
        let images = ArrayView4::from_shape((2, 3, side, side), &images).unwrap();
        model.give_features();
        let outputs = model.run(images, &Stop::default()).unwrap();
        let features = outputs.features.unwrap();
        let checkpoint = Checkpoint::load(&path).unwrap();
        let width = features.ncols() / heads.len();
        for (logits, features) in outputs.logits.rows().into_iter().zip(features.rows()) {
            for (k, logit) in logits.iter().enumerate() {
                let of_expert = |(head, features): (&&str, &[f32])| {
                    let (weight, bias) =
                        (&checkpoint.tensors[&format!("{head}.weight")], &checkpoint.tensors[&format!("{head}.bias")]);
                    assert_eq!(weight.shape, [logits.len(), width], "{name}");
                    let products = weight.values[k * width..(k + 1) * width].iter().zip(features).map(|(w, f)| w * f);
                    products.sum::<f32>() + bias.values[k]
                };
                let features = features.to_slice().unwrap().chunks_exact(width);
                let mean = heads.iter().zip(features).map(of_expert).sum::<f32>() / heads.len() as f32;
                assert!((mean - logit).abs() < 1e-3 * logit.abs().max(1.0), "{name}: {mean} {logit}");
            }
        }
    }
}

/// What building and folding a changed copy of a fixture says.
fn refusal(name: &str, change: impl FnOnce(&mut Checkpoint)) -> FoldError {
    let mut checkpoint = Checkpoint::load(&data(&format!("checkpoints/{name}.pth.tar"))).unwrap();
    change(&mut checkpoint);
    match architecture::build(&checkpoint, 64, Extras::default(), &Overrides::default()) {
        Err(error) => error,
        Ok(network) => nbn::fold::fold(&network.graph).unwrap_err(),
    }
}

#[test]
fn a_wrong_checkpoint_is_refused_by_name() {
    let said = |name, change: fn(&mut Checkpoint)| refusal(name, change).to_string();
    let missing = said("resnet50_nbn", |c| drop(c.tensors.remove("layer3.0.bn2.running_mean")));
    assert!(missing.contains("missing key state_dict.layer3.0.bn2.running_mean"), "{missing}");
    let extra = said("resnet50_nbn", |c| {
        let tensor = c.tensors["fc.bias"].clone();
        c.tensors.insert("layer9.bias".into(), tensor);
    });
    assert!(extra.contains("unexpected") && extra.contains("layer9.bias"), "{extra}");
    let shape = said("resnet50_nbn", |c| c.tensors.get_mut("layer4.0.bn3.weight").unwrap().shape = vec![2, 32]);
    assert!(shape.contains("layer4.0.bn3.weight has shape [2, 32]; expected [64]"), "{shape}");
    let zero = said("resnet50_nbn", |c| c.tensors.get_mut("layer4.1.bn3.weight").unwrap().values.fill(0.0));
    assert!(zero.contains("layer4.1.bn3.weight has norm 0"), "{zero}");
    let variance = said("resnet50", |c| c.tensors.get_mut("bn1.running_var").unwrap().values[1] = -0.5);
    assert!(variance.contains("bn1.running_var is -0.5 at channel 1"), "{variance}");
    let experts = said("ride", |c| {
        let tensor = c.tensors["layer3s.0.0.conv1.weight"].clone();
        c.tensors.insert("layer3s.10.0.conv1.weight".into(), tensor);
    });
    assert!(experts.contains("11 experts; at most 10"), "{experts}");
    let unknown = said("resnet50", |c| c.tensors.retain(|name, _| name.starts_with("fc")));
    assert!(unknown.contains("not those of a known network"), "{unknown}");
}

#[test]
fn a_zero_bias_direction_folds_to_zero_and_only_the_acting_alpha_counts() {
    let mut checkpoint = Checkpoint::load(&data("checkpoints/resnet50_nbn.pth.tar")).unwrap();
    checkpoint.tensors.get_mut("layer4.0.bn3.bias").unwrap().values.fill(0.0);
    let network = architecture::build(&checkpoint, 64, Extras::default(), &Overrides::default()).unwrap();
    assert_eq!(network.alphas.len(), 1);
    let scale = checkpoint.tensors.get_mut("scale_factor").unwrap();
    scale.values[1..].fill(77.0);
    let again = architecture::build(&checkpoint, 64, Extras::default(), &Overrides::default()).unwrap();
    assert_eq!(network.graph, again.graph);
    nbn::fold::fold(&network.graph).unwrap();
}

#[test]
fn nbn_layers_can_be_overruled_and_are_held_to_the_checkpoint() {
    let load = |name: &str| Checkpoint::load(&data(&format!("checkpoints/{name}.pth.tar"))).unwrap();
    let build = |name, layers: NbnLayers| {
        let overrides = Overrides { nbn_layers: Some(layers), ..Overrides::default() };
        architecture::build(&load(name), 64, Extras::default(), &overrides)
    };
    assert_eq!(build("resnet50_nbn", NbnLayers::LastStageAll).unwrap().normalized_layers.len(), 7);
    assert_eq!(
        build("resnet50_nbn", "layer4.0.bn3,bn1".parse().unwrap()).unwrap().normalized_layers,
        ["bn1", "layer4.0.bn3"]
    );
    assert!(build("resnet50_nbn", NbnLayers::None).unwrap().normalized_layers.is_empty());
    assert!(build("resnet50_nbn", "layer7.bn1".parse().unwrap()).unwrap_err().to_string().contains("layer7.bn1"));
    assert!(build("resnet50", NbnLayers::All).unwrap_err().to_string().contains("scale_factor"));
    let overrides = Overrides { arch: Some("resnet50".into()), ..Overrides::default() };
    let error = architecture::build(&load("resnext50"), 64, Extras::default(), &overrides).unwrap_err().to_string();
    assert!(error.contains("resnext17_2x1d"), "{error}");
}

#[test]
fn the_command_writes_nothing_on_an_error_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("words.pth.tar"), "these are words").unwrap();
    fs::write(path("empty.pt"), "").unwrap();
    fs::write(path("page.pth"), "<!DOCTYPE html><title>Not found</title>").unwrap();
    fs::write(path("pointer.pth"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n").unwrap();
    let archive = fs::read(data("checkpoints/cifar_b.pth.tar")).unwrap();
    fs::write(path("cut.pth"), &archive[..archive.len() / 2]).unwrap();
    // A pickle of an empty list.
    fs::write(path("list.pth"), b"\x80\x02].").unwrap();
    let good = data("checkpoints/cifar_a.safetensors");
    let bytes = fs::read(&good).unwrap();
    fs::write(path("cut.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    let mut nan = bytes;
    let end = nan.len() - 4;
    nan[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(path("nan.safetensors"), nan).unwrap();
    fs::write(path("two.csv"), "label,count\na,1\nb,2\n").unwrap();
    fs::write(path("bad.csv"), "label,count\na,many\n").unwrap();
    let good = good.to_str().unwrap();
    let cases: BTreeMap<String, &str> = BTreeMap::from([
        (path("words.pth.tar"), "not a checkpoint"),
        (path("empty.pt"), "an empty file"),
        (path("page.pth"), "web page"),
        (path("pointer.pth"), "git lfs pull"),
        (path("cut.pth"), "damaged or truncated"),
        (path("list.pth"), "a pickle, and torch.save did not write it"),
        (path("cut.safetensors"), "damaged or truncated"),
        (path("nan.safetensors"), "NaN"),
        (path("absent.pt"), "absent.pt"),
    ]);
    let out = path("models/m/1");
    for (checkpoint, words) in cases {
        let done = fold(&["export", &checkpoint, "--out", &out]);
        assert_eq!(done.status.code(), Some(1), "{checkpoint}");
        assert!(text(&done.stderr).contains(words), "{}", text(&done.stderr));
        assert!(!Path::new(&out).exists());
    }
    let two = fold(&["export", good, "--out", &out, "--classes", &path("two.csv")]);
    assert!(text(&two.stderr).contains("names 2 classes; the network has 6"), "{}", text(&two.stderr));
    let bad = fold(&["export", good, "--out", &out, "--classes", &path("bad.csv")]);
    assert!(text(&bad.stderr).contains("line 2: count \"many\""), "{}", text(&bad.stderr));
    assert!(fold(&["export", good, "--out", &out]).status.success());
    let again = fold(&["export", good, "--out", &out]);
    assert!(text(&again.stderr).contains("--force"), "{}", text(&again.stderr));
    let shown = fold(&["inspect", &out]);
    assert!(text(&shown.stdout).contains("proof"), "{}", text(&shown.stderr));
    let shown = fold(&["inspect", good]);
    assert!(text(&shown.stdout).contains("layer3.1.bn2"), "{}", text(&shown.stderr));
    assert!(root().join("models/cifar10-lt/1/manifest.json").is_file());
}

/// The small checkpoint with `metadata`, and its tensors called what `rename` gives.
fn written(path: &Path, metadata: &[(&str, &str)], rename: impl Fn(&str) -> String) {
    let bytes = fs::read(data("checkpoints/cifar_a.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = file.tensors().into_iter().map(|(name, view)| (rename(&name), view)).collect();
    let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    safetensors::serialize_to_file(tensors, Some(metadata), path).unwrap();
}

#[test]
fn every_number_of_a_checkpoints_metadata_is_checked_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("a.safetensors"), folder.path().join("m/1"));
    let preprocessing = |shorter_side: &str, crop: &str, std: &str| {
        let sizes = format!("\"shorter_side\":{shorter_side},\"crop\":{crop}");
        format!("{{{sizes},\"mean\":[0,0,0],\"std\":[1,1,{std}],\"exif\":\"apply\"}}")
    };
    let classes = |label: &str, count: &str| {
        let class = |k: usize| format!("{{\"label\":\"{k}{label}\",\"count\":{count}}}");
        format!("[{}]", (0..6).map(class).collect::<Vec<_>>().join(","))
    };
    let long = "x".repeat(1001);
    let cases = [
        (
            "nbn.preprocessing",
            preprocessing("0", "0", "1"),
            "\"shorter side to 0\" and crop 0; sides must lie in 1..=4096",
        ),
        ("nbn.preprocessing", preprocessing("32", "0", "1"), "crop 0"),
        ("nbn.preprocessing", preprocessing("16", "32", "1"), "crop 32"),
        ("nbn.preprocessing", preprocessing("4294967295", "32", "1"), "shorter side to 4294967295"),
        ("nbn.preprocessing", preprocessing("32", "32", "0"), "std [1.0, 1.0, 0.0]"),
        ("nbn.preprocessing", preprocessing("32", "32", "1e-38"), "every std in 0.000001..=1000000"),
        ("nbn.preprocessing", preprocessing("-1", "32", "1"), "-1"),
        ("nbn.preprocessing", "null".into(), "null"),
        ("nbn.kappa", "-1".into(), "kappa is -1; it must lie in 0..=10"),
        ("nbn.kappa", "1e308".into(), "it must lie in 0..=10"),
        ("nbn.kappa", "1e999".into(), "out of range"),
        ("nbn.classes", classes("", "9223372036854775808"), "the count of class \"0\" is 9223372036854775808"),
        ("nbn.classes", classes("", "-1"), "-1"),
        ("nbn.classes", classes(&long, "1"), "the label of class 0 is \"0xxx"),
        ("nbn.classes", "[]".into(), "0 classes"),
    ];
    for (key, value, words) in cases {
        written(&path, &[(key, &value)], str::to_owned);
        let plain = ExportOptions { input_size: None, ..options(&path, &out, 32) };
        let error = export(&plain, library()).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains(words) && error.contains(": give "), "{key} {value}: {error}");
        assert!(error.len() < 500, "{error}");
        assert!(!out.exists(), "{key} {value}");
    }
    // What the command line gives instead is taken, and the checkpoint's is not looked at.
    written(&path, &[("nbn.preprocessing", &preprocessing("0", "0", "0"))], str::to_owned);
    let given = ExportOptions {
        preprocessing: Some(PreprocessingSource::Preset(nbn::fold::export::Preset::Cifar)),
        ..options(&path, &out, 32)
    };
    assert_eq!(export(&given, library()).unwrap().manifest.preprocessing.crop, Size::square(32));
    fs::remove_dir_all(&out).unwrap();
    // A size that the stored ratio carries beyond the limit.
    written(&path, &[("nbn.preprocessing", &preprocessing("4096", "1", "1"))], str::to_owned);
    let error = export(&options(&path, &out, 2048), library()).unwrap_err().to_string();
    assert!(error.contains("--input-size 2048") && error.contains("1..=4096"), "{error}");
}

#[test]
fn a_tensors_name_that_no_network_has_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    for (from, to, words) in [
        ("layer1.0.", "layer1.18446744073709551615.", "its name has the number 18446744073709551615"),
        ("layer1.0.", "layer1.10000.", "are numbered up to 9999"),
        ("layer1.0.", &format!("layer1.{}.", "x".repeat(600)), "names may have at most 500"),
    ] {
        written(&path, &[], |name| name.replacen(from, to, 1));
        let error = Checkpoint::load(&path).unwrap_err().to_string();
        assert!(error.contains("tensor \"layer1.") && error.contains(words), "{error}");
        assert!(error.len() < 400, "{error}");
        assert!(!fold(&["inspect", path.to_str().unwrap()]).status.success());
    }
}

#[test]
fn a_bundle_is_not_replaced_with_files_of_others_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m/1");
    let checkpoint = data("checkpoints/cifar_a.safetensors");
    let force = ExportOptions { force: true, ..options(&checkpoint, &out, 32) };
    export(&force, library()).unwrap();
    for name in ["notes.md", "a.csv", "zoo.txt"] {
        fs::write(out.join(name), "mine").unwrap();
    }
    fs::create_dir(out.join("calibration.json")).unwrap();
    let before = fs::read(out.join("manifest.json")).unwrap();
    let error = export(&force, library()).unwrap_err().to_string();
    assert!(error.contains("holds a.csv, calibration.json, notes.md and 1 more"), "{error}");
    assert!(error.contains("move it elsewhere, or give the next version number"), "{error}");
    for name in ["notes.md", "a.csv", "zoo.txt"] {
        assert_eq!(fs::read(out.join(name)).unwrap(), b"mine");
    }
    assert!(out.join("calibration.json").is_dir());
    assert_eq!(before, fs::read(out.join("manifest.json")).unwrap());
    for name in ["notes.md", "a.csv", "zoo.txt"] {
        fs::remove_file(out.join(name)).unwrap();
    }
    fs::remove_dir(out.join("calibration.json")).unwrap();
    // A draft that an ended run of this program has left is its own.
    fs::write(out.join(".calibration.json-17-0-1700000000000000000"), "{").unwrap();
    export(&force, library()).unwrap();
    let names = |folder: &Path| {
        let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&out), ["manifest.json", "model.onnx"]);
    assert_eq!(names(&folder.path().join("m")), ["1"]);
}

#[test]
fn a_folder_whose_manifest_is_of_another_program_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m/1");
    let checkpoint = data("checkpoints/cifar_a.safetensors");
    let force = ExportOptions { force: true, ..options(&checkpoint, &out, 32) };
    fs::create_dir_all(&out).unwrap();
    let app = r##"{"name": "Notes", "icons": [], "start_url": "/", "theme_color": "#fff"}"##;
    for manifest in [app, "", "mine", "[1, 2]", r#"{"schema_version": 1, "classes": [], "model": {}}"#] {
        for name in ["model.onnx", "calibration.json", "evaluation.json"] {
            fs::write(out.join(name), "mine").unwrap();
        }
        fs::write(out.join("manifest.json"), manifest).unwrap();
        let error = export(&force, library()).unwrap_err().to_string();
        assert!(error.contains("m/1 is not a bundle: --force replaces bundles only"), "{manifest}: {error}");
        assert_eq!(fs::read_to_string(out.join("manifest.json")).unwrap(), manifest);
        for name in ["model.onnx", "calibration.json", "evaluation.json"] {
            assert_eq!(fs::read(out.join(name)).unwrap(), b"mine", "{manifest}");
        }
    }
    // An own bundle is replaced, also one of another version and with values that no bundle has.
    let own = r#"{"schema_version": 0, "arch": 1, "classes": 2, "preprocessing": 3, "fold": 4, "model": 5}"#;
    fs::write(out.join("manifest.json"), own).unwrap();
    export(&force, library()).unwrap();
    Bundle::load(&out).unwrap();
}

#[test]
fn a_bundle_replaces_no_link_and_no_folder_that_it_is_made_from() {
    let folder = tempfile::tempdir().unwrap();
    let (out, link) = (folder.path().join("m/1"), folder.path().join("m/2"));
    let checkpoint = data("checkpoints/cifar_a.safetensors");
    export(&options(&checkpoint, &out, 32), library()).unwrap();
    let before = fs::read(out.join("manifest.json")).unwrap();
    std::os::unix::fs::symlink("1", &link).unwrap();
    std::os::unix::fs::symlink("gone", folder.path().join("m/3")).unwrap();
    for (name, target) in [("m/2", "1"), ("m/2/", "1"), ("m/2/.", "1"), ("m/3", "gone")] {
        for force in [true, false] {
            let at = folder.path().join(name);
            let error = export(&ExportOptions { force, ..options(&checkpoint, &at, 32) }, library()).unwrap_err();
            let error = error.to_string();
            assert!(
                error.contains(&format!("is a link to {target}, and a bundle does not replace a link")),
                "{name}: {error}"
            );
        }
    }
    assert_eq!(fs::read_link(&link).unwrap(), Path::new("1"));
    assert_eq!(fs::read_dir(folder.path().join("m")).unwrap().count(), 3);
    // A file of the old bundle would go with it.
    fs::write(out.join("evaluation.json"), r#"{"overall": 0.5}"#).unwrap();
    let evaluation = Some(out.join("evaluation.json"));
    let force = ExportOptions { force: true, evaluation, ..options(&checkpoint, &out, 32) };
    let error = export(&force, library()).unwrap_err().to_string();
    assert!(error.contains("evaluation.json lies in") && error.contains("copy it elsewhere"), "{error}");
    assert_eq!(fs::read(out.join("manifest.json")).unwrap(), before);
    assert_eq!(fs::read(out.join("evaluation.json")).unwrap(), br#"{"overall": 0.5}"#);
}

#[test]
fn what_older_releases_wrote_is_read_and_would_be_written_the_same() {
    let file = fs::read_to_string(data("calibration/first_manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_str(&file).unwrap();
    manifest.check().unwrap();
    assert_eq!((manifest.schema_version, manifest.lowest_schema_version()), (1, 1));
    assert_eq!(serde_json::to_string_pretty(&manifest).unwrap() + "\n", file);
}

#[test]
fn weights_may_lie_in_files_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let (within, apart) = (folder.path().join("m/1"), folder.path().join("m/2"));
    let cache = folder.path().join("cache");
    let photo = folder.path().join("photo.png");
    fs::write(&photo, picture(40, 30, image::ImageFormat::Png)).unwrap();
    let checkpoint = data("checkpoints/cifar_a.safetensors");
    export(&options(&checkpoint, &within, 32), library()).unwrap();
    let external = ExportOptions { external_data: true, ..options(&checkpoint, &apart, 32) };
    let manifest = export(&external, library()).unwrap().manifest;
    assert_eq!((manifest.schema_version, manifest.model_data.len()), (2, 1));
    let names = |folder: &Path| {
        let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&apart), ["manifest.json", "model.data.0", "model.onnx"]);
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    assert!(size(&apart.join("model.onnx")) < size(&within.join("model.onnx")) / 3);
    // The network's own file stands for the weights: its digest names theirs.
    let own = fs::read(apart.join("model.onnx")).unwrap();
    assert!(own.windows(64).any(|part| part == manifest.model_data[0].sha256.as_bytes()));

    let cache = cache.to_str().unwrap();
    let score = |bundle: &Path, more: &[&str]| {
        let named = ["score", "--model", bundle.to_str().unwrap(), "--logits", photo.to_str().unwrap()];
        nbn(&[&named, more].concat())
    };
    let logits = |out: std::process::Output| {
        assert!(out.status.success(), "{}", text(&out.stderr));
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()["logits"].clone()
    };
    let expected = logits(score(&within, &["--cache", "none"]));
    // Without a cache, to fill it, and from it.
    for more in [&["--cache", "none"][..], &["--cache", cache], &["--cache", cache]] {
        assert_eq!(logits(score(&apart, more)), expected, "{more:?}");
    }
    // It is ONNX like any other: what was made from it says so.
    let again = folder.path().join("m/3");
    let from_bundle = apart.join("model.onnx");
    export(&ExportOptions { external_data: true, ..options(&from_bundle, &again, 32) }, library()).unwrap();
    let told = Bundle::load(&again).unwrap().manifest;
    assert_eq!(told.fold.onnx.unwrap().data, manifest.model_data);

    // A change is noticed, also by a cache that has the old weights.
    let weights = apart.join("model.data.0");
    let kept = fs::read(&weights).unwrap();
    let mut changed = kept.clone();
    changed[4] ^= 1;
    fs::write(&weights, changed).unwrap();
    for more in [&["--cache", "none"][..], &["--cache", cache]] {
        let out = score(&apart, more);
        assert_eq!(out.status.code(), Some(1), "{more:?}");
        let words = "model.data.0: SHA-256 is ";
        assert!(text(&out.stderr).contains(words), "{}", text(&out.stderr));
    }
    fs::remove_file(&weights).unwrap();
    let error = Bundle::load(&apart).unwrap_err().to_string();
    assert!(error.contains("model.data.0: No such file"), "{error}");
    #[cfg(unix)]
    {
        let elsewhere = folder.path().join("elsewhere");
        fs::write(&elsewhere, &kept).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &weights).unwrap();
        let error = Bundle::load(&apart).unwrap_err().to_string();
        assert!(error.contains("model.data.0: it is a link out of the bundle's folder"), "{error}");
        fs::remove_file(&weights).unwrap();
    }
    // What a manifest names must not lead elsewhere, and is what the network names: its digest stands for the weights.
    let path = apart.join("manifest.json");
    let written = fs::read_to_string(&path).unwrap();
    fs::write(&path, written.replace("\"model.data.0\"", "\"../1/model.onnx\"")).unwrap();
    let error = Bundle::load(&apart).unwrap_err().to_string();
    assert!(error.contains("model_data.file is \"../1/model.onnx\"; it must be model.data.N"), "{error}");
    fs::write(&weights, &kept).unwrap();
    let digest = &manifest.model_data[0].sha256;
    let mut other = kept.clone();
    other[4] ^= 1;
    let forged = written.replace(digest.as_str(), &nbn::bundle::sha256_hex(&other));
    let mut without: serde_json::Value = serde_json::from_str(&written).unwrap();
    without.as_object_mut().unwrap().remove("model_data");
    for (manifest, bytes) in [(forged, &other), (without.to_string(), &kept)] {
        fs::write(&path, manifest).unwrap();
        fs::write(&weights, bytes).unwrap();
        for more in [&["--cache", "none"], &["--cache", cache]] {
            let out = score(&apart, more);
            let words = "it names other files with weights than the manifest's model_data";
            assert!(out.status.code() == Some(1) && text(&out.stderr).contains(words), "{}", text(&out.stderr));
        }
    }
    fs::write(&path, written).unwrap();
    fs::write(&weights, kept).unwrap();
    // A bundle with one file takes its place, and nothing of it is left.
    export(&ExportOptions { force: true, ..options(&checkpoint, &apart, 32) }, library()).unwrap();
    assert_eq!(names(&apart), ["manifest.json", "model.onnx"]);
    assert_eq!(names(&folder.path().join("m")), ["1", "2", "3"]);
}

#[test]
fn a_refused_export_leaves_nothing_and_a_later_one_takes_stale_drafts_away() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("models/mine/1");
    let path = data("onnx/bad_written_softmax.onnx");
    let refused = export(&ExportOptions { external_data: true, ..options(&path, &out, 16) }, library());
    assert!(refused.unwrap_err().to_string().contains("are probabilities"));
    assert!(!folder.path().join("models").exists());
    // As a killed run leaves them: of this bundle, of another, and one that may be at work.
    let drafts = [".1-17-0-1700000000000000000", ".2-17-0-1700000000000000000", ".1-17-1-1700000000000000000"];
    for (n, draft) in drafts.iter().enumerate() {
        let draft = folder.path().join("models/mine").join(draft);
        fs::create_dir_all(&draft).unwrap();
        fs::write(draft.join("model.data.0"), "weights").unwrap();
        let hours = if n == 2 { 0 } else { 3 };
        let then = std::time::SystemTime::now() - std::time::Duration::from_secs(3600 * hours);
        fs::File::open(&draft).unwrap().set_modified(then).unwrap();
    }
    export(&options(&data("checkpoints/cifar_a.safetensors"), &out, 32), library()).unwrap();
    let mut names: Vec<_> =
        fs::read_dir(out.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, [drafts[2], drafts[1], "1"]);
}

#[cfg(unix)]
#[test]
fn an_export_that_is_told_to_end_takes_its_draft_away() {
    let folder = tempfile::tempdir().unwrap();
    let models = folder.path().join("models");
    let out = models.join("mine/1");
    let pipe = folder.path().join("classes.csv");
    // It waits here, behind the weights: nobody writes into the pipe.
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut child = Owned::begin(
        std::process::Command::new(env!("CARGO_BIN_EXE_nbn"))
            .args(["fold", "export", data("onnx/softmax.onnx").to_str().unwrap(), "--external-data"])
            .args(["--out", out.to_str().unwrap(), "--classes", pipe.to_str().unwrap()])
            .stderr(std::process::Stdio::null()),
    );
    let draft = || fs::read_dir(models.join("mine")).map(|entries| entries.count()).unwrap_or(0);
    for _ in 0..1000 {
        if draft() == 1 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(draft(), 1, "it has begun");
    assert_eq!(child.terminate().code(), Some(130));
    assert_eq!(draft(), 0);
}
