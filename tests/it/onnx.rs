//! Networks that come as ONNX: every form is folded and proved, gives the logits of its own program, and is served; what
//! cannot be served is refused by name. `tests/oracle/make_onnx.py` made the files.

use std::fs;
use std::path::{Path, PathBuf};

use nbn::bundle::{Bundle, Color, Ending, Filter, Layout, Manifest, Reference, Resize, Scale, Size};
use nbn::fold::onnx::Network;
use nbn::runtime::{OnnxModel, Runner, SessionOptions};
use nbn::serve::ServeOptions;
use nbn::stop::Stop;
use ndarray::{Array4, Axis, concatenate};
use serde_json::Value;

use crate::support::{Server, data, fold, library, nbn, picture, text};

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
    let mut model = OnnxModel::open(library(), &bytes, SessionOptions::default()).unwrap();
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
        let [a, b, c] = manifest.preprocessing.shape();
        assert_eq!([a, b, c], if name == "channels_last" { [16, 16, 3] } else { [3, 16, 16] }, "{name}");
        let images = match manifest.preprocessing.layout {
            Layout::Nchw => images.clone(),
            Layout::Nhwc => images.clone().permuted_axes([0, 2, 3, 1]).as_standard_layout().into_owned(),
        };
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
fn values_within_can_be_served_and_features_are_what_one_classifier_sees() {
    let folder = tempfile::tempdir().unwrap();
    let (_, manifest) = export("bad_written_softmax", folder.path(), &["--logits", "z"]);
    assert_eq!((manifest.fold.onnx.unwrap().output.as_str(), manifest.fold.proof.outputs.len()), ("z", 2));
    let (_, manifest) = export("two_heads", folder.path(), &[]);
    assert!(!manifest.has_output("features"));
    // Under another name, too.
    let other = folder.path().join("network.pth");
    fs::copy(file("two_heads"), &other).unwrap();
    let out = folder.path().join("other/1");
    let done = fold(&["export", other.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert!(done.status.success(), "{}", text(&done.stderr));
}

#[test]
fn single_settings_of_the_preprocessing_can_be_given() {
    let folder = tempfile::tempdir().unwrap();
    let settings = |flags: &str| {
        let more = [&["--force"][..], &flags.split(' ').collect::<Vec<_>>()].concat();
        export("channels_last", folder.path(), &more).1.preprocessing
    };
    let found = settings(
        "--preprocessing cifar --resize-to 20 --resize both --filter bicubic --factor 1 --mean 1,2,3 --std 4,5,6",
    );
    assert_eq!((found.resize, found.crop), (Resize::Both(Size::square(20)), Size::square(16)));
    assert_eq!((found.filter, found.scale, found.layout), (Filter::Bicubic, Scale::Factor(1.0), Layout::Nhwc));
    assert_eq!((found.mean, found.std), (vec![1.0, 2.0, 3.0], vec![4.0, 5.0, 6.0]));
    let found =
        settings("--color bgr --divisor 127.5 --crop-fraction 0.8 --resize fit --fill 1,2,3 --crop-offset floor");
    assert_eq!((found.color, found.scale), (Color::Bgr, Scale::Divisor(127.5)));
    assert_eq!((found.resize, found.fill), (Resize::Fit(Size::square(20)), [1, 2, 3]));
    assert_eq!(settings("--resize none").resize, Resize::None);
    assert_eq!(settings("--resize cover --resize-to 18x20").resize, Resize::Cover(Size { height: 18, width: 20 }));
    // What is to fit is not cut; BGR turns the numbers of a source around.
    assert_eq!(settings("--resize fit").resize, Resize::Fit(Size::square(16)));
    assert_eq!(settings("--preprocessing imagenet --color bgr").mean, [0.406, 0.456, 0.485]);
    assert_eq!(settings("--color bgr --mean 1,2,3").mean, [1.0, 2.0, 3.0]);
    for (flags, words) in [
        ("--resize none --resize-to 18", "--resize none leaves pictures as they are"),
        ("--resize-to 18x20", "only the shorter side is resized, which takes one number, but there are two, 18×20"),
        ("--resize-to 12", "the preprocessing has \"shorter side to 12\" and crop 16"),
        ("--color grey", "has 3 channels, the preprocessing is grey"),
        ("--mean 1", "RGB has 3 channels, but mean [1.0] and std"),
        ("--input-size 20", "has 16 pixels, --input-size asks for 20"),
        ("--input-size 4x20", "a network's input has 8 pixels a side or more"),
        ("--crop-fraction 2", "expected a number from 0.01 to 1"),
        ("--fill 1,2,256", "expected three whole numbers from 0 to 255"),
        ("--resize-to 20 --crop-fraction 0.9", "cannot be used with"),
    ] {
        let out = folder.path().join("models/x/1");
        let more: Vec<&str> = flags.split(' ').collect();
        let path = file("channels_last");
        let done = fold(&[&["export", path.to_str().unwrap(), "--out", out.to_str().unwrap()], &more[..]].concat());
        assert!(!done.status.success() && !out.exists(), "{flags}");
        assert!(text(&done.stderr).contains(words), "{flags}: {}", text(&done.stderr));
    }
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
        (bad("two_outputs"), vec!["--logits", "z"], "it has no value \"z\"; its outputs are \"y\", \"y2\""),
        (bad("hidden_softmax"), vec![], "ends in a softmax and then Flatten"),
        (bad("random"), vec![], "\"r\" is RandomNormalLike, which gives other values each time"),
        (bad("eight_at_a_time"), vec![], "it takes 8 pictures at a time, and not any other number"),
        (bad("blind"), vec![], "logits is the same for every image"),
        (bad("short_weight"), vec![], "its weight \"w\" has the shape [1099511627776, 3], but 48 bytes"),
        (bad("written_softmax"), vec![], "are probabilities, of each image between 0 and 1 and 1 in sum"),
        (bad("training_norm"), vec![], "node \"norm\" is a BatchNormalization in training mode"),
        (bad("training_dropout"), vec![], "node \"drop\" is a Dropout in training mode"),
        (file("softmax"), vec!["--arch", "resnet50"], "--arch is for checkpoints"),
        (bad("newer_ir"), vec![], "its ir_version is 99; this build reads 3 to 13"),
        (file("softmax"), vec!["--input-size", "32"], "has 16 pixels, --input-size asks for 32"),
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
    let told = text(&fold(&["inspect", file("nbn_clamped_script").to_str().unwrap()]).stdout);
    for words in ["opset 17 by pytorch", "merges      4 of 5 BatchNorm layers; 1 are normalised", "α 2.500000"] {
        assert!(told.contains(words), "{words}: {told}");
    }
    let told = text(&fold(&["inspect", model]).stdout);
    for words in
        ["opset 17 by pytorch", "4 of 5 BatchNorm layers; 1 are normalised", "α[0]        2.500000", "left        /bn4"]
    {
        assert!(told.contains(words), "{words}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grey_network_that_is_wider_than_high_with_its_channel_last_is_served_so() {
    let folder = tempfile::tempdir().unwrap();
    let flags = "--mean 0.45 --std 0.225 --resize both --resize-to 12x20";
    let (bundle, manifest) = export("grey_wide", folder.path(), &flags.split(' ').collect::<Vec<_>>());
    assert_eq!((manifest.preprocessing.color, manifest.preprocessing.shape()), (Color::Grey, [12, 20, 1]));
    let photo = data("pixels/photo.jpg");
    let done = nbn(&["score", "--model", bundle.to_str().unwrap(), "--logits", photo.to_str().unwrap()]);
    let row: Value = serde_json::from_slice(&done.stdout).unwrap();
    let expected = numbers(&expected()["grey_wide"]["outputs"]);
    close(&numbers(&row["logits"]), &expected, "grey_wide");

    let server = Server::over(folder.path(), ServeOptions::default()).await;
    let described = server.get("/v2/models/grey_wide").await.json();
    assert_eq!(described["inputs"][0]["shape"], serde_json::json!([-1, 12, 20, 1]));
    let ask = async |shape: [usize; 4]| {
        let body = serde_json::json!({
            "inputs": [{"name": "images", "datatype": "FP32", "shape": shape, "data": vec![0.5; 240]}],
            "outputs": [{"name": "logits"}],
        });
        server.post("/v2/models/grey_wide/infer", "application/json", body.to_string()).await
    };
    let answer = ask([1, 12, 20, 1]).await;
    assert_eq!(answer.status, 200, "{}", text(&answer.body));
    assert_eq!(answer.json()["outputs"][0]["shape"], serde_json::json!([1, 4]));
    let refused = text(&ask([1, 1, 12, 20]).await.body);
    assert!(refused.contains("[1, 1, 12, 20]; expected [N, 12, 20, 1] with N from 1"), "{refused}");
    let native = server.post("/v1/models/grey_wide/classify", "image/jpeg", fs::read(&photo).unwrap()).await;
    assert_eq!(native.status, 200, "{}", text(&native.body));
}
