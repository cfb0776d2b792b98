//! Logs: human lines on a terminal, JSON elsewhere, always on stderr. Traces to a collector, where one is named.

use std::io::IsTerminal;

use tracing::{Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Identity, Layered, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

/// Overrules the level: `debug`, or levels of modules such as `nbn=debug,ort=warn`.
const RUST_LOG: &str = "RUST_LOG";

/// Starts logging at `level`; `RUST_LOG` overrules it. ONNX Runtime logs warnings only.
pub fn init(level: Level) {
    start(level, Identity::new());
}

/// `spans` takes what is to be exported.
fn start(level: Level, spans: impl Layer<Layered<Targets, Registry>> + Send + Sync) {
    let (filter, refused) = filter(level);
    tracing_subscriber::registry().with(filter).with(spans).with(lines()).init();
    if let Some(text) = refused {
        tracing::warn!(
            "{RUST_LOG}={text:?} is not understood and changes nothing: expected a level (error, warn, info, debug, \
             trace, off) or levels of modules such as nbn=debug,ort=warn"
        );
    }
}

/// What is logged, and what `RUST_LOG` said instead where it was not understood.
fn filter(level: Level) -> (Targets, Option<String>) {
    let default = Targets::new().with_default(level).with_target("ort", LevelFilter::WARN);
    match std::env::var_os(RUST_LOG).map(|text| text.to_string_lossy().into_owned()) {
        None => (default, None),
        Some(text) if text.is_empty() => (default, None),
        Some(text) => match text.parse() {
            // A filter by spans would pass for a module of that name.
            Ok(targets) if !text.contains('[') => (targets, None),
            _ => (default, Some(text)),
        },
    }
}

/// What writes the log's lines.
fn lines<S: Subscriber + for<'a> LookupSpan<'a>>() -> Box<dyn Layer<S> + Send + Sync> {
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        layer.with_target(false).boxed()
    } else {
        layer.json().flatten_event(true).boxed()
    }
}

/// The way to the collector.
#[cfg(feature = "serve")]
pub struct Traces(opentelemetry_sdk::trace::SdkTracerProvider);

#[cfg(feature = "serve")]
impl Traces {
    /// Sends what is left. Blocks for a few seconds at most.
    pub fn finish(self) {
        if let Err(error) = self.0.shutdown() {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// As [`init`], and sends spans to the collector at `otlp` over gRPC. Must be called inside a tokio runtime.
///
/// # Errors
/// When `otlp` is no address of a collector.
#[cfg(feature = "serve")]
pub fn init_traced(level: Level, otlp: Option<&str>) -> Result<Option<Traces>, String> {
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_otlp::WithExportConfig;
    let Some(endpoint) = otlp else {
        init(level);
        return Ok(None);
    };
    if !endpoint.starts_with("http://") {
        return Err(format!("{endpoint:?}: expected an address such as http://127.0.0.1:4317"));
    }
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .map_err(|error| format!("{endpoint:?}: {error}"))?;
    let resource = opentelemetry_sdk::Resource::builder().with_service_name("nbn").build();
    let provider = opentelemetry_sdk::trace::SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .build();
    start(level, tracing_opentelemetry::layer().with_tracer(provider.tracer("nbn")));
    Ok(Some(Traces(provider)))
}
