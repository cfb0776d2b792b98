use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use image::ImageFormat;
use serde_json::Value;

use crate::support::{Owned, fold, nbn, picture, root, text};

#[test]
fn score_writes_a_row_per_image_and_remembers_the_bad_one() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("sub")).unwrap();
    fs::write(folder.path().join("a.png"), picture(40, 30, ImageFormat::Png)).unwrap();
    fs::write(folder.path().join("b.jpg"), b"broken").unwrap();
    fs::write(folder.path().join("sub/c.JPG"), picture(30, 40, ImageFormat::Jpeg)).unwrap();
    fs::write(folder.path().join("notes.txt"), b"skipped").unwrap();
    let out = nbn(&["score", "--model", "models/cifar10-lt", "--top-k", "2", folder.path().to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    let rows: Vec<Value> = text(&out.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let names: Vec<&str> = rows.iter().map(|r| r["path"].as_str().unwrap().rsplit('/').next().unwrap()).collect();
    assert_eq!(names, ["a.png", "b.jpg", "c.JPG"]);
    assert_eq!(rows[0]["predictions"].as_array().unwrap().len(), 2);
    assert!(rows[1]["error"].as_str().unwrap().contains("known format") && rows[1]["predictions"].is_null());
    assert!(rows[2]["error"].is_null());
    assert!(text(&out.stderr).contains("scored      2 images") && text(&out.stderr).contains("failed      1: "));
}

#[test]
fn score_takes_a_list_on_stdin_and_writes_csv_to_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("a, \"b\".png");
    fs::write(&image, picture(32, 32, ImageFormat::Png)).unwrap();
    let output = folder.path().join("rows.csv");
    let mut child = Owned::begin(
        Command::new(env!("CARGO_BIN_EXE_nbn"))
            .current_dir(root())
            .args(["score", "--model", "models/cifar10-lt/1", "--format", "csv", "--top-k", "1", "--output"])
            .arg(&output)
            .stdin(Stdio::piped())
            .stderr(Stdio::null()),
    );
    let list = format!("{}\n\n{}\n", image.display(), folder.path().join("gone.png").display());
    child.stdin.take().unwrap().write_all(list.as_bytes()).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let mut csv = csv::Reader::from_path(&output).unwrap();
    let origin = ["model", "version", "scale", "calibration", "prior"];
    let header = [&["path", "error", "decision", "reason", "label_1", "score_1"][..], &origin].concat();
    assert_eq!(csv.headers().unwrap(), header);
    let rows: Vec<csv::StringRecord> = csv.records().map(Result::unwrap).collect();
    assert_eq!(&rows[0][0], image.to_str().unwrap());
    assert_eq!(&rows[0][2], "accept");
    assert!(rows[0][5].parse::<f64>().unwrap() > 0.0);
    assert!(rows[1][1].contains("No such file"));
}

#[test]
fn score_and_the_server_share_one_path_so_a_folder_twice_gives_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    for n in 1..20 {
        fs::write(folder.path().join(format!("{n:02}.png")), picture(n * 7, 200 / n, ImageFormat::Png)).unwrap();
    }
    let path = folder.path().to_str().unwrap();
    let once = nbn(&["score", "--model", "models/cifar10-lt", "--workers", "1", path]);
    let again = nbn(&["score", "--model", "models/cifar10-lt", "--workers", "3", path]);
    assert!(once.status.success());
    assert_eq!(text(&once.stdout), text(&again.stdout));
}

#[test]
fn a_bundle_whose_model_was_changed_by_one_byte_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("m/1");
    fs::create_dir_all(&bundle).unwrap();
    let mut model = fs::read(root().join("models/cifar10-lt/1/model.onnx")).unwrap();
    model[5000] ^= 1;
    fs::write(bundle.join("model.onnx"), model).unwrap();
    fs::copy(root().join("models/cifar10-lt/1/manifest.json"), bundle.join("manifest.json")).unwrap();
    let out = nbn(&["serve", "--addr", "127.0.0.1:0", "--models", folder.path().to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("the file was changed after `nbn fold export`"), "{}", text(&out.stderr));
}

#[test]
fn what_cannot_start_says_what_was_tried() {
    let folder = tempfile::tempdir().unwrap();
    let wrong = folder.path().join("wrong.so");
    fs::write(&wrong, b"not a library").unwrap();
    let picture_path = folder.path().join("a.png");
    fs::write(&picture_path, picture(8, 8, ImageFormat::Png)).unwrap();
    let picture_path = picture_path.to_str().unwrap();
    let (at, state) = (folder.path().join("rows.xlsx"), folder.path().join("run.state"));
    let (at, state) = (at.to_str().unwrap(), state.to_str().unwrap());
    fs::write(state, "").unwrap();
    let (version, model) = ("models/cifar10-lt/1", "models/cifar10-lt");
    let cases: [(&[&str], &str); 20] = [
        (&["score", "--model", "cifar10-lt", picture_path], "cifar10-lt: no such folder; is it models/cifar10-lt?"),
        (&["score", "--model", "README.md", picture_path], "README.md: it is a file: a bundle is a folder"),
        (&["score", "--model", model, "nothere/"], "nothere/: no such file or folder"),
        (
            &["score", "--model", model, "--output", at, picture_path],
            "rows.xlsx: no format has this ending: name it .jsonl",
        ),
        (
            &["serve", "--addr", "127.0.0.1:0", "--models", version],
            "models/cifar10-lt/1 is a bundle: give the folder above",
        ),
        (&["fold", "export", version, "--out", "x/1"], "models/cifar10-lt/1 is a bundle already"),
        (&["fold", "evaluate", model, "--data", picture_path], "a.png: is one image: give a folder"),
        (
            &["fold", "evaluate", model, "--data", "tests", "--report", picture_path],
            "a.png: it is a file: give a folder",
        ),
        (&["fold", "inspect", state], "run.state: it belongs to a run of `nbn fold train`"),
        (
            &["score", "--model", "models/cifar10-lt", "--onnxruntime", wrong.to_str().unwrap(), picture_path],
            "wrong.so",
        ),
        (
            &["score", "--model", "models/cifar10-lt", "--onnxruntime", "/nowhere/lib.so", picture_path],
            "/nowhere/lib.so: no such file",
        ),
        (&["score", "--model", "models/nobody", picture_path], "models/nobody"),
        (&["score", "--model", "models/cifar10-lt", "/nowhere/a.png"], "failed      1: file_not_found 1"),
        (
            &["score", "--model", "models", picture_path],
            "models: it is a repository, which holds models/cifar10-lt: give one",
        ),
        (&["serve", "--addr", "127.0.0.1:0", "--models", "models/cifar10-lt"], "is a bundle: give the folder above"),
        (
            &["score", "--model", model, "--device", "cuda", picture_path],
            "--device cuda:0 cannot be used: this build has",
        ),
        (
            &["score", "--model", model, "--device", "cuda:1", picture_path],
            "--device cuda:1 cannot be used: this build has",
        ),
        (&["serve", "--addr", "127.0.0.1:0", "--device", "cuda:2,0"], "--device cuda:2 cannot be used: this build has"),
        (&["serve", "--addr", "127.0.0.1:0", "--default-model", "x"], "--default-model \"x\""),
        (&["serve", "--addr", "127.0.0.1:0", "--models", "/nowhere"], "/nowhere"),
    ];
    for (args, words) in cases {
        let out = nbn(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        assert!(text(&out.stderr).contains(words), "{args:?}: {}", text(&out.stderr));
        assert!(!text(&out.stderr).contains("panicked"), "{args:?}");
    }
    let out = nbn(&["score", "--model", "models/cifar10-lt", "--device", "auto", picture_path]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(nbn(&["serve", "--workers", "0"]).status.code(), Some(2));
    for wrong in ["gpu", "cuda:", "cuda:x", "cuda:0,0"] {
        let out = nbn(&["score", "--model", model, "--device", wrong, picture_path]);
        assert_eq!(out.status.code(), Some(2), "{wrong}");
        assert!(text(&out.stderr).contains(&format!("{wrong:?}")), "{}", text(&out.stderr));
    }
}

#[test]
fn an_address_takes_a_name_and_a_bad_one_is_told_what_to_write() {
    // Nothing listens on a port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let named = nbn(&["health", "--addr", &format!("localhost:{port}")]);
    assert_eq!(named.status.code(), Some(1));
    assert!(text(&named.stderr).contains(&format!("no server at 127.0.0.1:{port}")), "{}", text(&named.stderr));
    for bad in ["8080", ":8080", "localhost", "localhost:http", "127.0.0.1:70000"] {
        let out = nbn(&["serve", "--addr", bad]);
        assert_eq!(out.status.code(), Some(2), "{bad}");
        let told = text(&out.stderr);
        assert!(told.contains(bad) && told.contains("expected HOST:PORT, such as 127.0.0.1:8080"), "{told}");
    }
}

#[test]
fn a_source_without_an_image_is_said_to_be_so() {
    let folder = tempfile::tempdir().unwrap();
    let of = |arguments: &[&str]| {
        let mut all = vec!["score", "--model", "models/cifar10-lt"];
        all.extend(arguments);
        let out = nbn(&all);
        (out.status.code(), text(&out.stderr))
    };
    let path = folder.path().to_str().unwrap();
    let (status, told) = of(&[path]);
    assert!(status == Some(1) && told.contains("holds no file that ends in"), "{told}");
    let list = folder.path().join("empty.txt");
    fs::write(&list, "").unwrap();
    let list = list.to_str().unwrap();
    let (status, told) = of(&[list]);
    assert!(status == Some(0) && told.contains("the source has no images\n"), "{told}");
    let (status, told) = of(&["--shard", "0/2", list]);
    assert!(status == Some(0) && told.contains("no images in this share\n"), "{told}");
    let table = folder.path().join("empty.csv");
    fs::write(&table, "").unwrap();
    let (status, told) = of(&[table.to_str().unwrap()]);
    assert!(status == Some(1) && told.contains("there are no columns: name one with --image-column"), "{told}");
}

#[test]
fn fold_replaces_nothing_but_bundles_and_compares_no_bundle_with_itself() {
    let folder = tempfile::tempdir().unwrap();
    let photos = folder.path().join("2024");
    fs::create_dir(&photos).unwrap();
    fs::write(photos.join("a.jpg"), "mine").unwrap();
    let out = fold(&["export", "none.pth", "--force", "--out", photos.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("--force replaces bundles only"), "{}", text(&out.stderr));
    assert!(photos.join("a.jpg").is_file());
    let bundle = "models/cifar10-lt";
    let [upper, other] = ["l.SAFETENSORS", "l.bin"].map(|name| folder.path().join(name));
    fs::write(&upper, "").unwrap();
    fs::write(&other, "").unwrap();
    for logits in [&[upper.to_str().unwrap()][..], &[other.to_str().unwrap(), "--data-format", "logits"]] {
        let out = fold(&[&["evaluate", bundle, "--against", bundle, "--data"], logits].concat());
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out.stderr).contains("--against needs the images themselves"), "{}", text(&out.stderr));
    }
}

#[test]
fn a_log_filter_that_is_not_understood_is_told() {
    let run = |filter: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nbn"));
        command.current_dir(root()).args(["score", "--model", "models/cifar10-lt", "-"]).env("RUST_LOG", filter);
        text(&command.stdin(Stdio::null()).output().unwrap().stderr)
    };
    for filter in ["nbn=loud", "nbn[request]=debug", "[{id}]=debug"] {
        let told = run(filter);
        assert!(told.contains(filter) && told.contains("expected a level"), "{told}");
    }
    assert!(!run("nbn=debug,ort=warn").contains("RUST_LOG"));
    assert!(!run("").contains("RUST_LOG"));
}

#[test]
fn nbn_fold_is_the_program_beside_it() {
    let bundle = "models/cifar10-lt/1";
    let (through, alone) = (nbn(&["fold", "inspect", bundle]), fold(&["inspect", bundle]));
    assert!(through.status.success() && !through.stdout.is_empty(), "{}", text(&through.stderr));
    assert_eq!(through, alone);
    for (arguments, status, stdout, stderr) in [
        (&["fold", "--help"][..], 0, "Usage: nbn fold <COMMAND>", ""),
        (&["fold", "export", "--help"], 0, "Usage: nbn fold export", ""),
        (&["fold", "--version"], 0, "nbn-fold 0.1.0\nfeatures: serve fold train", ""),
        (&["fold", "inspect", "gone.pth"], 1, "", "nbn fold: gone.pth: No such file"),
        (&["fold", "bake"], 2, "", "unrecognized subcommand 'bake'"),
        (&["fold", "calibrate", bundle, "--kappa", "-1"], 2, "", "invalid value '-1' for '--kappa"),
        (&["score", "--min-score", "-1"], 2, "", "invalid value '-1' for '--min-score"),
    ] {
        let out = nbn(arguments);
        assert_eq!(out.status.code(), Some(status), "{arguments:?}");
        assert!(text(&out.stdout).contains(stdout), "{arguments:?}: {}", text(&out.stdout));
        assert!(text(&out.stderr).contains(stderr), "{arguments:?}: {}", text(&out.stderr));
    }
}

#[test]
fn nbn_fold_takes_no_other_programs_fold() {
    let folder = tempfile::tempdir().unwrap();
    let alone = folder.path().join("nbn");
    fs::copy(env!("CARGO_BIN_EXE_nbn"), &alone).unwrap();
    // As coreutils installs one.
    fs::copy("/usr/bin/true", folder.path().join("fold")).unwrap();
    let run =
        |path: &std::path::Path| Command::new(&alone).args(["fold", "inspect"]).env("PATH", path).output().unwrap();
    let out = run(folder.path());
    assert_eq!(out.status.code(), Some(1));
    let said = text(&out.stderr);
    assert!(said.contains("neither beside nbn nor on the PATH") && said.contains("--bin nbn-fold"), "{said}");
    let elsewhere = tempfile::tempdir().unwrap();
    fs::copy("/usr/bin/true", elsewhere.path().join("nbn-fold")).unwrap();
    assert!(run(elsewhere.path()).status.success());
}
