//! Cost of calibrated scores: microseconds per image while serving, seconds and memory of a fit. Familiarity is of 512
//! features, and of the look of a picture of 224×224 pixels.
//!
//!     cargo bench --bench calibration            # serving, and a fit of 1,000 classes × 20,000 images
//!     cargo bench --bench calibration -- large   # and one of 8,142 classes × 24,426 images (iNaturalist 2018)
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbn::bundle::{BoundCalibration, Bundle, Class, Familiarity, Layout, Manifest, TrainingOverlap};
use nbn::calibrate::{CalibrateOptions, Kappa, Training, calibrate, familiarity};
use nbn::classify::{ScoreRequest, Scorer, Seen};
use nbn::data::{Answers, LabelledLogits};
use nbn::pixels::look;
use nbn::scores::{Logits, Prior};
use ndarray::Array3;

const ROUNDS: usize = 5;
const IMAGES: usize = 200;

fn main() -> anyhow::Result<()> {
    // `cargo test` runs benches without this flag; there is nothing to measure then.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let shipped = Bundle::load("models/cifar10-lt".as_ref())?.manifest;
    let mut sizes = vec![(1000, 20_000)];
    if std::env::args().any(|a| a == "large") {
        sizes.push((8142, 24_426));
    }
    looking();
    serving(&shipped, 1000)?;
    serving(&shipped, 8142)?;
    for (classes, images) in sizes {
        fit(&shipped, classes, images)?;
    }
    Ok(())
}

fn manifest(shipped: &Manifest, classes: usize) -> Manifest {
    let count = |k: usize| (500.0 * 100f64.powf(-(k as f64) / classes as f64)).ceil() as u64;
    let class = |k| Class { label: format!("class {k}"), count: Some(count(k)) };
    Manifest { classes: (0..classes).map(class).collect(), ..shipped.clone() }
}

/// Long-tailed labels, and logits that know them about half the time.
fn logits(classes: usize, images: usize) -> anyhow::Result<LabelledLogits> {
    let mut random = fastrand::Rng::with_seed(1);
    let labels: Vec<u32> = (0..images)
        .map(|n| if n < classes { n as u32 } else { (random.f64().powi(2) * classes as f64) as u32 })
        .collect();
    let mut values: Vec<f32> =
        (0..images * classes).map(|_| 4.0 * (random.f32() + random.f32() + random.f32() - 1.5)).collect();
    for (row, label) in labels.iter().enumerate() {
        values[row * classes + *label as usize] += 6.0;
    }
    LabelledLogits::try_new(classes, values, labels).map_err(anyhow::Error::msg)
}

fn options() -> CalibrateOptions {
    let command = String::new();
    CalibrateOptions {
        kappa: Some(Kappa::Learned),
        rung: None,
        seed: 0,
        groups: None,
        training_overlap: TrainingOverlap::NotChecked,
        pixels: nbn::bundle::Pixels::Exact,
        command,
    }
}

fn serving(shipped: &Manifest, classes: usize) -> anyhow::Result<()> {
    let manifest = manifest(shipped, classes);
    let logits = logits(classes, IMAGES)?;
    let content = calibrate(&logits, &manifest, &options(), &|_| ())?;
    let mut content = content;
    let answers = answers(logits.clone());
    let mut training = Training::new(vec![3; classes]);
    for n in 0..3 * classes {
        // Of each class several.
        let row = (n + n / classes) % IMAGES;
        training.add(n, n % classes, Some(&answers.looks[row]), answers.features.as_ref().map(|f| f[row].as_slice()));
    }
    let began = Instant::now();
    let (record, bytes) = familiarity(Some(training), &answers, &content, &manifest.classes)?;
    let (took, size) = (began.elapsed().as_secs_f64(), bytes.len() as f64 / 1e6);
    println!(
        "{classes} classes: fitting familiarity {took:.1} s after the images have passed; its file has {size:.1} MB"
    );
    content.familiarity = Some(record);
    let known = Some(Arc::new(Familiarity::from_bytes(&bytes)?));
    let bound = BoundCalibration { id: "bench".into(), content, familiarity: known };
    let manifest = Arc::new(manifest);
    let rows: Vec<Logits> = (0..IMAGES).map(|row| logits.logits(row)).collect::<Result<_, _>>()?;
    let plain = Scorer::new(manifest.clone(), None);
    let scorer = Scorer::new(manifest, Some(bound));
    let request = |alpha, familiarity| ScoreRequest { alpha, familiarity, ..ScoreRequest::default() };
    for (name, scorer, request) in [
        ("softmax", &plain, request(None, false)),
        ("calibrated", &scorer, request(None, false)),
        ("calibrated, with a prediction set", &scorer, request(Some(0.2), false)),
        ("calibrated, with familiarity", &scorer, request(None, true)),
    ] {
        let rule = scorer.rule(request, &Prior::Uniform)?;
        let mut rounds: Vec<Duration> = (0..ROUNDS)
            .map(|_| {
                let began = Instant::now();
                for (row, z) in rows.iter().enumerate() {
                    let features = answers.features.as_ref().map(|features| features[row].as_slice());
                    let seen = Seen::new(black_box(z), features, Some(&answers.looks[row]));
                    black_box(scorer.score(seen, &rule));
                }
                began.elapsed()
            })
            .collect();
        rounds.sort();
        println!(
            "{classes} classes, {name}: {:.0} µs an image",
            rounds[ROUNDS / 2].as_secs_f64() * 1e6 / IMAGES as f64
        );
    }
    Ok(())
}

/// Of each row features and a look that say nothing of it.
fn answers(logits: LabelledLogits) -> Answers {
    let mut random = fastrand::Rng::with_seed(2);
    let mut rows = |width: usize| (0..logits.len()).map(|_| (0..width).map(|_| random.f32()).collect()).collect();
    let (features, looks) = (Some(rows(512)), rows(31));
    Answers { hashes: vec![[0; 32]; logits.len()], features, looks, logits }
}

fn looking() {
    let mut random = fastrand::Rng::with_seed(3);
    let picture = Array3::from_shape_fn((3, 224, 224), |_| random.f32());
    let mut rounds: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            (0..IMAGES).for_each(|_| drop(black_box(look(black_box(picture.view()), Layout::Nchw))));
            began.elapsed()
        })
        .collect();
    rounds.sort();
    println!("the look of 224×224 pixels: {:.0} µs an image", rounds[ROUNDS / 2].as_secs_f64() * 1e6 / IMAGES as f64);
}

fn fit(shipped: &Manifest, classes: usize, images: usize) -> anyhow::Result<()> {
    let logits = logits(classes, images)?;
    let began = Instant::now();
    let calibration = calibrate(&logits, &manifest(shipped, classes), &options(), &|_| ())?;
    println!(
        "{classes} classes × {images} images: {:.1} s, {} MB at most (logits {} MB), chose {}",
        began.elapsed().as_secs_f64(),
        peak_megabytes().map_or_else(|| "?".into(), |mb| mb.to_string()),
        (classes * images * 4) >> 20,
        calibration.rung.name()
    );
    Ok(())
}

/// Largest resident size of this process so far.
fn peak_megabytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}
