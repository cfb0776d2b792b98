//! Spans to an OpenTelemetry collector.

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider};
use opentelemetry_otlp::WithExportConfig;
use tracing::{Level, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;

use super::{Ids, Reader, UNTRACED, init, start};

/// The way to the collector.
pub struct Traces(opentelemetry_sdk::trace::SdkTracerProvider);

impl Traces {
    /// Sends what is left. Blocks for a few seconds at most.
    pub fn finish(self) {
        if let Err(error) = self.0.shutdown() {
            tracing::warn!(%error, "the last traces could not be sent");
        }
    }
}

/// As [`init`], and sends spans to the collector at `otlp` over gRPC. Must be called inside a tokio runtime.
///
/// # Errors
/// When `otlp` is no address of a collector.
pub fn init_traced(level: Level, otlp: Option<&str>) -> Result<Option<Traces>, String> {
    let Some(endpoint) = otlp else {
        init(level);
        return Ok(None);
    };
    if !endpoint.starts_with("http://") {
        return Err(format!("--otlp {endpoint:?}: expected an address such as http://127.0.0.1:4317"));
    }
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .map_err(|error| format!("--otlp {endpoint:?}: {error}"))?;
    let resource = opentelemetry_sdk::Resource::builder().with_service_name("nbn").build();
    let provider = opentelemetry_sdk::trace::SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .build();
    let traced = filter_fn(|metadata| metadata.target() != UNTRACED);
    start(
        level,
        tracing_opentelemetry::layer().with_tracer(provider.tracer("nbn")).with_filter(traced),
        Reader::Operator,
    );
    Ok(Some(Traces(provider)))
}

/// Makes `span` a child of the caller's `parent`. Gives the ids that `span` is exported with; none when it is not.
pub fn join(span: &Span, parent: Option<&Ids>) -> Option<Ids> {
    if let Some(parent) = parent.and_then(remote) {
        // Without a collector there is nobody to tell.
        let _ = span.set_parent(opentelemetry::Context::new().with_remote_span_context(parent));
    }
    let context = span.context();
    let own = context.span().span_context().clone();
    let ids = || Ids { trace: own.trace_id().to_string(), span: own.span_id().to_string(), sampled: own.is_sampled() };
    own.is_valid().then(ids)
}

fn remote(ids: &Ids) -> Option<SpanContext> {
    let flags = if ids.sampled { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
    let (trace, span) = (TraceId::from_hex(&ids.trace).ok()?, SpanId::from_hex(&ids.span).ok()?);
    Some(SpanContext::new(trace, span, flags, true, TraceState::default()))
}
