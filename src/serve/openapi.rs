//! The OpenAPI document, generated from the handlers and wire types.

use utoipa::OpenApi;

use super::{handlers, problem, wire};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "nbn",
        description = "Image classification by networks trained on long-tailed data with a normalised BatchNorm.",
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
        handlers::openapi
    ),
    components(schemas(problem::ProblemBody, wire::ClassifyRequest))
)]
struct Document;

/// The document in YAML.
pub fn document() -> String {
    // The document is built from constants, and a test writes it.
    Document::openapi().to_yaml().unwrap_or_default()
}

/// The document in JSON.
pub fn document_json() -> String {
    Document::openapi().to_json().unwrap_or_default()
}
