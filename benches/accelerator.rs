//! The engine over a device that keeps time as an accelerator does: what of the ideal it reaches, and how long answers take.
//!
//!     cargo bench --bench accelerator
//!     NBN_BENCH_SECONDS=3 NBN_BENCH_ROUNDS=5 cargo bench --bench accelerator
//!
//! The device takes a + b × n milliseconds for a batch of n images (tests/it/accelerator.rs). Ideal is the smaller of what the
//! device does with full batches, and of what all processors decode that do nothing else; the engine's own threads and its
//! client share these processors. Beside it, in the same rounds, the other structure: workers that decode and then wait for the
//! device themselves. At last, both structures with the shipped network on the processor. Ratios are medians of the rounds.
#![allow(missing_docs)]

#[path = "../tests/it/accelerator.rs"]
mod accelerator;
mod measure;

use std::collections::VecDeque;
use std::io::Cursor;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use accelerator::Accelerator;
use anyhow::{Context, ensure};
use measure::{median, photo, ratio};
use nbn::bundle::{Bundle, Manifest};
use nbn::classify::{Classifier, Executor, Input, Network, Preparer};
use nbn::engine::{Budget, Crew, Engine, Ticket};
use nbn::pixels::{DecodeLimits, Preprocessor};
use nbn::runtime::{Library, OnnxModel, Runner, SessionOptions};
use nbn::stop::Stop;

/// A device by its name: milliseconds for a batch and for each of its images, and the largest batch.
type Device = (&'static str, f64, f64, usize);
const DEVICES: [Device; 3] =
    [("GPU-like", 1.0, 0.05, 64), ("slow start", 8.0, 0.05, 64), ("many small", 0.1, 0.02, 32)];
/// Executors of a device.
const IN_FLIGHT: usize = 2;
/// Images that answers are waited for, in batches.
const WINDOW: usize = 4;

fn main() -> anyhow::Result<()> {
    // `cargo test` runs benches without this flag; there is nothing to measure then.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let number = |name, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let round = Duration::from_secs_f64(number("NBN_BENCH_SECONDS", 2.0));
    let rounds = number("NBN_BENCH_ROUNDS", 5.0) as usize;
    let bundle = Bundle::load(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/cifar10-lt/1").as_path())?;
    let manifest = Arc::new(bundle.manifest.clone());
    let workers = thread::available_parallelism()?.get();
    let png = Input::Encoded(picture().into());
    let blank = preprocessor(&manifest).blank();
    let tensor = Input::Pixels(blank.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into());
    println!("{workers} processors, {rounds} rounds of {round:?}");
    let photo = Input::Encoded(photo().into());
    let bench = Bench { manifest: manifest.clone(), workers, round, rounds: rounds.max(1) };
    let mut reached = Vec::new();
    for device in DEVICES {
        for (kind, input) in [("32×32 PNG", &png), ("tensors", &tensor)] {
            reached.push(bench.one(device, kind, input)?);
        }
    }
    // Decoding and the network take as long as each other: whoever does one after the other takes twice as long.
    let each = 1e3 / decoding(&manifest, &photo, workers, round);
    reached.push(bench.one(("as slow as decoding", 1.0, each, 64), "500×375 JPEG", &photo)?);
    on_processor(&bundle, &manifest, workers, &png, round, rounds)?;
    println!("engine / ideal: {}", reached.join(", "));
    Ok(())
}

struct Bench {
    manifest: Arc<Manifest>,
    workers: usize,
    round: Duration,
    rounds: usize,
}

impl Bench {
    /// Measures both structures over a device, and says what share of the ideal the engine reaches.
    fn one(&self, device: Device, kind: &str, input: &Input) -> anyhow::Result<String> {
        let Self { ref manifest, workers, round, rounds } = *self;
        let (name, a, b, max_batch) = device;
        let full = max_batch as f64 / (a + b * max_batch as f64) * 1e3;
        println!("{name}, {kind}: {a} ms + {b:.3} ms × n, up to {max_batch} images, {full:.0}/s with full batches");
        let (mut apart, mut together, mut ideals) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            let decoded = if kind == "tensors" { f64::INFINITY } else { decoding(manifest, input, workers, round / 2) };
            ideals.push(full.min(decoded));
            apart.push(saturated(&structure(manifest, device, workers, true)?, input, max_batch, round)?);
            together.push(saturated(&structure(manifest, device, workers, false)?, input, max_batch, round)?);
        }
        let [share, other] = [&apart, &together].map(|rates| ratio(rates, &ideals));
        println!("    ideal {:.0}/s; engine ÷ ideal {share}; workers ÷ ideal {other}", median(ideals.clone()));
        let pause = Duration::from_secs_f64((a + b) * 4e-3);
        let [low, least] = alone(&structure(manifest, device, workers, true)?, input, pause)?;
        let [other, _] = alone(&structure(manifest, device, workers, false)?, input, pause)?;
        println!(
            "    one at a time: p50 {low:.2} ms, {:.2} more than a + b, p10 {least:.2}; workers p50 {other:.2}",
            low - a - b
        );
        let rate = 0.7 * median(ideals.clone());
        let [p50, p99] = open_loop(&structure(manifest, device, workers, true)?, input, rate, round)?;
        let [p50s, p99s] = open_loop(&structure(manifest, device, workers, false)?, input, rate, round)?;
        println!("    at 0.7 of the ideal: p50 {p50:.2} ms, p99 {p99:.2}; workers {p50s:.2}, {p99s:.2}");
        let share = median(apart.iter().zip(&ideals).map(|(rate, ideal)| rate / ideal).collect());
        Ok(format!("{share:.3} {name} {kind}"))
    }
}

fn preprocessor(manifest: &Manifest) -> Preprocessor {
    Preprocessor::new(manifest.preprocessing.clone(), DecodeLimits::default())
}

/// Preparers and two executors, or as many workers, over the device.
fn structure(
    manifest: &Arc<Manifest>,
    (_, a, b, max_batch): Device,
    workers: usize,
    apart: bool,
) -> anyhow::Result<Engine> {
    let time = |ms: f64| Duration::from_secs_f64(ms / 1e3);
    let device = Accelerator::new(0, time(a), time(b), manifest.classes.len());
    let runners = (0..if apart { IN_FLIGHT } else { workers }).map(|_| device.handle()).collect();
    engine(manifest, runners, max_batch, workers, apart)
}

fn engine(
    manifest: &Arc<Manifest>,
    runners: Vec<Box<dyn Runner>>,
    max_batch: usize,
    workers: usize,
    apart: bool,
) -> anyhow::Result<Engine> {
    let crew = if apart {
        let executor = |runner| Executor::new(Network::new(manifest.clone(), runner).with_max_batch(max_batch));
        Crew::Apart {
            preparers: (0..workers).map(|_| Preparer::new(Box::new(preprocessor(manifest)))).collect(),
            devices: vec![("simulated".into(), runners.into_iter().map(executor).collect())],
        }
    } else {
        let limits = DecodeLimits::default();
        let worker = |runner| Classifier::new(manifest.clone(), limits, runner).with_max_batch(max_batch);
        Crew::Together(runners.into_iter().map(worker).collect())
    };
    Ok(Engine::start(crew, 2 * WINDOW * max_batch, Arc::new(Budget::new(workers)))?)
}

/// Images per second that `workers` threads prepare, which do nothing else.
fn decoding(manifest: &Manifest, input: &Input, workers: usize, round: Duration) -> f64 {
    let began = Instant::now();
    let work = || {
        let mut preparer = Preparer::new(Box::new(preprocessor(manifest)));
        let (stop, mut done) = (Stop::default(), 0);
        let mut memory = None;
        while began.elapsed() < round {
            memory = preparer.prepare(input, &stop, memory).ok().and_then(nbn::classify::Ready::emptied);
            done += 1;
        }
        done
    };
    let done: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
    });
    done as f64 / began.elapsed().as_secs_f64()
}

/// Answers per second to a client that always waits for a few batches.
fn saturated(engine: &Engine, input: &Input, max_batch: usize, round: Duration) -> anyhow::Result<f64> {
    let mut open: VecDeque<Ticket> = VecDeque::new();
    let (mut began, mut done, mut warm) = (Instant::now(), 0, false);
    while began.elapsed() < round {
        while open.len() < WINDOW * max_batch {
            open.push_back(engine.submit_waiting(input.clone())?);
        }
        open.pop_front().context("no ticket")?.wait()??;
        done += 1;
        if !warm && done >= WINDOW * max_batch {
            // What was waited for until here was submitted to an idle engine.
            (began, done, warm) = (Instant::now(), 0, true);
        }
    }
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

/// Milliseconds to an answer, median and tenth percentile, of a client that asks again after a pause.
fn alone(engine: &Engine, input: &Input, pause: Duration) -> anyhow::Result<[f64; 2]> {
    let mut times = Vec::new();
    for _ in 0..200 {
        thread::sleep(pause);
        let began = Instant::now();
        engine.submit_waiting(input.clone())?.wait()??;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok([times[times.len() / 2], times[times.len() / 10]])
}

/// Milliseconds from when an image was due to its answer, p50 and p99, of a client that asks `rate` times a second, whatever comes.
fn open_loop(engine: &Engine, input: &Input, rate: f64, round: Duration) -> anyhow::Result<[f64; 2]> {
    let (sender, receiver) = mpsc::channel::<(Instant, Ticket)>();
    let times = thread::scope(|scope| {
        let waiter = scope.spawn(move || {
            let mut times = Vec::new();
            for (due, ticket) in receiver {
                if ticket.wait().is_ok_and(|reply| reply.is_ok()) {
                    times.push(due.elapsed().as_secs_f64() * 1e3);
                }
            }
            times
        });
        let mut random = fastrand::Rng::with_seed(1);
        let began = Instant::now();
        let mut due = began;
        while began.elapsed() < round {
            due += Duration::from_secs_f64(-(1.0 - random.f64()).ln() / rate);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if sender.send((due, engine.submit_waiting(input.clone())?)).is_err() {
                break;
            }
        }
        drop(sender);
        waiter.join().map_err(|_| anyhow::anyhow!("the waiter panicked"))
    })?;
    ensure!(!times.is_empty(), "no answers");
    let mut times = times;
    times.sort_by(f64::total_cmp);
    Ok([times[times.len() / 2], times[times.len() * 99 / 100]])
}

/// Both structures with a network that runs on the processor.
fn on_processor(
    bundle: &Bundle,
    manifest: &Arc<Manifest>,
    workers: usize,
    input: &Input,
    round: Duration,
    rounds: usize,
) -> anyhow::Result<()> {
    let library = Library::load(None)?;
    let sessions = || -> anyhow::Result<Vec<Box<dyn Runner>>> {
        let open = |_| {
            let model = OnnxModel::open(library, bundle.network.bytes()?, SessionOptions::default())?;
            Ok(Box::new(model) as Box<dyn Runner>)
        };
        (0..workers).map(open).collect()
    };
    let (mut apart, mut together) = (Vec::new(), Vec::new());
    for _ in 0..rounds.max(1) {
        apart.push(saturated(&engine(manifest, sessions()?, 8, workers, true)?, input, 8, round)?);
        together.push(saturated(&engine(manifest, sessions()?, 8, workers, false)?, input, 8, round)?);
    }
    println!("the shipped network on the processor: apart ÷ workers {}", ratio(&apart, &together));
    Ok(())
}

/// A PNG of 32×32 pixels with the entropy of a photo.
fn picture() -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(2);
    let image = image::RgbImage::from_fn(32, 32, |x, y| {
        let noise = random.u8(0..16);
        image::Rgb([(x * 6) as u8 + noise, (y * 6) as u8 + noise, ((x + y) * 3) as u8 + noise])
    });
    let mut bytes = Cursor::new(Vec::new());
    // Writing to memory an image of this size cannot fail.
    let _ = image.write_to(&mut bytes, image::ImageFormat::Png);
    bytes.into_inner()
}
