//! Images per second of the server at saturation ÷ a bare loop over ready tensors, on the same bundle and cores.
//!
//!     cargo bench --bench saturation                                   # the shipped bundle
//!     NBN_BENCH_MODEL=models/mine/1 cargo bench --bench saturation     # yours
//!
//! Both use one session a worker and one thread a session, in turn, five times; the medians are compared. The server is
//! fed 500×375 JPEGs over 16 connections by a client in this process, so the client's time counts against it.
#![allow(missing_docs)]

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nbn::bundle::Bundle;
use nbn::pixels::{DecodeLimits, Preprocessor};
use nbn::runtime::{Library, OnnxModel, Runner, SessionOptions};
use nbn::serve::{self, Registry, ServeOptions, ServedModel};

const CONNECTIONS: usize = 16;
const ROUNDS: usize = 5;

fn main() -> anyhow::Result<()> {
    // `cargo test` runs benches without this flag; there is nothing to measure then.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let folder = std::env::var_os("NBN_BENCH_MODEL").map_or_else(|| PathBuf::from("models/cifar10-lt"), PathBuf::from);
    let round = Duration::from_secs(std::env::var("NBN_BENCH_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(8));
    let library = Library::load(None)?;
    let workers = thread::available_parallelism()?.get();
    let bundle = Bundle::load(&folder)?;
    let jpeg: Arc<[u8]> = photo().into();
    println!(
        "{}, {workers} workers × 1 thread, {CONNECTIONS} connections, JPEG of {} bytes, {ROUNDS} rounds of {round:?}",
        bundle.manifest.arch,
        jpeg.len()
    );
    let mut served = Vec::new();
    let mut bare = Vec::new();
    for _ in 0..ROUNDS {
        bare.push(bare_loop(&bundle, library, workers, round)?);
        served.push(server(&bundle, library, workers, round, &jpeg)?);
        println!("bare {:.1}/s  server {:.1}/s", bare[bare.len() - 1], served[served.len() - 1]);
    }
    let (served, bare) = (median(served), median(bare));
    println!("median: bare {bare:.1}/s, server {served:.1}/s, ratio {:.3}", served / bare);
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A JPEG with the entropy of a photo.
fn photo() -> Vec<u8> {
    let mut state = 1u32;
    let image = image::RgbImage::from_fn(500, 375, |x, y| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let noise = (state >> 27) as f32;
        let wave = |period: f32| ((x as f32 / period).sin() + (y as f32 / (period * 1.3)).cos()) * 50.0 + 115.0 + noise;
        image::Rgb([wave(23.0) as u8, wave(41.0) as u8, wave(67.0) as u8])
    });
    let mut bytes = Cursor::new(Vec::new());
    // Writing to memory an image of this size cannot fail.
    let _ = image.write_to(&mut bytes, image::ImageFormat::Jpeg);
    bytes.into_inner()
}

fn bare_loop(bundle: &Bundle, library: &'static Library, workers: usize, round: Duration) -> anyhow::Result<f64> {
    let blank = Preprocessor::new(bundle.manifest.preprocessing.clone(), DecodeLimits::default()).blank();
    let mut models = Vec::new();
    for _ in 0..workers {
        let mut model = OnnxModel::open(library, &bundle.model, SessionOptions::default())?;
        model.run(&blank)?;
        models.push(model);
    }
    let began = Instant::now();
    let done: usize = thread::scope(|scope| {
        let threads: Vec<_> = models
            .into_iter()
            .map(|mut model| {
                let blank = &blank;
                scope.spawn(move || {
                    let mut done = 0;
                    while began.elapsed() < round && model.run(blank).is_ok() {
                        done += 1;
                    }
                    done
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap_or(0)).sum()
    });
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

#[tokio::main]
async fn server(
    bundle: &Bundle,
    library: &'static Library,
    workers: usize,
    round: Duration,
    jpeg: &Arc<[u8]>,
) -> anyhow::Result<f64> {
    let model =
        ServedModel::start(bundle.clone(), library, workers, SessionOptions::default(), DecodeLimits::default(), 128)?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/v1/classify", listener.local_addr()?);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let registry = Registry::new(vec![model], None)?;
    let running = tokio::spawn(serve::run(listener, registry, ServeOptions::default(), stopped));
    let client = reqwest::Client::new();
    let done = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let (client, url, done, jpeg) = (client.clone(), url.clone(), done.clone(), jpeg.to_vec());
        connections.push(tokio::spawn(async move {
            while began.elapsed() < round {
                let request = client.post(&url).header("content-type", "image/jpeg").body(jpeg.clone());
                let answer = request.send().await?.error_for_status()?;
                answer.bytes().await?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, reqwest::Error>(())
        }));
    }
    for connection in connections {
        connection.await??;
    }
    let rate = done.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64();
    stop.send(true)?;
    running.await??;
    Ok(rate)
}
