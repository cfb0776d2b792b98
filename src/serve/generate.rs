//! Generates the OpenAPI document from the handlers and wire types.

use utoipa::OpenApi;

use super::{handlers, problem, v2, wire};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "nbn",
        description = "Image classification with calibrated scores, for networks trained on long-tailed data.",
        license(name = "MIT OR Apache-2.0")
    ),
    paths(
        handlers::classify_default,
        handlers::classify_model,
        handlers::classify_version,
        handlers::models,
        handlers::model,
        handlers::live,
        handlers::ready,
        handlers::openapi,
        handlers::metrics,
        v2::server,
        v2::live,
        v2::ready,
        v2::metadata,
        v2::metadata_version,
        v2::model_ready,
        v2::model_ready_version,
        v2::all_stats,
        v2::stats,
        v2::stats_version,
        v2::config,
        v2::config_version,
        v2::infer,
        v2::infer_version,
        v2::index,
        v2::load,
        v2::unload
    ),
    components(schemas(problem::ProblemBody, wire::ClassifyRequest, v2::ErrorBody, v2::WireInfer))
)]
struct Document;

/// The document in YAML; empty if it cannot be written, which a test rules out.
pub fn yaml() -> String {
    Document::openapi().to_yaml().unwrap_or_default()
}

/// The document in JSON.
pub fn json() -> String {
    Document::openapi().to_pretty_json().unwrap_or_default() + "\n"
}
