//! Pictures unlike the training pictures: what is learned of them, what is told, and what cannot be used.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbn::bundle::{Bundle, CALIBRATION_FILE, FAMILIARITY_FILE, Familiarity, Question};
use nbn::engine::Budget;
use nbn::registry::{Registry, ServedModel};
use nbn::serve::ServeOptions;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::support::{SHIPPED, Server, fold, library, model_options, nbn, picture, root, shipped, text};

/// Noise: a picture of nothing, which the network is sure of.
fn noise(seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let image = image::RgbImage::from_fn(32, 32, |_, _| image::Rgb([random.u8(..), random.u8(..), random.u8(..)]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

pub(crate) fn copied(folder: &Path) -> PathBuf {
    copied_of(SHIPPED, folder)
}

pub(crate) fn copied_of(version: &str, folder: &Path) -> PathBuf {
    let bundle = folder.join("models/own/1");
    fs::create_dir_all(&bundle).unwrap();
    for file in fs::read_dir(root().join(version)).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), bundle.join(file.file_name())).unwrap();
    }
    bundle
}

/// Class folders of pictures of plain hues with some texture, which the shipped network has never seen; no two sets share one.
pub(crate) fn set(folder: &Path, images: usize, seed: u64) -> PathBuf {
    let mut random = fastrand::Rng::with_seed(seed);
    for class in ["airplane", "cat", "ship"] {
        let of_class = folder.join(class);
        fs::create_dir_all(&of_class).unwrap();
        for n in 0..images {
            let tint = [class.len() as u8 * 20, 90, 160];
            let image = image::RgbImage::from_fn(32, 32, |x, y| {
                image::Rgb(tint.map(|base| base + ((x * y) % 23) as u8 + random.u8(0..40)))
            });
            image.save(of_class.join(format!("{n}.png"))).unwrap();
        }
    }
    folder.to_owned()
}

#[tokio::test]
async fn noise_is_withheld_in_every_interface() {
    let server = Server::shipped().await;
    let ask = async |query: &str, body: Vec<u8>| {
        let answer = server.post(&format!("/v1/classify{query}"), "image/png", body).await;
        assert_eq!(answer.status, 200, "{}", text(&answer.body));
        answer.json()["results"][0].clone()
    };
    // Nobody asks, nothing is told.
    let plain = ask("", noise(1)).await;
    assert_eq!((&plain["decision"], plain.get("familiarity")), (&json!("accept"), None));
    let told = ask("?include=familiarity", noise(1)).await;
    assert_eq!(told["decision"], "accept");
    let p = told["familiarity"]["p"].as_f64().unwrap();
    assert!(p < 0.01, "{told}");
    assert!(["group", "marginal"].contains(&told["familiarity"]["rung"].as_str().unwrap()), "{told}");
    let withheld = ask("?unlike=0.01", noise(1)).await;
    assert_eq!(withheld["decision"], "abstain");
    let reason = withheld["reason"].as_str().unwrap();
    assert!(reason.starts_with("unlike_training: familiarity 0.00"), "{reason}");
    assert_eq!(ask("?unlike=0", noise(1)).await["decision"], "accept");
    // What the first answers say of familiarity is the same in a JSON body.
    let b64 = {
        use base64::Engine;
        base64::engine::general_purpose::STANDARD.encode(noise(1))
    };
    let body = json!({"images": [{"b64": b64}], "options": {"unlike": 0.01}});
    let reply = server.post("/v1/classify", "application/json", body.to_string()).await.json();
    assert_eq!(reply["results"][0]["reason"], withheld["reason"]);
    let card = server.get("/v1/models/cifar10-lt").await.json();
    let known = &card["calibration"]["familiarity"];
    assert_eq!(known["questions"], json!(["look", "distance", "confidence"]));
    let metrics = text(&server.get("/metrics").await.body);
    let counted = metrics.lines().find(|line| line.starts_with("nbn_unlike_training_total{")).unwrap();
    assert!(counted.ends_with(" 2"), "{counted}");
    for (query, words) in [
        ("?unlike=2", "unlike is 2; it must be from 0 to 1"),
        ("?unlike=x", "unlike=\"x\": expected a number from 0 to 1"),
        ("?unlike=1e-9", "it must be 0, for none, or from 0.000866 to 1"),
    ] {
        let answer = server.post(&format!("/v1/classify{query}"), "image/png", noise(1)).await;
        assert_eq!(answer.status, 400, "{query}");
        let detail = answer.json()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(words), "{detail}");
    }
}

#[tokio::test]
async fn the_servers_own_limit_holds_until_a_request_says_otherwise() {
    let model = ServedModel::start(shipped(), library(), &model_options(), Arc::new(Budget::new(2))).unwrap();
    let options = ServeOptions { unlike: Some(0.01), ..ServeOptions::default() };
    let server = Server::with(Registry::new(vec![model], None).unwrap(), options).await;
    let ask = async |query: &str| {
        server.post(&format!("/v1/classify{query}"), "image/png", noise(3)).await.json()["results"][0].clone()
    };
    assert_eq!(ask("").await["decision"], "abstain");
    assert!(ask("").await["familiarity"]["p"].is_f64());
    assert_eq!(ask("?unlike=0").await["decision"], "accept");
}

#[tokio::test]
async fn tensors_have_a_familiarity_too() {
    let server = Server::shipped().await;
    let of = |more: Value| {
        use base64::Engine;
        let b64 = base64::engine::general_purpose::STANDARD.encode(picture(32, 32, image::ImageFormat::Png));
        let mut call = json!({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [b64]}]});
        call.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        call.to_string()
    };
    let ask = async |more: Value| server.post("/v2/models/cifar10-lt/infer", "application/json", of(more)).await.json();
    let all = ask(json!({})).await;
    let output = all["outputs"].as_array().unwrap().iter().find(|output| output["name"] == "familiarity").unwrap();
    assert_eq!((&output["datatype"], &output["shape"]), (&json!("FP32"), &json!([1, 1])));
    let alone = ask(json!({"outputs": [{"name": "familiarity"}]})).await;
    assert_eq!(alone["outputs"][0], *output);
    let refused = ask(json!({"outputs": [{"name": "familiarity", "parameters": {"classification": 2}}]})).await;
    assert!(refused["error"].as_str().unwrap().contains("familiarity has no scores"), "{refused}");
}

#[test]
fn rows_carry_it_and_a_model_without_it_says_so() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("noise.png"), noise(5)).unwrap();
    fs::copy(root().join("examples/pictures/ship.jpg"), folder.path().join("ship.jpg")).unwrap();
    let pictures = folder.path().to_str().unwrap();
    let score = |model: &str, more: &[&str]| nbn(&[&["score", "--model", model, pictures], more].concat());
    let out = score("models/cifar10-lt", &["--unlike", "0.01"]);
    let rows: Vec<Value> = text(&out.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(rows[0]["familiarity"].as_f64().unwrap() < 0.01, "{}", rows[0]);
    assert_eq!(rows[0]["decision"], "abstain");
    assert!(rows[1]["familiarity"].is_f64(), "{}", rows[1]);
    let csv = text(&score("models/cifar10-lt", &["--unlike", "0.01", "--format", "csv"]).stdout);
    assert!(csv.lines().next().unwrap().contains(",familiarity,"), "{csv}");
    let parquet = folder.path().join("rows.parquet");
    let out = score("models/cifar10-lt", &["--unlike", "0.01", "--output", parquet.to_str().unwrap()]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    // A calibration that knows nothing of it.
    let bundle = copied(folder.path());
    let path = bundle.join(CALIBRATION_FILE);
    let mut calibration: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    calibration.as_object_mut().unwrap().remove("familiarity");
    fs::write(&path, calibration.to_string()).unwrap();
    let out = score(bundle.to_str().unwrap(), &["--unlike", "0.01"]);
    assert_eq!(out.status.code(), Some(1));
    let words = "unlike needs a model that knows its training pictures: run `nbn fold calibrate` on it anew";
    assert!(text(&out.stderr).contains(words), "{}", text(&out.stderr));
}

#[test]
fn a_side_file_that_is_not_the_calibrations_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = copied(folder.path());
    let file = bundle.join(FAMILIARITY_FILE);
    let good = fs::read(&file).unwrap();
    let refused = || Bundle::load(&bundle).unwrap_err().to_string();
    fs::remove_file(&file).unwrap();
    assert!(refused().contains("familiarity.safetensors: No such file"), "{}", refused());
    let mut changed = good.clone();
    *changed.last_mut().unwrap() ^= 1;
    fs::write(&file, &changed).unwrap();
    assert!(refused().contains("it is of another calibration, or was changed; run `nbn fold calibrate` again"));
    // With a digest that fits, what is inside decides.
    let with = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        let path = bundle.join(CALIBRATION_FILE);
        let mut calibration: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        calibration["familiarity"]["sha256"] = json!(nbn::bundle::sha256_hex(bytes));
        fs::write(&path, calibration.to_string()).unwrap();
        Bundle::load(&bundle).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(with(&good), Ok(()));
    assert!(with(b"nothing").unwrap_err().contains("it is not a safetensors file"));
    let content = Familiarity::from_bytes(&good).unwrap();
    let changed = |change: &dyn Fn(&mut Familiarity)| {
        let mut content = content.clone();
        change(&mut content);
        with(&content.to_bytes().unwrap()).unwrap_err()
    };
    assert!(changed(&|c| c.rankings[0].scores[3] = f64::NAN).contains("not ascending and finite"));
    assert!(changed(&|c| c.rankings[0].scores.clear()).contains("a ranking has no scores"));
    assert!(changed(&|c| c.distance.as_mut().unwrap().spread[0] = 0.0).contains("spreads that are not above 0"));
    assert!(changed(&|c| c.distance.as_mut().unwrap().mean[0] = f32::INFINITY).contains("not finite"));
    let longer = |c: &mut Familiarity| c.look.as_mut().unwrap().mean.push(0.0);
    let mut wrong = content.clone();
    longer(&mut wrong);
    assert!(wrong.to_bytes().is_err());
    assert!(changed(&|c| c.distance = None).contains("differ in asking for distance"));
    let bytes = vec![0; 8];
    let odd = TensorView::new(Dtype::I64, vec![1], &bytes).unwrap();
    let odd = safetensors::serialize([("ranking.all", odd)], None).unwrap();
    assert!(with(&odd).unwrap_err().contains("its tensor ranking.all is not of f64"));
}

#[test]
fn what_is_learned_depends_on_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = copied(folder.path());
    let held_out = set(&folder.path().join("held-out"), 12, 1);
    let training = set(&folder.path().join("training"), 40, 2);
    let run = |more: &[&str]| {
        let words = ["calibrate", bundle.to_str().unwrap(), "--force", "--rung", "temperature"];
        let out = fold(&[&words, more].concat());
        assert!(out.status.success(), "{}", text(&out.stderr));
        let found = Bundle::load(&bundle).unwrap().calibration.unwrap().content.familiarity;
        let asked =
            found.map(|found| (found.training_images, found.questions.iter().map(|q| q.question).collect::<Vec<_>>()));
        (asked, text(&out.stderr))
    };
    let (held_out, training) = (held_out.to_str().unwrap(), training.to_str().unwrap());
    let (asked, said) = run(&["--data", held_out, "--training-data", training]);
    assert_eq!(asked, Some((120, Question::ALL.to_vec())), "{said}");
    assert!(said.contains("familiarity by look, distance, confidence; 120 training images"), "{said}");
    let (asked, _) = run(&["--data", held_out, "--training-data", training, "--familiarity-images", "110"]);
    assert_eq!(asked, Some((110, Question::ALL.to_vec())));
    let (asked, said) = run(&["--data", held_out, "--training-data", training, "--familiarity-images", "99"]);
    assert_eq!(asked, Some((0, vec![Question::Confidence])));
    assert!(said.contains("from confidence alone: there are fewer than 100 training images"), "{said}");
    let (asked, said) = run(&["--data", held_out]);
    assert_eq!(asked, Some((0, vec![Question::Confidence])));
    assert!(said.contains("familiarity from confidence alone: with --training-data"), "{said}");
    let (asked, _) = run(&["--data", held_out, "--training-data", training, "--familiarity-images", "0"]);
    assert_eq!((asked, bundle.join(FAMILIARITY_FILE).exists()), (None, false));
    // A file of logits has no pictures.
    let logits = folder.path().join("logits.safetensors");
    let evaluate = ["evaluate", bundle.to_str().unwrap(), "--data", held_out, "--logits", logits.to_str().unwrap()];
    assert!(fold(&[&evaluate[..], &["--resamples", "20"]].concat()).status.success());
    let (asked, said) = run(&["--data", logits.to_str().unwrap()]);
    assert_eq!(asked, None);
    assert!(said.contains("familiarity not learned: a file of logits says nothing"), "{said}");
    // Each calibration of a folder has a file of its own, and none takes another's.
    let elsewhere = folder.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let named = |name: &str| elsewhere.join(name).to_str().unwrap().to_owned();
    let words = ["calibrate", bundle.to_str().unwrap(), "--rung", "temperature", "--data", held_out, "--out"];
    for (name, images) in [("a.json", "20000"), ("b.json", "110"), ("c.json", "0")] {
        let sets = ["--training-data", training, "--familiarity-images", images];
        let out = fold(&[&words[..], &[named(name).as_str()], &sets].concat());
        assert!(out.status.success(), "{}", text(&out.stderr));
    }
    let manifest = shipped().manifest;
    for (name, images) in [("a.json", 120), ("b.json", 110)] {
        let loaded = nbn::bundle::BoundCalibration::load(&elsewhere.join(name), &manifest).unwrap();
        assert_eq!(loaded.content.familiarity.unwrap().training_images, images);
    }
    assert!(!elsewhere.join("c.familiarity.safetensors").exists());
    // A pipe has no place beside it.
    let out = fold(&[&words[..], &["/dev/stdout", "--training-data", training, "--force"]].concat());
    assert!(text(&out.stdout).contains("\"model_sha256\""), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("/dev/stdout is not a file"), "{}", text(&out.stderr));
    // Another file of that name is not written over.
    let out = folder.path().join("of-others");
    fs::create_dir(&out).unwrap();
    fs::write(out.join(FAMILIARITY_FILE), "mine").unwrap();
    let out = out.join("calibration.json");
    let refused = fold(&["calibrate", bundle.to_str().unwrap(), "--data", held_out, "--out", out.to_str().unwrap()]);
    assert!(text(&refused.stderr).contains("is not a file of a calibration"), "{}", text(&refused.stderr));
}

#[test]
fn an_evaluation_measures_false_alarms_and_what_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let test = set(&folder.path().join("test"), 5, 3);
    let foreign = folder.path().join("foreign/below");
    fs::create_dir_all(&foreign).unwrap();
    (0..7).for_each(|n| fs::write(foreign.join(format!("{n}.png")), noise(n)).unwrap());
    let bundle = copied(folder.path());
    let (report, above) = (folder.path().join("report"), folder.path().join("foreign"));
    let run = |more: &[&str]| {
        let words = ["evaluate", bundle.to_str().unwrap(), "--data", test.to_str().unwrap(), "--resamples", "20"];
        fold(&[&words, more].concat())
    };
    let unlike = ["--unlike-data", above.to_str().unwrap()];
    let out = run(&[&unlike[..], &["--report", report.to_str().unwrap(), "--card"]].concat());
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("7 images"), "{}", text(&out.stdout));
    let read = |path: PathBuf| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let found = read(report.join("report.json"))["evaluation"]["familiarity"].clone();
    assert_eq!(found["foreign"]["shares"], json!([1.0, 1.0, 1.0]), "{found}");
    assert_eq!((&found["foreign"]["images"], &found["foreign"]["data"]), (&json!(7), &json!("foreign")));
    assert!(fs::read_to_string(report.join("report.html")).unwrap().contains("<h2>Unlike training</h2>"));
    // The card has it, and is one.
    let card = Bundle::load(&bundle).unwrap().evaluation.unwrap();
    assert_eq!(card["familiarity"]["foreign"]["withheld"], json!([1.0, 1.0, 1.0]));
    let mut wrong = card.clone();
    wrong["familiarity"]["foreign"]["auroc"] = json!(7);
    fs::write(bundle.join("evaluation.json"), wrong.to_string()).unwrap();
    let loaded = Bundle::load(&bundle).unwrap();
    assert!(loaded.stale_card.unwrap().to_string().contains("familiarity.foreign.auroc is 7"));
    let out = run(&["--unlike-data", test.parent().unwrap().join("models").to_str().unwrap()]);
    assert!(text(&out.stderr).contains("holds no images, only files"), "{}", text(&out.stderr));
}
