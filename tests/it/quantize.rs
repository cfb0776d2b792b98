//! Networks of whole numbers: what they say beside the originals, the bounds, and what cannot be quantized.

use std::fs;
use std::path::{Path, PathBuf};

use image::{Rgb, RgbImage};
use nbn::bundle::{Bundle, Pixels, Quantization};
use nbn::data::{Form, LabelledImages, answers_of};
use nbn::runtime::Place;
use serde_json::Value;

use crate::familiarity::{copied_of, set};
use crate::support::{data, fold, library, nbn, root, text};

/// A bundle of the small network `name`.
fn bundle(folder: &Path, name: &str) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let classes = folder.join("classes.csv");
    fs::write(&classes, "label,count\na,500\nb,200\nc,90\nd,30\ne,9\n").unwrap();
    let out = folder.join("models").join(name).join("1");
    let network = data(&format!("quantize/{name}.onnx"));
    let done = fold(&[
        "export",
        network.to_str().unwrap(),
        "--classes",
        classes.to_str().unwrap(),
        "--preprocessing",
        "cifar",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    out
}

/// Pictures of waves in class folders: what `bundle` says is right, if it says one of `classes`.
fn labelled(folder: &Path, bundle: &Path, images: u64) -> PathBuf {
    let (loose, place) = (folder.join("loose"), folder.join("labelled"));
    fs::create_dir_all(&loose).unwrap();
    for n in 0..images {
        let mut random = fastrand::Rng::with_seed(n);
        let waves: [[f64; 4]; 3] = std::array::from_fn(|_| std::array::from_fn(|_| random.f64()));
        let image = RgbImage::from_fn(32, 32, |x, y| {
            Rgb(waves.map(|[a, b, phase, mean]| {
                let wave = (a * f64::from(x) + b * f64::from(y) + 6.0 * phase).sin();
                (255.0 * (0.6 * mean + 0.2 + 0.2 * wave)) as u8
            }))
        });
        image.save(loose.join(format!("{n}.png"))).unwrap();
    }
    let rows = folder.join("rows.jsonl");
    let (model, rows_path) = (bundle.to_str().unwrap(), rows.to_str().unwrap());
    let done = nbn(&["score", "--model", model, "--top-k", "1", "--output", rows_path, loose.to_str().unwrap()]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    for row in fs::read_to_string(&rows).unwrap().lines() {
        let row: Value = serde_json::from_str(row).unwrap();
        let label = row["predictions"][0]["label"].as_str().unwrap();
        let file = Path::new(row["path"].as_str().unwrap());
        fs::create_dir_all(place.join(label)).unwrap();
        fs::rename(file, place.join(label).join(file.file_name().unwrap())).unwrap();
    }
    place
}

fn quantize(bundle: &Path, data: &Path, out: &Path, flags: &[&str]) -> Result<Quantization, String> {
    let common =
        ["quantize", bundle.to_str().unwrap(), "--data", data.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let done = fold(&[&common, flags].concat());
    assert!(!text(&done.stderr).contains("panicked"), "{}", text(&done.stderr));
    match done.status.code() {
        Some(0) => Ok(Bundle::load(out).unwrap().manifest.fold.quantization.unwrap()),
        Some(1 | 2) => Err(text(&done.stderr)),
        code => panic!("{code:?}: {}", text(&done.stderr)),
    }
}

/// Largest difference of a logit, in standard deviations, and the share of images of which both say the same.
fn beside(first: &Path, second: &Path, images: &Path) -> (f64, f64) {
    let first = Bundle::load(first).unwrap();
    let labels: Vec<String> = first.manifest.classes.iter().map(|class| class.label.clone()).collect();
    let images = LabelledImages::open(images, Form::Folder, &labels).unwrap();
    let logits =
        |bundle: &Bundle| answers_of(bundle, library(), &Place::default(), &images, Pixels::Exact, &|| {}).unwrap();
    let (a, b) = (logits(&first), logits(&Bundle::load(second).unwrap()));
    assert!(a.features.is_some() == b.features.is_some());
    let top = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
    let rows = || (0..a.logits.len()).map(|n| (a.logits.row(n), b.logits.row(n)));
    let all: Vec<f64> = rows().flat_map(|(a, _)| a).map(|&v| f64::from(v)).collect();
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    let deviation = (all.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / all.len() as f64).sqrt();
    let largest = rows().flat_map(|(a, b)| a.iter().zip(b)).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    let agreed = rows().filter(|(a, b)| top(a) == top(b)).count();
    (largest / deviation, agreed as f64 / a.logits.len() as f64)
}

#[test]
fn the_first_shipped_network_in_whole_numbers_says_what_it_said() {
    let place = tempfile::tempdir().unwrap();
    // docs/quantization.md has its figures.
    let original = copied_of("models/cifar10-lt/1", place.path());
    let (held_out, training) = (set(&place.path().join("held-out"), 20, 1), set(&place.path().join("training"), 40, 2));
    let out = original.with_file_name("2");
    let flags = ["--training-data", training.to_str().unwrap(), "--unproved"];
    let record = quantize(&original, &held_out, &out, &flags).unwrap();
    assert_eq!((record.weight_bits, record.images, record.layers, record.float_layers.len()), (7, 60, 20, 0));
    assert_eq!(
        (record.from.as_str(), record.certificate.images, record.certificate.fitted_to_them),
        ("own/1", 60, true)
    );
    assert_eq!(record.certificate.scorer, "calibrated");
    assert!(record.certificate.slices[0].differences.contains_key("posterior_size"), "{record:?}");
    let (first, second) = (original.join("model.onnx"), out.join("model.onnx"));
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    assert!(size(&second) * 3 < size(&first), "{} {}", size(&first), size(&second));
    let bundle = Bundle::load(&out).unwrap();
    assert_eq!(bundle.manifest.precision(), "int8");
    assert!(bundle.calibration.unwrap().familiarity.is_some() && bundle.stale_card.is_none());
    let (_, agreed) = beside(&original, &out, &held_out);
    assert!(agreed > 0.9, "{agreed}");
    // The same again, and the network is the same.
    let again = original.with_file_name("3");
    quantize(&original, &held_out, &again, &flags).unwrap();
    assert_eq!(fs::read(&second).unwrap(), fs::read(again.join("model.onnx")).unwrap());
    let compared = fold(&[
        "evaluate",
        out.to_str().unwrap(),
        "--data",
        held_out.to_str().unwrap(),
        "--against",
        original.to_str().unwrap(),
    ]);
    assert!(text(&compared.stdout).contains("own/2 minus own/1"), "{}", text(&compared.stderr));
    let shown = text(&fold(&["inspect", out.to_str().unwrap()]).stdout);
    assert!(shown.contains("int8") && shown.contains("certificate"), "{shown}");
    let twice = quantize(&out, &held_out, &original.with_file_name("4"), &[]).unwrap_err();
    assert!(twice.contains("is quantized already, from own/1"), "{twice}");
    // Calibrated anew, the certificate says no more than what does not depend on that.
    let figures = |bundle: &Bundle| bundle.manifest.fold.quantization.clone().unwrap().certificate;
    let softmax = figures(&Bundle::load(&out).unwrap()).softmax;
    let anew = fold(&[
        "calibrate",
        out.to_str().unwrap(),
        "--data",
        held_out.to_str().unwrap(),
        "--rung",
        "temperature",
        "--force",
    ]);
    assert!(text(&anew.stderr).contains("stale       the certificate"), "{}", text(&anew.stderr));
    let left = figures(&Bundle::load(&out).unwrap());
    assert_eq!((left.scorer.as_str(), left.slices, left.fitted_to_them), ("softmax", softmax, false));
}

#[test]
fn every_operator_that_goes_with_whole_numbers_keeps_its_meaning() {
    let place = tempfile::tempdir().unwrap();
    for name in ["plain", "mixed", "padded", "conv_head"] {
        let folder = place.path().join(name);
        let original = bundle(&folder, name);
        let images = labelled(&folder, &original, 120);
        let out = original.with_file_name("2");
        let record = quantize(&original, &images, &out, &["--max-top1-loss", "20", "--max-nll-rise", "0.1"]).unwrap();
        // What gives the logits itself stays in floats.
        let kept: Vec<&str> = record.float_layers.iter().map(|layer| layer.reason.as_str()).collect();
        let expected: &[&str] = if name == "conv_head" { &["it gives the logits"] } else { &[] };
        assert!(record.proved && kept == expected, "{name}: {record:?}");
        let (largest, agreed) = beside(&original, &out, &images);
        assert!(largest < 0.3 && agreed > 0.94, "{name}: {largest} {agreed}");
        // No calibration, and nothing that says otherwise.
        assert!(Bundle::load(&out).unwrap().calibration.is_none());
        assert_eq!(record.certificate.scorer, "softmax");
    }
}

#[test]
fn a_network_of_experts_keeps_its_outputs() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("models/ride/1");
    let file = data("checkpoints/ride_nbn.pth.tar");
    let (file, to) = (file.to_str().unwrap(), out.to_str().unwrap());
    let done = fold(&["export", file, "--input-size", "64", "--expert-logits", "--out", to]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let images = labelled(place.path(), &out, 40);
    quantize(&out, &images, &out.with_file_name("2"), &["--unproved"]).unwrap();
    let (_, agreed) = beside(&out, &out.with_file_name("2"), &images);
    assert!(agreed > 0.8, "{agreed}");
    let again = out.with_file_name("2").join("model.onnx");
    let refused =
        fold(&["export", again.to_str().unwrap(), "--out", place.path().join("models/ride/3").to_str().unwrap()]);
    assert!(text(&refused.stderr).contains("is the network of a quantized bundle"), "{}", text(&refused.stderr));
    let inside = quantize(&out, &images, &out.join("4"), &[]).unwrap_err();
    assert!(inside.contains("lies within the bundle"), "{inside}");
}

#[test]
fn few_images_prove_little() {
    let place = tempfile::tempdir().unwrap();
    let original = bundle(place.path(), "plain");
    let images = labelled(place.path(), &original, 30);
    let refused = quantize(&original, &images, &original.with_file_name("2"), &["--max-nll-rise", "9"]).unwrap_err();
    assert!(refused.contains("on 30 images, which may stand for a loss of"), "{refused}");
    let refused = quantize(&original, &images, &original.with_file_name("2"), &["--max-top1-loss", "nan"]);
    assert!(format!("{refused:?}").contains("expected a number"), "{refused:?}");
}

#[test]
fn a_network_that_loses_too_much_is_refused_and_the_layers_are_named() {
    let place = tempfile::tempdir().unwrap();
    let original = bundle(place.path(), "rescaled");
    let images = labelled(place.path(), &original, 120);
    let out = original.with_file_name("2");
    let refused = quantize(&original, &images, &out, &[]).unwrap_err();
    assert!(refused.contains("top-1 changes by") && refused.contains("nothing was written"), "{refused}");
    assert!(!out.exists());
    let named: Vec<&str> =
        refused.lines().filter_map(|line| line.trim().split_once(" moves the logits")).map(|l| l.0).collect();
    assert!(named[..2].iter().all(|name| name.contains("second") || name.contains("third")), "{refused}");
    for (n, name) in named[..2].iter().enumerate() {
        let out = original.with_file_name((n + 3).to_string());
        let record = quantize(&original, &images, &out, &["--keep-float", name, "--max-top1-loss", "10"]).unwrap();
        assert!(record.proved && record.float_layers.iter().any(|layer| layer.name == **name), "{record:?}");
        let (largest, _) = beside(&original, &out, &images);
        assert!(largest < 0.3, "{name}: {largest}");
    }
    let record = quantize(&original, &images, &out, &["--unproved"]).unwrap();
    assert!(!record.proved);
    let shown = text(&fold(&["inspect", out.to_str().unwrap()]).stdout);
    assert!(shown.contains("unproved"), "{shown}");
}

#[test]
fn what_cannot_be_quantized_is_refused_by_name() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let plain = bundle(place.path(), "plain");
    let images = labelled(place.path(), &plain, 12);
    let out = plain.with_file_name("2");
    let refusal = |bundle: &Path, data: &Path, flags: &[&str]| {
        let refused = quantize(bundle, data, &out, flags).unwrap_err();
        assert!(!out.exists(), "{refused}");
        refused
    };
    let said = refusal(&plain, &images, &["--images", "1"]);
    assert!(said.contains("gives 1 picture to take ranges from"), "{said}");
    let said = refusal(&plain, &images, &["--keep-float", "nobody"]);
    assert!(said.contains("no layer with weights named \"nobody\""), "{said}");
    fs::create_dir_all(at("none")).unwrap();
    refusal(&plain, &at("none"), &[]);
    fs::create_dir_all(at("other/zebra")).unwrap();
    fs::copy(root().join("examples/pictures/ship.jpg"), at("other/zebra/1.jpg")).unwrap();
    let said = refusal(&plain, &at("other"), &[]);
    assert!(said.contains("zebra"), "{said}");
    let said = refusal(&bundle(&at("old"), "old_opset"), &images, &[]);
    assert!(said.contains("opset 11; whole numbers need 13"), "{said}");
    // Values that are always 0 have steps, too; that nothing depends on the picture is told.
    let constant = at("constant/models/constant/1");
    let made = fold(&["export", data("quantize/constant.onnx").to_str().unwrap(), "--out", constant.to_str().unwrap()]);
    assert!(text(&made.stderr).contains("is the same for every image"), "{}", text(&made.stderr));
    let logits = at("logits.safetensors");
    let done = fold(&[
        "evaluate",
        plain.to_str().unwrap(),
        "--data",
        images.to_str().unwrap(),
        "--logits",
        logits.to_str().unwrap(),
    ]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let said = refusal(&plain, &logits, &[]);
    assert!(said.contains("ranges of values need images"), "{said}");
    let said = quantize(&plain, &images, &plain.with_file_name("two"), &[]).unwrap_err();
    assert!(said.contains("a decimal number"), "{said}");
    let said = quantize(&plain, &images, &plain, &["--force"]).unwrap_err();
    assert!(said.contains("which --force would replace"), "{said}");
}
