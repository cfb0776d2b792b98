//! `nbn score` with parts, shares and tables. `tests/clients/batch.py` has other programs read the rows, and kills.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::sync::Arc;

use image::ImageFormat;
use nbn::classify::ScoreRequest;
use nbn::engine::Budget;
use nbn::registry::ServedModel;
use nbn::score::{self, Columns, Format, Output, RowWriter, Scoring, Shard, Source, SourceOptions, Stores, Summary};
use nbn::scores::Prior;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::Value;

use crate::support::{data, fold, library, model_options, nbn, picture, shipped, text};

fn nbn_score(args: &[&str]) -> std::process::Output {
    nbn(&[&["score", "--model", "models/cifar10-lt", "--top-k", "1"], args].concat())
}

fn pictures(folder: &Path, n: u32) {
    for i in 0..n {
        fs::write(folder.join(format!("{i:02}.png")), picture(20 + i, 30, ImageFormat::Png)).unwrap();
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
    let (with, without) = (model("with", &["--features"]), model("without", &[]));
    let run = |model: &Path, format: &str, more: &[&str]| {
        let args = ["score", "--model", model.to_str().unwrap(), "--features", "--format", format];
        nbn(&[&args[..], more, &[images.to_str().unwrap()]].concat())
    };
    let refused = run(&without, "jsonl", &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("has no output features: make the bundle with `fold export --features`"));

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
    assert!(text(&refused.stderr).contains("holds 1 parts already: go on with --resume"), "{}", text(&refused.stderr));
    let resumed = run(&["--resume"]);
    assert!(
        resumed.status.success() && text(&resumed.stderr).contains("5 had a row already"),
        "{}",
        text(&resumed.stderr)
    );
    assert_eq!(rows(&out, ""), whole);

    let other = run(&["--resume", "--prior", "train"]);
    assert!(
        text(&other.stderr).contains("made with prior \"uniform\", now it is \"train\""),
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
    assert!(text(&again.stderr).contains("0 images scored, 0 failed"), "{}", text(&again.stderr));
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
        (&["--label-column", "x", &at("d.txt")], "--label-column is of use only with a list or table with columns"),
        (&["--labels", "line", &at("a.csv")], "--labels line is of use only with a text list"),
        (&["--summary", &at("no/folder/s.json"), &at("d.txt")], "--summary: cannot write"),
        (&[&at("a.csv")], "there are id, picture: name one with --image-column"),
        (
            &["--image-column", "photo", &at("a.csv")],
            "there is no column \"photo\" (--image-column); there are id, picture",
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
    let columns = Columns { top_k: 1, label: false, set: false, probabilities: false, logits: false, features: false };
    let (manifest, scorer) = (&model.manifest, &model.scorer);
    let rule = scorer.rule(ScoreRequest::default(), &Prior::default()).unwrap();
    let scoring = Scoring { manifest, scorer, rule, min_score: 0.0, columns };
    let mut rows = RowWriter::new(Vec::new(), Format::Csv, columns, &manifest.classes).unwrap();
    let run = score::Options {
        max_file_bytes: options.max_file_bytes,
        memory: 1 << 20,
        readers: 2,
        skip_duplicates: false,
        committed: HashMap::new(),
        stopped: options.stopped.clone(),
    };
    let summary = score::run(source, &model.engine, &scoring, &mut rows, run, |_| ()).unwrap();
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
