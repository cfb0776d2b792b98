//! Logs: human lines on a terminal, JSON elsewhere, always on stderr. Traces to a collector, where one is named.

use std::io::IsTerminal;

use tracing::Subscriber;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Starts logging at `level` for this crate; `RUST_LOG` overrules it. ONNX Runtime logs warnings only.
pub fn init(level: &str) {
    tracing_subscriber::registry().with(filter(level)).with(lines()).init();
}

fn filter(level: &str) -> EnvFilter {
    EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{level},ort=warn")))
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
pub fn init_traced(level: &str, otlp: Option<&str>) -> Result<Option<Traces>, String> {
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
    let spans = tracing_opentelemetry::layer().with_tracer(provider.tracer("nbn"));
    tracing_subscriber::registry().with(filter(level)).with(spans).with(lines()).init();
    Ok(Some(Traces(provider)))
}
