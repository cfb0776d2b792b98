use std::fs;
use std::path::{Path, PathBuf};

use nbn::bundle::{Bundle, Class, Head, KappaSource, Manifest, Rung, StaleCard, TrainingOverlap};
use nbn::calibrate::{CalibrateError, CalibrateOptions, Kappa, Problem, calibrate, temperature_alone, threshold};
use nbn::classify::{ScoreRequest, Scorer};
use nbn::data::LabelledLogits;
use nbn::metrics::Rows;
use nbn::registry::ServedModel;
use nbn::scores::{Calibrator, Logits, Prior, softmax_in_place};
use nbn::serve::RequestLimits;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::support::{
    SHIPPED, Server, data, fold, library, model_options, nbn, picture, repository, root, shipped, text,
};

/// Class scores drawn so that labels follow them, then doubled: a classifier that is too sure.
fn too_sure(counts: &[usize], seed: u64) -> LabelledLogits {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut normal = || (0..12).map(|_| random.f64()).sum::<f64>() - 6.0;
    let (mut values, mut labels) = (Vec::new(), Vec::new());
    for (label, count) in counts.iter().enumerate() {
        for _ in 0..*count {
            let row: Vec<f64> = (0..counts.len()).map(|k| normal() + if k == label { 2.0 } else { 0.0 }).collect();
            values.extend(row.iter().map(|z| (4.0 * z) as f32));
            labels.push(label as u32);
        }
    }
    LabelledLogits::try_new(counts.len(), values, labels).unwrap()
}

fn manifest(counts: &[u64]) -> Manifest {
    let mut manifest = shipped().manifest;
    manifest.classes =
        counts.iter().enumerate().map(|(k, n)| Class { label: format!("class {k}"), count: Some(*n) }).collect();
    manifest
}

fn options(kappa: Kappa) -> CalibrateOptions {
    CalibrateOptions {
        kappa: Some(kappa),
        rung: None,
        seed: 0,
        groups: None,
        training_overlap: TrainingOverlap::NotChecked,
        pixels: nbn::bundle::Pixels::Exact,
        command: "test".into(),
    }
}

fn rows(logits: &LabelledLogits, of: impl Fn(&Logits) -> Vec<f64>) -> Rows {
    let p = (0..logits.len()).flat_map(|row| of(&logits.logits(row).unwrap())).collect();
    Rows::new(logits.classes(), p, logits.labels().to_vec())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn figures_and_fits_agree_with_independent_implementations() {
    let logits = LabelledLogits::load(&data("calibration/logits.safetensors"), 10).unwrap();
    let expected: Value = serde_json::from_slice(&fs::read(data("calibration/expected.json")).unwrap()).unwrap();
    let close = |name: &str, found: f64, expected: &Value, tolerance: f64| {
        let expected = expected.as_f64().unwrap_or_else(|| panic!("{name} is missing"));
        assert!((found - expected).abs() <= tolerance, "{name}: {found}, expected {expected}");
    };
    let ones = vec![1.0; logits.len()];
    let softmax = |temperature: f64| {
        rows(&logits, |z| {
            let mut p: Vec<f64> = z.values().iter().map(|z| f64::from(*z) / temperature).collect();
            softmax_in_place(&mut p);
            p
        })
    };
    // At the fitted temperature the gaps have both signs, so that the bins themselves are tested.
    for (section, temperature) in
        [("softmax", 1.0), ("softmax_at_temperature", expected["temperature"].as_f64().unwrap())]
    {
        let (of, found) = (&expected[section], softmax(temperature));
        close("nll", mean(&found.nll), &of["nll"], 1e-6);
        close("brier", mean(&found.brier), &of["brier"], 1e-6);
        close("ece", found.ece(&found.top1, &ones), &of["ece"], 1e-6);
        close("ece", found.ece(&found.top1, &ones), &of["ece_uncertainty_calibration"], 1e-6);
        close("ece_equal_mass", found.ece_equal_mass(&found.top1, &ones), &of["ece_equal_mass"], 1e-6);
        for (k, found) in found.classwise_ece(logits.labels(), &ones).into_iter().enumerate() {
            close("classwise_ece", found, &of["classwise_ece"][k], 1e-6);
        }
    }
    let softmax = softmax(1.0);
    close("temperature", temperature_alone(&logits), &expected["temperature"], 1e-3);
    // No prior, no ridge: the rung is plain vector scaling.
    let zero = vec![0.0; 10];
    let problem = Problem {
        logits: &logits,
        rows: (0..logits.len() as u32).collect(),
        log_train: &zero,
        shift: &zero,
        kappa: Kappa::Fixed(0.0),
        ridge: 0.0,
        towards_uniform: 0.0,
    };
    let fit = problem.fit(Rung::StructuredVectorScaling, 0.0, None);
    let (a, c) = (fit.a(), fit.c(&zero));
    let nll = (0..logits.len()).map(|row| {
        let mut p: Vec<f64> = logits.row(row).iter().zip(&a).zip(&c).map(|((z, a), c)| a * f64::from(*z) + c).collect();
        let own = p[logits.labels()[row] as usize];
        softmax_in_place(&mut p) - own
    });
    let nll = nll.sum::<f64>() / logits.len() as f64;
    let theirs = expected["vector_scaling_nll"].as_f64().unwrap();
    assert!(nll <= theirs + 1e-4, "vector scaling: {nll}, theirs {theirs}");
    let mut scores: Vec<f64> =
        logits.labels().iter().enumerate().map(|(row, l)| 1.0 - softmax.row(row)[*l as usize]).collect();
    scores.sort_by(f64::total_cmp);
    let table = expected["conformal"].as_array().unwrap();
    assert!(table.len() >= 5);
    for level in table {
        let found = threshold(&scores, level["alpha"].as_f64().unwrap()).unwrap();
        let packages = level.as_object().unwrap().iter().filter(|(name, _)| *name != "alpha");
        for (package, theirs) in packages {
            close(package, found, theirs, 1e-6);
        }
    }
}

#[test]
fn the_checkpoints_loss_decides_how_much_prior_is_left() {
    let logits = too_sure(&[500, 100, 15, 2], 1);
    let fit = |kappa: Option<f64>, head: Head, asked: Option<Kappa>| {
        let mut manifest = manifest(&[2000, 400, 60, 8]);
        manifest.fold.kappa = kappa;
        manifest.fold.head = Some(head);
        let fitted =
            calibrate(&logits, &manifest, &CalibrateOptions { kappa: asked, ..options(Kappa::Learned) }, &|_| ())
                .unwrap();
        (fitted.kappa, fitted.kappa_source)
    };
    // The logits have no prior: the images move κ from what the loss implies towards 1.
    let (kappa, source) = fit(Some(0.5), Head::Linear, None);
    assert!((0.5..1.0).contains(&kappa) && source == KappaSource::Checkpoint, "{kappa}");
    assert_eq!(fit(Some(0.5), Head::Linear, Some(Kappa::Fixed(0.0))), (0.0, KappaSource::Given));
    let found = fit(None, Head::Linear, None);
    assert!(matches!(found.1, KappaSource::Chosen | KappaSource::Learned), "{found:?}");
    assert_eq!(fit(Some(0.5), Head::LrPlain, None), (kappa, source));
}

#[test]
fn calibration_improves_what_it_did_not_see_and_writes_down_how() {
    let manifest = manifest(&[2000, 400, 60, 8]);
    let fitted = calibrate(&too_sure(&[500, 100, 15, 2], 1), &manifest, &options(Kappa::Learned), &|_| ()).unwrap();
    fitted.check(&manifest).unwrap();
    assert_eq!(fitted.fit.images, 617);
    assert_eq!(fitted.classes.iter().map(|c| c.support).collect::<Vec<_>>(), [500, 100, 15, 2]);
    assert!((0.8..1.1).contains(&fitted.kappa), "the logits have no prior: κ is {}", fitted.kappa);
    // Scores are N(0, 1) + 2·[own class], so the likelihood ratio is 2·s and logits of 4·s want T = 2.
    assert!((1.6..2.4).contains(&fitted.temperature), "{}", fitted.temperature);
    assert!(fitted.trend.abs() < 0.2 && fitted.shrinkage >= 0.5, "{} {}", fitted.trend, fitted.shrinkage);
    let test = too_sure(&[300; 4], 2);
    let calibrator = Calibrator::of(&fitted);
    let offsets = calibrator.offsets(&Prior::Uniform);
    let before = rows(&test, |z| z.softmax().values().to_vec());
    let after = rows(&test, |z| calibrator.probabilities(z, &offsets).values().to_vec());
    assert!(mean(&after.nll) < mean(&before.nll) - 0.1);
    let ones = vec![1.0; test.len()];
    assert!(after.ece(&after.top1, &ones) < 0.5 * before.ece(&before.top1, &ones));
}

#[test]
fn few_images_hold_the_ladder_down_and_status_says_what_a_class_stands_on() {
    let manifest = manifest(&[2000, 400, 60, 8]);
    let rung = |counts: &[usize]| {
        calibrate(&too_sure(counts, 3), &manifest, &options(Kappa::Fixed(1.0)), &|_| ())
            .map(|c| (c.rung, c.fit.ladder.len()))
    };
    assert_eq!(rung(&[20, 5, 2, 1]).unwrap(), (Rung::PriorShift, 1));
    assert_eq!(rung(&[40, 20, 4, 0]).unwrap(), (Rung::StructuredVectorScaling, 4));
    let many: Vec<u64> = (0..40).map(|k| 400 - 10 * k).collect();
    let counts = [vec![2; 30], vec![0; 10]].concat();
    let found = calibrate(&too_sure(&counts, 4), &self::manifest(&many), &options(Kappa::Learned), &|_| ()).unwrap();
    // Two images a class say nothing of its own: it has what all share.
    assert!(found.classes[..30].iter().all(|class| class.status.name() == "pooled"));
    assert_eq!(found.classes[35].status.name(), "prior_only");
    let own = found.classes.iter().map(|class| class.a * found.temperature).map(|scale| (scale.ln() - 0.0).abs());
    assert!(own.fold(0.0, f64::max) < 0.35, "{:?}", found.classes);
    let error = calibrate(
        &too_sure(&counts[..10], 4),
        &self::manifest(&many[..10]),
        &CalibrateOptions { rung: Some(Rung::TemperatureBias), ..options(Kappa::Learned) },
        &|_| (),
    );
    assert!(matches!(error, Err(CalibrateError::Rung { .. })));
}

/// The shipped bundle's calibration of the first release, before a trend and a strength were written down.
#[test]
fn a_calibration_of_the_first_schema_answers_as_before() {
    // Of the bundle that was shipped then.
    let manifest = fs::read(data("calibration/first_manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
    let bound = nbn::bundle::BoundCalibration::load(&data("calibration/first_schema.json"), &manifest).unwrap();
    assert_eq!((bound.content.schema_version, bound.content.trend, bound.content.shrinkage), (1, 0.0, 0.0));
    assert_eq!(bound.id, "3182b04d49bd");
    let calibrator = Calibrator::of(&bound.content);
    let logits = too_sure(&[3; 10], 4);
    for row in 0..logits.len() {
        let z = logits.logits(row).unwrap();
        for (prior, shift) in [(Prior::Uniform, 1.0), (Prior::Train, 0.0)] {
            let mut expected: Vec<f64> = z
                .values()
                .iter()
                .zip(&bound.content.classes)
                .map(|(z, class)| class.a * f64::from(*z) + class.c - shift * class.train_prior.ln())
                .collect();
            softmax_in_place(&mut expected);
            let found = calibrator.probabilities(&z, &calibrator.offsets(&prior));
            for (found, expected) in found.values().iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-12, "{found} {expected}");
            }
        }
    }
}

#[test]
fn scores_stay_accurate_and_the_strength_is_written_down() {
    let manifest = manifest(&[4000, 2000, 900, 400, 200, 90, 40, 20]);
    let counts = [400, 200, 90, 40, 20, 9, 4, 2];
    let fitted = calibrate(&too_sure(&counts, 11), &manifest, &options(Kappa::Around(1.0)), &|_| ()).unwrap();
    assert_eq!(fitted.rung, Rung::StructuredVectorScaling);
    assert!([0.5, 1.0, 2.0, 4.0, 8.0].contains(&fitted.shrinkage), "{}", fitted.shrinkage);
    // The most frequent class says enough of itself, the rarest ones do not.
    let statuses: Vec<&str> = fitted.classes.iter().map(|class| class.status.name()).collect();
    assert_eq!((statuses[0], statuses[7]), ("fitted", "pooled"), "{statuses:?}");
    let test = too_sure(&[200; 8], 12);
    let calibrator = Calibrator::of(&fitted);
    let offsets = calibrator.offsets(&Prior::Uniform);
    let before = rows(&test, |z| z.softmax().values().to_vec());
    let after = rows(&test, |z| calibrator.probabilities(z, &offsets).values().to_vec());
    assert!(mean(&after.top1) > mean(&before.top1) - 0.02, "{} {}", mean(&after.top1), mean(&before.top1));
    assert!(mean(&after.nll) < mean(&before.nll) - 0.2);
    // Less may be asked for.
    let less = CalibrateOptions { rung: Some(Rung::Temperature), ..options(Kappa::Around(1.0)) };
    let less = calibrate(&too_sure(&counts, 11), &manifest, &less, &|_| ()).unwrap();
    let scales: Vec<f64> = less.classes.iter().map(|class| class.a * less.temperature).collect();
    assert!(less.trend == 0.0 && scales.iter().all(|scale| (scale - 1.0).abs() < 1e-9), "{scales:?}");
}

#[test]
fn a_request_with_a_prior_of_its_own_equals_a_fit_made_for_it() {
    let manifest = manifest(&[1000, 500, 200, 50]);
    let rare_first = [240, 600, 1600, 3600];
    let options = CalibrateOptions { rung: Some(Rung::Temperature), ..options(Kappa::Fixed(1.0)) };
    let fit = |counts: &[usize]| calibrate(&too_sure(counts, 5), &manifest, &options, &|_| ()).unwrap();
    // Fitted on the training mix and asked under the other, and fitted on images of that other mix.
    let [here, there] = [fit(&[3600, 1600, 600, 240]), fit(&rare_first)].map(|fitted| Calibrator::of(&fitted));
    let prior = Prior::custom(rare_first.iter().map(|n| *n as f64).collect(), &manifest.classes).unwrap();
    let test = too_sure(&[50; 4], 8);
    let mut largest: f64 = 0.0;
    for row in 0..test.len() {
        let z = test.logits(row).unwrap();
        let asked = here.probabilities(&z, &here.offsets(&prior));
        let refit = there.probabilities(&z, &there.offsets(&prior));
        largest = asked.values().iter().zip(refit.values()).map(|(a, b)| (a - b).abs()).fold(largest, f64::max);
        // Exactly: the training prior's answer, re-weighted.
        let train = here.probabilities(&z, &here.offsets(&Prior::Train));
        let moved =
            train.values().iter().zip(rare_first).zip(here.train_prior()).map(|((p, to), from)| p * to as f64 / from);
        let moved: Vec<f64> = moved.collect();
        let total: f64 = moved.iter().sum();
        for (asked, moved) in asked.values().iter().zip(&moved) {
            assert!((asked - moved / total).abs() < 1e-9);
        }
    }
    assert!(largest < 0.03, "{largest}");
}

#[test]
fn what_cannot_be_calibrated_is_refused_with_the_way_out() {
    let of = |counts: &[usize], manifest: &Manifest| {
        calibrate(&too_sure(counts, 6), manifest, &options(Kappa::Learned), &|_| ()).unwrap_err().to_string()
    };
    assert!(of(&[60, 0, 0], &manifest(&[9, 9, 9])).contains("\"class 0\""));
    assert!(of(&[60, 20, 10], &manifest(&[9, 0, 9])).contains("no training count above 0 for class \"class 1\""));
    let sure: Vec<f32> = (0..60).flat_map(|n| if n % 2 == 0 { [3.0, 0.0] } else { [0.0, 3.0] }).collect();
    let labels = (0..60).map(|n| n % 2).collect();
    let sure = LabelledLogits::try_new(2, sure, labels).unwrap();
    let options = CalibrateOptions { rung: Some(Rung::Temperature), ..options(Kappa::Fixed(0.0)) };
    let error = calibrate(&sure, &manifest(&[9, 9]), &options, &|_| ()).unwrap_err().to_string();
    assert!(error.contains("held out of training"), "{error}");
    assert!(LabelledLogits::try_new(2, vec![0.0, f32::NAN], vec![0]).unwrap_err().contains("class 1 in row 0 is NaN"));
    assert!(LabelledLogits::try_new(2, vec![0.0, 1.0], vec![2]).unwrap_err().contains("label 2"));
}

/// A copy of the shipped bundle without its calibration.
fn copied(folder: &Path) -> PathBuf {
    let bundle = folder.join("m/1");
    fs::create_dir_all(&bundle).unwrap();
    for file in ["model.onnx", "manifest.json"] {
        fs::copy(root().join(SHIPPED).join(file), bundle.join(file)).unwrap();
    }
    bundle
}

fn save(path: &Path, classes: usize, values: &[f32], labels: &[i64]) {
    let values: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let rows = labels.len();
    let labels: Vec<u8> = labels.iter().flat_map(|v| v.to_le_bytes()).collect();
    let tensors = [
        ("logits", TensorView::new(Dtype::F32, vec![rows, classes], &values).unwrap()),
        ("labels", TensorView::new(Dtype::I64, vec![rows], &labels).unwrap()),
    ];
    safetensors::serialize_to_file(tensors, None, path).unwrap();
}

#[test]
fn the_commands_refuse_what_does_not_fit_and_write_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = copied(folder.path());
    let at = |name: &str| folder.path().join(name);
    save(&at("nan.safetensors"), 10, &[f32::NAN; 20], &[0, 1]);
    save(&at("three.safetensors"), 3, &[0.0; 6], &[0, 1]);
    save(&at("label.safetensors"), 10, &[0.0; 20], &[0, 10]);
    save(&at("one.safetensors"), 10, &[0.5; 400], &[3; 40]);
    fs::write(at("words.safetensors"), "words").unwrap();
    let bundle_path = bundle.to_str().unwrap();
    for (file, words) in [
        ("nan.safetensors", "the logit of class 0 in row 0 is NaN"),
        ("three.safetensors", "has logits of 3 classes; the bundle has 10"),
        ("label.safetensors", "row 1 has label 10"),
        ("one.safetensors", "all 40 calibration images are of class \"cat\""),
        ("words.safetensors", "is not a safetensors file"),
    ] {
        let out = fold(&["calibrate", bundle_path, "--data", at(file).to_str().unwrap()]);
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out.stderr).contains(words), "{file}: {}", text(&out.stderr));
        assert!(!bundle.join("calibration.json").exists());
    }
    too_sure(&[40, 30, 20, 9, 8, 7, 6, 5, 4, 3], 7).save(&at("good.safetensors")).unwrap();
    let good = at("good.safetensors");
    let calibrate =
        |more: &[&str]| fold(&[&["calibrate", bundle_path, "--data", good.to_str().unwrap()], more].concat());
    assert!(calibrate(&["--dry-run"]).status.success() && !bundle.join("calibration.json").exists());
    assert!(calibrate(&[]).status.success());
    let again = calibrate(&[]);
    assert!(!again.status.success() && text(&again.stderr).contains("--force"));
    let inspected = fold(&["inspect", bundle_path]);
    assert!(text(&inspected.stdout).contains("<- chosen"), "{}", text(&inspected.stdout));
    let evaluate = |more: &[&str]| fold(&[&["evaluate", bundle_path, "--data", good.to_str().unwrap()], more].concat());
    let fine = evaluate(&["--alpha", "0.001", "--resamples", "20"]);
    assert!(text(&fine.stderr).contains("alpha is 0.001; the calibration images allow"), "{}", text(&fine.stderr));
    let report = at("report");
    let out = evaluate(&["--card", "--resamples", "20", "--report", report.to_str().unwrap()]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let page = fs::read_to_string(report.join("report.html")).unwrap();
    assert!(page.matches("<svg").count() >= 6 && !page.contains("http://127") && !page.contains("src="));
    assert!(Bundle::load(&bundle).unwrap().evaluation.is_some());
    // An evaluation of another calibration is stale; a calibration of another bundle is foreign.
    let card = fs::read(bundle.join("evaluation.json")).unwrap();
    let out = calibrate(&["--force", "--rung", "temperature"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let stderr = text(&out.stderr);
    assert!(stderr.contains("evaluation.json: it was measured with calibration"), "{stderr}");
    assert!(stderr.contains("until `nbn fold evaluate --card` has measured them again"), "{stderr}");
    assert_eq!(card, fs::read(bundle.join("evaluation.json")).unwrap(), "the stale card was touched");
    let stale = Bundle::load(&bundle).unwrap();
    assert!(
        stale.evaluation.is_none() && matches!(stale.stale_card, Some(StaleCard::Other { key: "calibration", .. }))
    );
    let warned = fold(&["inspect", bundle_path]);
    assert!(warned.status.success() && text(&warned.stderr).contains("stale model card"), "{}", text(&warned.stderr));
    assert!(evaluate(&["--card", "--resamples", "20"]).status.success());
    let anew = Bundle::load(&bundle).unwrap();
    assert!(anew.evaluation.is_some() && anew.stale_card.is_none());
    let elsewhere = at("elsewhere.json");
    let out = calibrate(&["--out", elsewhere.to_str().unwrap()]);
    assert!(out.status.success() && !text(&out.stderr).contains("evaluation.json"), "{}", text(&out.stderr));
    let mut manifest: Value = serde_json::from_slice(&fs::read(bundle.join("manifest.json")).unwrap()).unwrap();
    manifest["classes"][0]["count"] = json!(1);
    fs::write(bundle.join("manifest.json"), manifest.to_string()).unwrap();
    let out = nbn(&["serve", "--addr", "127.0.0.1:0", "--models", folder.path().to_str().unwrap()]);
    assert!(text(&out.stderr).contains("it belongs to another bundle"), "{}", text(&out.stderr));
}

#[test]
fn images_that_were_trained_on_are_refused_or_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = copied(folder.path());
    let mut records = Vec::new();
    for n in 0..60u8 {
        records.push(n % 10);
        records.extend((0..3072u32).map(|i| (i as u8).wrapping_mul(n).wrapping_add(n)));
    }
    let held_out = folder.path().join("held-out.bin");
    fs::write(&held_out, &records).unwrap();
    // One of them, as a PNG in a class folder.
    let training = folder.path().join("training");
    fs::create_dir_all(training.join("deer")).unwrap();
    let shared = 14;
    let planes = &records[shared * 3073 + 1..(shared + 1) * 3073];
    let image = image::RgbImage::from_fn(32, 32, |x, y| {
        let at = (y * 32 + x) as usize;
        image::Rgb([planes[at], planes[1024 + at], planes[2048 + at]])
    });
    image.save(training.join("deer/a.png")).unwrap();
    let run = |more: &[&str]| {
        let (bundle, held_out, training) =
            (bundle.to_str().unwrap(), held_out.to_str().unwrap(), training.to_str().unwrap());
        let words = ["calibrate", bundle, "--data", held_out, "--training-data", training, "--rung", "prior-shift"];
        fold(&[&words, more].concat())
    };
    let out = run(&[]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("held-out.bin record 14, which has the pixels of "), "{}", text(&out.stderr));
    let out = run(&["--drop-shared"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let written = Bundle::load(&bundle).unwrap().calibration.unwrap().content;
    assert_eq!((written.fit.images, written.fit.training_overlap), (59, TrainingOverlap::None));
}

async fn calibrated() -> Server {
    Server::shipped().await
}

#[tokio::test]
async fn a_calibrated_model_answers_under_the_prior_that_a_request_names() {
    let server = calibrated().await;
    let png = picture(32, 32, image::ImageFormat::Png);
    let ask = async |query: &str| {
        let answer = server.post(&format!("/v1/classify?top_k=10{query}"), "image/png", png.clone()).await;
        assert_eq!(answer.status, 200, "{}", text(&answer.body));
        answer.json()
    };
    let scores = |reply: &Value| -> Vec<f64> {
        let mut scores = vec![0.0; 10];
        for p in reply["results"][0]["predictions"].as_array().unwrap() {
            scores[p["class_id"].as_u64().unwrap() as usize] = p["score"].as_f64().unwrap();
        }
        assert!((scores.iter().sum::<f64>() - 1.0).abs() < 1e-6);
        scores
    };
    let uniform = ask("").await;
    assert_eq!((&uniform["scale"], &uniform["prior"]), (&json!("calibrated"), &json!("uniform")));
    assert_eq!(uniform["results"][0]["decision"], "accept");
    let train = ask("&prior=train").await;
    assert_eq!(train["prior"], "train");
    let counts: Vec<f64> = shipped().manifest.classes.iter().map(|c| c.count.unwrap() as f64).collect();
    let weighted: Vec<f64> = scores(&train).iter().zip(&counts).map(|(p, n)| p / n).collect();
    let total: f64 = weighted.iter().sum();
    for (u, w) in scores(&uniform).iter().zip(&weighted) {
        assert!((u - w / total).abs() < 1e-9);
    }
    let labels: Vec<String> = shipped().manifest.classes.iter().map(|c| c.label.clone()).collect();
    let map: Value =
        labels.iter().zip(&counts).map(|(l, n)| (l.clone(), json!(n))).collect::<serde_json::Map<_, _>>().into();
    let b64 = {
        use base64::Engine;
        base64::engine::general_purpose::STANDARD.encode(&png)
    };
    for prior in [json!("train"), json!(counts), map.clone()] {
        let body = json!({"images": [{"b64": b64}], "options": {"top_k": 10, "prior": prior}});
        let reply = server.post("/v1/classify", "application/json", body.to_string()).await.json();
        for (a, b) in scores(&reply).iter().zip(scores(&train)) {
            assert!((a - b).abs() < 1e-9);
        }
    }
    let mut zero = counts.clone();
    zero[3] = 0.0;
    let mut missing = map.clone();
    missing.as_object_mut().unwrap().remove("truck");
    for (prior, words) in [
        (json!(zero), "class \"cat\" is 0"),
        (json!(counts[..9]), "9 entries; the model has 10"),
        (missing, "no entry for class \"truck\""),
        (json!({"unicorn": 1.0}), "\"unicorn\""),
        (json!(["a"]), "prior must be uniform, train, a list of numbers"),
    ] {
        let body = json!({"images": [{"b64": b64}], "options": {"prior": prior}});
        let answer = server.post("/v1/classify", "application/json", body.to_string()).await;
        assert_eq!(answer.status, 400);
        assert!(answer.json()["detail"].as_str().unwrap().contains(words), "{}", text(&answer.body));
    }
}

#[tokio::test]
async fn sets_extras_and_abstention_come_on_request() {
    let server = calibrated().await;
    let png = picture(50, 40, image::ImageFormat::Png);
    let ask = async |query: &str| server.post(&format!("/v1/classify?{query}"), "image/png", png.clone()).await;
    let reply = ask("alpha=0.1&include=uncalibrated,support&top_k=10").await.json();
    let result = &reply["results"][0];
    let set = &result["set"];
    assert_eq!(
        (&set["alpha"], &set["method"], &set["rung"], &set["holds_for"]),
        (&json!(0.1), &json!("posterior"), &json!("shrunk"), &json!("uniform"))
    );
    assert!(!set["labels"].as_array().unwrap().is_empty() && set["rungs"].is_null());
    let softmax: f64 =
        result["predictions"].as_array().unwrap().iter().map(|p| p["uncalibrated"].as_f64().unwrap()).sum();
    assert!((softmax - 1.0).abs() < 1e-6);
    let truck = result["predictions"].as_array().unwrap().iter().find(|p| p["label"] == "truck").unwrap();
    assert_eq!(
        (&truck["support"], &truck["status"], &truck["training_images"]),
        (&json!(5), &json!("pooled"), &json!(45))
    );
    let pas = ask("alpha=0.1&set_score=pas").await.json()["results"][0]["set"].clone();
    assert_eq!((&pas["method"], &pas["rung"]), (&json!("pas"), &json!("marginal")));
    let wide = ask("alpha=0.02&set_rung=class&prior=train").await.json()["results"][0]["set"].clone();
    assert!(wide["labels"].as_array().unwrap().len() >= pas["labels"].as_array().unwrap().len());
    assert_eq!(wide["rungs"].as_array().unwrap().len(), wide["labels"].as_array().unwrap().len());
    assert_eq!(wide["holds_for"], "train");
    let shy = ask("min_score=1").await.json()["results"][0].clone();
    assert_eq!((&shy["decision"], &shy["predictions"]), (&json!("abstain"), &json!([])));
    assert!(shy["reason"].as_str().unwrap().contains("below min_score 1"));
    let tight = ask("alpha=0.02&set_score=pas&max_set_size=1").await.json()["results"][0].clone();
    assert!(tight["decision"] == "abstain" && tight["reason"].as_str().unwrap().contains("more than max_set_size 1"));
    for (query, words) in [
        ("alpha=0.0001", "the calibration images allow"),
        ("alpha=2", "it must lie between 0 and 1"),
        ("alpha=x", "a number from 0 to 1"),
        ("alpha=0.1&set_score=none", "posterior, pas or plain"),
        ("alpha=0.1&set_score=pas&set_rung=shrunk", "choose marginal, group or class, or set_score posterior"),
        ("alpha=0.1&set_score=posterior&set_rung=group", "leave set_rung out"),
        ("include=everything", "uncalibrated"),
    ] {
        let answer = ask(query).await;
        assert_eq!(answer.status, 400, "{query}");
        assert!(answer.json()["detail"].as_str().unwrap().contains(words), "{query}: {}", text(&answer.body));
    }
}

#[tokio::test]
async fn a_bundle_without_calibration_serves_the_softmax_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = Bundle::load(&copied(folder.path())).unwrap();
    let budget = std::sync::Arc::new(nbn::engine::Budget::new(2));
    let model = ServedModel::start(bundle, library(), &crate::support::model_options(), budget).unwrap();
    let server = Server::of(vec![model], RequestLimits::default()).await;
    let png = picture(32, 32, image::ImageFormat::Png);
    let reply = server.post("/v1/classify?top_k=10&include=logits", "image/png", png).await.json();
    assert_eq!(
        (&reply["scale"], &reply["prior"], &reply["calibration"]),
        (&json!("softmax"), &Value::Null, &Value::Null)
    );
    let result = &reply["results"][0];
    let logits: Vec<f64> = result["logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    let total: f64 = logits.iter().map(|z| z.exp()).sum();
    for prediction in result["predictions"].as_array().unwrap() {
        let class = prediction["class_id"].as_u64().unwrap() as usize;
        assert!((prediction["score"].as_f64().unwrap() - logits[class].exp() / total).abs() < 1e-6);
    }
    assert_eq!(server.get("/v1/models/m").await.json()["calibration"], Value::Null);
    let out =
        nbn(&["serve", "--addr", "127.0.0.1:0", "--require-calibration", "--models", folder.path().to_str().unwrap()]);
    assert!(
        text(&out.stderr).contains("m/1 is not calibrated and --require-calibration is set"),
        "{}",
        text(&out.stderr)
    );
}

#[test]
fn batch_rows_carry_sets_and_decisions() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.png"), picture(40, 30, image::ImageFormat::Png)).unwrap();
    let path = folder.path().to_str().unwrap();
    let score = |more: &[&str]| nbn(&[&["score", "--model", "models/cifar10-lt"], more, &[path]].concat());
    let out = score(&["--alpha", "0.1", "--prior", "train", "--max-set-size", "9"]);
    let row: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("{}", text(&out.stderr)));
    assert!(!row["set"].as_array().unwrap().is_empty());
    assert_eq!(row["decision"], "accept");
    let out = score(&["--alpha", "0.1", "--format", "csv", "--min-score", "1"]);
    let mut csv = csv::Reader::from_reader(&out.stdout[..]);
    assert_eq!(
        csv.headers().unwrap().iter().take(5).collect::<Vec<_>>(),
        ["path", "error", "decision", "reason", "set"]
    );
    let row = csv.records().next().unwrap().unwrap();
    assert_eq!(&row[2], "abstain");
    assert!(serde_json::from_str::<Vec<String>>(&row[4]).is_ok());
    let prior = folder.path().join("prior.json");
    fs::write(&prior, "[1,1,1]").unwrap();
    let out = score(&["--prior", prior.to_str().unwrap()]);
    assert!(text(&out.stderr).contains("3 entries"), "{}", text(&out.stderr));
    let out = score(&["--max-set-size", "3"]);
    assert_eq!(out.status.code(), Some(2));
}

#[tokio::test]
async fn a_stale_card_is_withheld_and_the_model_serves() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = repository(folder.path()).join("cifar10-lt/1");
    let card = async || {
        let opened = Bundle::open(&bundle).unwrap();
        let (stale, budget) = (opened.stale_card.clone(), std::sync::Arc::new(nbn::engine::Budget::new(2)));
        let model = ServedModel::start(opened, library(), &model_options(), budget).unwrap();
        let server = Server::of(vec![model], RequestLimits::default()).await;
        let card = server.get("/v1/models/cifar10-lt").await;
        assert_eq!(card.status, 200);
        (card.json()["evaluation"].clone(), stale)
    };
    assert!(matches!(card().await, (figures, None) if figures["data"] == "test.bin"));
    let fresh = fs::read_to_string(bundle.join("evaluation.json")).unwrap();
    let mut other: Value = serde_json::from_str(&fresh).unwrap();
    other["calibration"] = json!("0".repeat(5000));
    let mut foreign: Value = serde_json::from_str(&fresh).unwrap();
    foreign["model_sha256"] = json!(7);
    for (content, words) in [
        (other.to_string(), "it was measured with calibration 000"),
        (foreign.to_string(), "it was measured with model_sha256 7, this bundle's is b506"),
        ("[1, 2]".into(), "it was measured with model_sha256 none"),
        ("{\"model_sha256\"".into(), "it is not JSON"),
        (format!("{fresh}{}", " ".repeat(1 << 20)), "it is longer than 1048576 bytes"),
    ] {
        fs::write(bundle.join("evaluation.json"), content).unwrap();
        let (figures, stale) = card().await;
        let stale = stale.unwrap().to_string();
        assert!(stale.contains(words) && stale.len() < 300, "{stale}");
        assert_eq!(figures, Value::Null, "{words}");
    }
    fs::remove_file(bundle.join("evaluation.json")).unwrap();
    assert!(matches!(card().await, (Value::Null, None)));
}

#[test]
fn figures_that_no_evaluation_gives_are_withheld() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = repository(folder.path()).join("cifar10-lt/1");
    let fresh: Value = serde_json::from_slice(&fs::read(bundle.join("evaluation.json")).unwrap()).unwrap();
    let overall = "/figures/uniform/calibrated/overall";
    let stale = |change: &dyn Fn(&mut Value)| {
        let mut card = fresh.clone();
        change(&mut card);
        fs::write(bundle.join("evaluation.json"), card.to_string()).unwrap();
        let opened = Bundle::open(&bundle).unwrap();
        assert_eq!(opened.evaluation.is_none(), opened.stale_card.is_some());
        opened.stale_card.map(|stale| stale.to_string())
    };
    for (metric, values, limit) in [
        ("top1", [json!(-1), json!(2), json!(1e300), json!("good"), Value::Null], "0..=1"),
        ("ece", [json!(-0.1), json!(1.1), json!([0.5]), json!({}), json!("x".repeat(5000))], "0..=1"),
        ("brier", [json!(-0.1), json!(2.1), json!(1e300), json!(""), json!(true)], "0..=2"),
        ("nll", [json!(-0.1), json!(2e12), json!(-1e300), json!("low"), Value::Null], "0..=1e12"),
        ("pas_size", [json!(-1), json!(1u64 << 63), json!(1e300), json!("small"), Value::Null], "0..=1e12"),
    ] {
        for value in values {
            let said = stale(&|card| card.pointer_mut(overall).unwrap()[metric] = value.clone()).unwrap();
            let expected = format!("figures.uniform.calibrated.overall.{metric} is ");
            assert!(said.starts_with(&expected) && said.contains(&format!("it must lie in {limit}")), "{said}");
            assert!(said.len() < 300, "{said}");
        }
    }
    for (key, value, words) in [
        ("images", json!(-3), "images is -3; it must lie in 0..=1e12"),
        ("alpha", json!(1.5), "alpha is 1.5; it must lie in 0..=1"),
        ("data", json!(7), "data is 7; it must be text"),
        ("how", json!("x".repeat(1001)), "it must be text of at most 1000 characters"),
        ("more", json!(1), "the card has an unknown key \"more\""),
        ("figures", json!([1]), "figures is not an object"),
        ("figures", json!({"posterior": {}}), "figures has an unknown key \"posterior\""),
        ("figures", json!({"train": 0.5}), "figures.train is not an object"),
        ("figures", json!({"train": {"softmax": {"all": {}}}}), "figures.train.softmax has an unknown key \"all\""),
        ("figures", json!({"train": {"softmax": {"many": {"f1": 1}}}}), "softmax.many has an unknown key \"f1\""),
    ] {
        let said = stale(&|card| card[key] = value.clone()).unwrap();
        assert!(said.contains(words) && said.len() < 300, "{said}");
    }
    let said = stale(&|card| drop(card.as_object_mut().unwrap().remove("figures"))).unwrap();
    assert!(said.contains("the card has no figures"), "{said}");
    for (metric, value) in [("top1", json!(0)), ("top5", json!(1)), ("brier", json!(2)), ("nll", json!(708.4))] {
        assert_eq!(stale(&|card| card.pointer_mut(overall).unwrap()[metric] = value.clone()), None, "{metric}");
    }
}

#[test]
fn a_bundles_pipes_and_devices_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = repository(folder.path()).join("cifar10-lt/1");
    let logits = data("calibration/logits.safetensors");
    let pipe = |path: &Path| assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
    let device = |path: &Path| std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    for name in ["manifest.json", "calibration.json", "model.onnx", "evaluation.json"] {
        let (path, kept) = (bundle.join(name), folder.path().join("kept"));
        fs::rename(&path, &kept).unwrap();
        for make in [&pipe as &dyn Fn(&Path), &device] {
            make(&path);
            for given in [&bundle, bundle.parent().unwrap()] {
                let said = match Bundle::load(given) {
                    Ok(opened) => format!("{name}: {}", opened.stale_card.unwrap()),
                    Err(error) => error.to_string(),
                };
                assert!(said.contains(name) && said.contains("it is not a regular file"), "{name}: {said}");
            }
            fs::remove_file(&path).unwrap();
        }
        // Nor does a command write into them.
        pipe(&path);
        let (bundle, data) = (bundle.to_str().unwrap(), logits.to_str().unwrap());
        for command in
            [&["calibrate", bundle, "--data", data, "--force"], &["evaluate", bundle, "--data", data, "--card"]]
        {
            let reads = command[0] == "evaluate" || !["calibration.json", "evaluation.json"].contains(&name);
            if reads || name == "calibration.json" {
                let out = fold(command);
                let said = text(&out.stderr);
                assert!(!out.status.success() && said.contains(name), "{command:?}: {said}");
                assert!(said.contains("regular file") || said.contains("is not a calibration"), "{command:?}: {said}");
            }
        }
        fs::remove_file(&path).unwrap();
        // A link to a regular file is as good as the file.
        std::os::unix::fs::symlink(&kept, &path).unwrap();
        let opened = Bundle::load(Path::new(bundle)).unwrap();
        assert!(opened.calibration.is_some() && opened.evaluation.is_some(), "{name}");
        fs::remove_file(&path).unwrap();
        fs::rename(&kept, &path).unwrap();
    }
}

/// The paths below `folder` and what the files hold.
fn held(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut held = Vec::new();
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            held.extend(self::held(&path));
        } else {
            held.push((path.clone(), fs::read(&path).unwrap_or_default()));
        }
    }
    held.sort();
    held
}

#[test]
fn a_file_that_is_read_or_is_of_another_kind_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = repository(folder.path()).join("cifar10-lt/1");
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let of_bundle = |name: &str| bundle.join(name).to_str().unwrap().to_owned();
    fs::copy(data("calibration/logits.safetensors"), at("l.safetensors")).unwrap();
    save(Path::new(&at("mine.safetensors")), 10, &[0.0; 10], &[1]);
    let other = [("weights", TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap())];
    safetensors::serialize_to_file(other, None, Path::new(&at("other.safetensors"))).unwrap();
    for name in ["records.json", "report/report.json", "page/report.html", "notes.json"] {
        fs::create_dir_all(Path::new(&at(name)).parent().unwrap()).unwrap();
        fs::write(at(name), "{\"records\": [0], \"evaluation\": 1}").unwrap();
    }
    fs::copy(at("l.safetensors"), at("report/l.safetensors")).unwrap();
    std::os::unix::fs::symlink("gone", at("link")).unwrap();
    std::os::unix::fs::symlink("l.safetensors", at("same.safetensors")).unwrap();
    fs::create_dir(at("as-data")).unwrap();
    fs::copy(at("l.safetensors"), at("as-data/report.json")).unwrap();
    fs::remove_file(bundle.join("evaluation.json")).unwrap();
    let before = held(folder.path());
    let model = bundle.to_str().unwrap();
    let (set, calibrate, evaluate) = (at("l.safetensors"), "calibrate", "evaluate");
    let as_data = at("as-data/report.json");
    let cases: [(&str, &[&str], &[&str]); 17] = [
        (calibrate, &["--out", &set, "--force"], &["--out", "is the same file as --data"]),
        (calibrate, &["--out", &at("same.safetensors"), "--force"], &["--out", "is the same file as --data"]),
        (calibrate, &["--out", &of_bundle("manifest.json"), "--force"], &["is the same file as the bundle's file"]),
        (calibrate, &["--out", &of_bundle("model.onnx"), "--force"], &["is the same file as the bundle's file"]),
        (calibrate, &["--out", &of_bundle("evaluation.json")], &["is the same file as the bundle's file"]),
        (calibrate, &["--out", &at("notes.json"), "--force"], &["notes.json is not a calibration"]),
        (calibrate, &["--out", &at("report"), "--force"], &["report is not a calibration"]),
        (calibrate, &["--out", &at("link")], &["link is not a calibration"]),
        (evaluate, &["--logits", &set], &["--logits", "is the same file as --data"]),
        (evaluate, &["--logits", &of_bundle("manifest.json")], &["is the same file as the bundle's file"]),
        (evaluate, &["--logits", &of_bundle("calibration.json")], &["is the same file as the bundle's file"]),
        (evaluate, &["--logits", &at("other.safetensors")], &["other.safetensors is not a file of logits and labels"]),
        (evaluate, &["--logits", &at("notes.json")], &["notes.json is not a file of logits and labels"]),
        (evaluate, &["--logits", &at("link")], &["link is not a file of logits and labels"]),
        (evaluate, &["--report", &at("report")], &["report.json is not a report of `nbn fold evaluate`"]),
        (evaluate, &["--report", &at("page")], &["report.html is not a report of `nbn fold evaluate`"]),
        (evaluate, &["--report", &at("new"), "--logits", &at("page/report.html")], &["is not a file of logits"]),
    ];
    for (command, args, words) in cases {
        let out = fold(&[&[command, model, "--data", &set], args].concat());
        let said = text(&out.stderr);
        assert!(!out.status.success() && words.iter().all(|words| said.contains(words)), "{args:?}: {said}");
        assert!(said.contains("overwr") && said.contains("give another file"), "{args:?}: {said}");
        assert_eq!(held(folder.path()), before, "{args:?}");
    }
    let out = fold(&["evaluate", model, "--data", &as_data, "--data-format", "logits", "--report", &at("as-data")]);
    assert!(text(&out.stderr).contains("report.json is the same file as --data"), "{}", text(&out.stderr));
    assert_eq!(held(folder.path()), before);
    // Of its own kind it replaces what is there; also reports of a version that set no mark.
    let old = "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>a on b</title>\n\
               <meta name=\"viewport\" content=\"width=device-width\"><style>\n\
               body{font:15px/1.5 system-ui,sans-serif;color:#222226;background:#fff;max-width:1040px;margin:32px auto;\
               padding:0 20px}\nh1";
    fs::write(at("page/report.html"), old).unwrap();
    let logits = at("mine.safetensors");
    let last = ["--report", &at("page"), "--logits", &logits, "--resamples", "20", "--card"];
    for _ in 0..2 {
        let out = fold(&[&["evaluate", model, "--data", &set], &last[..]].concat());
        assert!(out.status.success(), "{}", text(&out.stderr));
        assert!(fs::read_to_string(at("page/report.html")).unwrap().contains("<meta name=\"generator\""));
    }
    assert!(LabelledLogits::load(Path::new(&logits), 10).unwrap().len() > 1);
    assert!(Bundle::load(&bundle).unwrap().evaluation.is_some());
    for _ in 0..2 {
        let more = ["--out", &at("elsewhere.json"), "--force", "--rung", "temperature"];
        let out = fold(&[&["calibrate", model, "--data", &set], &more[..]].concat());
        assert!(out.status.success(), "{}", text(&out.stderr));
    }
    // A damaged calibration of the bundle can be made anew.
    fs::write(bundle.join("calibration.json"), "{\"model").unwrap();
    let out = fold(&["calibrate", model, "--data", &set, "--force", "--rung", "temperature"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(Bundle::load(&bundle).unwrap().calibration.is_some());
}

/// The places of all numbers and texts in `value`; of a list those in its first and its last entry.
fn leaves(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| leaves(value, &format!("{at}/{key}"), found)),
        Value::Array(list) => {
            let ends = [0, list.len().saturating_sub(1)];
            ends[..list.len().min(2)].iter().for_each(|&n| leaves(&list[n], &format!("{at}/{n}"), found));
        }
        _ => found.push(at.to_owned()),
    }
}

/// What `bundle` makes of large and small logits is finite, in 0..=1, and sums to 1; and so are its pixels finite.
#[track_caller]
fn assert_scores(bundle: &Bundle, what: &str) {
    let scorer = Scorer::new(std::sync::Arc::new(bundle.manifest.clone()), bundle.calibration.clone());
    let classes = bundle.manifest.classes.len();
    let calibrated = bundle.calibration.is_some();
    for prior in [Some(Prior::Train), None] {
        let request = ScoreRequest { prior: prior.filter(|_| calibrated), ..ScoreRequest::default() };
        let with_set = ScoreRequest { alpha: calibrated.then_some(0.1), ..request.clone() };
        let rules = [request, with_set].map(|request| scorer.rule(request, &Prior::default()));
        for rule in rules.iter().flatten() {
            for spread in [0.0, 20.0, f32::MAX] {
                let z = (0..classes).map(|k| if k % 2 == 0 { spread } else { -spread }).collect();
                let scored = scorer.score(&Logits::try_new(z, classes).unwrap(), rule);
                let p = scored.probabilities.values();
                assert!(p.iter().all(|p| (0.0..=1.0).contains(p)), "{what}: {p:?}");
                assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{what}: {p:?}");
                assert!(scored.set.is_none_or(|set| !set.members.is_empty()), "{what}");
            }
        }
    }
    let preprocessing = &bundle.manifest.preprocessing;
    for (mean, std) in preprocessing.mean.iter().zip(&preprocessing.std) {
        assert!([0.0, 1.0].iter().all(|value| ((value - mean) / std).is_finite()), "{what}: {preprocessing:?}");
    }
}

#[test]
fn a_bundle_with_a_number_changed_is_refused_by_name_or_scores_soundly() {
    let changes = [json!(0), json!(-1), json!(1e308), json!(1e-308), json!(1u64 << 63), json!(""), Value::Null];
    let (mut loaded, mut refused) = (0, 0);
    for (file, alone) in
        [("manifest.json", false), ("manifest.json", true), ("calibration.json", false), ("evaluation.json", false)]
    {
        let folder = tempfile::tempdir().unwrap();
        let bundle = repository(folder.path()).join("cifar10-lt/1");
        if alone {
            fs::remove_file(bundle.join("calibration.json")).unwrap();
        }
        let original: Value = serde_json::from_slice(&fs::read(bundle.join(file)).unwrap()).unwrap();
        let mut places = Vec::new();
        leaves(&original, "", &mut places);
        assert!(places.len() > 30, "{file}: {} places", places.len());
        for (place, change) in places.iter().flat_map(|place| changes.iter().map(move |change| (place, change))) {
            let mut changed = original.clone();
            *changed.pointer_mut(place).unwrap() = change.clone();
            fs::write(bundle.join(file), changed.to_string()).unwrap();
            let what = format!("{file}{place} = {change}");
            match Bundle::open(&bundle) {
                Ok(opened) => {
                    loaded += 1;
                    let wrong = [json!(-1), json!(1e308), json!(1u64 << 63), Value::Null].contains(change);
                    assert!(file != "evaluation.json" || !wrong || opened.evaluation.is_none(), "{what}");
                    assert_scores(&opened, &what);
                }
                Err(error) => {
                    refused += 1;
                    let error = error.to_string();
                    assert_ne!(file, "evaluation.json", "{what}: {error}");
                    let named = place.split('/').any(|key| key.len() > 1 && error.contains(key))
                        || ["a", "c"].iter().any(|key| error.contains(&format!(": {key} of class \"")));
                    let other_bundle = error.contains("it belongs to another bundle");
                    assert!(named || other_bundle || error.contains(" at line "), "{what}: {error}");
                    assert!(error.contains(file) || other_bundle, "{what}: {error}");
                }
            }
        }
    }
    assert!(loaded > 100 && refused > 500, "{loaded} loaded, {refused} refused");
}

#[test]
fn numbers_that_would_make_scores_overflow_are_refused_with_the_range() {
    let bundle = shipped();
    let content = &bundle.calibration.as_ref().unwrap().content;
    let said = |change: fn(&mut nbn::bundle::Calibration)| {
        let mut changed = content.clone();
        change(&mut changed);
        changed.check(&bundle.manifest).unwrap_err().to_string()
    };
    content.check(&bundle.manifest).unwrap();
    for (error, words) in [
        (said(|c| c.classes[1].a = 1e300), "a of class \"automobile\" is 1000"),
        (said(|c| c.classes[1].a = f64::NAN), "a of class \"automobile\" is NaN; it must lie in 0.000001..=1000000"),
        (said(|c| c.classes[1].c = -1e300), "it must lie in -1000000..=1000000"),
        (said(|c| c.classes[9].train_prior = 1e-310), "train_prior of class \"truck\""),
        (said(|c| c.classes[9].train_prior = 0.5), "the sum of train_prior is 1.49"),
        (said(|c| c.classes.swap(0, 1)), "the label of class 0 is \"automobile\"; it must match the manifest"),
        (said(|c| c.temperature_alone = 0.0), "temperature_alone is 0;"),
        (said(|c| c.kappa = f64::INFINITY), "kappa is inf; it must lie in -1..=10"),
        (said(|c| c.kappa = -1.1), "kappa is -1.1; it must lie in -1..=10"),
        (said(|c| c.fit.ladder[0].nll = -0.1), "in fit.ladder is -0.1; it must lie in 0..=1e50"),
        (said(|c| c.fit.ladder[0].balanced_nll = -0.1), "balanced_nll of rung"),
        (said(|c| c.fit.ladder[0].standard_error = -0.1), "standard_error of rung"),
        (said(|c| c.fit.after.nll = -0.1), "fit.after.nll is -0.1"),
        (said(|c| c.fit.before.ece = -0.1), "fit.before.ece is -0.1; it must lie in 0..=1"),
        (said(|c| c.sets.alphas[0] = 1e-9), "levels must be ascending, at least 0.000001, and below 1"),
        (
            said(|c| c.sets.plain.marginal.uniform[15] = Some(0.5)),
            "a threshold in sets.plain is 0.5; it must lie in -1..=0",
        ),
        (said(|c| c.sets.pas.classes[0][15] = Some(f64::NEG_INFINITY)), "a threshold in sets.pas is -inf"),
        (said(|c| c.fit.before.ece = 2.0), "fit.before.ece is 2; it must lie in 0..=1"),
    ] {
        assert!(error.contains(words) && error.contains("run `nbn fold calibrate` again"), "{error}");
    }
    let mut free = bundle.manifest.clone();
    free.evaluation = Some(json!({"how": "x".repeat(10_000), "images": 1e15, "change": [-0.5, null, {"kept": true}]}));
    free.check().unwrap();
    let said = |change: fn(&mut Manifest)| {
        let mut changed = bundle.manifest.clone();
        change(&mut changed);
        changed.check().unwrap_err().to_string()
    };
    for (error, words) in [
        (said(|m| m.fold.experts = 0), "fold.experts is 0; it must lie in 1..=100"),
        (said(|m| m.fold.kappa = Some(-0.5)), "kappa is -0.5; it must lie in 0..=10"),
        (said(|m| m.fold.alphas[0].value = f64::INFINITY), "the value of magnitude 0 in fold.alphas is inf"),
        (said(|m| m.fold.proof.outputs[0].tolerance = f64::NAN), "tolerance of output \"logits\" in fold.proof is NaN"),
        (said(|m| m.classes[2].count = Some(u64::MAX)), "the count of class \"bird\" is 18446744073709551615"),
        (said(|m| m.classes[2].label = "é".repeat(1 << 20)), "it may have at most 1000 characters"),
        (said(|m| m.model.sha256 = "XYZ".into()), "model.sha256 is \"XYZ\"; it must have 64 digits"),
        (said(|m| m.preprocessing.std[1] = 1e-30), "every std in 0.000001..=1000000"),
        (said(|m| m.preprocessing.mean[1] = f32::NAN), "every mean must lie in -1000..=1000"),
        (
            said(|m| m.evaluation = Some(json!({"overall": [{"top1": 1e16}]}))),
            "the number \"top1\" in evaluation is 1e+16; it must lie in -1e15..=1e15",
        ),
        (said(|m| m.evaluation = Some(json!(-1e300))), "the number in evaluation is -1e+300"),
        (said(|m| m.evaluation = Some(json!({"how": "é".repeat(10_001)}))), "the text \"how\" in evaluation is \"éé"),
        (said(|m| m.evaluation = Some(json!({"x".repeat(10_001): 1}))), "a key in evaluation is \"xx"),
    ] {
        assert!(error.contains(words) && error.len() < 400, "{error}");
    }
}
