//! Logs: human lines on a terminal, JSON elsewhere, always on stderr. Traces to a collector, where one is named.

#[cfg_attr(not(feature = "otlp"), path = "telemetry/no_traces.rs")]
mod traces;

use std::io::IsTerminal;

use tracing::{Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Identity, Layered, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

pub use traces::{Traces, init_traced, join};

/// A span's ids in W3C Trace Context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids {
    /// 32 hexadecimal digits, not all zero.
    pub trace: String,
    /// 16 hexadecimal digits, not all zero.
    pub span: String,
    /// Whether the trace is recorded.
    pub sampled: bool,
}

/// The target of spans that are logged, and not exported.
pub const UNTRACED: &str = "nbn::untraced";

/// Overrules the level: `debug`, or levels of modules such as `nbn=debug,ort=warn`.
const RUST_LOG: &str = "RUST_LOG";

/// Who reads the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    /// Whoever ran a command, between its other lines.
    Person,
    /// A person at a terminal, else what collects logs.
    Operator,
}

/// Starts logging for a server at `level`; `RUST_LOG` overrules it. ONNX Runtime logs warnings only.
pub fn init(level: Level) {
    start(level, Identity::new(), Reader::Operator);
}

/// Starts logging for a command whose reader is a person, as [`init`] does.
pub fn init_command(level: Level) {
    start(level, Identity::new(), Reader::Person);
}

/// `spans` takes what is to be exported.
fn start(level: Level, spans: impl Layer<Layered<Targets, Registry>> + Send + Sync, reader: Reader) {
    let (filter, refused) = filter(level);
    tracing_subscriber::registry().with(filter).with(spans).with(lines(reader)).init();
    if let Some(text) = refused {
        tracing::warn!(
            "{RUST_LOG}={text:?} is not valid and is ignored: expected a level (error, warn, info, debug, trace, off) \
             or levels of modules such as nbn=debug,ort=warn"
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
fn lines<S: Subscriber + for<'a> LookupSpan<'a>>(reader: Reader) -> Box<dyn Layer<S> + Send + Sync> {
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let is_terminal = std::io::stderr().is_terminal();
    if reader == Reader::Person {
        layer.with_target(false).without_time().with_ansi(is_terminal).boxed()
    } else if is_terminal {
        layer.with_target(false).boxed()
    } else {
        layer.json().flatten_event(true).boxed()
    }
}
