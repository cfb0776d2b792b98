//! Checkpoints as public code bases save them, re-created by tests/oracle/field_checkpoints.py with PyTorch's own logits.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nbn::bundle::{Manifest, sha256_hex};
use nbn::fold::checkpoint::Tensor;
use nbn::fold::{Checkpoint, FoldError};

use crate::support::{data, fold, text};

/// What has to be said of these files.
const FLAGS: [(&str, &[&str]); 7] = [
    ("beside_assorted_legacy", &["--ignore", "parameter"]),
    ("ldam_resnet32_normed", &["--classifier-form", "cosine:1"]),
    ("torchvision_trainer_ema", &["--weights", "model"]),
    ("two_both_prefixes", &["--weights", "."]),
    ("two_ema_inside", &["--weights", "state_dict.model"]),
    ("ride_cifar_ea", &["--ignore", "expert_help_pred"]),
    ("lookalike/leaky_relu", &["--activation", "leaky-relu:0.1"]),
];

fn folder() -> PathBuf {
    data("checkpoints/field")
}

/// Name → file and, where it is a network, the file with its logits.
fn entries() -> BTreeMap<String, (PathBuf, Option<PathBuf>)> {
    let table: serde_json::Value = serde_json::from_slice(&fs::read(folder().join("table.json")).unwrap()).unwrap();
    let path = |value: &serde_json::Value| value.as_str().map(|name| folder().join(name));
    let entry = |entry: &serde_json::Value| {
        (entry["name"].as_str().unwrap().to_owned(), (path(&entry["file"]).unwrap(), path(&entry["npz"])))
    };
    table.as_array().unwrap().iter().map(entry).collect()
}

fn flags(name: &str) -> &'static [&'static str] {
    FLAGS.iter().find(|(of, _)| *of == name).map_or(&[], |(_, flags)| flags)
}

fn export(file: &Path, out: &Path, flags: &[&str]) -> Result<Manifest, String> {
    let (file, out) = (file.to_str().unwrap(), out.to_str().unwrap());
    let done = fold(&[&["export", file, "--out", out], flags].concat());
    match done.status.code() {
        Some(0) => Ok(serde_json::from_slice(&fs::read(Path::new(out).join("manifest.json")).unwrap()).unwrap()),
        Some(1) => Err(text(&done.stderr)),
        code => panic!("{file}: {code:?}: {}", text(&done.stderr)),
    }
}

#[test]
fn every_form_of_the_field_gives_its_networks_own_logits() {
    let place = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for (name, (file, npz)) in entries() {
        let Some(npz) = npz.filter(|_| !name.starts_with("lookalike/") && name != "ride_cifar_ea") else { continue };
        let held = [flags(&name), &["--expect", npz.to_str().unwrap()]].concat();
        let manifest =
            export(&file, &place.path().join(&name).join("1"), &held).unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected = manifest.fold.proof.expected.unwrap();
        assert!(expected.max_relative < 1e-4, "{name}: {expected:?}");
        assert!(!manifest.fold.proof.assumed.is_empty(), "{name}");
        seen += 1;
    }
    assert!(seen > 20, "{seen}");
}

#[test]
fn a_network_of_the_same_names_goes_in_with_a_caveat_and_not_against_its_own_logits() {
    let place = tempfile::tempdir().unwrap();
    let out = |name: &str| place.path().join(name).join("1");
    let entries = entries();
    let lookalikes: Vec<_> = entries.iter().filter(|(name, _)| name.starts_with("lookalike/")).collect();
    assert_eq!(lookalikes.len(), 5);
    for (name, (file, npz)) in lookalikes {
        let npz = npz.as_ref().unwrap().to_str().unwrap();
        let manifest = export(file, &out(name), &["--input-size", "32"]).unwrap();
        assert!(!manifest.fold.proof.assumed.is_empty() && manifest.fold.proof.expected.is_none(), "{name}");
        let shown = text(&fold(&["inspect", out(name).to_str().unwrap()]).stdout).to_owned();
        assert!(shown.contains("the proof is relative to") && shown.contains("--expect"), "{shown}");
        let refused = export(file, &out("refused"), &["--expect", npz]).unwrap_err();
        assert!(refused.contains("nothing was written") && !out("refused").exists(), "{name}: {refused}");
        let cure = match name.as_str() {
            "lookalike/stride_on_conv1" => "with --stride-in conv1 it agrees",
            "lookalike/batch_norm_eps" => "with --batch-norm-epsilon 1e-3 it agrees",
            "lookalike/leaky_relu" => "with --activation leaky-relu:0.1 it agrees",
            "lookalike/cosine_no_bias" => "with --classifier-form cosine:16 it agrees",
            "lookalike/dilated" => "export the network itself as ONNX",
            other => panic!("{other}"),
        };
        assert!(refused.contains(cure), "{name}: {refused}");
    }
    let (file, npz) = &entries["lookalike/leaky_relu"];
    let told = [flags("lookalike/leaky_relu"), &["--expect", npz.as_ref().unwrap().to_str().unwrap()]].concat();
    export(file, &out("told"), &told).unwrap();
}

#[test]
fn of_two_sets_of_weights_one_is_asked_for_and_always_the_same_is_taken() {
    let place = tempfile::tempdir().unwrap();
    let entries = entries();
    let cases = [
        ("torchvision_trainer_ema", "model and model_ema.module", ["model", "model_ema"]),
        ("two_both_prefixes", "\".\" (names without a prefix) and module", [".", "module"]),
        ("two_ema_inside", "state_dict.ema_model and state_dict.model", ["state_dict.model", "state_dict.ema_model"]),
    ];
    for (name, both, sets) in cases {
        let file = &entries[name].0;
        for _ in 0..5 {
            let refused = export(file, &place.path().join("1"), &[]).unwrap_err();
            assert!(refused.contains(both) && refused.contains("--weights"), "{refused}");
        }
        let digest = |set: &str, run: usize| {
            let out = place.path().join(format!("{name}{}{run}", sha256_hex(set.as_bytes()))).join("1");
            export(file, &out, &["--weights", set, "--input-size", "32"]).unwrap();
            ["model.onnx", "manifest.json"].map(|file| sha256_hex(&fs::read(out.join(file)).unwrap()))
        };
        let [first, second] = sets.map(|set| digest(set, 0));
        assert_ne!(first, second, "{name}");
        for run in 1..5 {
            assert_eq!(digest(sets[0], run), first, "{name}");
        }
        let none = export(file, &place.path().join("1"), &["--weights", "teacher"]).unwrap_err();
        assert!(none.contains("--weights teacher") && none.contains(both), "{none}");
    }
}

#[test]
fn what_is_no_checkpoint_is_called_what_it_is() {
    let entries = entries();
    let said = |name: &str| Checkpoint::load(&entries[&format!("unreadable/{name}")].0).unwrap_err().to_string();
    for (name, what) in [
        ("torchscript.pt", "a TorchScript program"),
        ("exported.pt2", "torch.export"),
        ("dynamically_quantised.pth", "is quantized"),
        ("whole_module.pth", "a whole module of the class __main__.Net"),
        ("whole_module_legacy.pth", "a whole module of the class __main__.Net"),
        ("optimizer_only.pth", "an optimizer's state"),
        ("bare_tensor.pth", "a single tensor"),
        ("list_of_tensors.pth", "a list"),
        ("distributed", "torch.distributed.checkpoint"),
        ("gzipped.pth", "a gzip file"),
        ("archive.pth.tar", "a tar archive"),
        (
            "photos.pth",
            "a zip archive of 1 file (photos/a.jpg, for example), not one of torch.save: give the checkpoint itself",
        ),
        ("zipped_checkpoint.zip", "a zip archive of 1 file (model_best.pth"),
        ("network.h5", "an HDF5 file"),
        ("network.keras", "a Keras model"),
        ("weights.npz", "NumPy"),
        ("model.ckpt-1000.index", "TensorFlow"),
        ("saved_model/saved_model.pb", "TensorFlow"),
        ("model.safetensors.index.json", "an index"),
        ("lfs_pointer.pth", "Git LFS"),
        ("page.pth", "a web page"),
        ("empty.pth", "an empty file"),
    ] {
        let said = said(name);
        assert!(said.contains(what) && !said.contains("amaged"), "{name}: {said}");
    }
    for name in ["truncated.pth", "broken.safetensors"] {
        assert!(said(name).contains("damaged or truncated"), "{}", said(name));
    }
}

/// The small checkpoint, its tensors called what `rename` gives.
fn renamed(rename: impl Fn(&str) -> String) -> (tempfile::TempDir, PathBuf) {
    renamed_with(rename, &[])
}

/// As [`renamed`], with other tensors besides.
fn renamed_with(rename: impl Fn(&str) -> String, others: &[(&str, &[usize])]) -> (tempfile::TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("renamed.safetensors");
    let checkpoint = Checkpoint::load(&data("checkpoints/cifar_bn.pth.tar")).unwrap();
    let mut bytes: Vec<(String, Vec<usize>, Vec<u8>)> = checkpoint
        .tensors
        .iter()
        .map(|(n, t)| (rename(n), t.shape.clone(), t.values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    for (name, shape) in others {
        let values = (0..shape.iter().product::<usize>()).flat_map(|n| (0.1 * n as f32).to_le_bytes());
        bytes.push(((*name).to_owned(), shape.to_vec(), values.collect()));
    }
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    (place, path)
}

#[test]
fn a_missing_key_names_the_one_that_is_likely_meant() {
    let refusal =
        |path: &Path, flags: &[&str]| export(path, &path.with_file_name("models").join("1"), flags).unwrap_err();
    let (_place, path) = renamed(|name| name.replace("fc.", "species."));
    let said = refusal(&path, &[]);
    assert!(
        said.contains("missing key fc.weight") && said.contains("is it species.weight (--classifier species)?"),
        "{said}"
    );
    export(&path, &path.with_file_name("models").join("1"), &["--classifier", "species"]).unwrap();
    let (_place, path) = renamed(|name| name.replace("layer2.0.bn2", "layer2.0.norm2"));
    let said = refusal(&path, &[]);
    assert!(
        said.contains("missing key layer2.0.bn2.weight") && said.contains("is it layer2.0.norm2.weight?"),
        "{said}"
    );
    let (_place, path) = renamed(str::to_owned);
    let said = refusal(&path, &["--classifier", "species"]);
    assert!(said.contains("no linear layer has that name; there is fc"), "{said}");
}

#[test]
fn what_may_act_on_the_logits_is_never_left_out() {
    let features = Checkpoint::load(&data("checkpoints/cifar_bn.pth.tar")).unwrap().tensors["fc.weight"].shape[1];
    let square: &[usize] = &[features, features];
    let narrow: &[usize] = &[5, features];
    let refused: [&[(&str, &[usize])]; 7] = [
        &[("proj.weight", square)],
        &[("neck.0.weight", square), ("neck.2.weight", square)],
        &[("heads.0.weight", &[6, 16]), ("heads.1.weight", &[6, 16])],
        &[("logit_adjustment", &[6])],
        &[("temperature", &[1])],
        &[("layer2.0.projection.0.weight", &[8, 4, 1, 1])],
        &[("ema_fc.weight", &[6, 16])],
    ];
    for others in refused {
        let (_place, path) = renamed_with(str::to_owned, others);
        let said = export(&path, &path.with_file_name("models").join("1"), &[]).unwrap_err();
        assert!(said.contains(others[0].0) && said.contains("--ignore"), "{said}");
        let ignore: Vec<&str> = others.iter().flat_map(|(name, _)| ["--ignore", name]).collect();
        let manifest = export(&path, &path.with_file_name("models").join("1"), &ignore).unwrap();
        assert!(manifest.fold.proof.assumed.iter().any(|what| what.contains("no part in the logits of")), "{others:?}");
    }
    // What gives neither features nor logits cannot come before or beside the classifier.
    let projection: &[(&str, &[usize])] =
        &[("head.0.weight", square), ("head.0.bias", &[16]), ("head.2.weight", narrow)];
    let (_place, path) = renamed_with(str::to_owned, projection);
    let manifest = export(&path, &path.with_file_name("models").join("1"), &[]).unwrap();
    let assumed = manifest.fold.proof.assumed.join("; ");
    assert!(assumed.contains("no part in the logits of head (3 tensors)"), "{assumed}");
    let (_place, path) = renamed_with(|name| name.replace("fc.", "head.4."), &projection[..2]);
    let said = export(&path, &path.with_file_name("models").join("1"), &["--classifier", "head.4"]).unwrap_err();
    assert!(said.contains("head.0.weight"), "{said}");
    let (_place, path) = renamed(str::to_owned);
    let said = export(&path, &path.with_file_name("models").join("1"), &["--ignore", "nothing"]).unwrap_err();
    assert!(said.contains("no tensor's name begins so"), "{said}");
}

#[test]
fn a_bundles_own_network_is_held_to_outputs_too() {
    let place = tempfile::tempdir().unwrap();
    let out = |name: &str| place.path().join(name).join("1");
    let entries = entries();
    let (file, npz) = &entries["cb_resnet10_cosine"];
    export(file, &out("first"), &["--input-size", "32"]).unwrap();
    let network = out("first").join("model.onnx");
    let npz = npz.as_ref().unwrap().to_str().unwrap();
    let manifest = export(&network, &out("again"), &["--expect", npz]).unwrap();
    let proof = manifest.fold.proof;
    assert!(proof.expected.unwrap().max_relative < 1e-4 && !proof.assumed.is_empty());
    let other = entries["kuangliu_resnet18"].1.clone().unwrap();
    let said = export(&network, &out("other"), &["--expect", other.to_str().unwrap()]).unwrap_err();
    assert!(said.contains("y has 10 classes; the network has 9"), "{said}");
    let said = export(&network, &out("other"), &["--weights", "x"]).unwrap_err();
    assert!(said.contains("--weights is for checkpoints"), "{said}");
}

#[test]
fn magnitudes_that_were_all_trained_are_asked_about() {
    let mut checkpoint = Checkpoint::load(&data("checkpoints/resnet50_nbn.pth.tar")).unwrap();
    let scale = checkpoint.tensors.get_mut("scale_factor").unwrap();
    *scale = Tensor { shape: vec![3], values: vec![3.0, 4.0, 5.0] };
    let build = |magnitude: Option<&str>| {
        use nbn::fold::architecture::{Extras, Overrides, build};
        let magnitude = magnitude.map(|text| text.parse().unwrap());
        build(&checkpoint, 64, Extras::default(), &Overrides { magnitude, ..Overrides::default() })
    };
    let refused = build(None).unwrap_err();
    assert!(
        matches!(refused, FoldError::Magnitudes { .. }) && refused.to_string().contains("--magnitude"),
        "{refused}"
    );
    assert_eq!(build(Some("expert")).unwrap().alphas.len(), 1);
    assert_eq!(build(Some("layer")).unwrap().alphas.len(), 3);
    // Of one stage, two were trained for nothing.
    assert!(build(Some("stage")).unwrap_err().to_string().contains("more than 1 were trained"));
}

#[test]
fn expected_outputs_that_are_none_are_refused_by_name() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let file = |name: &str, arrays: &[(&str, &[usize], Vec<f32>)]| {
        let bytes: Vec<(&str, Vec<usize>, Vec<u8>)> =
            arrays.iter().map(|(n, s, v)| (*n, s.to_vec(), v.iter().flat_map(|v| v.to_le_bytes()).collect())).collect();
        let views = bytes.iter().map(|(name, shape, bytes)| {
            (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
        });
        fs::write(at(name), safetensors::serialize(views, None).unwrap()).unwrap();
    };
    let x = |n: usize, side: usize| ("x", vec![n, 3, side, side], vec![0.5; n * 3 * side * side]);
    let y = |n: usize, k: usize, value: f32| ("y", vec![n, k], (0..n * k).map(|i| value * (i % 5) as f32).collect());
    let put = |name: &str, arrays: &[(&str, Vec<usize>, Vec<f32>)]| {
        let arrays: Vec<(&str, &[usize], Vec<f32>)> =
            arrays.iter().map(|(n, s, v)| (*n, s.as_slice(), v.clone())).collect();
        file(name, &arrays);
    };
    put("no_y", &[x(2, 32)]);
    put("flat", &[("x", vec![2, 3], vec![0.0; 6]), y(2, 6, 1.0)]);
    put("uneven", &[x(2, 32), y(3, 6, 1.0)]);
    put("nan", &[x(1, 32), y(1, 6, f32::NAN)]);
    put("probable", &[x(1, 32), ("y", vec![1, 6], vec![0.5, 0.5, 0.0, 0.0, 0.0, 0.0])]);
    put("classes", &[x(2, 32), y(2, 5, 1.0)]);
    put("other", &[x(2, 32), y(2, 6, 1.0)]);
    fs::write(at("words"), "these are words").unwrap();
    fs::write(at("empty"), "").unwrap();
    let network = data("checkpoints/cifar_bn.pth.tar");
    for (name, words) in [
        ("no_y", "no array \"y\" (there: x)"),
        ("flat", "expected [N, 3, height, width]"),
        ("uneven", "2 images and y 3 rows"),
        ("nan", "y holds NaN"),
        ("probable", "save the logits"),
        ("classes", "y has 5 classes; the network has 6"),
        ("other", "differs from the bundle's logits"),
        ("words", "numpy.savez"),
        ("empty", "numpy.savez"),
        ("absent", "absent"),
    ] {
        let path = at(name);
        let said = export(&network, &at("models").join("1"), &["--expect", path.to_str().unwrap()]).unwrap_err();
        assert!(said.contains(words), "{name}: {said}");
        assert!(!at("models").exists(), "{name}");
    }
    put("sized", &[x(2, 48), y(2, 6, 1.0)]);
    let path = at("sized");
    let said = export(&network, &at("models").join("1"), &["--expect", path.to_str().unwrap(), "--input-size", "32"]);
    assert!(said.unwrap_err().contains("inputs of [3, 48, 48]; the network takes [3, 32, 32]"));
}
