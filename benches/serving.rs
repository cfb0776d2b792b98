//! The server beside loops without one, on the same bundle and cores; its start, its memory, what it adds to a request.
//!
//!     cargo bench --bench serving                                   # the shipped bundle
//!     NBN_BENCH_MODEL=models/mine/1 cargo bench --bench serving     # yours
//!     NBN_BENCH_IMAGE=photo.jpg NBN_BENCH_CONNECTIONS=64 NBN_BENCH_SECONDS=8 NBN_BENCH_ROUNDS=5 cargo bench --bench serving
//!
//! One session a worker, one thread a session, a worker a processor, in turn, five times. What is compared is the median of
//! the rounds' ratios: machines change their speed from one minute to the next. The server is a process of its own; its
//! client shares the machine, so the client's time counts against it. Processor time per image tells the two apart.
#![allow(missing_docs)]

mod measure;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use measure::{median, photo, ratio};
use nbn::bundle::Bundle;
use nbn::classify::{Classifier, Input};
use nbn::pixels::{DecodeLimits, Preprocessor};
use nbn::runtime::{Library, NetworkCache, SessionOptions};
use nbn::stop::Stop;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Starts that are timed.
const STARTS: usize = 5;

fn main() -> anyhow::Result<()> {
    // `cargo test` runs benches without this flag; there is nothing to measure then.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let set = |name| std::env::var(name).ok();
    let number = |name, default| set(name).and_then(|text| text.parse().ok()).unwrap_or(default);
    let folder = set("NBN_BENCH_MODEL").map_or_else(|| PathBuf::from("models/cifar10-lt/1"), PathBuf::from);
    let folder = std::fs::canonicalize(&folder).with_context(|| folder.display().to_string())?;
    let round = Duration::from_secs(number("NBN_BENCH_SECONDS", 8));
    let connections = number("NBN_BENCH_CONNECTIONS", 16) as usize;
    let rounds = number("NBN_BENCH_ROUNDS", 5).max(1);
    let library = Library::load(None)?;
    let workers = thread::available_parallelism()?.get();
    let bundle = Bundle::load(&folder)?;
    let image = match set("NBN_BENCH_IMAGE") {
        Some(path) => std::fs::read(&path).with_context(|| path)?,
        None => photo(),
    };
    let blank = Preprocessor::new(bundle.manifest.preprocessing.clone(), DecodeLimits::default()).blank();
    let tensor: Vec<u8> = blank.iter().flat_map(|v| v.to_le_bytes()).collect();
    println!(
        "{}, {workers} workers × 1 thread, {connections} connections, image of {} bytes, {rounds} rounds of {round:?}",
        bundle.manifest.arch,
        image.len()
    );
    let scratch = tempfile::tempdir()?;
    let cache = scratch.path().join("cache");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    // The first start fills the cache; its batch size is used everywhere.
    let (server, _) = Server::start(&folder, &cache, workers)?;
    let max_batch = server.max_batch;
    drop(server);
    println!("images in a run of the network: up to {max_batch}");

    let as_image = request("/v1/classify", "content-type: image/jpeg", &image);
    let side = bundle.manifest.preprocessing.crop;
    let json = format!(
        r#"{{"inputs":[{{"name":"images","datatype":"FP32","shape":[1,3,{side},{side}],"parameters":{{"binary_data_size":{}}}}}],"outputs":[{{"name":"probabilities","parameters":{{"binary_data":true}}}}]}}"#,
        tensor.len()
    );
    let path = format!("/v2/models/{}/infer", bundle.name);
    let header = format!("inference-header-content-length: {}", json.len());
    let as_tensor = request(&path, &header, &[json.as_bytes(), &tensor].concat());

    let loops = |input: Input| bare_loop(&bundle, library, &cache, (workers, max_batch), round, input);
    let (tensor, encoded) = (Input::Pixels(tensor.into()), Input::Encoded(image.into()));
    let names = ["tensors, no server", "images, no server", "images, server", "tensors, server"];
    let mut rates = [const { Vec::new() }; 4];
    // Milliseconds an image of the loop, the server and its client.
    let mut processor = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        rates[0].push(loops(tensor.clone())?);
        let before = processor_seconds("self")?;
        rates[1].push(loops(encoded.clone())?);
        processor[0]
            .push((processor_seconds("self")? - before) / rates[1][rates[1].len() - 1] / round.as_secs_f64() * 1e3);
        let (server, _) = Server::start(&folder, &cache, workers)?;
        let id = server.child.id().to_string();
        let before = [processor_seconds(&id)?, processor_seconds("self")?];
        rates[2].push(runtime.block_on(saturate(&server.address, &as_image, connections, round))?);
        let spent = [processor_seconds(&id)? - before[0], processor_seconds("self")? - before[1]];
        for (all, seconds) in processor[1..].iter_mut().zip(spent) {
            all.push(seconds / rates[2][rates[2].len() - 1] / round.as_secs_f64() * 1e3);
        }
        rates[3].push(runtime.block_on(saturate(&server.address, &as_tensor, connections, round))?);
        let line: Vec<_> =
            names.iter().zip(&rates).map(|(name, r)| format!("{name} {:.1}/s", r[r.len() - 1])).collect();
        println!("  {}", line.join("   "));
    }
    let [bare, own, images, tensors] = &rates;
    println!("server with images ÷ bare loop on tensors    {}", ratio(images, bare));
    println!("server with images ÷ decode and infer loop   {}", ratio(images, own));
    println!("server with tensors ÷ bare loop on tensors   {}", ratio(tensors, bare));
    let [bare, own, images, tensors] = rates.map(median);
    println!("medians: {bare:.1}, {own:.1}, {images:.1}, {tensors:.1} images/s");
    let [own, server, client] = processor.map(median);
    println!(
        "processor time per image, ms: loop {own:.3}, server {server:.3} ({:.3} of it the loop's), its client {client:.3}",
        own / server
    );

    let (server, _) = Server::start(&folder, &cache, workers)?;
    runtime.block_on(added(&server.address, &as_tensor))?;
    drop(server);

    let mut starts = Vec::new();
    for _ in 0..STARTS {
        starts.push(Server::start(&folder, &cache, workers)?.1.as_secs_f64() * 1e3);
    }
    println!("start to ready with a warm cache: median {:.0} ms", median(starts));
    let memory = |workers| -> anyhow::Result<f64> {
        let (server, _) = Server::start(&folder, &cache, workers)?;
        runtime.block_on(saturate(&server.address, &as_image, 2 * workers, Duration::from_secs(3)))?;
        server.anonymous_mib()
    };
    let (few, many) = (memory(1)?, memory(5)?);
    println!(
        "anonymous memory after load: {few:.0} MiB with 1 worker, {:.1} MiB per further worker",
        (many - few) / 4.0
    );
    Ok(())
}

/// What the process has had of the processors since it began, in hundredths, as Linux counts it.
fn processor_seconds(process: &str) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let after_name = stat.rsplit_once(')').context("no name")?.1;
    let ticks = after_name.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}

/// Images per second of `workers` threads that do nothing but classify `input` in batches.
fn bare_loop(
    bundle: &Bundle,
    library: &'static Library,
    cache: &Path,
    (workers, max_batch): (usize, usize),
    round: Duration,
    input: Input,
) -> anyhow::Result<f64> {
    let cache = NetworkCache::at(cache.to_owned());
    let options = SessionOptions::default();
    let classifiers = Classifier::open_many(bundle, library, options, DecodeLimits::default(), &cache, workers)?;
    let mut warm = Vec::new();
    for classifier in classifiers {
        let mut classifier = classifier.with_max_batch(max_batch);
        classifier.network().warm()?;
        warm.push(classifier);
    }
    let began = Instant::now();
    let work = |mut classifier: Classifier| {
        let inputs = vec![input.clone(); max_batch];
        let mut done = 0;
        while began.elapsed() < round {
            let stop = Stop::default();
            let pictures: Vec<_> = inputs.iter().map(|input| (input, &stop)).collect();
            done += classifier.classify(&pictures, &stop).iter().filter(|r| r.is_ok()).count();
        }
        done
    };
    let done: usize = thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = warm.into_iter().map(|c| scope.spawn(move || work(c))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or(0)).sum()
    });
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

/// The program, as an operator starts it.
struct Server {
    child: Child,
    address: String,
    max_batch: usize,
}

impl Server {
    /// Starts it and returns how long it took to be ready.
    fn start(bundle: &Path, cache: &Path, workers: usize) -> anyhow::Result<(Self, Duration)> {
        let repository = bundle.parent().and_then(Path::parent).context("the bundle is not in NAME/VERSION")?;
        let name = bundle.parent().and_then(Path::file_name).context("the bundle has no name")?;
        let began = Instant::now();
        let mut child = Command::new(env!("CARGO_BIN_EXE_nbn"))
            .args(["serve", "--addr", "127.0.0.1:0", "--workers", &workers.to_string(), "--default-model"])
            .arg(name)
            .arg("--models")
            .arg(repository)
            .arg("--cache")
            .arg(cache)
            .env_remove("RUST_LOG")
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = child.stderr.take().context("no stderr")?;
        let mut server = Self { child, address: String::new(), max_batch: 1 };
        let mut lines = BufReader::new(stderr).lines();
        for line in lines.by_ref() {
            let line: serde_json::Value = serde_json::from_str(&line?)?;
            if let Some(address) = line["addr"].as_str() {
                server.address = address.to_owned();
            }
            if let Some(max_batch) = line["max_batch"].as_u64() {
                server.max_batch = max_batch as usize;
            }
            if line["message"] == "ready" {
                let took = began.elapsed();
                // What it still says must not fill the pipe.
                thread::spawn(move || lines.for_each(drop));
                return Ok((server, took));
            }
        }
        bail!("the server did not become ready")
    }

    fn anonymous_mib(&self) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).context("no RssAnon")?;
        Ok(line.split_whitespace().nth(1).context("no RssAnon")?.parse::<f64>()? / 1024.0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It is ours, and nothing more is asked of it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn request(path: &str, header: &str, body: &[u8]) -> Arc<[u8]> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: nbn\r\n{header}\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat().into()
}

/// Sends one request and reads its answer. Returns the answer's head.
async fn ask(stream: &mut TcpStream, request: &[u8], buffer: &mut Vec<u8>) -> anyhow::Result<String> {
    stream.write_all(request).await?;
    buffer.clear();
    loop {
        if stream.read_buf(buffer).await? == 0 {
            bail!("the server closed the connection");
        }
        let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
        let head = std::str::from_utf8(&buffer[..end])?.to_owned();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).context("no length")?;
        let whole = end + 4 + length.parse::<usize>()?;
        while buffer.len() < whole {
            stream.read_buf(buffer).await?;
        }
        ensure!(head.starts_with("HTTP/1.1 200"), "{head}: {}", String::from_utf8_lossy(&buffer[end..]));
        return Ok(head);
    }
}

/// Answers per second over `connections` that each ask again as soon as they are answered.
async fn saturate(address: &str, request: &Arc<[u8]>, connections: usize, round: Duration) -> anyhow::Result<f64> {
    let done = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let mut clients = Vec::new();
    for _ in 0..connections {
        let (address, request, done) = (address.to_owned(), request.clone(), done.clone());
        clients.push(tokio::spawn(async move {
            let mut stream = TcpStream::connect(&address).await?;
            stream.set_nodelay(true)?;
            let mut buffer = Vec::new();
            while began.elapsed() < round {
                ask(&mut stream, &request, &mut buffer).await?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        }));
    }
    for client in clients {
        client.await??;
    }
    Ok(done.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64())
}

/// What a request costs beside the network, one at a time.
async fn added(address: &str, request: &[u8]) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    let stages = ["queue", "preprocess", "infer", "calibrate"];
    let mut times = [const { Vec::new() }; 5];
    let mut added = Vec::new();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        let sent = Instant::now();
        let head = ask(&mut stream, request, &mut buffer).await?;
        let whole = sent.elapsed().as_secs_f64() * 1e3;
        let timing = head.lines().find_map(|line| line.strip_prefix("server-timing: ")).context("no server-timing")?;
        let stage = |name: &str| {
            let part = timing.split(", ").find_map(|part| part.strip_prefix(name)?.strip_prefix(";dur="));
            part.and_then(|ms| ms.parse::<f64>().ok()).unwrap_or(f64::NAN)
        };
        let known: Vec<f64> = stages.iter().map(|name| stage(name)).collect();
        added.push(whole - known[2]);
        times[4].push(whole - known.iter().sum::<f64>());
        for (all, one) in times.iter_mut().zip(known) {
            all.push(one);
        }
    }
    let [queue, preprocess, infer, calibrate, rest] = times.map(median);
    let echo = echoed(request, buffer.clone(), infer).await?;
    println!(
        "one tensor at a time, median ms: {:.3} beside the network's {infer:.3}: queue {queue:.3}, copy {preprocess:.3}, \
         scores {calibrate:.3}, HTTP with its client {rest:.3}, of which the client and the loopback {echo:.3}",
        median(added)
    );
    Ok(())
}

/// What the client and the system take for themselves: the median ms, beside the work, of the same request and the same
/// answer with a thread that knows nothing of HTTP and is busy for `work` ms, while whoever waits falls as deep asleep.
async fn echoed(request: &[u8], answer: Vec<u8>, work: f64) -> anyhow::Result<f64> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut received = vec![0; request.len()];
    let thread = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        while stream.read_exact(&mut received).is_ok() {
            let began = Instant::now();
            while began.elapsed().as_secs_f64() * 1e3 < work {
                std::hint::spin_loop();
            }
            stream.write_all(&answer)?;
        }
        Ok(())
    });
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut buffer, mut times) = (Vec::new(), Vec::new());
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        let sent = Instant::now();
        ask(&mut stream, request, &mut buffer).await?;
        times.push(sent.elapsed().as_secs_f64() * 1e3 - work);
    }
    drop(stream);
    ensure!(thread.join().is_ok_and(|outcome| outcome.is_ok()), "the thread that answers failed");
    Ok(median(times))
}
