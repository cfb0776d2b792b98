//! What /metrics tells. Labels come from loaded models, groups, stages and codes, never from a client's string.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use axum::http::{HeaderMap, header};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry as Metrics;

use super::control::Models;
use super::problem::Problem;
use crate::bundle::Group;
use crate::classify::{Prediction, Scored};
use crate::engine::DeviceStats;
use crate::registry::ServedModel;

/// A form that metrics are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Prometheus' own text format, version 0.0.4.
    Prometheus,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Form {
    /// The form that the header `Accept` prefers; Prometheus' own where it does not say.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let mut best = (0.0, Self::Prometheus);
        let given = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        for range in given.flat_map(|value| value.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let form = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
                "application/openmetrics-text" => Self::OpenMetrics,
                "text/plain" | "text/*" | "*/*" => Self::Prometheus,
                _ => continue,
            };
            let quality = parts.find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")));
            let quality = quality.map_or(1.0, |text| text.parse::<f64>().unwrap_or(0.0));
            if quality > best.0 {
                best = (quality, form);
            }
        }
        best.1
    }

    /// Its media type.
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// What is told in OpenMetrics, in Prometheus' own format: there, a counter's family is named as its samples are, and
/// there are no units and no end.
fn as_prometheus(open_metrics: &str) -> String {
    let mut out = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(_), text) => help = text,
            (Some("#"), Some("TYPE"), Some(name), Some(kind)) => {
                let name = if kind == "counter" { Cow::Owned(format!("{name}_total")) } else { Cow::Borrowed(name) };
                if let Some(help) = help.take() {
                    let _ = writeln!(out, "# HELP {name} {help}");
                }
                let _ = writeln!(out, "# TYPE {name} {kind}");
            }
            (Some("#"), ..) => {}
            _ => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    protocol: &'static str,
    model: String,
    code: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StageLabels {
    model: String,
    stage: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ModelLabels {
    model: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VersionLabels {
    model: String,
    version: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct GroupLabels {
    model: String,
    group: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct DeviceLabels {
    model: String,
    version: String,
    device: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RunLabels {
    model: String,
    version: String,
    device: String,
    /// Images in the run.
    images: u64,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct BuildLabels {
    version: &'static str,
    /// Of the models that are served, each once.
    precision: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct InfoLabels {
    model: String,
    version: String,
    precision: &'static str,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// Histograms of one model that every image moves, found by its name alone.
struct OfModel {
    queue: Histogram,
    decode: Histogram,
    preprocess: Histogram,
    infer: Histogram,
    calibrate: Histogram,
    encode: Histogram,
    batch: Histogram,
}

/// Every metric of the server.
pub(crate) struct Telemetry {
    all: Metrics,
    /// Held while gauges are filled and told: two scrapes at once must not add to each other.
    scrape: Mutex<()>,
    requests: Histograms<RequestLabels>,
    stages: Histograms<StageLabels>,
    batches: Histograms<ModelLabels>,
    models: RwLock<HashMap<String, Arc<OfModel>>>,
    scores: Histograms<GroupLabels>,
    set_sizes: Histograms<GroupLabels>,
    rejected: Family<ReasonLabels, Counter>,
    predictions: Family<GroupLabels, Counter>,
    unlike: Family<GroupLabels, Counter>,
    loads: Family<OutcomeLabels, Counter>,
    queue: Family<ModelLabels, Gauge>,
    capacity: Family<ModelLabels, Gauge>,
    running: Family<ModelLabels, Gauge>,
    ready: Family<VersionLabels, Gauge>,
    build: Family<BuildLabels, Gauge>,
    info: Family<InfoLabels, Gauge>,
    device_images: Family<DeviceLabels, Counter>,
    device_runs: Family<RunLabels, Counter>,
    device_waiting: Family<DeviceLabels, Counter<f64, AtomicU64>>,
    device_network: Family<DeviceLabels, Counter<f64, AtomicU64>>,
    device_lost: Family<DeviceLabels, Gauge>,
    worker_panics: Counter,
    /// Open connections.
    pub(crate) connections: Gauge,
    /// Requests at work.
    pub(crate) in_flight: Gauge,
}

/// 0.1 ms to 52 s.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(1e-4, 2.0, 20))
}

fn sizes() -> Histogram {
    Histogram::new([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
}

fn shares() -> Histogram {
    Histogram::new([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
}

fn classes() -> Histogram {
    Histogram::new([1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0])
}

impl Telemetry {
    pub(crate) fn new() -> Self {
        let mut telemetry = Self {
            all: Metrics::with_prefix("nbn"),
            scrape: Mutex::default(),
            requests: Family::new_with_constructor(seconds),
            stages: Family::new_with_constructor(seconds),
            batches: Family::new_with_constructor(sizes),
            models: RwLock::default(),
            scores: Family::new_with_constructor(shares),
            set_sizes: Family::new_with_constructor(classes),
            rejected: Family::default(),
            predictions: Family::default(),
            unlike: Family::default(),
            loads: Family::default(),
            queue: Family::default(),
            capacity: Family::default(),
            running: Family::default(),
            ready: Family::default(),
            build: Family::default(),
            info: Family::default(),
            device_images: Family::default(),
            device_runs: Family::default(),
            device_waiting: Family::default(),
            device_network: Family::default(),
            device_lost: Family::default(),
            worker_panics: Counter::default(),
            connections: Gauge::default(),
            in_flight: Gauge::default(),
        };
        let (build, info) = (telemetry.build.clone(), telemetry.info.clone());
        let Self { all, .. } = &mut telemetry;
        // Not OpenMetrics' own kind for this, `info`: readers of Prometheus' format stumble over it.
        all.register("build_info", "1, labelled with the server's version and what its models compute with", build);
        all.register("model_info", "1, labelled with what a model computes with", info);
        macro_rules! register {
            ($($field:ident $name:literal $help:literal)*) => {
                $(telemetry.all.register($name, $help, telemetry.$field.clone());)*
            };
        }
        register! {
            requests "request_duration_seconds" "Time from a request's head to its answer"
            stages "stage_duration_seconds" "Time that an image spends in each stage"
            batches "batch_size" "Size of the batch that an image was processed in"
            scores "score" "Score of the best class"
            set_sizes "set_size" "Classes in a prediction set"
            rejected "rejected" "Requests and connections that were refused"
            predictions "predictions" "Images by the group of their best class"
            unlike "unlike_training" "Images whose decision was withheld because they are unlike the training images"
            loads "model_loads" "Attempts to load a version of a model"
            queue "queue_images" "Images that wait for a worker or a device"
            capacity "queue_capacity_images" "Largest number of images that can wait for a worker"
            running "running_images" "Images that workers or devices are processing"
            ready "model_ready" "1 for each version that is ready"
            device_images "device_images" "Images that a device beside the processor has run"
            device_runs "device_runs" "Runs of the network on a device beside the processor, by the images in them"
            device_waiting "device_waiting_seconds" "Time that a device beside the processor has waited for images"
            device_network "device_network_seconds" "Time that a device beside the processor has run the network"
            device_lost "device_lost" "1 for a device that has failed and is used no longer, otherwise 0"
            worker_panics "worker_panics" "Panics of workers between images: a bug in the server; the worker continues"
            connections "connections" "Open connections"
            in_flight "requests_in_flight" "Requests in progress"
        }
        telemetry
    }

    pub(crate) fn request(&self, protocol: &'static str, model: &str, code: u16, took: Duration) {
        let labels = RequestLabels { protocol, model: model.to_owned(), code };
        self.requests.get_or_create(&labels).observe(took.as_secs_f64());
    }

    pub(crate) fn rejected(&self, reason: &'static str) {
        self.rejected.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Counts a refusal that says something of load, limits or keys.
    pub(crate) fn rejected_by(&self, problem: &Problem) {
        if let Some(reason) = problem.code.counted() {
            self.rejected(reason);
        }
    }

    /// What a picture's way to its logits cost.
    pub(crate) fn prediction(&self, model: &ServedModel, prediction: &Prediction) {
        let timings = &prediction.timings;
        let metrics = self.of(model);
        metrics.queue.observe(timings.queue.as_secs_f64());
        metrics.decode.observe(timings.decode.as_secs_f64());
        metrics.preprocess.observe(timings.preprocess.as_secs_f64());
        metrics.infer.observe(timings.infer.as_secs_f64());
        metrics.batch.observe(timings.batch as f64);
    }

    /// What was made of the logits, in `took`.
    pub(crate) fn scored(&self, model: &ServedModel, scored: &Scored, took: Duration) {
        self.of(model).calibrate.observe(took.as_secs_f64());
        let Some(&(best, score)) = scored.probabilities.top(1).first() else { return };
        let group = model.manifest.classes[best].group().map_or("unknown", Group::name);
        let labels = GroupLabels { model: model.name.clone(), group };
        self.predictions.get_or_create(&labels).inc();
        self.scores.get_or_create(&labels).observe(score);
        if scored.is_unlike_training {
            self.unlike.get_or_create(&labels).inc();
        }
        if let Some(set) = &scored.set {
            self.set_sizes.get_or_create(&labels).observe(set.members.len() as f64);
        }
    }

    /// An answer was written, in `took`.
    pub(crate) fn encoded(&self, model: &ServedModel, took: Duration) {
        self.of(model).encode.observe(took.as_secs_f64());
    }

    /// Kept beside the families: a look-up there hashes and copies all labels.
    fn of(&self, model: &ServedModel) -> Arc<OfModel> {
        let known = self.models.read().unwrap_or_else(PoisonError::into_inner).get(&model.name).cloned();
        known.unwrap_or_else(|| {
            let name = || model.name.clone();
            let stage = |stage| self.stages.get_or_create(&StageLabels { model: name(), stage }).clone();
            let of_model = Arc::new(OfModel {
                queue: stage("queue"),
                decode: stage("decode"),
                preprocess: stage("preprocess"),
                infer: stage("infer"),
                calibrate: stage("calibrate"),
                encode: stage("encode"),
                batch: self.batches.get_or_create(&ModelLabels { model: name() }).clone(),
            });
            let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
            models.entry(name()).or_insert(of_model).clone()
        })
    }

    fn device(&self, model: &ServedModel, stats: DeviceStats) {
        let DeviceStats { device, images, batches, waiting, network, lost } = stats;
        let (name, version) = (model.name.clone(), model.version.clone());
        let labels = DeviceLabels { model: name.clone(), version: version.clone(), device: device.clone() };
        self.device_images.get_or_create(&labels).inc_by(images);
        self.device_waiting.get_or_create(&labels).inc_by(waiting.as_secs_f64());
        self.device_network.get_or_create(&labels).inc_by(network.as_secs_f64());
        self.device_lost.get_or_create(&labels).set(lost.into());
        for (images, runs) in batches {
            let (model, version, device) = (name.clone(), version.clone(), device.clone());
            let labels = RunLabels { model, version, device, images: images as u64 };
            self.device_runs.get_or_create(&labels).inc_by(runs);
        }
    }

    /// Everything.
    pub(crate) fn text(&self, registry: &Models, form: Form) -> String {
        let _one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        for gauge in [&self.queue, &self.capacity, &self.running] {
            gauge.clear();
        }
        self.ready.clear();
        self.build.clear();
        self.info.clear();
        // Told anew as the engines count them: a model that is loaded again begins at 0, as a process does.
        self.device_images.clear();
        self.device_runs.clear();
        self.device_waiting.clear();
        self.device_network.clear();
        self.device_lost.clear();
        let precisions: BTreeSet<&str> = registry.models().iter().map(|model| model.manifest.precision()).collect();
        let precision = precisions.into_iter().collect::<Vec<_>>().join(",");
        self.build.get_or_create(&BuildLabels { version: env!("CARGO_PKG_VERSION"), precision }).set(1);
        for model in registry.models() {
            let (name, version) = (model.name.clone(), model.version.clone());
            let labels = InfoLabels { model: name, version, precision: model.manifest.precision() };
            self.info.get_or_create(&labels).set(1);
            let labels = ModelLabels { model: model.name.clone() };
            // Versions of a model have an engine each; its gauges are their sums.
            self.queue.get_or_create(&labels).inc_by(model.engine.queued() as i64);
            self.capacity.get_or_create(&labels).inc_by(model.engine.capacity() as i64);
            self.running.get_or_create(&labels).inc_by(model.engine.running() as i64);
            for device in model.engine.stats().devices {
                self.device(&model, device);
            }
            let labels = VersionLabels { model: model.name.clone(), version: model.version.clone() };
            self.ready.get_or_create(&labels).set(1);
        }
        let panics = &self.worker_panics;
        panics.inc_by(registry.worker_panics().saturating_sub(panics.get()));
        let (ok, failed) = registry.loads();
        for (outcome, count) in [("ok", ok), ("failed", failed)] {
            let counter = self.loads.get_or_create(&OutcomeLabels { outcome });
            counter.inc_by(count.saturating_sub(counter.get()));
        }
        let mut out = String::new();
        // Writing into a string cannot fail.
        let _ = text::encode(&mut out, &self.all);
        if form == Form::Prometheus { as_prometheus(&out) } else { out }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn the_form_is_what_the_client_prefers() {
        let of = |accept: &[&'static str]| {
            let mut headers = HeaderMap::new();
            accept.iter().for_each(|value| {
                headers.append(header::ACCEPT, HeaderValue::from_static(value));
            });
            Form::of(&headers)
        };
        for plain in [&[][..], &["*/*"], &["text/plain"], &["application/json"], &["application/openmetrics-text;q=0"]]
        {
            assert_eq!(of(plain), Form::Prometheus, "{plain:?}");
        }
        // As Prometheus 3 asks.
        let own = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                   application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,\
                   text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for open in [&[own][..], &["text/plain;q=0.5", "application/openmetrics-text"]] {
            assert_eq!(of(open), Form::OpenMetrics, "{open:?}");
        }
    }

    #[test]
    fn prometheus_names_counters_as_their_samples() {
        let open = "# HELP a_b Help with  spaces.\n# TYPE a_b counter\n# UNIT a_b seconds\na_b_total{x=\"# y\"} 1\n\
                    # HELP c It.\n# TYPE c gauge\nc 2\n# EOF\n";
        let expected = "# HELP a_b_total Help with  spaces.\n# TYPE a_b_total counter\na_b_total{x=\"# y\"} 1\n\
                        # HELP c It.\n# TYPE c gauge\nc 2\n";
        assert_eq!(as_prometheus(open), expected);
    }
}
