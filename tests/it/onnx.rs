//! Networks that come as ONNX: every form is folded and proved, gives the logits of its own program, and is served; what
//! cannot be served is refused by name. `tests/oracle/make_onnx.py` made the files.

use std::fs;
use std::path::{Path, PathBuf};

use nbn::bundle::{Bundle, Ending, Filter, Manifest, Reference, Resize, Scale};
use nbn::fold::onnx::Network;
use nbn::runtime::{Device, OnnxModel, Runner, SessionOptions};
use nbn::stop::Stop;
use ndarray::{Array4, Axis, concatenate};
use serde_json::Value;

use crate::support::{data, fold, library, nbn, picture, text};

fn file(name: &str) -> PathBuf {
    data(&format!("onnx/{name}.onnx"))
}

fn expected() -> serde_json::Map<String, Value> {
    serde_json::from_slice(&fs::read(data("onnx/expected.json")).unwrap()).unwrap()
}

fn input(seed: u64) -> Array4<f32> {
    let bytes = fs::read(data(&format!("onnx/picture_{seed}.f32"))).unwrap();
    let (values, _) = bytes.as_chunks::<4>();
    Array4::from_shape_vec((1, 3, 16, 16), values.iter().map(|&v| f32::from_le_bytes(v)).collect()).unwrap()
}

/// Exports a file into `folder` and gives the bundle's folder and manifest.
fn export(name: &str, folder: &Path, more: &[&str]) -> (PathBuf, Manifest) {
    let out = folder.join(name).join("1");
    let path = file(name);
    let done = fold(&[&["export", path.to_str().unwrap(), "--out", out.to_str().unwrap()], more].concat());
    assert!(done.status.success(), "{name}: {}", text(&done.stderr));
    let manifest = Bundle::load(&out).unwrap().manifest;
    (out, manifest)
}

fn logits(bundle: &Path, images: &Array4<f32>) -> Vec<f64> {
    let bytes = fs::read(bundle.join("model.onnx")).unwrap();
    let mut model = OnnxModel::open(library(), &bytes, SessionOptions { device: Device::Cpu, threads: 1 }).unwrap();
    let outputs = model.run(images.view(), &Stop::default()).unwrap();
    outputs.logits.iter().map(|&v| f64::from(v)).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn close(a: &[f64], b: &[f64], name: &str) {
    assert_eq!(a.len(), b.len(), "{name}");
    a.iter().zip(b).for_each(|(a, b)| assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{name}: {a} {b}"));
}

#[test]
fn every_form_of_a_normalised_norm_is_found_merged_and_proved() {
    let folder = tempfile::tempdir().unwrap();
    for (name, entry) in expected().iter().filter(|(name, _)| name.starts_with("nbn_")) {
        let (bundle, manifest) = export(name, folder.path(), &[]);
        let report = &manifest.fold;
        assert_eq!((report.normalized_layers.len(), report.alphas.len()), (1, 1), "{name}");
        assert_eq!(report.alphas[0].value, 2.5, "{name}");
        // bn4 stands behind a ReLU.
        assert_eq!((report.batch_norms_merged, report.batch_norms_left.len()), (4, 1), "{name}");
        assert_eq!(report.proof.reference, Reference::Original);
        assert!(manifest.has_output("features"), "{name}");
        let images = input(entry["seed"].as_u64().unwrap());
        close(&logits(&bundle, &images), &numbers(&entry["logits"]), name);
        // Two at a time, though the newer exporter wrote it for one.
        let both = concatenate(Axis(0), &[images.view(), images.view()]).unwrap();
        close(&logits(&bundle, &both), &[numbers(&entry["logits"]), numbers(&entry["logits"])].concat(), name);
    }
}

#[test]
fn endings_functions_and_fixed_batches_become_logits_of_any_batch() {
    let folder = tempfile::tempdir().unwrap();
    let expected = expected();
    let images = input(9);
    for (name, ending) in [
        ("softmax", Ending::Softmax),
        ("logsoftmax", Ending::LogSoftmax),
        ("channels_last", Ending::Softmax),
        ("function", Ending::Logits),
        ("taken_names", Ending::Logits),
        ("fixed_batch", Ending::Logits),
        ("one_by_one", Ending::Logits),
    ] {
        let (bundle, manifest) = export(name, folder.path(), &[]);
        let report = manifest.fold.onnx.as_ref().unwrap();
        assert_eq!((report.ending, report.output.as_str()), (ending, "y"), "{name}");
        assert_eq!(report.one_by_one, name == "one_by_one");
        assert_eq!(manifest.max_batch(), (name == "one_by_one").then_some(1));
        let mut found = logits(&bundle, &images);
        let total: f64 = found.iter().map(|v| v.exp()).sum();
        match ending {
            Ending::Logits => {}
            Ending::Softmax => found.iter_mut().for_each(|v| *v = v.exp() / total),
            Ending::LogSoftmax => found.iter_mut().for_each(|v| *v -= total.ln()),
        }
        close(&found, &numbers(&expected[name]["outputs"]), name);
        let both = concatenate(Axis(0), &[images.view(), images.view()]).unwrap();
        if name != "one_by_one" {
            assert_eq!(logits(&bundle, &both).len(), 8, "{name}");
        }
    }
}

#[test]
fn single_settings_of_the_preprocessing_can_be_given() {
    let folder = tempfile::tempdir().unwrap();
    let flags = "--preprocessing cifar --resize-to 20 --squash --filter bicubic --factor 1 --mean 1,2,3 --std 4,5,6";
    let (_, manifest) = export("channels_last", folder.path(), &flags.split(' ').collect::<Vec<_>>());
    let found = manifest.preprocessing;
    assert_eq!((found.resize, found.shorter_side, found.crop), (Resize::Both, 20, 16));
    assert_eq!((found.filter, found.scale), (Filter::Bicubic, Scale::Factor(1.0)));
    assert_eq!((found.mean, found.std), ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]));
    let out = folder.path().join("models/x/1");
    let wrong = fold(&["export", file("softmax").to_str().unwrap(), "--mean", "1,2", "--out", out.to_str().unwrap()]);
    assert!(text(&wrong.stderr).contains("expected three numbers separated by commas"), "{}", text(&wrong.stderr));
}

#[test]
fn what_no_pass_touches_is_written_back_as_it_came() {
    let bytes = bytes::Bytes::from(fs::read(file("softmax")).unwrap());
    let network = Network::of_bytes(&bytes, Path::new(".")).unwrap();
    assert_eq!(network.encode(), bytes);
    // A field of the model that these types do not know, as a later ONNX may bring.
    let mut later = bytes.to_vec();
    later.extend([0xd2, 0x0f, 3, b'n', b'e', b'w']);
    let network = Network::of_bytes(&later.clone().into(), Path::new(".")).unwrap();
    assert_eq!(network.encode(), later);
}

#[test]
fn what_cannot_be_served_is_refused_by_name_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let cut = folder.path().join("cut.onnx");
    let whole = fs::read(file("nbn_added_script")).unwrap();
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let empty = folder.path().join("empty.onnx");
    fs::write(&empty, "").unwrap();
    let bad = |name: &str| file(&format!("bad_{name}"));
    for (path, more, words) in [
        (cut, vec![], "cut off or damaged"),
        (empty, vec![], "it has no graph"),
        (bad("cycle"), vec![], "node \"g\" reads \"h\", which no node before it makes: the graph has a circle"),
        (bad("missing_external"), vec![], "weights.bin, which cannot be read: No such file"),
        (bad("external_outside"), vec![], "lies in \"../weights.bin\", outside of the network's folder"),
        (bad("custom_operator"), vec![], "is of operator \"Hash\" of \"mine\""),
        (bad("open_height"), vec![], "leaves the height or width open: give --input-size PIXELS"),
        (bad("two_inputs"), vec![], "it has 2 inputs (\"x\", \"x2\")"),
        (bad("integer_input"), vec![], "its input \"u\" is of uint8"),
        (bad("half_weights"), vec![], "its weight \"w16\" is float16"),
        (bad("no_rows"), vec![], "output \"p\" has the shape [1, 3, 1, 1] for one image"),
        (bad("sigmoid"), vec![], "ends in a sigmoid"),
        (bad("two_outputs"), vec![], "name the one with a score for each class by --logits NAME"),
        (bad("two_outputs"), vec!["--logits", "z"], "it has no output \"z\"; its outputs are \"y\", \"y2\""),
        (bad("hidden_softmax"), vec![], "ends in a softmax and then Flatten"),
        (bad("random"), vec![], "\"r\" is RandomNormalLike, which gives other values each time"),
        (bad("eight_at_a_time"), vec![], "it takes 8 pictures at a time, and not any other number"),
        (bad("blind"), vec![], "logits is the same for every image"),
        (bad("short_weight"), vec![], "its weight \"w\" has the shape [1099511627776, 3], but 48 bytes"),
        (file("softmax"), vec!["--arch", "resnet50"], "--arch is for checkpoints"),
        (bad("newer_ir"), vec![], "its ir_version is 99; this build reads 3 to 13"),
        (file("softmax"), vec!["--input-size", "32"], "has 16 pixels a side, --input-size asks for 32"),
    ] {
        let out = folder.path().join("models/bad/1");
        let done = fold(&[&["export", path.to_str().unwrap(), "--out", out.to_str().unwrap()], &more[..]].concat());
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{said}");
        assert!(said.contains(words) && said.trim_end().lines().count() == 1, "{}: {said}", path.display());
        assert!(!out.exists());
    }
    let classes = folder.path().join("three.csv");
    fs::write(&classes, "label\na\nb\nc\n").unwrap();
    let out = folder.path().join("models/bad/1");
    let (path, out) = (file("softmax"), out.to_str().unwrap());
    let done = fold(&["export", path.to_str().unwrap(), "--classes", classes.to_str().unwrap(), "--out", out]);
    assert!(text(&done.stderr).contains("names 3 classes; the network has 4"), "{}", text(&done.stderr));
    // What is open or ambiguous can be given.
    for (name, more) in [("bad_open_height", ["--input-size", "16"]), ("bad_two_outputs", ["--logits", "y"])] {
        export(name, folder.path(), &more);
    }
}

#[test]
fn a_network_from_elsewhere_is_calibrated_scored_and_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let classes = folder.path().join("classes.csv");
    fs::write(&classes, "label,count\nant,500\nbee,60\ncat,12\ndog,300\neel,40\n").unwrap();
    let (bundle, manifest) =
        export("nbn_clamped_script", folder.path(), &["--classes", classes.to_str().unwrap(), "--kappa", "1"]);
    assert_eq!((manifest.schema_version, manifest.fold.kappa), (2, Some(1.0)));
    let photos = folder.path().join("photos");
    for (k, label) in ["ant", "bee", "cat", "dog", "eel"].into_iter().enumerate() {
        fs::create_dir_all(photos.join(label)).unwrap();
        for n in 0..8 {
            let photo = picture(20 + k as u32, 17 + n, image::ImageFormat::Png);
            fs::write(photos.join(label).join(format!("{n}.png")), photo).unwrap();
        }
    }
    let (model, photos) = (bundle.to_str().unwrap(), photos.to_str().unwrap());
    let (_, manifest) = export("nbn_added_script", folder.path(), &["--images", photos]);
    assert_eq!((manifest.fold.proof.images, manifest.fold.proof.pictures), (12, 40));
    let done = fold(&["calibrate", model, "--data", photos, "--rung", "prior-shift"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let done = nbn(&["score", "--model", model, "--features", "--top-k", "1", photos]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let rows: Vec<Value> = text(&done.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 40);
    assert!(rows.iter().all(|row| row["features"].as_array().unwrap().len() == 4));
    let told = text(&fold(&["inspect", model]).stdout);
    for words in
        ["opset 17 by pytorch", "4 of 5 BatchNorm layers; 1 are normalised", "α[0]        2.500000", "left        /bn4"]
    {
        assert!(told.contains(words), "{words}: {told}");
    }
}
