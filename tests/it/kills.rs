//! A kill between any two steps of a writer leaves the old content or the new, whole, and the same command then succeeds.
//! The programs of a debugging build end themselves at the step that `NBN_KILL_AT_STEP` names.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use nbn::bundle::{Bundle, BundleError};
use nbn::data::LabelledLogits;
use nbn::files::name_of_draft;
use serde_json::{Value, json};

use crate::support::{data, picture, repository, root, text};

/// More steps than any command has.
const MOST_STEPS: usize = 200;

fn program(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(name);
    command.current_dir(root()).args(arguments);
    command
}

fn fold(arguments: &[&str]) -> Command {
    program(env!("CARGO_BIN_EXE_fold"), arguments)
}

fn nbn(arguments: &[&str]) -> Command {
    program(env!("CARGO_BIN_EXE_nbn"), arguments)
}

#[track_caller]
fn done(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output.stderr));
    output
}

/// Runs `command` in a new folder that `prepare` has filled, killed at step 1, then again at step 2, and so on, until it
/// ends by itself; `check` sees the folder after every kill. Returns the number of kills.
fn kill_at_every_step(
    prepare: impl Fn(&Path) + Sync,
    command: impl Fn(&Path) -> Command + Sync,
    check: impl Fn(&Path, usize) + Sync,
) -> usize {
    let (next, last) = (AtomicUsize::new(1), AtomicUsize::new(MOST_STEPS));
    let work = || {
        loop {
            let step = next.fetch_add(1, Ordering::SeqCst);
            if step >= last.load(Ordering::SeqCst) {
                return;
            }
            let folder = tempfile::tempdir().unwrap();
            prepare(folder.path());
            let output = command(folder.path()).env("NBN_KILL_AT_STEP", step.to_string()).output().unwrap();
            match output.status.code() {
                None => check(folder.path(), step),
                Some(0) => drop(last.fetch_min(step, Ordering::SeqCst)),
                Some(code) => panic!("step {step}: exit status {code}: {}", text(&output.stderr)),
            }
        }
    };
    thread::scope(|scope| [scope.spawn(work), scope.spawn(work)].map(|thread| thread.join().unwrap()));
    let kills = last.load(Ordering::SeqCst) - 1;
    assert!(kills < MOST_STEPS - 1, "it never ended by itself");
    kills
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Everything in `folder` is called as in `expected`, or has the name of a draft of such.
#[track_caller]
fn nothing_but(folder: &Path, expected: &[&str]) {
    for name in names(folder) {
        assert!(expected.contains(&name_of_draft(&name).unwrap_or(&name)), "{name} in {}", folder.display());
    }
}

fn checkpoint() -> PathBuf {
    data("checkpoints/cifar_a.safetensors")
}

fn shipped(folder: &Path) -> PathBuf {
    repository(folder).join("cifar10-lt/1")
}

#[test]
fn a_killed_export_leaves_no_bundle_or_a_whole_one() {
    let out = |folder: &Path| folder.join("m/1");
    let export = |folder: &Path| fold(&["export", path(&checkpoint()), "--out", path(&out(folder))]);
    let check = |folder: &Path, step| {
        let there = out(folder).exists();
        if there {
            Bundle::load(&out(folder)).unwrap_or_else(|error| panic!("step {step}: {error}"));
        } else if out(folder).parent().unwrap().exists() {
            let error = Bundle::load(&folder.join("m")).unwrap_err();
            assert!(matches!(error, BundleError::NoVersion(_)), "step {step}: {error}");
        }
        nothing_but(&folder.join("m"), &["1"]);
        if !there {
            done(export(folder));
            Bundle::load(&out(folder)).unwrap();
        }
    };
    assert!(kill_at_every_step(|folder| fs::create_dir(folder.join("m")).unwrap(), export, check) > 10);
}

#[test]
fn a_killed_export_over_a_bundle_leaves_the_old_one_or_the_new_one() {
    let old = crate::support::shipped();
    let out = |folder: &Path| folder.join("models/cifar10-lt/1");
    let export = |folder: &Path| fold(&["export", path(&checkpoint()), "--force", "--out", path(&out(folder))]);
    let check = |folder: &Path, step| {
        let found = Bundle::load(&out(folder)).unwrap_or_else(|error| panic!("step {step}: {error}"));
        if found.network.sha256 == old.network.sha256 {
            assert_eq!((&found.calibration, &found.evaluation), (&old.calibration, &old.evaluation), "step {step}");
        } else {
            assert_eq!(found.manifest.arch, "cifar_resnet14_w4", "step {step}");
            assert!(found.calibration.is_none() && found.evaluation.is_none() && found.stale_card.is_none());
        }
        nothing_but(&folder.join("models/cifar10-lt"), &["1"]);
        done(export(folder));
        assert_ne!(Bundle::load(&out(folder)).unwrap().network.sha256, old.network.sha256);
    };
    assert!(kill_at_every_step(|folder| drop(shipped(folder)), export, check) > 15);
}

/// What a bundle has.
const FILES: [&str; 5] =
    ["model.onnx", "manifest.json", "calibration.json", "evaluation.json", "familiarity.safetensors"];

#[test]
fn a_killed_calibration_leaves_a_bundle_that_loads_and_no_figures_of_another_calibration() {
    let old = crate::support::shipped().calibration.unwrap().id;
    let bundle = |folder: &Path| folder.join("models/cifar10-lt/1");
    let logits = data("calibration/logits.safetensors");
    let calibrate = |folder: &Path| {
        let more = ["--force", "--kappa", "1", "--rung", "temperature"];
        fold(&[&["calibrate", path(&bundle(folder)), "--data", path(&logits)], &more[..]].concat())
    };
    let check = |folder: &Path, step| {
        let found = Bundle::load(&bundle(folder)).unwrap_or_else(|error| panic!("step {step}: {error}"));
        let is_old = found.calibration.unwrap().id == old;
        assert_eq!((found.evaluation.is_some(), found.stale_card.is_none()), (is_old, is_old), "step {step}");
        nothing_but(&bundle(folder), &FILES);
        let again = done(calibrate(folder));
        assert!(text(&again.stderr).contains("nbn fold evaluate --card"), "{}", text(&again.stderr));
        assert!(Bundle::load(&bundle(folder)).unwrap().stale_card.is_some());
    };
    assert!(kill_at_every_step(|folder| drop(shipped(folder)), calibrate, check) > 3);
    // With familiarity, whose file is another one: what is there never names a file that is not.
    let images = |folder: &Path, name: &str, seed: u8, count: u8| {
        for (class, label) in ["cat", "ship"].into_iter().enumerate() {
            let of_class = folder.join(name).join(label);
            fs::create_dir_all(&of_class).unwrap();
            for n in 0..count {
                let of = |x: u32, y: u32| image::Rgb([(x * y) as u8, seed + 3 * n, (y as u8) << class]);
                image::RgbImage::from_fn(32, 32, of).save(of_class.join(format!("{n}.png"))).unwrap();
            }
        }
    };
    let prepare = |folder: &Path| {
        shipped(folder);
        images(folder, "held-out", 1, 3);
        images(folder, "training", 2, 50);
    };
    let calibrate = |folder: &Path| {
        let (held_out, training) = (folder.join("held-out"), folder.join("training"));
        let sets = ["--data", path(&held_out), "--training-data", path(&training)];
        fold(&[&["calibrate", path(&bundle(folder)), "--force"], &sets[..]].concat())
    };
    let check = |folder: &Path, step| {
        let found = Bundle::load(&bundle(folder)).unwrap_or_else(|error| panic!("step {step}: {error}"));
        assert!(found.calibration.is_some(), "step {step}");
        nothing_but(&bundle(folder), &FILES);
        done(calibrate(folder));
        assert!(Bundle::load(&bundle(folder)).unwrap().calibration.unwrap().familiarity.is_some());
    };
    assert!(kill_at_every_step(prepare, calibrate, check) > 9);
}

#[test]
fn a_killed_evaluation_leaves_the_old_card_or_the_new_one() {
    let bundle = |folder: &Path| folder.join("models/cifar10-lt/1");
    let logits = data("calibration/logits.safetensors");
    let evaluate = |folder: &Path| {
        let more = ["--resamples", "20", "--card", "--logits"];
        let out = folder.join("out.safetensors");
        fold(&[&["evaluate", path(&bundle(folder)), "--data", path(&logits)], &more[..], &[path(&out)]].concat())
    };
    let all = LabelledLogits::load(&logits, 10).unwrap();
    let few = LabelledLogits::try_new(10, all.row(0).to_vec(), vec![all.labels()[0]]).unwrap();
    let prepare = |folder: &Path| {
        shipped(folder);
        few.save(&folder.join("out.safetensors")).unwrap();
    };
    let card = |folder: &Path| Bundle::load(&bundle(folder)).unwrap().evaluation.unwrap()["data"].clone();
    let check = |folder: &Path, step| {
        let (data, images) = (card(folder), LabelledLogits::load(&folder.join("out.safetensors"), 10).unwrap().len());
        let [old, new] = [json!("test.bin"), json!("logits.safetensors")];
        assert!(data == old || data == new, "step {step}: {data}");
        // The logits come first.
        assert!(images == all.len() || (images == 1 && data == old), "step {step}: {images} images, card of {data}");
        nothing_but(folder, &["models", "out.safetensors"]);
        done(evaluate(folder));
        assert_eq!(card(folder), new);
    };
    assert!(kill_at_every_step(prepare, evaluate, check) > 8);
}

/// Five pictures below `folder`, and their paths.
fn pictures(folder: &Path) -> BTreeSet<String> {
    fs::create_dir(folder.join("pictures")).unwrap();
    let paths = (0..5).map(|n| folder.join(format!("pictures/{n}.png")));
    paths
        .map(|path| {
            fs::write(&path, picture(8 + path.as_os_str().len() as u32 % 7, 9, image::ImageFormat::Png)).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .collect()
}

fn score(folder: &Path, cache: &str, more: &[&str]) -> Command {
    let pictures = folder.join("pictures");
    let fixed = ["score", "--model", "models/cifar10-lt", "--workers", "1", "--top-k", "1", "--cache", cache];
    nbn(&[&fixed[..], more, &[path(&pictures)]].concat())
}

/// The paths in rows of JSON lines, in order.
fn scored(rows: &str) -> Vec<String> {
    let row = |line: &str| serde_json::from_str::<Value>(line).unwrap()["path"].as_str().unwrap().to_owned();
    rows.lines().map(row).collect()
}

#[test]
fn a_killed_scoring_into_parts_goes_on_with_a_row_for_every_picture_exactly_once() {
    let rows = |folder: &Path| -> Vec<String> {
        let parts = names(&folder.join("rows")).into_iter().filter(|name| name.starts_with("part-"));
        parts.flat_map(|name| scored(&fs::read_to_string(folder.join("rows").join(name)).unwrap())).collect()
    };
    let into_parts = |folder: &Path, more: &[&str]| {
        let out = folder.join("rows");
        score(folder, "none", &[&["--part-rows", "2", "--output-dir", path(&out)], more].concat())
    };
    let check = |folder: &Path, step| {
        if folder.join("rows").exists() {
            assert!(rows(folder).len() < 6, "step {step}");
        }
        done(into_parts(folder, &["--resume"]));
        let found = rows(folder);
        let expected = names(&folder.join("pictures"));
        let found_names: BTreeSet<String> = found.iter().map(|p| p.rsplit('/').next().unwrap().to_owned()).collect();
        assert_eq!((found.len(), &found_names), (5, &expected), "step {step}");
    };
    let kills = kill_at_every_step(|folder| drop(pictures(folder)), |folder| into_parts(folder, &[]), check);
    assert!(kills > 10, "{kills}");
}

#[test]
fn a_killed_scoring_leaves_the_old_summary_or_the_new_one() {
    let summary = |folder: &Path| folder.join("summary.json");
    let prepare = |folder: &Path| {
        pictures(folder);
        fs::write(summary(folder), "{\"scored\": 77}").unwrap();
    };
    let summed = |folder: &Path| score(folder, "none", &["--summary", path(&summary(folder))]);
    let read = |folder: &Path| serde_json::from_slice::<Value>(&fs::read(summary(folder)).unwrap()).unwrap();
    let check = |folder: &Path, step| {
        let scored = read(folder)["scored"].clone();
        assert!(scored == 77 || scored == 5, "step {step}: {scored}");
        nothing_but(folder, &["pictures", "summary.json"]);
        done(summed(folder));
        assert_eq!(read(folder)["scored"], 5);
    };
    assert!(kill_at_every_step(prepare, summed, check) > 3);
}

#[test]
fn a_killed_cache_has_whole_entries_and_what_the_user_keeps_in_its_folder() {
    let foreign = [".git", ".ssh", ".cache-1-2-3"];
    let three_hours_ago = SystemTime::now() - Duration::from_secs(3 * 3600);
    let prepare = |folder: &Path| {
        pictures(folder);
        for name in foreign {
            fs::create_dir_all(folder.join("cache").join(name)).unwrap();
            fs::write(folder.join("cache").join(name).join("network.onnx"), "mine").unwrap();
            File::open(folder.join("cache").join(name)).unwrap().set_modified(three_hours_ago).unwrap();
        }
    };
    let cached = |folder: &Path| score(folder, path(&folder.join("cache")), &[]);
    let expected = Mutex::new(None);
    let check = |folder: &Path, step| {
        for name in foreign {
            assert_eq!(fs::read(folder.join("cache").join(name).join("network.onnx")).unwrap(), b"mine", "step {step}");
        }
        for name in names(&folder.join("cache")).iter().filter(|name| !name.starts_with('.')) {
            assert!(folder.join("cache").join(name).join("network.onnx").is_file(), "step {step}: {name}");
        }
        let rows: Vec<Value> = text(&done(cached(folder)).stdout)
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["predictions"].clone())
            .collect();
        assert_eq!(rows.len(), 5);
        assert_eq!(*expected.lock().unwrap().get_or_insert(rows.clone()), rows, "step {step}");
    };
    assert!(kill_at_every_step(prepare, cached, check) > 8);
}

#[cfg(feature = "train")]
mod training {
    use super::*;
    use std::collections::BTreeMap;

    use nbn::fold::Checkpoint;
    use safetensors::SafeTensors;

    const FILES: [&str; 5] =
        ["run.safetensors", "run.state", "run.metrics.jsonl", "run.training.json", "run.calibration.json"];

    /// Sets of two classes whose pictures differ by a stripe.
    fn set(folder: &Path) -> PathBuf {
        let set = folder.join("set");
        for (class, columns) in [("left", 0..4), ("right", 4..8)] {
            fs::create_dir_all(set.join(class)).unwrap();
            for n in 0..6u8 {
                let pixel = |x: u32, y: u32| {
                    let light = if columns.contains(&x) { 200 } else { 20 };
                    image::Rgb([light, n * 8, y as u8 * 9])
                };
                image::RgbImage::from_fn(8, 8, pixel).save(set.join(class).join(format!("{n}.png"))).unwrap();
            }
        }
        set
    }

    fn train(set: &Path, folder: &Path, more: &[&str]) -> Command {
        let out = folder.join("run.safetensors");
        let fixed = ["--arch", "resnet8_w4", "--input-size", "8", "--batch", "8", "--threads", "1", "--epochs", "1"];
        fold(&[&["train", "--data", path(set), "--out", path(&out)], &fixed[..], more].concat())
    }

    fn copy(from: &Path, to: &Path) {
        for name in FILES {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }

    fn files(folder: &Path) -> BTreeMap<&'static str, Option<Vec<u8>>> {
        FILES.into_iter().map(|name| (name, fs::read(folder.join(name)).ok())).collect()
    }

    /// The seed in the recipe that a checkpoint or a state tells.
    fn seed(path: &Path) -> u64 {
        let bytes = fs::read(path).unwrap();
        let file = SafeTensors::read_metadata(&bytes).unwrap().1;
        SafeTensors::deserialize(&bytes).unwrap();
        let metadata = file.metadata().clone().unwrap();
        let told: Value = match (metadata.get("nbn.recipe"), metadata.get("nbn.progress")) {
            (Some(recipe), _) => serde_json::from_str(recipe).unwrap(),
            (None, progress) => serde_json::from_str::<Value>(progress.unwrap()).unwrap()["recipe"].clone(),
        };
        told["seed"].as_u64().unwrap()
    }

    fn network(folder: &Path) -> Checkpoint {
        Checkpoint::load(&folder.join("run.safetensors")).unwrap()
    }

    #[test]
    fn a_killed_training_over_a_run_leaves_one_that_goes_on_and_no_mixture() {
        let root = tempfile::tempdir().unwrap();
        let set = set(root.path());
        let [old, new] = ["old", "new"].map(|name| root.path().join(name));
        for (folder, seed) in [(&old, "0"), (&new, "1")] {
            fs::create_dir(folder).unwrap();
            done(train(&set, folder, &["--seed", seed]));
        }
        let (old_files, new_files) = (files(&old), files(&new));
        let seeds = |folder: &Path| ["run.safetensors", "run.state"].map(|name| seed(&folder.join(name)));
        let overwrite = |folder: &Path| train(&set, folder, &["--seed", "1", "--overwrite"]);
        let check = |folder: &Path, step| {
            let [checkpoint, state] = seeds(folder);
            assert!(state == 1 || checkpoint == 0, "step {step}: the new checkpoint came before its state");
            for list in ["run.training.json", "run.calibration.json"] {
                let of = if checkpoint == 0 { &old_files } else { &new_files };
                let list = (list, fs::read(folder.join(list)).ok());
                assert!(list.1.is_none() || list.1 == of[list.0], "step {step}: {} is of another run", list.0);
            }
            if state == 0 {
                assert!(files(folder) == old_files, "step {step}: the old run was touched");
                if step % 7 == 0 {
                    done(train(&set, folder, &["--seed", "0", "--resume"]));
                    assert!(network(folder) == network(&old), "step {step}");
                }
                return;
            }
            let refused = train(&set, folder, &["--seed", "0", "--resume"]).output().unwrap();
            assert!(text(&refused.stderr).contains("seed is 0, was 1"), "step {step}: {}", text(&refused.stderr));
            done(train(&set, folder, &["--seed", "1", "--resume"]));
            assert_eq!(seeds(folder), [1, 1], "step {step}");
            assert!(network(folder) == network(&new), "step {step}");
            let metrics = fs::read_to_string(folder.join("run.metrics.jsonl")).unwrap();
            let loss = |text: &str| serde_json::from_str::<Value>(text).unwrap()["loss"].clone();
            let expected = String::from_utf8(new_files["run.metrics.jsonl"].clone().unwrap()).unwrap();
            assert_eq!((metrics.lines().count(), loss(&metrics)), (1, loss(&expected)), "step {step}");
            for list in ["run.training.json", "run.calibration.json"] {
                assert!(fs::read(folder.join(list)).ok() == new_files[list], "step {step}: {list}");
            }
            let hidden: Vec<String> = names(folder).into_iter().filter(|name| name.starts_with('.')).collect();
            assert_eq!(hidden, [".run.lock"], "step {step}");
        };
        assert!(kill_at_every_step(|folder| copy(&old, folder), overwrite, check) > 40);
    }
}
