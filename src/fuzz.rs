//! What the fuzzers in `fuzz/` run: one function per target, which takes any bytes and panics only on a finding.
//!
//! Pictures go through a classifier, request bodies through a server with a small stand-in for a network, and files
//! through the readers that the programs use. The tests replay all seeds and former findings, and mutations of them.

#![expect(clippy::expect_used, clippy::panic, reason = "a panic is how a finding is told")]

mod http;
mod models;

use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::batch::{Source, SourceOptions};
use crate::bundle::{BoundCalibration, Calibration, Manifest, inputs_sha256, train_prior};
use crate::classify::{Classifier, ClassifyError, Input, ScoreRequest, Scorer};
use crate::fold::Checkpoint;
use crate::fold::architecture::{self, Extras, Overrides};
use crate::fold::onnx::Network;
use crate::fold::onnx::passes::{self, ends};
use crate::scores::{Logits, Prior};

/// As in the programs: decoding is ended when it takes more memory than it may.
#[cfg(fuzzing)]
#[global_allocator]
static ALLOCATOR: crate::memory::Counting = crate::memory::Counting;

/// A target: its name, which is also the name of its folder of seeds, and what it runs.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 18] = [
    ("picture_jpeg", picture_jpeg),
    ("picture_png", picture_png),
    ("picture_gif", picture_gif),
    ("picture_webp", picture_webp),
    ("picture_bmp", picture_bmp),
    ("picture_tiff", picture_tiff),
    ("json_body", json_body),
    ("v2_json", v2_json),
    ("v2_binary", v2_binary),
    ("multipart", multipart),
    ("grpc_message", grpc_message),
    ("checkpoint", checkpoint),
    ("pickle", pickle),
    ("onnx", onnx),
    ("manifest", manifest),
    ("calibration", calibration),
    ("tar_source", tar_source),
    ("list_source", list_source),
];

/// Lets panics unwind, as in the programs: some readers' panics are caught by design, and libFuzzer's own hook would
/// end the process at the first of them. The first fifty are printed.
pub fn let_panics_unwind() {
    static PRINTED: AtomicUsize = AtomicUsize::new(0);
    std::panic::set_hook(Box::new(|panic| {
        if PRINTED.fetch_add(1, Ordering::Relaxed) < 50 {
            crate::console::tell(format_args!("{panic}"));
        }
    }));
}

/// A JPEG.
pub fn picture_jpeg(data: &[u8]) {
    picture(with_head(data, &[b"\xFF\xD8\xFF"]));
}

/// A PNG.
pub fn picture_png(data: &[u8]) {
    picture(with_head(data, &[b"\x89PNG\r\n\x1A\n"]));
}

/// A GIF.
pub fn picture_gif(data: &[u8]) {
    picture(with_head(data, &[b"GIF89a", b"GIF87a"]));
}

/// A WebP file.
pub fn picture_webp(data: &[u8]) {
    let mut file = with_head(data, &[b"RIFF"]);
    if let Some(kind) = file.get_mut(8..12) {
        kind.copy_from_slice(b"WEBP");
    }
    picture(file);
}

/// A BMP file.
pub fn picture_bmp(data: &[u8]) {
    picture(with_head(data, &[b"BM"]));
}

/// A TIFF, little- or big-endian.
pub fn picture_tiff(data: &[u8]) {
    picture(with_head(data, &[b"II*\0", b"MM\0*"]));
}

/// A JSON body of the native interface, with its options.
pub fn json_body(data: &[u8]) {
    http::post("/v1/models/test/classify", &["content-type: application/json"], data).check();
}

/// A JSON body of the Open Inference Protocol.
pub fn v2_json(data: &[u8]) {
    http::post("/v2/models/test/infer", &["content-type: application/json"], data).check();
}

/// The same with tensors behind the JSON, whose length the first two bytes give.
pub fn v2_binary(data: &[u8]) {
    let Some(([low, high], body)) = data.split_first_chunk::<2>() else { return };
    let length = format!("inference-header-content-length: {}", u16::from_le_bytes([*low, *high]));
    http::post("/v2/models/test/infer", &["content-type: application/octet-stream", &length], body).check();
}

/// A multipart body, whose boundary is `nbn`.
pub fn multipart(data: &[u8]) {
    http::post("/v1/models/test/classify", &["content-type: multipart/form-data; boundary=nbn"], data).check();
}

/// The message of an inference over gRPC.
pub fn grpc_message(data: &[u8]) {
    let length = u32::try_from(data.len()).expect("fuzzers make small inputs");
    let framed = [&[0], &length.to_be_bytes()[..], data].concat();
    let headers = ["content-type: application/grpc", "te: trailers"];
    http::post("/inference.GRPCInferenceService/ModelInfer", &headers, &framed).check();
}

/// The pickle of a checkpoint, as the older form has it, without checksums.
pub fn pickle(data: &[u8]) {
    const BEGIN: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}.";
    checkpoint(&[BEGIN, data, b"\x80\x02]."].concat());
}

/// A checkpoint, of either form.
pub fn checkpoint(data: &[u8]) {
    let file = Scratch::of("pth", data);
    let Ok(checkpoint) = Checkpoint::load(&file.0) else { return };
    let side = architecture::family(&checkpoint).map_or(32, |family| family.default_side());
    let _ = architecture::build(&checkpoint, side, Extras::default(), &Overrides::default());
    for (name, tensor) in &checkpoint.tensors {
        assert_eq!(tensor.shape.iter().product::<usize>(), tensor.values.len(), "{name} is not as its shape says");
        assert!(tensor.values.iter().all(|value| value.is_finite()), "{name} is not finite");
    }
}

/// A network in ONNX. The runtime is not asked: what it makes of a network is its own matter.
pub fn onnx(data: &[u8]) {
    // No file lies in a folder that does not exist.
    let nowhere = Path::new("/nonexistent");
    let Ok(mut network) = Network::of_bytes(&data.to_vec().into(), nowhere) else { return };
    let written: Network = Network::of_bytes(&network.encode().into(), nowhere).expect("what was written can be read");
    assert_eq!(written.encode(), network.encode());
    if passes::fold(&mut network).is_err() || ends::input(&network).is_err() {
        return;
    }
    if ends::name(&mut network, None, (16, 16), true, ends::Batch::Free).is_ok() {
        let _ = network.check("naming the ends");
        Network::of_bytes(&network.encode().into(), nowhere).expect("what was folded can be read");
    }
}

/// A manifest.
pub fn manifest(data: &[u8]) {
    let Ok(manifest) = serde_json::from_slice::<Manifest>(data) else { return };
    if manifest.check().is_err() {
        return;
    }
    if let Some(prior) = train_prior(&manifest.classes) {
        assert!((prior.iter().sum::<f64>() - 1.0).abs() < 1e-6, "the training prior is {prior:?}");
    }
    let written = serde_json::to_vec(&manifest).expect("a manifest can be written");
    let again: Manifest = serde_json::from_slice(&written).expect("a manifest that was written can be read");
    assert_eq!(again, manifest);
    let values: usize = manifest.preprocessing.shape().iter().product();
    if values <= 3 * 16 * 16 {
        let mut classifier = models::mirror(Manifest { classes: models::classes(values), ..manifest });
        look_at(&mut classifier, &models::bmp([200, 100, 50])).expect("every preprocessing has finite values");
    }
}

/// A calibration, both as it is and as that of the bundle it is checked against.
pub fn calibration(data: &[u8]) {
    let Ok(content) = serde_json::from_slice::<Calibration>(data) else { return };
    let manifest = Arc::new(models::manifest(3));
    // Of another bundle, nearly always.
    let _ = content.check(&manifest);
    let (model_sha256, inputs_sha256) = (manifest.model.sha256.clone(), inputs_sha256(&manifest));
    let content = Calibration { model_sha256, inputs_sha256, ..content };
    if content.check(&manifest).is_err() {
        return;
    }
    let scorer = Scorer::new(manifest, Some(BoundCalibration { id: "fuzz".into(), content, familiarity: None }));
    for values in [[0.0, 0.0, 0.0], [-30.0, 1.5, 30.0], [1e30, -1e30, 7.0]] {
        let logits = Logits::try_new(values.to_vec(), 3).expect("they are finite");
        for prior in [Prior::Uniform, Prior::Train] {
            let request = ScoreRequest { prior: Some(prior.clone()), alpha: Some(0.1), ..ScoreRequest::default() };
            let rule = scorer.rule(request, &prior).or_else(|_| scorer.rule(ScoreRequest::default(), &prior));
            let Ok(rule) = rule else { continue };
            let scored = scorer.score(&logits, &rule);
            let scores = scored.probabilities.values();
            let sum: f64 = scores.iter().sum();
            assert!((sum - 1.0).abs() < 1e-6, "the scores of {values:?} under {prior:?} are {scores:?}");
        }
    }
}

/// A tar archive of pictures, plain or by gzip.
pub fn tar_source(data: &[u8]) {
    let packed = data.starts_with(b"\x1F\x8B");
    let file = Scratch::of(if packed { "tar.gz" } else { "tar" }, data);
    // A member takes at least its header of 512 bytes, which gzip makes up to a thousand times smaller.
    let most = if packed { 2 * data.len() + 2 } else { data.len() / 512 + 2 };
    read_source(&file, most);
}

/// A list of pictures: as text, as CSV, and as JSON lines. Lists that name object stores are passed over: making a
/// store's client takes a thousand times longer than reading its line.
pub fn list_source(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if text.matches("://").count() > text.matches("file://").count() {
        return;
    }
    let most = data.len() + 2;
    for ending in ["txt", "csv", "jsonl"] {
        read_source(&Scratch::of(ending, data), most);
    }
}

/// Reads a source to its end, which gives at most `most` items with names of a bounded length.
fn read_source(file: &Scratch, most: usize) {
    /// Characters of a row's `path`: a list's own line, or the name of a member, both bounded where they are read.
    const LONGEST_KEY: usize = 80 << 10;
    let options = SourceOptions { max_file_bytes: 64 << 10, ..SourceOptions::default() };
    let Ok(mut source) = Source::open(std::slice::from_ref(&file.0), &options, io::empty()) else { return };
    let mut items = 0;
    while let Some(item) = source.next() {
        items += 1;
        assert!(items <= most, "the source gives more than {most} items");
        assert!(item.key.len() <= LONGEST_KEY, "a name has {} bytes", item.key.len());
    }
}

/// `data` with one of `heads` at its beginning: the first one, unless it begins with another.
fn with_head(data: &[u8], heads: &[&[u8]]) -> Vec<u8> {
    let mut file = data.to_vec();
    if let [head, ..] = heads
        && !heads.iter().any(|head| data.starts_with(head))
    {
        let there = head.len().min(file.len());
        file[..there].copy_from_slice(&head[..there]);
    }
    file
}

/// Classifies a picture after others of two different colours: what comes out must be the same, so that nothing of
/// the picture before is in it, and must be made of bytes.
fn picture(file: Vec<u8>) {
    thread_local! {
        static CLASSIFIER: RefCell<Classifier> = RefCell::new(models::mirror(models::mirrored()));
    }
    CLASSIFIER.with_borrow_mut(|classifier| {
        let after = |classifier: &mut Classifier, colour| {
            let known = Input::Encoded(models::bmp(colour).into());
            models::classify(classifier, &[known.clone(), known]).for_each(|answer| {
                answer.expect("the known picture is whole");
            });
            look_at(classifier, &file)
        };
        let one = after(classifier, [13, 77, 201]);
        let other = after(classifier, [240, 5, 99]);
        assert_eq!(one, other, "the answer depends on the picture before");
        for value in one.into_iter().flatten() {
            let byte = value.round();
            assert!((value - byte).abs() < 1e-3 && (0.0..=255.0).contains(&byte), "{value} is no byte of a picture");
        }
    });
}

/// What a mirror gives for a picture: its tensor, or why there is none.
fn look_at(classifier: &mut Classifier, file: &[u8]) -> Result<Vec<f32>, String> {
    let mut answers = models::classify(classifier, &[Input::Encoded(file.to_vec().into())]);
    match answers.next().expect("one picture has one answer") {
        Ok(prediction) => Ok(prediction.logits.values().to_vec()),
        Err(ClassifyError::Panic(message)) => panic!("a decoder panicked: {message}"),
        Err(error) => Err(error.to_string()),
    }
}

/// A file of the temporary folder, which goes with it.
struct Scratch(PathBuf);

impl Scratch {
    fn of(ending: &str, content: &[u8]) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("nbn-fuzz-{}-{number}.{ending}", process::id()));
        std::fs::write(&path, content).expect("the temporary folder can be written");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests;
