//! `nbn score` with parts, shares and tables. `tests/clients/batch.py` has other programs read the rows, and kills.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use image::ImageFormat;
use nbn::batch::{
    self, Columns, Form, Format, Origin, Output, RowWriter, Scoring, Shard, Source, SourceOptions, Stores, Summary,
};
use nbn::classify::ScoreRequest;
use nbn::engine::Budget;
use nbn::registry::ServedModel;
use nbn::scores::Prior;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::Value;

use crate::support::{
    Owned, SHIPPED, data, fold, library, model_options, nbn, picture, repository, root, shipped, text,
};

fn nbn_score(args: &[&str]) -> std::process::Output {
    nbn(&[&["score", "--model", "models/cifar10-lt", "--top-k", "1"], args].concat())
}

fn pictures(folder: &Path, n: u32) {
    for i in 0..n {
        fs::write(folder.join(format!("{i:02}.png")), picture(20 + i, 30, ImageFormat::Png)).unwrap();
    }
}

#[test]
fn what_is_hidden_is_left_out_wherever_it_lies() {
    let folder = tempfile::tempdir().unwrap();
    let set = folder.path().join("set");
    let png = picture(20, 30, ImageFormat::Png);
    let names = ["a.png", "deep/b.png", "._a.png", ".thumbs/c.png", "deep/.ipynb_checkpoints/b.png"];
    let mut archive = tar::Builder::new(Vec::new());
    for name in names {
        let path = set.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &png).unwrap();
        archive.append_data(&mut header(tar::EntryType::Regular, name, png.len() as u64), name, &png[..]).unwrap();
    }
    let packed = folder.path().join("set.tar");
    fs::write(&packed, archive.into_inner().unwrap()).unwrap();
    let set = set.to_str().unwrap();
    let sources = [
        (set.to_owned(), 2),
        (format!("{set}/**/*.png"), 2),
        (format!("{set}/*.png"), 1),
        // Whoever names them gets them.
        (format!("{set}/._*.png"), 1),
        (format!("{set}/.thumbs/c.png"), 1),
        (packed.to_str().unwrap().to_owned(), 2),
        (format!("file://{set}/"), 2),
        (format!("file://{set}/*.png"), 1),
    ];
    for (source, rows) in sources {
        let out = nbn_score(&[&source]);
        assert!(out.status.success(), "{source}: {}", text(&out.stderr));
        assert_eq!(text(&out.stdout).lines().count(), rows, "{source}: {}", text(&out.stdout));
    }
}

/// The rows of all parts whose names have `words`, in the parts' order.
fn rows(folder: &Path, words: &str) -> Vec<String> {
    let mut parts: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    parts.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&format!("part-{words}")));
    parts.sort();
    parts
        .iter()
        .flat_map(|part| fs::read_to_string(part).unwrap().lines().map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

#[test]
fn features_are_told_in_every_form_of_rows() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    fs::create_dir(&images).unwrap();
    pictures(&images, 2);
    fs::write(images.join("broken.png"), "no picture").unwrap();
    let checkpoint = data("checkpoints/cifar_bn.pth.tar");
    let model = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let at = out.join("1");
        let made = fold(&[&["export", checkpoint.to_str().unwrap(), "--out", at.to_str().unwrap()], more].concat());
        assert!(made.status.success(), "{}", text(&made.stderr));
        out
    };
    let (with, without) = (model("with", &[]), model("without", &["--no-features"]));
    let run = |model: &Path, format: &str, more: &[&str]| {
        let args = ["score", "--model", model.to_str().unwrap(), "--features", "--format", format];
        nbn(&[&args[..], more, &[images.to_str().unwrap()]].concat())
    };
    let refused = run(&without, "jsonl", &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr)
            .contains("has no output features: make the bundle again, by `nbn fold export` without --no-features")
    );

    let lines = text(&run(&with, "jsonl", &[]).stdout);
    let features: Vec<Option<Vec<f32>>> = lines
        .lines()
        .map(|line| serde_json::from_value(serde_json::from_str::<Value>(line).unwrap()["features"].clone()).unwrap())
        .collect();
    let width = features[0].as_ref().unwrap().len();
    assert_eq!(features.iter().map(|f| f.as_ref().map(Vec::len)).collect::<Vec<_>>(), [Some(width), Some(width), None]);
    assert_ne!(features[0], features[1]);

    let table = run(&with, "csv", &[]).stdout;
    let mut table = csv::Reader::from_reader(&table[..]);
    let column = table.headers().unwrap().iter().position(|name| name == "features").unwrap();
    for (row, features) in table.records().zip(&features) {
        let text = row.unwrap()[column].to_owned();
        assert_eq!(serde_json::from_str(&text).ok(), *features, "{text}");
    }
    let path = folder.path().join("rows.parquet");
    run(&with, "parquet", &["--output", path.to_str().unwrap()]);
    let reader = SerializedFileReader::new(fs::File::open(&path).unwrap()).unwrap();
    for (row, features) in reader.get_row_iter(None).unwrap().zip(&features) {
        let row = row.unwrap();
        let (_, field) = row.get_column_iter().find(|(name, _)| *name == "features").unwrap();
        let found = match field {
            Field::ListInternal(list) => Some(list.elements().iter().map(float).collect::<Vec<f32>>()),
            _ => None,
        };
        assert_eq!(found, *features);
    }
}

fn float(field: &Field) -> f32 {
    match field {
        Field::Float(value) => *value,
        other => panic!("{other} is no float"),
    }
}

/// Rows of several runs are put into one table, where each must still say what made it.
#[test]
fn rows_tell_what_made_them_in_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    fs::create_dir(&images).unwrap();
    pictures(&images, 1);
    fs::write(images.join("broken.png"), "no picture").unwrap();
    let plain = folder.path().join("plain");
    let (checkpoint, at) = (data("checkpoints/cifar_bn.pth.tar"), plain.join("7"));
    assert!(fold(&["export", checkpoint.to_str().unwrap(), "--out", at.to_str().unwrap()]).status.success());
    let id = nbn::bundle::sha256_hex(&fs::read(root().join(SHIPPED).join("calibration.json")).unwrap());
    let id = &id[..12];
    let prior = folder.path().join("prior.json");
    fs::write(&prior, "[1, 1, 1, 1, 1, 1, 1, 1, 1, 2]").unwrap();
    let other = folder.path().join("other.json");
    fs::write(&other, "[1, 1, 1, 1, 1, 1, 1, 1, 1, 3]").unwrap();
    let custom = [&prior, &other].map(|prior| {
        let row = nbn(&[
            "score",
            "--model",
            "models/cifar10-lt",
            "--prior",
            prior.to_str().unwrap(),
            images.to_str().unwrap(),
        ]);
        let row: Value = serde_json::from_str(text(&row.stdout).lines().next().unwrap()).unwrap();
        row["prior"].as_str().unwrap().to_owned()
    });
    assert!(custom[0] != custom[1] && custom.iter().all(|name| name.starts_with("custom-")), "{custom:?}");
    let shipped = "models/cifar10-lt";
    let names = ["model", "version", "scale", "calibration", "prior"];
    let cases: [(&str, &[&str], [Option<&str>; 5]); 4] = [
        (shipped, &[], [Some("cifar10-lt"), Some("2"), Some("calibrated"), Some(id), Some("uniform")]),
        (shipped, &["--prior", "train"], [Some("cifar10-lt"), Some("2"), Some("calibrated"), Some(id), Some("train")]),
        (
            shipped,
            &["--prior", prior.to_str().unwrap()],
            [Some("cifar10-lt"), Some("2"), Some("calibrated"), Some(id), Some(&custom[0])],
        ),
        (plain.to_str().unwrap(), &[], [Some("plain"), Some("7"), Some("softmax"), None, None]),
    ];
    for (model, more, origin) in cases {
        let run = |format: &str, more_of: &[&str]| {
            let args = ["score", "--model", model, "--format", format];
            nbn(&[&args[..], more, more_of, &[images.to_str().unwrap()]].concat())
        };
        let lines = text(&run("jsonl", &[]).stdout);
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2, "{model}");
        for line in &lines {
            assert_eq!(names.map(|name| line.get(name).and_then(Value::as_str)), origin, "{line}");
        }
        let table = run("csv", &[]).stdout;
        let mut table = csv::Reader::from_reader(&table[..]);
        let records: Vec<HashMap<String, String>> = table.deserialize().map(Result::unwrap).collect();
        assert_eq!(records.len(), 2);
        for record in &records {
            assert_eq!(names.map(|name| record[name].as_str()), origin.map(Option::unwrap_or_default), "{model}");
        }
        let path = folder.path().join("rows.parquet");
        run("parquet", &["--output", path.to_str().unwrap()]);
        let reader = SerializedFileReader::new(fs::File::open(&path).unwrap()).unwrap();
        let metadata = reader.metadata().file_metadata().key_value_metadata().unwrap();
        let entry = metadata.iter().find(|entry| entry.key == "nbn").unwrap().value.as_deref().unwrap();
        let about: Value = serde_json::from_str(entry).unwrap();
        assert_eq!(names.map(|name| about.get(name).and_then(Value::as_str)), origin);
        let best = &lines.iter().find(|line| line.get("predictions").is_some()).unwrap()["predictions"][0];
        assert_eq!(about["classes"][best["class_id"].as_u64().unwrap() as usize], best["label"]);
        let mut rows = 0;
        for row in reader.get_row_iter(None).unwrap() {
            let row = row.unwrap();
            let fields: HashMap<&String, &Field> = row.get_column_iter().collect();
            let told = names.map(|name| match fields[&name.to_owned()] {
                Field::Str(text) => Some(text.as_str()),
                _ => None,
            });
            assert_eq!(told, origin);
            rows += 1;
        }
        assert_eq!(rows, 2);
    }
}

#[test]
fn a_run_that_goes_on_scores_what_has_no_row() {
    let folder = tempfile::tempdir().unwrap();
    let (images, out) = (folder.path().join("images"), folder.path().join("rows"));
    fs::create_dir(&images).unwrap();
    pictures(&images, 12);
    let (images, dir) = (images.to_str().unwrap(), out.to_str().unwrap());
    let whole: Vec<String> = text(&nbn_score(&[images]).stdout).lines().map(str::to_owned).collect();
    let run = |more: &[&str]| nbn_score(&[&["--output-dir", dir, "--part-rows", "5"], more, &[images]].concat());
    assert!(run(&[]).status.success());
    assert_eq!(rows(&out, ""), whole);

    // As if it had been killed while it wrote the second part.
    fs::remove_file(out.join("part-00000-of-00001-000001.jsonl")).unwrap();
    fs::remove_file(out.join("part-00000-of-00001-000002.jsonl")).unwrap();
    fs::write(out.join(".part-00000-of-00001-000001.jsonl.tmp"), "half a r").unwrap();
    let refused = run(&[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains("already holds 1 parts: continue with --resume"),
        "{}",
        text(&refused.stderr)
    );
    let resumed = run(&["--resume"]);
    assert!(
        resumed.status.success() && text(&resumed.stderr).contains("5 that already had a row"),
        "{}",
        text(&resumed.stderr)
    );
    assert_eq!(rows(&out, ""), whole);

    let other = run(&["--resume", "--prior", "train"]);
    assert!(
        text(&other.stderr).contains("made with prior \"uniform\", but now it is \"train\""),
        "{}",
        text(&other.stderr)
    );
    let record = fs::read(out.join("run.json")).unwrap();
    fs::remove_file(out.join("run.json")).unwrap();
    let unknown = run(&["--resume", "--prior", "train"]);
    assert!(text(&unknown.stderr).contains("3 parts without run.json"), "{}", text(&unknown.stderr));
    fs::write(out.join("run.json"), record).unwrap();
    fs::write(out.join("part-00000-of-00001-000001.jsonl"), "{\"path\":").unwrap();
    let damaged = run(&["--resume"]);
    assert!(text(&damaged.stderr).contains("000001.jsonl: row 1: "), "{}", text(&damaged.stderr));
}

#[test]
fn shares_of_one_folder_are_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (images, out) = (folder.path().join("images"), folder.path().join("rows"));
    fs::create_dir(&images).unwrap();
    pictures(&images, 20);
    let (images, dir) = (images.to_str().unwrap(), out.to_str().unwrap());
    for share in ["0/3", "1/3", "2/3"] {
        assert!(nbn_score(&["--output-dir", dir, "--shard", share, images]).status.success());
    }
    let mut merged = rows(&out, "");
    merged.sort();
    assert_eq!(merged, text(&nbn_score(&[images]).stdout).lines().collect::<Vec<_>>());
    assert!((0..3).all(|share| !rows(&out, &format!("{share:05}-of-00003")).is_empty()));
    // Another split of the same folder leaves out what has a row, too.
    let again = nbn_score(&["--output-dir", dir, "--shard", "0/1", "--resume", images]);
    assert!(text(&again.stderr).contains("scored      0 images"), "{}", text(&again.stderr));
}

#[test]
fn a_source_that_cannot_be_used_says_what_would_be() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("a.csv"), "id,picture\n1,x.png\n").unwrap();
    fs::write(at("b.parquet"), "no table").unwrap();
    fs::write(at("c.jsonl"), "{\"picture\":\"x.png\"}\n").unwrap();
    fs::write(at("d.txt"), "x.png\n").unwrap();
    fs::write(at("empty.tar"), "").unwrap();
    let cases: [(&[&str], &str); 12] = [
        (&[&at("empty.tar")], "empty.tar cannot be read further: it is empty"),
        (&["--label-column", "x", &at("d.txt")], "--label-column needs a list or table with columns"),
        (&["--labels", "line", &at("a.csv")], "--labels line needs a text list"),
        (&["--summary", &at("no/folder/s.json"), &at("d.txt")], "--summary: cannot write"),
        (&[&at("a.csv")], "the columns are id, picture: name one with --image-column"),
        (
            &["--image-column", "photo", &at("a.csv")],
            "there is no column \"photo\" (--image-column); the columns are id, picture",
        ),
        (&["--image-column", "picture", &at("a.csv")], "file_not_found 1"),
        (&[&at("b.parquet")], "b.parquet: "),
        (&[&at("gone.tar")], "gone.tar: No such file"),
        (&[&at("*.jpg")], "no file matches"),
        (&[&at("c.jsonl")], "list_entry 1"),
        (&["--labels", "line", &at("d.txt")], "list_entry 1"),
    ];
    for (args, words) in cases {
        let out = nbn_score(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        assert!(text(&out.stderr).contains(words), "{args:?}: {}", text(&out.stderr));
    }
    let usage = nbn_score(&["--shard", "4/4", &at("d.txt")]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(text(&usage.stderr).contains("the last is 3"), "{}", text(&usage.stderr));
}

/// Scores what `inputs` name; the summary, and the keys of the rows.
fn run(inputs: &[&str], options: &SourceOptions, stdin: impl BufRead + Send + 'static) -> (Summary, Vec<String>) {
    let model = ServedModel::start(shipped(), library(), &model_options(), Arc::new(Budget::new(1))).unwrap();
    let inputs: Vec<_> = inputs.iter().map(|input| input.into()).collect();
    let source = Source::open(&inputs, options, stdin).unwrap();
    let columns = Columns {
        top_k: 1,
        label: false,
        set: false,
        familiarity: false,
        probabilities: false,
        logits: false,
        features: false,
    };
    let (manifest, scorer) = (&model.manifest, &model.scorer);
    let rule = scorer.rule(ScoreRequest::default(), &Prior::default()).unwrap();
    let scoring = Scoring { manifest, scorer, rule, min_score: 0.0, columns };
    let origin = Origin::new((&model.name, &model.version), &model.scorer, &scoring.rule, nbn::bundle::Pixels::Exact);
    let mut rows =
        RowWriter::new(Vec::new(), Form { format: Format::Csv, columns, classes: &manifest.classes, origin: &origin })
            .unwrap();
    let run = batch::BatchOptions {
        max_file_bytes: options.max_file_bytes,
        memory: 1 << 20,
        readers: 2,
        skip_duplicates: false,
        committed: HashMap::new(),
        stopped: options.stopped.clone(),
    };
    let summary = batch::run(source, &model.engine, &scoring, &mut rows, run, |_| ()).unwrap();
    rows.finish().unwrap();
    let table = text(&rows.into_inner().unwrap());
    (summary, table.lines().skip(1).map(|line| line.split(',').next().unwrap().to_owned()).collect())
}

#[test]
fn a_store_that_the_caller_brings_is_read_like_any_other() {
    let store = InMemory::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for name in ["photos/b.png", "photos/sub/a.png", "photos/notes.txt", "other/c.png"] {
        let bytes = picture(30, 20, ImageFormat::Png);
        runtime.block_on(store.put(&name.into(), bytes.into())).unwrap();
    }
    let store = Arc::new(store);
    let stores = Stores::default().with("memory://bucket", store.clone());
    let options = SourceOptions { stores, max_file_bytes: 1 << 20, ..SourceOptions::default() };
    let (summary, keys) =
        run(&["memory://bucket/photos", "memory://bucket/other/gone.png"], &options, std::io::empty());
    assert_eq!((summary.scored, summary.failed, summary.errors.get("file_not_found")), (2, 1, Some(&1)));
    assert_eq!(
        keys,
        ["memory://bucket/photos/b.png", "memory://bucket/photos/sub/a.png", "memory://bucket/other/gone.png"]
    );
    for (pattern, found) in [
        ("memory://bucket/photos/*.png", &["memory://bucket/photos/b.png"][..]),
        (
            "memory://bucket/**/*.png",
            &["memory://bucket/other/c.png", "memory://bucket/photos/b.png", "memory://bucket/photos/sub/a.png"],
        ),
    ] {
        assert_eq!(run(&[pattern], &options, std::io::empty()).1, found);
    }
    let list = b"./b.png\n../other/c.png\n../../d.png\n".to_vec();
    runtime.block_on(store.put(&"photos/list.txt".into(), list.into())).unwrap();
    let (summary, keys) = run(&["memory://bucket/photos/list.txt"], &options, std::io::empty());
    assert_eq!((summary.scored, summary.errors.get("list_entry")), (2, Some(&1)));
    assert_eq!(keys[..2], ["memory://bucket/photos/b.png", "memory://bucket/other/c.png"]);
}

/// Three lines, then an error for every read.
struct Failing(Cursor<Vec<u8>>);

impl Read for Failing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 => Err(io::Error::other("the line is dead")),
            n => Ok(n),
        }
    }
}

#[test]
fn a_list_that_breaks_off_is_told_to_every_share_once() {
    for share in 0..3 {
        let shard = Shard::new(share, 3).unwrap();
        let options = SourceOptions { shard, max_file_bytes: 1 << 20, ..SourceOptions::default() };
        let list = BufReader::new(Failing(Cursor::new(b"gone/a.png\ngone/b.png\ngone/c.png\n".to_vec())));
        let (summary, keys) = run(&["-"], &options, list);
        assert_eq!(summary.broken, ["stdin cannot be read further: the line is dead"]);
        assert_eq!(summary.failed as usize, keys.len());
        assert!(keys.iter().all(|key| key.starts_with("gone/")), "{keys:?}");
    }
}

/// Everything below `folder`, without following links: contents of files, targets of links.
fn snapshot(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        let content = if kind.is_symlink() {
            format!("link to {}", fs::read_link(&path).unwrap().display())
        } else if kind.is_dir() {
            found.extend(snapshot(&path));
            "folder".into()
        } else {
            text(&fs::read(&path).unwrap())
        };
        found.insert(path, content);
    }
    found
}

/// As somebody else's program leaves it, three hours ago.
fn age(path: &Path) {
    File::open(path).unwrap().set_modified(SystemTime::now() - Duration::from_secs(3 * 3600)).unwrap();
}

#[test]
fn what_others_put_beside_the_rows_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (images, out, elsewhere) =
        (folder.path().join("images"), folder.path().join("rows"), folder.path().join("elsewhere"));
    for made in [&images, &out, &elsewhere] {
        fs::create_dir(made).unwrap();
    }
    pictures(&images, 3);
    fs::write(elsewhere.join("precious"), "precious").unwrap();
    let stale = ".part-00000-of-00001-000777.jsonl.tmp";
    for beside in [&out, folder.path()] {
        for name in [
            ".part-00000-of-00001-notes",
            ".part-00000-of-00001-000001.jsonl",
            ".part-00000-of-00001-1.jsonl.tmp",
            ".part-00000-of-00001-000001.txt.tmp",
            ".part-00001-of-00002-000001.jsonl.tmp",
            ".lock-00000-of-00001",
            ".rows.jsonl-1-2-3",
            ".summary.json-1-2-3",
            ".run.json-00000-of-00002.tmp",
            "notes.txt",
        ] {
            fs::write(beside.join(name), "mine").unwrap();
            age(&beside.join(name));
        }
        let repository = beside.join(".part-00000-of-00001-000778.jsonl.tmp");
        fs::create_dir(&repository).unwrap();
        fs::write(repository.join("key"), "key").unwrap();
        age(&repository);
        symlink(elsewhere.join("precious"), beside.join(".part-00000-of-00001-000779.jsonl.tmp")).unwrap();
        symlink(&elsewhere, beside.join(".part-00000-of-00001-000780.jsonl.tmp")).unwrap();
    }
    let before = snapshot(folder.path());
    fs::write(out.join(stale), "half a r").unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let to_parts = nbn_score(&["--output-dir", &at("rows"), "--summary", &at("summary.json"), &at("images")]);
    assert!(to_parts.status.success(), "{}", text(&to_parts.stderr));
    let to_file = nbn_score(&["--output", &at("rows.jsonl"), "--summary", &at("summary.json"), &at("images")]);
    assert!(to_file.status.success(), "{}", text(&to_file.stderr));
    let mut after = snapshot(folder.path());
    for made in ["rows/part-00000-of-00001-000000.jsonl", "rows/run.json", "rows.jsonl", "summary.json"] {
        assert!(after.remove(&folder.path().join(made)).is_some(), "{made}");
    }
    assert_eq!(after, before);
}

#[test]
fn a_link_where_a_part_is_drafted_is_not_written_through() {
    let folder = tempfile::tempdir().unwrap();
    let (images, out) = (folder.path().join("images"), folder.path().join("rows"));
    fs::create_dir(&images).unwrap();
    fs::create_dir(&out).unwrap();
    pictures(&images, 1);
    let precious = folder.path().join("precious");
    fs::write(&precious, "precious").unwrap();
    let link = out.join(".part-00000-of-00001-000000.jsonl.tmp");
    symlink(&precious, &link).unwrap();
    let refused = nbn_score(&["--output-dir", out.to_str().unwrap(), images.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("000000.jsonl: File exists"), "{}", text(&refused.stderr));
    assert_eq!((fs::read_to_string(&precious).unwrap(), fs::read_link(&link).unwrap()), ("precious".into(), precious));
}

#[test]
fn a_run_json_of_another_program_is_refused_and_left() {
    let folder = tempfile::tempdir().unwrap();
    let (images, out) = (folder.path().join("images"), folder.path().join("rows"));
    fs::create_dir(&images).unwrap();
    fs::create_dir(&out).unwrap();
    pictures(&images, 2);
    let (record, elsewhere) = (out.join("run.json"), folder.path().join("elsewhere.json"));
    fs::write(&elsewhere, "{}").unwrap();
    let run = |more: &[&str]| {
        nbn_score(&[&["--output-dir", out.to_str().unwrap()], more, &[images.to_str().unwrap()]].concat())
    };
    let file = |content: &'static str| move |path: &Path| fs::write(path, content).unwrap();
    type Make<'a> = Box<dyn Fn(&Path) + 'a>;
    let cases: [(Make<'_>, &str); 6] = [
        (Box::new(file("")), "it is not a JSON object"),
        (Box::new(file("[1, 2]")), "it is not a JSON object"),
        (Box::new(file("{\"nbn\": \"0.1.0\", \"seed\": 7}")), "it has no field \"abstain_prior_only\""),
        (Box::new(|path| File::create(path).unwrap().set_len(5 << 20).unwrap()), "it has 5242880 bytes"),
        (Box::new(|path| fs::create_dir_all(path.join("kept")).unwrap()), "it is not a regular file"),
        (Box::new(|path| symlink(&elsewhere, path).unwrap()), "it is not a regular file"),
    ];
    for (make, reason) in cases {
        make(&record);
        if record.is_file() {
            age(&record);
        }
        let before = snapshot(folder.path());
        for more in [&[][..], &["--resume"], &["--shard", "0/2"]] {
            let refused = run(more);
            assert_eq!(refused.status.code(), Some(1), "{reason}");
            let said = text(&refused.stderr);
            assert!(said.contains("run.json was not written by a run of this version of nbn score"), "{said}");
            assert!(said.contains(reason) && said.contains("move it, or give another folder"), "{said}");
        }
        let mut after = snapshot(folder.path());
        after.retain(|path, _| !path.file_name().unwrap().to_str().unwrap().starts_with(".lock-"));
        assert_eq!(after, before, "{reason}");
        fs::remove_file(out.join(".lock-00000-of-00001")).unwrap();
        fs::remove_file(out.join(".lock-00000-of-00002")).unwrap();
        if record.is_symlink() || !record.is_dir() {
            fs::remove_file(&record).unwrap();
        } else {
            fs::remove_dir_all(&record).unwrap();
        }
    }
    // Its own, of a run that ended before it wrote a part, is replaced.
    let nothing = folder.path().join("nothing.txt");
    fs::write(&nothing, "").unwrap();
    assert!(nbn_score(&["--output-dir", out.to_str().unwrap(), nothing.to_str().unwrap()]).status.success());
    assert_eq!(serde_json::from_slice::<Value>(&fs::read(&record).unwrap()).unwrap()["prior"], "uniform");
    assert!(run(&["--prior", "train"]).status.success());
    assert_eq!(serde_json::from_slice::<Value>(&fs::read(&record).unwrap()).unwrap()["prior"], "train");
    assert_eq!(rows(&out, "").len(), 2);
}

#[test]
fn a_run_that_fails_before_its_first_row_leaves_the_files_it_was_to_write() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(at("images")).unwrap();
    pictures(Path::new(&at("images")), 1);
    fs::write(at("a.csv"), "id,picture\n1,x.png\n").unwrap();
    fs::write(at("rows.jsonl"), "rows of yesterday\n").unwrap();
    fs::write(at("summary.json"), "counts of yesterday\n").unwrap();
    let before = snapshot(folder.path());
    let (images, gone) = (at("images"), at("gone"));
    let cases: [(&[&str], &str); 7] = [
        (&["--model", &gone, &images], "gone"),
        (&[&at("gone/*.png")], "no file matches"),
        (&[&at("gone.tar")], "No such file"),
        (&[&at("a.csv")], "name one with --image-column"),
        (&["--labels", "line", &images], "--labels line needs a text list"),
        (&["--prior", &at("gone.json"), &images], "--prior"),
        (&["--alpha", "7", &images], "alpha"),
    ];
    for (args, words) in cases {
        let model = if args[0] == "--model" { &[][..] } else { &["--model", "models/cifar10-lt"] };
        let files = ["--output", &at("rows.jsonl"), "--summary", &at("summary.json")];
        let failed = nbn(&[&["score"], model, &files, args].concat());
        assert_eq!(failed.status.code(), Some(1), "{args:?}");
        assert!(text(&failed.stderr).contains(words), "{args:?}: {}", text(&failed.stderr));
        assert_eq!(snapshot(folder.path()), before, "{args:?}");
    }
    // A summary that cannot be written is told before the rows are touched, and rows before the summary.
    for (output, summary) in
        [("rows.jsonl", "no/folder.json"), ("no/rows.jsonl", "summary.json"), ("images", "summary.json")]
    {
        let failed = nbn_score(&["--output", &at(output), "--summary", &at(summary), &images]);
        assert_eq!(failed.status.code(), Some(1));
        assert!(text(&failed.stderr).contains(": cannot write "), "{}", text(&failed.stderr));
        assert_eq!(snapshot(folder.path()), before);
    }
    // A source without a readable row has nothing to take the place of the rows; the summary says so.
    fs::write(at("empty.tar"), "").unwrap();
    let files = ["--output", &at("rows.jsonl"), "--summary", &at("summary.json")];
    assert_eq!(nbn_score(&[&files[..], &[&at("empty.tar")]].concat()).status.code(), Some(1));
    assert_eq!(fs::read_to_string(at("rows.jsonl")).unwrap(), "rows of yesterday\n");
    let summary: Value = serde_json::from_slice(&fs::read(at("summary.json")).unwrap()).unwrap();
    assert_eq!((&summary["scored"], summary["broken"].as_array().unwrap().len()), (&Value::from(0), 1));
    // A list that is empty has no rows, and that is what the file says then.
    fs::write(at("nothing.txt"), "").unwrap();
    for (format, rows) in
        [("jsonl", ""), ("csv", "path,error,decision,reason,label_1,score_1,model,version,scale,calibration,prior\n")]
    {
        assert!(nbn_score(&[&files[..], &["--format", format, &at("nothing.txt")]].concat()).status.success());
        assert_eq!(fs::read_to_string(at("rows.jsonl")).unwrap(), rows);
    }
}

#[test]
fn a_file_that_is_read_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    pictures(folder.path(), 1);
    fs::write(at("list.txt"), "00.png\n").unwrap();
    fs::write(at("prior.json"), "[1,1,1,1,1,1,1,1,1,1]").unwrap();
    fs::hard_link(at("list.txt"), at("same.txt")).unwrap();
    symlink("list.txt", at("link.txt")).unwrap();
    fs::create_dir(at("rows")).unwrap();
    let (list, other) = (at("list.txt"), at("./other.json"));
    let before = snapshot(folder.path());
    let cases: [(&[&str], &str, &str); 9] = [
        (&["--output", &list, &list], "--output", "the input"),
        (&["--output", &at("same.txt"), &list], "--output", "the input"),
        (&["--summary", &at("link.txt"), &list], "--summary", "the input"),
        (&["--output", &list, &format!("file://{list}")], "--output", "the input"),
        (&["--output", &other, "--summary", &at("other.json"), &list], "--output", "--summary"),
        (&["--output", &list, "--summary", &at("link.txt"), &at("00.png")], "--output", "--summary"),
        (&["--prior", &at("prior.json"), "--summary", &at("prior.json"), &list], "--summary", "--prior"),
        (&["--output", &at("00.png"), &list], "--output", "has the name of an image file"),
        (&["--output-dir", &at("rows"), "--summary", &at("rows/run.json"), &list], "--summary", "--output-dir"),
    ];
    for (args, file, other) in cases {
        let refused = nbn_score(args);
        assert_eq!(refused.status.code(), Some(1), "{args:?}");
        let said = text(&refused.stderr);
        assert!(said.contains(file) && said.contains(other) && said.contains("give another file"), "{args:?}: {said}");
        assert_eq!(snapshot(folder.path()), before, "{args:?}");
    }
    // A list on standard input is a file, too.
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbn"));
    command.current_dir(root()).args(["score", "--model", "models/cifar10-lt", "--output", &list]);
    let refused = command.stdin(File::open(&list).unwrap()).output().unwrap();
    assert!(text(&refused.stderr).contains("is the same file as the input /dev/stdin"), "{}", text(&refused.stderr));
    assert_eq!(snapshot(folder.path()), before);
}

#[test]
fn the_files_of_the_bundle_that_scores_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let bundle = repository(folder.path()).join("cifar10-lt/1");
    fs::remove_file(bundle.join("evaluation.json")).unwrap();
    pictures(folder.path(), 1);
    symlink(bundle.join("model.onnx"), at("link.jsonl")).unwrap();
    let before = snapshot_of_bytes(&bundle);
    let (model, picture) = (at("models/cifar10-lt"), at("00.png"));
    let files = ["manifest.json", "model.onnx", "calibration.json", "evaluation.json"].map(|name| bundle.join(name));
    for path in files.iter().map(|path| path.to_str().unwrap().to_owned()).chain([at("link.jsonl")]) {
        for flag in ["--output", "--summary"] {
            let refused = nbn(&["score", "--model", &model, flag, &path, &picture]);
            assert_eq!(refused.status.code(), Some(1), "{flag} {path}");
            let said = text(&refused.stderr);
            let expected =
                [flag, "is the same file as the bundle's file", "which it would overwrite: give another file"];
            assert!(expected.iter().all(|words| said.contains(words)), "{flag} {path}: {said}");
            assert_eq!(snapshot_of_bytes(&bundle), before, "{flag} {path}");
        }
    }
}

/// The files in `folder` and their bytes.
fn snapshot_of_bytes(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn a_lock_that_is_no_regular_file_is_refused_and_left() {
    let folder = tempfile::tempdir().unwrap();
    let (images, out) = (folder.path().join("images"), folder.path().join("rows"));
    fs::create_dir(&images).unwrap();
    fs::create_dir(&out).unwrap();
    pictures(&images, 1);
    let lock = out.join(".lock-00000-of-00001");
    fs::write(folder.path().join("precious"), "precious").unwrap();
    for target in ["../gone", "../precious"] {
        symlink(target, &lock).unwrap();
        let before = snapshot(folder.path());
        let refused = nbn_score(&["--output-dir", out.to_str().unwrap(), images.to_str().unwrap()]);
        assert_eq!(refused.status.code(), Some(1), "{target}");
        let said = text(&refused.stderr);
        assert!(said.contains(".lock-00000-of-00001") && said.contains("it is not a regular file"), "{target}: {said}");
        assert_eq!(snapshot(folder.path()), before, "{target}");
        fs::remove_file(&lock).unwrap();
    }
    assert!(Command::new("mkfifo").arg(&lock).status().unwrap().success());
    let refused = nbn_score(&["--output-dir", out.to_str().unwrap(), images.to_str().unwrap()]);
    assert!(text(&refused.stderr).contains("it is not a regular file"), "{}", text(&refused.stderr));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
}

#[test]
fn rows_and_summaries_go_to_files_links_pipes_and_devices() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(at("images")).unwrap();
    pictures(Path::new(&at("images")), 2);
    let images = at("images");
    let want = text(&nbn_score(&[&images]).stdout);
    let scored = |summary: &[u8]| serde_json::from_slice::<Value>(summary).unwrap()["scored"].clone();
    // What was there was longer.
    fs::write(at("rows.jsonl"), "x".repeat(100_000)).unwrap();
    fs::write(at("target.json"), "y".repeat(100_000)).unwrap();
    symlink("target.json", at("summary.json")).unwrap();
    let args = ["--output", &at("rows.jsonl"), "--summary", &at("summary.json"), &images];
    assert!(nbn_score(&args).status.success());
    assert_eq!(fs::read_to_string(at("rows.jsonl")).unwrap(), want);
    assert_eq!(scored(&fs::read(at("target.json")).unwrap()), 2);
    assert!(fs::symlink_metadata(at("summary.json")).unwrap().is_symlink());

    let pipes = [at("rows.pipe"), at("summary.pipe")];
    assert!(Command::new("mkfifo").args(&pipes).status().unwrap().success());
    let readers = pipes.clone().map(|pipe| thread::spawn(move || fs::read(pipe).unwrap()));
    let piped = nbn_score(&["--output", &pipes[0], "--summary", &pipes[1], &images]);
    assert!(piped.status.success(), "{}", text(&piped.stderr));
    let [rows, summary] = readers.map(|reader| reader.join().unwrap());
    assert_eq!((text(&rows), scored(&summary)), (want.clone(), 2.into()));

    let streams = ["--output", "/dev/stdout", "--summary", "/dev/stdout", &images];
    let piped = nbn_score(&streams).stdout;
    assert_eq!((text(&piped[..want.len()]), scored(&piped[want.len()..])), (want.clone(), 2.into()));
    // Standard output is a file that has something already.
    let mut log = File::create(at("log")).unwrap();
    log.write_all(b"before\n").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbn"));
    command.current_dir(root()).args(["score", "--model", "models/cifar10-lt", "--top-k", "1"]).args(streams);
    assert!(command.stdout(log).stderr(Stdio::null()).status().unwrap().success());
    let log = fs::read(at("log")).unwrap();
    let rest = log.strip_prefix(format!("before\n{want}").as_bytes()).unwrap();
    assert_eq!(scored(rest), 2);

    // The last bytes that do not fit are told.
    for format in ["jsonl", "csv", "parquet"] {
        let full = nbn_score(&["--format", format, "--output", "/dev/full", &images]);
        assert_eq!(full.status.code(), Some(1), "{format}");
        assert!(text(&full.stderr).contains("a row could not be written to /dev/full"), "{}", text(&full.stderr));
    }
    let full = nbn_score(&["--output", "/dev/null", "--summary", "/dev/full", &images]);
    assert_eq!(full.status.code(), Some(1));
    assert!(text(&full.stderr).contains("--summary: cannot write /dev/full"), "{}", text(&full.stderr));
}

/// Runs `nbn score` with `args`; what it wrote, and the most memory that it had, in MiB, as its status told it in the end.
fn measured(args: &[&str]) -> (Option<i32>, String, String, u64) {
    let (out, err) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbn"));
    command.current_dir(root()).args(["score", "--model", "models/cifar10-lt", "--top-k", "1"]).args(args);
    let mut child = Owned::begin(command.stdout(out.reopen().unwrap()).stderr(err.reopen().unwrap()));
    let path = format!("/proc/{}/status", child.id());
    let peak_now = || {
        let status = fs::read_to_string(&path).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let mut peak = 0;
    let status = loop {
        // A process that has ended has no memory to tell of; the peak is one of its whole life.
        peak = peak_now().unwrap_or(peak);
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    };
    let read = |file: &tempfile::NamedTempFile| text(&fs::read(file.path()).unwrap());
    (status.code(), read(&out), read(&err), peak >> 10)
}

/// A header of a tar archive.
fn header(kind: tar::EntryType, name: &str, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_cksum();
    header
}

#[test]
fn a_source_cannot_make_the_memory_grow_by_what_it_claims() {
    const HUGE: u64 = 400 << 20;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let bytes = picture(30, 20, ImageFormat::Png);
    let archive = |name: &str, kind: tar::EntryType| {
        let file = File::create(at(name)).unwrap();
        let mut packed = flate2::write::GzEncoder::new(file, flate2::Compression::default());
        packed.write_all(header(tar::EntryType::Regular, "a.png", bytes.len() as u64).as_bytes()).unwrap();
        packed.write_all(&bytes).unwrap();
        packed.write_all(&vec![0; bytes.len().next_multiple_of(512) - bytes.len()]).unwrap();
        packed.write_all(header(kind, "long", HUGE).as_bytes()).unwrap();
        io::copy(&mut io::repeat(0).take(HUGE), &mut packed).unwrap();
        packed.write_all(header(tar::EntryType::Regular, "b.png", 0).as_bytes()).unwrap();
        packed.finish().unwrap();
    };
    archive("name.tar.gz", tar::EntryType::GNULongName);
    archive("pax.tar.gz", tar::EntryType::XHeader);
    archive("passed_over.tar.gz", tar::EntryType::Regular);
    // Zeros that take no room on the disk.
    for name in ["list.txt", "list.jsonl", "list.csv"] {
        let mut list = File::create(at(name)).unwrap();
        list.write_all(b"path\n\"").unwrap();
        list.set_len(HUGE).unwrap();
    }
    fs::write(at("a.png"), &bytes).unwrap();
    let (_, _, _, usual) = measured(&[&at("a.png")]);
    let broken = "cannot be read further: ";
    for (name, told) in [
        ("name.tar.gz", "the name of a member has 419430399 bytes; nbn reads up to 4096"),
        ("pax.tar.gz", "a PAX header has 419430400 bytes; nbn reads up to 65536"),
        ("passed_over.tar.gz", "nbn accepts up to 200 times as many: unpack the file and give the result"),
        ("list.csv", "a record is longer than 1048576 bytes"),
        ("list.txt", "it is longer than 1048576 bytes"),
        ("list.jsonl", "it is longer than 1048576 bytes"),
    ] {
        let (code, rows, said, peak) = measured(&[&at(name)]);
        assert_eq!(code, Some(1), "{name}: {said}");
        let is_list = name.starts_with("list");
        assert!(if is_list && name != "list.csv" { &rows } else { &said }.contains(told), "{name}: {said} {rows}");
        assert_eq!(said.contains(broken), !["list.txt", "list.jsonl"].contains(&name), "{name}: {said}");
        // What stands before it has its row.
        assert!(is_list || rows.contains("tar.gz/a.png\",\"predictions\""), "{name}: {rows}");
        assert!(peak < usual + 48, "{name}: {peak} MiB, and {usual} MiB with one picture");
    }
}

#[test]
fn members_have_their_long_names_and_sparse_ones_say_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = picture(30, 20, ImageFormat::Png);
    let gnu = format!("{}/{}.png", "g".repeat(200), "n".repeat(200));
    let pax = format!("{}/{}.png", "p".repeat(2000), "x".repeat(2000));
    let mut entry = header(tar::EntryType::Regular, "short", bytes.len() as u64);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut entry, &gnu, &bytes[..]).unwrap();
    let size = bytes.len().to_string();
    builder.append_pax_extensions([("path", pax.as_bytes()), ("size", size.as_bytes())]).unwrap();
    builder.append(&header(tar::EntryType::Regular, "short", bytes.len() as u64), &bytes[..]).unwrap();
    builder.append_pax_extensions([("GNU.sparse.major", &b"1"[..]), ("GNU.sparse.name", b"holes.png")]).unwrap();
    builder.append(&header(tar::EntryType::Regular, "short", 600), &[1; 600][..]).unwrap();
    builder.append(&header(tar::EntryType::Regular, "last.png", bytes.len() as u64), &bytes[..]).unwrap();
    let archive = folder.path().join("a.tar");
    fs::write(&archive, builder.into_inner().unwrap()).unwrap();
    let archive = archive.to_str().unwrap();
    let scored = nbn_score(&[archive]);
    let rows: Vec<Value> = text(&scored.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let keys: Vec<&str> = rows.iter().map(|row| row["path"].as_str().unwrap()).collect();
    assert_eq!(keys, [&gnu, &pax, "holes.png", "last.png"].map(|name| format!("{archive}/{name}")));
    assert!(rows[2]["error"].as_str().unwrap().contains("stores this file as a sparse file"), "{}", rows[2]);
    assert_eq!([0, 1, 3].map(|n| rows[n]["predictions"] == rows[0]["predictions"]), [true; 3]);
    assert!(text(&scored.stderr).contains("failed      1: archive_sparse 1"), "{}", text(&scored.stderr));
}

#[test]
fn what_a_list_says_is_quoted_in_short() {
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("list.jsonl");
    let long = "a".repeat(100_000);
    let column = format!("{{\"{long}\":1}}");
    fs::write(&list, format!("\"{long}\"\n{column}\n{{\"path\":\"{long}\"}}\n")).unwrap();
    let rows = text(&nbn_score(&[list.to_str().unwrap()]).stdout);
    let errors: Vec<Value> = rows.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
    assert_eq!(errors.len(), 3);
    for (row, words) in errors.iter().zip([
        "invalid type: string",
        "no column has one of the usual names (path",
        "its path has 100000 bytes",
    ]) {
        let error = row["error"].as_str().unwrap();
        assert!(error.contains(words) && error.len() < 700, "{error}");
    }
}
