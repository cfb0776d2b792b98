//! What the subjects share: paths, the programs, and a client that checks every answer against openapi.yaml.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nbn::bundle::VersionPolicy;
use nbn::bundle::{Bundle, Manifest};
use nbn::classify::{Classifier, Scorer};
use nbn::engine::{Budget, Crew, Engine};
use nbn::pixels::DecodeLimits;
use nbn::registry::{BatchChoice, ModelOptions, Registry, RegistryOptions, RequestStats, ServedModel};
use nbn::runtime::{Device, Library, NetworkCache, Outputs, Place, Runner, RuntimeError};
use nbn::serve::{self, Ended, Listeners, RequestLimits, ServeOptions};
use nbn::stop::Stop;
use ndarray::{Array2, ArrayView4};
use serde_json::{Value, json};
use tokio::sync::watch;

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn data(name: &str) -> PathBuf {
    root().join("tests/data").join(name)
}

pub(crate) fn library() -> &'static Library {
    Library::load(None).unwrap()
}

pub(crate) fn nbn(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nbn")).current_dir(root()).args(args).output().unwrap()
}

pub(crate) fn fold(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fold")).current_dir(root()).args(args).output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An encoded picture with a gradient, so that resizing has something to do.
pub(crate) fn picture(width: u32, height: u32, format: image::ImageFormat) -> Vec<u8> {
    let image = image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, (x * y) as u8]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A progressive JPEG with a scan for the mean of each block of `width` × `height` grey pixels and `scans` − 1 further scans,
/// none of which changes anything: libjpeg goes over all blocks for each.
pub(crate) fn progressive_jpeg(width: u16, height: u16, scans: usize) -> Vec<u8> {
    let mut bytes = vec![0xFF, 0xD8];
    let mut segment = |marker: u8, content: &[u8]| {
        bytes.extend([0xFF, marker]);
        bytes.extend((content.len() as u16 + 2).to_be_bytes());
        bytes.extend(content);
    };
    segment(0xDB, &[&[0][..], &[1; 64]].concat());
    let [h1, h0] = height.to_be_bytes();
    let [w1, w0] = width.to_be_bytes();
    segment(0xC2, &[8, h1, h0, w1, w0, 1, 1, 0x11, 0]);
    // One code of one bit in each table: a mean that does not change; an end of blocks that lasts for 2^14 and more of them.
    let table = |class: u8, symbol: u8| [&[class, 1][..], &[0; 15], &[symbol]].concat();
    segment(0xC4, &table(0x00, 0));
    segment(0xC4, &table(0x10, 0xE0));
    let blocks = usize::from(width).div_ceil(8) * usize::from(height).div_ceil(8);
    for scan in 0..scans {
        let (header, data): (&[u8], Vec<u8>) = if scan == 0 {
            (&[0xFF, 0xDA, 0, 8, 1, 1, 0x00, 0, 0, 0], vec![0; blocks.div_ceil(8)])
        } else {
            // 0 and fourteen bits: a run of up to 2^15 − 1 blocks without anything. Runs of 2^14 + 0x3F00 blocks.
            let runs = blocks.div_ceil(0x7F00);
            let bits: String = "011111100000000".repeat(runs);
            let bytes = bits.as_bytes().chunks(8).map(|byte| {
                let text = format!("{:1<8}", std::str::from_utf8(byte).unwrap());
                u8::from_str_radix(&text, 2).unwrap()
            });
            (
                &[0xFF, 0xDA, 0, 8, 1, 1, 0x00, 1, 5, 0],
                bytes.flat_map(|b| if b == 0xFF { vec![0xFF, 0] } else { vec![b] }).collect(),
            )
        };
        bytes.extend(header);
        bytes.extend(data);
    }
    bytes.extend([0xFF, 0xD9]);
    bytes
}

/// A GIF's blocks of `codes` with `bits` bits each, the lowest first.
pub(crate) fn gif_blocks(codes: impl Iterator<Item = u32>, bits: u32) -> Vec<u8> {
    let (mut held, mut count, mut data) = (0u32, 0, Vec::new());
    for code in codes {
        held |= code << count;
        count += bits;
        while count >= 8 {
            data.push(held as u8);
            held >>= 8;
            count -= 8;
        }
    }
    data.push(held as u8);
    data.chunks(255).flat_map(|block| [&[block.len() as u8], block].concat()).chain([0]).collect()
}

/// The bundle that is served: the latest version in `models/`.
pub(crate) const SHIPPED: &str = "models/cifar10-lt/2";

pub(crate) fn shipped() -> Bundle {
    Bundle::load(&root().join("models/cifar10-lt")).unwrap()
}

/// A process that the test began, killed when the test ends, if only by a failure: one that went on would hold what
/// collects the output of the tests.
pub(crate) struct Owned(Child);

impl Owned {
    pub(crate) fn begin(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    /// Sends the signal of that name, such as `TERM`.
    pub(crate) fn signal(&self, name: &str) {
        assert!(Command::new("kill").args(["-s", name, &self.id().to_string()]).status().unwrap().success());
    }

    /// Asks it to end by SIGTERM, and waits.
    pub(crate) fn terminate(&mut self) -> std::process::ExitStatus {
        self.signal("TERM");
        self.wait().unwrap()
    }
}

impl std::ops::Deref for Owned {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl std::ops::DerefMut for Owned {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server process on a port of its own.
pub(crate) struct Process {
    pub(crate) address: String,
    pub(crate) child: Owned,
    log: std::thread::JoinHandle<Vec<String>>,
}

impl Process {
    /// Starts `nbn serve` over the shipped models, without a cache, and waits until it is ready.
    pub(crate) fn serve(args: &[&str]) -> Self {
        use std::io::BufRead;
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let mut child = Owned::begin(
            Command::new(env!("CARGO_BIN_EXE_nbn"))
                .current_dir(root())
                .args(["serve", "--addr", &address, "--cache", "none"])
                .args(args)
                .env_remove("RUST_LOG")
                .stderr(std::process::Stdio::piped()),
        );
        let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.by_ref().any(|line| line.contains("\"ready\"")), "it ended before it was ready");
        Self { address, child, log: std::thread::spawn(move || lines.collect()) }
    }

    /// The whole answer to a request of a connection of its own.
    pub(crate) fn ask(&self, request: &[u8]) -> String {
        ask(&self.address, request)
    }

    pub(crate) fn get(&self, path: &str) -> String {
        self.ask(format!("GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.address).as_bytes())
    }

    pub(crate) fn post(&self, path: &str, content_type: &str, body: &[u8]) -> String {
        self.ask(&request(&self.address, path, content_type, body))
    }

    /// A line of the process's status, in MiB.
    pub(crate) fn memory(&self, name: &str) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    }

    /// From now on `VmHWM` is the peak since now.
    pub(crate) fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }

    /// Asks it to end by SIGTERM, and waits; its status, and what it logged since it was ready.
    pub(crate) fn terminate(mut self) -> (std::process::ExitStatus, Vec<String>) {
        let status = self.child.terminate();
        (status, self.log.join().unwrap())
    }
}

/// A request on a connection that closes after it.
pub(crate) fn request(address: &str, path: &str, content_type: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {}\r\n\
         content-type: {content_type}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// The whole answer to `request` on a connection of its own.
pub(crate) fn ask(address: &str, request: &[u8]) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    text(&answer)
}

/// A running server on a port of its own.
pub(crate) struct Server {
    pub(crate) address: String,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<Ended>,
    pub(crate) client: reqwest::Client,
    pub(crate) registry: Arc<Registry>,
}

impl Server {
    pub(crate) async fn of(models: Vec<ServedModel>, limits: RequestLimits) -> Self {
        let options = ServeOptions { limits, drain_timeout: Duration::from_secs(20), ..ServeOptions::default() };
        Self::with(Registry::new(models, None).unwrap(), options).await
    }

    pub(crate) async fn with(registry: Registry, options: ServeOptions) -> Self {
        let main = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = main.local_addr().unwrap().to_string();
        let (stop, stopped) = watch::channel(false);
        let registry = Arc::new(registry);
        let listeners = Listeners { main, grpc: None, admin: None, tls: None };
        let task = tokio::spawn(serve::run(listeners, registry.clone(), options, stopped));
        Self { address, stop, task, client: reqwest::Client::new(), registry }
    }

    /// Everything in `repository`, with its optimised networks kept beside it.
    pub(crate) async fn over(repository: &Path, options: ServeOptions) -> Self {
        let cache = NetworkCache::at(repository.with_extension("cache"));
        let options_of_registry = RegistryOptions {
            pixels: Default::default(),
            repository: repository.to_owned(),
            versions: VersionPolicy::Latest,
            default_model: None,
            require_calibration: false,
            model: ModelOptions { cache, ..model_options() },
        };
        let registry = Registry::over(options_of_registry, library());
        let registry = tokio::task::spawn_blocking(|| registry.fill().map(|()| registry)).await.unwrap().unwrap();
        Self::with(registry, options).await
    }

    /// The shipped bundle behind two workers.
    pub(crate) async fn shipped() -> Self {
        let model = ServedModel::start(shipped(), library(), &model_options(), Arc::new(Budget::new(2))).unwrap();
        Self::of(vec![model], RequestLimits::default()).await
    }

    /// The shipped bundle's description over a runner of the test's own.
    pub(crate) async fn with_runner(runner: impl Runner + 'static, queue: usize, limits: RequestLimits) -> Self {
        let manifest = Arc::new(shipped().manifest);
        Self::of(vec![model(manifest, runner, queue)], limits).await
    }

    pub(crate) fn stop(&self) {
        self.stop.send(true).unwrap();
    }

    pub(crate) async fn ended(self) -> Ended {
        self.task.await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send("get", path, self.client.get(format!("http://{}{path}", self.address))).await
    }

    /// A body that openapi.yaml does not describe.
    pub(crate) async fn get_whole(&self, path: &str) -> Vec<u8> {
        let response = self.client.get(format!("http://{}{path}", self.address)).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        response.bytes().await.unwrap().to_vec()
    }

    pub(crate) async fn post(&self, path: &str, content_type: &str, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.client.post(format!("http://{}{path}", self.address));
        self.send("post", path, request.header("content-type", content_type).body(body)).await
    }

    pub(crate) async fn post_with(&self, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Answer {
        let request = self.client.post(format!("http://{}{path}", self.address)).body(body);
        Self::answered(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))).await
    }

    pub(crate) async fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let request = self.client.get(format!("http://{}{path}", self.address));
        Self::answered(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))).await
    }

    pub(crate) async fn multipart(&self, path: &str, parts: Vec<(&'static str, &'static str, Vec<u8>)>) -> Answer {
        let mut form = reqwest::multipart::Form::new();
        for (name, file, bytes) in parts {
            form = form.part(name, reqwest::multipart::Part::bytes(bytes).file_name(file));
        }
        let request = self.client.post(format!("http://{}{path}", self.address)).multipart(form);
        self.send("post", path, request).await
    }

    async fn send(&self, method: &str, path: &str, request: reqwest::RequestBuilder) -> Answer {
        let answer = Self::answered(request).await;
        answer.check(method, path);
        answer
    }

    async fn answered(request: reqwest::RequestBuilder) -> Answer {
        let response = request.send().await.unwrap();
        Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body: response.bytes().await.unwrap().to_vec(),
        }
    }
}

pub(crate) fn model_options() -> ModelOptions {
    ModelOptions {
        workers: 2,
        place: Place::default(),
        limits: DecodeLimits::default(),
        queue: 64,
        batch: BatchChoice::Fixed(4),
        features: false,
        cache: NetworkCache::none(),
    }
}

pub(crate) fn model(manifest: Arc<Manifest>, runner: impl Runner + 'static, queue: usize) -> ServedModel {
    model_of(Classifier::new(manifest.clone(), DecodeLimits::default(), Box::new(runner)), manifest, queue)
}

pub(crate) fn model_of(classifier: Classifier, manifest: Arc<Manifest>, queue: usize) -> ServedModel {
    let max_batch = classifier.max_batch();
    let engine = Engine::start(Crew::Together(vec![classifier]), queue, Arc::new(Budget::new(1))).unwrap();
    model_over(engine, manifest, max_batch)
}

pub(crate) fn model_over(engine: Engine, manifest: Arc<Manifest>, max_batch: usize) -> ServedModel {
    let scorer = Scorer::new(manifest.clone(), None);
    let (name, version, requests) = ("test".into(), "1".into(), RequestStats::default());
    ServedModel {
        name,
        version,
        manifest,
        scorer,
        evaluation: None,
        devices: vec![Device::Cpu],
        max_batch,
        pixels: nbn::bundle::Pixels::Exact,
        engine,
        requests,
    }
}

/// A repository that a test may change: the shipped bundle, as version 1.
pub(crate) fn repository(folder: &Path) -> PathBuf {
    let repository = folder.join("models");
    let version = repository.join("cifar10-lt/1");
    std::fs::create_dir_all(&version).unwrap();
    for entry in std::fs::read_dir(root().join(SHIPPED)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, version.join(path.file_name().unwrap())).unwrap();
    }
    repository
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", text(&self.body)))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(|v| v.to_str().unwrap()).unwrap_or_default()
    }

    /// The answer must be one that openapi.yaml describes for this operation; every error must be a problem.
    fn check(&self, method: &str, path: &str) {
        assert!(!self.header("x-request-id").is_empty(), "{path}: no request id");
        let document = document();
        let path = path.split('?').next().unwrap();
        let schema = match operation(document, method, path) {
            Some(operation) => {
                let responses = &operation["responses"];
                let described = responses.get(self.status.to_string()).unwrap_or(&responses["default"]);
                let essence = self.header("content-type").split(';').next().unwrap();
                if described["content"].is_null() && self.body.is_empty() {
                    return;
                }
                let content = described["content"].get(essence);
                content.unwrap_or_else(|| panic!("{method} {path}: {} {essence} is not in openapi.yaml", self.status))["schema"].clone()
            }
            None => {
                assert!(self.status >= 400, "{method} {path} answers {} and is not in openapi.yaml", self.status);
                let form = if path.starts_with("/v2") { "ErrorBody" } else { "Problem" };
                json!({"$ref": format!("#/components/schemas/{form}")})
            }
        };
        if self.status >= 400 {
            let form = if path.starts_with("/v2") { "application/json" } else { "application/problem+json" };
            assert_eq!(self.header("content-type"), form, "{method} {path}");
        }
        if !self.header("content-type").contains("json") {
            return;
        }
        let mut schema = schema;
        schema["components"] = document["components"].clone();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let errors: Vec<String> = validator.iter_errors(&self.json()).map(|e| e.to_string()).collect();
        assert!(errors.is_empty(), "{method} {path}: {errors:?}");
    }
}

fn document() -> &'static Value {
    static DOCUMENT: OnceLock<Value> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        let out = nbn(&["openapi", "--format", "json"]);
        serde_json::from_slice(&out.stdout).unwrap()
    })
}

fn operation<'a>(document: &'a Value, method: &str, path: &str) -> Option<&'a Value> {
    let segments: Vec<&str> = path.split('/').collect();
    let matches = |template: &str| {
        let parts: Vec<&str> = template.split('/').collect();
        parts.len() == segments.len() && parts.iter().zip(&segments).all(|(p, s)| p.starts_with('{') || p == s)
    };
    document["paths"].as_object()?.iter().find(|(template, _)| matches(template))?.1.get(method)
}

/// Waits for the test to open the gate before each run.
pub(crate) struct Gated {
    pub(crate) gate: std::sync::mpsc::Receiver<Vec<f32>>,
    pub(crate) entered: std::sync::mpsc::Sender<()>,
}

impl Runner for Gated {
    fn run(&mut self, _: ArrayView4<'_, f32>, _: &Stop) -> Result<Outputs, RuntimeError> {
        self.entered.send(()).unwrap();
        self.gate.recv().map(row).map_err(|_| RuntimeError::Run("the gate was closed".into()))
    }
}

/// Panics, fails, or gives NaN.
pub(crate) struct Faulty(pub(crate) fn() -> Result<Vec<f32>, RuntimeError>);

impl Runner for Faulty {
    fn run(&mut self, _: ArrayView4<'_, f32>, _: &Stop) -> Result<Outputs, RuntimeError> {
        self.0().map(row)
    }
}

fn row(logits: Vec<f32>) -> Outputs {
    Array2::from_shape_vec((1, logits.len()), logits).unwrap().into()
}

/// Runs until it is told to stop.
pub(crate) struct Endless {
    pub(crate) entered: std::sync::mpsc::Sender<()>,
}

impl Runner for Endless {
    fn run(&mut self, _: ArrayView4<'_, f32>, stop: &Stop) -> Result<Outputs, RuntimeError> {
        self.entered.send(()).unwrap();
        while !stop.asked() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(RuntimeError::Stopped)
    }
}
