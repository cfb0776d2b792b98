//! Cost of calibrated scores: microseconds per image while serving, seconds and memory of a fit.
//!
//!     cargo bench --bench calibration            # serving, and a fit of 1,000 classes × 20,000 images
//!     cargo bench --bench calibration -- large   # and one of 8,142 classes × 24,426 images (iNaturalist 2018)
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbn::bundle::{BoundCalibration, Bundle, Class, Manifest, TrainingOverlap};
use nbn::calibrate::{CalibrateOptions, Kappa, calibrate};
use nbn::classify::{ScoreRequest, Scorer};
use nbn::data::LabelledLogits;
use nbn::scores::{Logits, Prior};

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
        command,
    }
}

fn serving(shipped: &Manifest, classes: usize) -> anyhow::Result<()> {
    let manifest = manifest(shipped, classes);
    let logits = logits(classes, IMAGES)?;
    let content = calibrate(&logits, &manifest, &options(), &|_| ())?;
    let bound = BoundCalibration { id: "bench".into(), content };
    let manifest = Arc::new(manifest);
    let rows: Vec<Logits> = (0..IMAGES).map(|row| logits.logits(row)).collect::<Result<_, _>>()?;
    let plain = Scorer::new(manifest.clone(), None);
    let scorer = Scorer::new(manifest, Some(bound));
    let request = |alpha| ScoreRequest { alpha, ..ScoreRequest::default() };
    for (name, scorer, alpha) in [
        ("softmax", &plain, None),
        ("calibrated", &scorer, None),
        ("calibrated, with a prediction set", &scorer, Some(0.2)),
    ] {
        let rule = scorer.rule(request(alpha), &Prior::Uniform)?;
        let mut rounds: Vec<Duration> = (0..ROUNDS)
            .map(|_| {
                let began = Instant::now();
                for z in &rows {
                    black_box(scorer.score(black_box(z), &rule));
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
