//! Generates the OpenAPI document from the handlers and wire types.

use utoipa::openapi::content::{Content, ContentBuilder};
use utoipa::openapi::path::Operation;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, Schema, SchemaFormat, Type};
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{OpenApi as Api, RefOr, Server};
use utoipa::{Modify, OpenApi};

use super::{handlers, problem, v2, wire};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "nbn",
        description = "Image classification with calibrated scores, for networks trained on long-tailed data.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    tags(
        (name = "classify", description = "Scores of images"),
        (name = "models", description = "The models that are served, and their cards"),
        (name = "health", description = "Probes, metrics and this document"),
        (name = "v2", description = "The Open Inference Protocol, as KServe and Triton have it"),
    ),
    modifiers(&Finish),
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

/// What the handlers' attributes cannot say.
struct Finish;

impl Modify for Finish {
    fn modify(&self, api: &mut Api) {
        api.servers = Some(vec![Server::new("/")]);
        let key = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        let header = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("x-api-key")));
        if let Some(components) = &mut api.components {
            components.add_security_scheme("bearer", key);
            components.add_security_scheme("header", header);
        }
        // A server without keys wants none.
        let none: [&str; 0] = [];
        let either = [SecurityRequirement::default(), SecurityRequirement::new("bearer", none)];
        api.security = Some(either.into_iter().chain([SecurityRequirement::new("header", none)]).collect());
        for (path, item) in &mut api.paths.paths {
            let operations = [&mut item.get, &mut item.post].into_iter().flatten();
            for operation in operations {
                // Two protocols have operations of the same name.
                if path.starts_with("/v2") {
                    operation.operation_id = operation.operation_id.take().map(|id| format!("v2_{id}"));
                }
                contents(operation).for_each(|(media_type, content)| binary(media_type, content));
            }
        }
    }
}

fn contents(operation: &mut Operation) -> impl Iterator<Item = (&String, &mut Content)> {
    let request = operation.request_body.iter_mut().flat_map(|body| &mut body.content);
    let responses = operation.responses.responses.values_mut().filter_map(|response| match response {
        RefOr::T(response) => Some(&mut response.content),
        RefOr::Ref(_) => None,
    });
    request.chain(responses.flatten())
}

/// Says of bytes that they are: to utoipa they are a list of numbers.
fn binary(media_type: &str, content: &mut Content) {
    if !matches!(content.schema, Some(RefOr::T(Schema::Array(_)))) || media_type == "application/json" {
        return;
    }
    let file = |of: &str| {
        let bytes = ObjectBuilder::new().schema_type(Type::String).format(Some(SchemaFormat::Custom("binary".into())));
        bytes.content_media_type(of).build()
    };
    let schema: Schema = if media_type == "multipart/form-data" {
        let images = ArrayBuilder::new().items(file("application/octet-stream")).min_items(Some(1));
        let images =
            images.description(Some("The encoded images, each a part of this name; a file name becomes its id."));
        ObjectBuilder::new().property("image", images).required("image").into()
    } else {
        file(media_type).into()
    };
    *content = ContentBuilder::new().schema(Some(schema)).build();
}

/// The document in YAML; empty if it cannot be written, which a test rules out.
pub fn yaml() -> String {
    Document::openapi().to_yaml().unwrap_or_default()
}

/// The document in JSON.
pub fn json() -> String {
    Document::openapi().to_pretty_json().unwrap_or_default() + "\n"
}
