//! The OpenAPI document, as `cargo run --features openapi -- openapi` generated it; a test holds it to the code.

/// The document in YAML.
pub const OPENAPI_YAML: &str = include_str!("../../openapi.yaml");
/// The document in JSON.
pub const OPENAPI_JSON: &str = include_str!("../../openapi.json");
