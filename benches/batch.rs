//! `nbn score` beside a loop without it and a plain Python script, start included, on the same bundle, photos and cores.
//!
//!     NBN_BENCH_PHOTOS=photos cargo bench --bench batch
//!     NBN_BENCH_MODEL=models/mine/1 NBN_BENCH_IMAGES=2000 NBN_BENCH_PYTHON=python3 … cargo bench --bench batch
//!
//! The photos are repeated up to NBN_BENCH_IMAGES (default 500). They take turns, NBN_BENCH_ROUNDS times (default 3); what
//! is compared is the median of the rounds' ratios. The loop has one session a processor, warm before the clock starts,
//! and runs on a ready tensor. NBN_BENCH_PYTHON needs onnxruntime, pillow and numpy. The network's share of the workers'
//! time is told, too: it needs no second run, so that a machine whose speed changes does not blur it.
#![allow(missing_docs)]

mod measure;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, ensure};
use measure::median;
use nbn::bundle::Bundle;
use nbn::classify::{Classifier, Input};
use nbn::pixels::{DecodeLimits, Preprocessor};
use nbn::runtime::{Library, NetworkCache, SessionOptions};
use nbn::stop::Stop;

fn main() -> anyhow::Result<()> {
    // `cargo test` runs benches without this flag; there is nothing to measure then.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let set = |name| std::env::var(name).ok();
    let model = std::fs::canonicalize(set("NBN_BENCH_MODEL").unwrap_or("models/cifar10-lt/1".into()))?;
    let photos = PathBuf::from(set("NBN_BENCH_PHOTOS").context("NBN_BENCH_PHOTOS must name a folder of photos")?);
    let images: usize = set("NBN_BENCH_IMAGES").map_or(Ok(500), |text| text.parse())?;
    let rounds: usize = set("NBN_BENCH_ROUNDS").map_or(Ok(3), |text| text.parse())?;
    let mut files: Vec<PathBuf> = std::fs::read_dir(&photos)?.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|e| e == "jpg" || e == "jpeg"));
    files.sort();
    ensure!(!files.is_empty(), "{} holds no .jpg", photos.display());
    let scratch = tempfile::tempdir()?;
    let [list, cache, summary] = ["list.txt", "cache", "summary.json"].map(|name| scratch.path().join(name));
    let lines = files.iter().cycle().take(images).fold(String::new(), |mut text, path| {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{}", std::fs::canonicalize(path).unwrap_or_default().display());
        text
    });
    std::fs::write(&list, lines)?;
    let score = || {
        program(
            Command::new(env!("CARGO_BIN_EXE_nbn"))
                .arg("score")
                .arg("--model")
                .arg(&model)
                .arg("--cache")
                .arg(&cache)
                .arg("--summary")
                .arg(&summary)
                .arg(&list),
        )
    };
    // Fills the cache, and the system's of files.
    score()?;
    let bundle = Bundle::load(&model)?;
    let library = Library::load(None)?;
    let workers = thread::available_parallelism()?.get();
    let mut seconds = [const { Vec::new() }; 3];
    // What the network has of the workers' time from the first picture to the last.
    let mut shares = Vec::new();
    for _ in 0..rounds.max(1) {
        seconds[0].push(bare(&bundle, library, &cache, images)?);
        seconds[1].push(score()?);
        let told: serde_json::Value = serde_json::from_slice(&std::fs::read(&summary)?)?;
        let part = |name: &str| told["seconds"][name].as_f64().context("no seconds in the summary");
        shares.push(part("infer")? / part("total")? / workers as f64);
        if let Some(python) = set("NBN_BENCH_PYTHON") {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/others/batch.py");
            seconds[2].push(program(Command::new(python).arg(script).arg(&list).env("BUNDLE", &model))?);
        }
        let last: Vec<String> = seconds.iter().filter_map(|s| Some(format!("{:.2} s", s.last()?))).collect();
        println!("  {}", last.join("   "));
    }
    println!("{} × {images} photos, median of {rounds}, start included", bundle.manifest.arch);
    let names = ["loop on a ready tensor", "nbn score", "Python, a process per core"];
    for (name, own) in names.iter().zip(&seconds).filter(|(_, own)| !own.is_empty()) {
        let ratios = seconds[0].iter().zip(own).map(|(bare, own)| bare / own).collect();
        let rate = images as f64 / median(own.clone());
        println!("{name:<28} {rate:8.1} images/s   {:.3} of the loop", median(ratios));
    }
    println!("of nbn score's workers' time the network has {:.3}, start not counted", median(shares));
    Ok(())
}

/// Seconds that the program takes from its start to its end.
fn program(command: &mut Command) -> anyhow::Result<f64> {
    let began = Instant::now();
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(began.elapsed().as_secs_f64())
}

/// Seconds for `images` runs of the network, one at a time per processor.
fn bare(bundle: &Bundle, library: &'static Library, cache: &Path, images: usize) -> anyhow::Result<f64> {
    let workers = thread::available_parallelism()?.get();
    let cache = NetworkCache::at(cache.to_owned());
    let limits = DecodeLimits::default();
    let mut classifiers = Classifier::open_many(bundle, library, SessionOptions::default(), limits, &cache, workers)?;
    for classifier in &mut classifiers {
        classifier.network().warm()?;
    }
    let blank = Preprocessor::new(bundle.manifest.preprocessing.clone(), DecodeLimits::default()).blank();
    let tensor: Vec<u8> = blank.iter().flat_map(|v| v.to_le_bytes()).collect();
    let input = Input::Pixels(tensor.into());
    let left = AtomicUsize::new(images);
    let began = Instant::now();
    thread::scope(|scope| {
        for mut classifier in classifiers {
            let (left, input) = (&left, &input);
            scope.spawn(move || {
                let stop = Stop::default();
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
                    classifier.classify(&[(input, &stop)], &stop);
                }
            });
        }
    });
    Ok(began.elapsed().as_secs_f64())
}
