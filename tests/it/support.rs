//! What the subjects share: paths, the programs, and a client that checks every answer against openapi.yaml.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nbn::bundle::{Bundle, Manifest};
use nbn::classify::{Classifier, Scorer};
use nbn::engine::Engine;
use nbn::pixels::{DecodeLimits, PixelTensor};
use nbn::runtime::{Device, Library, Runner, RuntimeError, SessionOptions};
use nbn::serve::{self, Ended, Registry, RequestLimits, ServeOptions, ServedModel};
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

pub(crate) fn shipped() -> Bundle {
    Bundle::load(&root().join("models/cifar10-lt")).unwrap()
}

/// A running server on a port of its own.
pub(crate) struct Server {
    pub(crate) address: String,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<std::io::Result<Ended>>,
    client: reqwest::Client,
}

impl Server {
    pub(crate) async fn of(models: Vec<ServedModel>, limits: RequestLimits) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = watch::channel(false);
        let registry = Registry::new(models, None).unwrap();
        let options = ServeOptions { limits, drain_timeout: Duration::from_secs(20), ..ServeOptions::default() };
        let task = tokio::spawn(serve::run(listener, registry, options, stopped));
        Self { address, stop, task, client: reqwest::Client::new() }
    }

    /// The shipped bundle behind two workers.
    pub(crate) async fn shipped() -> Self {
        let options = SessionOptions { device: Device::Cpu, threads: 1 };
        let model = ServedModel::start(shipped(), library(), 2, options, DecodeLimits::default(), 64).unwrap();
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
        self.task.await.unwrap().unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send("get", path, self.client.get(format!("http://{}{path}", self.address))).await
    }

    pub(crate) async fn post(&self, path: &str, content_type: &str, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.client.post(format!("http://{}{path}", self.address));
        self.send("post", path, request.header("content-type", content_type).body(body)).await
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
        let response = request.send().await.unwrap();
        let answer = Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body: response.bytes().await.unwrap().to_vec(),
        };
        answer.check(method, path);
        answer
    }
}

pub(crate) fn model(manifest: Arc<Manifest>, runner: impl Runner + 'static, queue: usize) -> ServedModel {
    let classifier = Classifier::new(manifest.clone(), DecodeLimits::default(), Box::new(runner));
    let engine = Engine::start(vec![classifier], queue).unwrap();
    let scorer = Scorer::new(manifest.clone(), None);
    let (name, version) = ("test".into(), "1".into());
    ServedModel { name, version, manifest, scorer, evaluation: None, device: Device::Cpu, engine }
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
                let content = described["content"].get(essence);
                content.unwrap_or_else(|| panic!("{method} {path}: {} {essence} is not in openapi.yaml", self.status))["schema"].clone()
            }
            None => {
                assert!(self.status >= 400, "{method} {path} answers {} and is not in openapi.yaml", self.status);
                json!({"$ref": "#/components/schemas/Problem"})
            }
        };
        if self.status >= 400 {
            assert_eq!(self.header("content-type"), "application/problem+json", "{method} {path}");
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
    fn run(&mut self, _: &PixelTensor) -> Result<Vec<f32>, RuntimeError> {
        self.entered.send(()).unwrap();
        self.gate.recv().map_err(|_| RuntimeError::Run("the gate was closed".into()))
    }
}

/// Panics, fails, or gives NaN.
pub(crate) struct Faulty(pub(crate) fn() -> Result<Vec<f32>, RuntimeError>);

impl Runner for Faulty {
    fn run(&mut self, _: &PixelTensor) -> Result<Vec<f32>, RuntimeError> {
        self.0()
    }
}
