//! The native interface's handlers: thin; bodies are read in `input`, answers are shaped in `wire`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use tokio::time::Instant;

use super::code::Code;
use super::document::OPENAPI_YAML;
use super::infer::{self, default_model, find};
use super::notes::Notes;
use super::problem::Problem;
use super::wire::{ClassifyReply, ImageResult, ModelCard, ModelList, ModelSummary};
use super::{App, input, prometheus};
#[cfg(feature = "openapi")]
use super::{options::QueryOptions, problem::ProblemBody, wire::ClassifyRequest};
use crate::classify::Input;
use crate::registry::ServedModel;

/// Classifies with the default model
///
/// The server must have a single model, or `--default-model`.
#[cfg_attr(feature = "openapi", utoipa::path(
    post, path = "/v1/classify", tag = "classify",
    params(QueryOptions),
    request_body(
        description = "The encoded image itself, `multipart/form-data` with parts named `image`, or JSON with base64",
        content(
            (Vec<u8> = "image/jpeg"), (Vec<u8> = "image/png"), (Vec<u8> = "image/webp"), (Vec<u8> = "image/gif"),
            (Vec<u8> = "image/bmp"), (Vec<u8> = "image/tiff"), (Vec<u8> = "application/octet-stream"),
            (Vec<u8> = "multipart/form-data"), (ClassifyRequest = "application/json"),
        )
    ),
    responses(
        (status = 200, description = "One result per image, in order", body = ClassifyReply),
        (status = "default", description = "400, 401, 404, 405, 408, 413, 415, 422, 429, 500, 503 or 504", body = ProblemBody, content_type = "application/problem+json"),
    )
))]
pub(crate) async fn classify_default(
    State(app): State<App>,
    Extension(notes): Extension<Notes>,
    request: Request,
) -> Result<Response, Problem> {
    classify(&app, default_model(&app)?, &notes, request).await
}

/// Classifies with the named model
#[cfg_attr(feature = "openapi", utoipa::path(
    post, path = "/v1/models/{model}/classify", tag = "classify",
    params(("model" = String, Path, description = "Name of the model"), QueryOptions),
    request_body(
        description = "As in /v1/classify",
        content((Vec<u8> = "image/jpeg"), (Vec<u8> = "image/png"), (Vec<u8> = "image/webp"), (Vec<u8> = "image/gif"),
            (Vec<u8> = "image/bmp"), (Vec<u8> = "image/tiff"), (Vec<u8> = "application/octet-stream"),
            (Vec<u8> = "multipart/form-data"), (ClassifyRequest = "application/json"))
    ),
    responses(
        (status = 200, description = "One result per image, in order", body = ClassifyReply),
        (status = "default", description = "As in /v1/classify", body = ProblemBody, content_type = "application/problem+json"),
    )
))]
pub(crate) async fn classify_model(
    State(app): State<App>,
    Extension(notes): Extension<Notes>,
    Path(model): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    classify(&app, find(&app, &model, None)?, &notes, request).await
}

/// Classifies with a version of the named model
#[cfg_attr(feature = "openapi", utoipa::path(
    post, path = "/v1/models/{model}/versions/{version}/classify", tag = "classify",
    params(
        ("model" = String, Path, description = "Name of the model"),
        ("version" = String, Path, description = "A decimal number"),
        QueryOptions,
    ),
    request_body(
        description = "As in /v1/classify",
        content((Vec<u8> = "image/jpeg"), (Vec<u8> = "image/png"), (Vec<u8> = "image/webp"), (Vec<u8> = "image/gif"),
            (Vec<u8> = "image/bmp"), (Vec<u8> = "image/tiff"), (Vec<u8> = "application/octet-stream"),
            (Vec<u8> = "multipart/form-data"), (ClassifyRequest = "application/json"))
    ),
    responses(
        (status = 200, description = "One result per image, in order", body = ClassifyReply),
        (status = "default", description = "As in /v1/classify", body = ProblemBody, content_type = "application/problem+json"),
    )
))]
pub(crate) async fn classify_version(
    State(app): State<App>,
    Extension(notes): Extension<Notes>,
    Path((model, version)): Path<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    classify(&app, find(&app, &model, Some(&version))?, &notes, request).await
}

async fn classify(app: &App, model: Arc<ServedModel>, notes: &Notes, request: Request) -> Result<Response, Problem> {
    notes.model(&model.name);
    infer::counted(&model, answer(app, &model, notes, request)).await
}

async fn answer(
    app: &App,
    model: &ServedModel,
    notes: &Notes,
    request: Request,
) -> Result<(Response, Duration), Problem> {
    let deadline = infer::deadline(app, request.headers());
    let input::Images { items, options, held } = input::read(app, request, deadline).await?;
    let rule = infer::rule(app, model, options.score_request(&model.manifest)?)?;
    let alone = items.len() == 1;
    let images = items.iter().filter_map(|(_, image)| Some(Input::Encoded(image.as_ref().ok()?.clone()))).collect();
    let mut answers = infer::predict(app, model, images, deadline).await?.into_iter();
    drop(held);
    let began = Instant::now();
    let mut results = Vec::with_capacity(items.len());
    for (id, image) in items {
        // An image that could not be read was not sent to the model.
        let outcome = match image {
            Err(problem) => Err(problem),
            Ok(_) => answers.next().unwrap_or_else(|| Err(infer::lost())),
        };
        match outcome {
            Ok(prediction) => {
                let scored = infer::score(app, model, &rule, &prediction, notes);
                results.push(ImageResult::of(id, &prediction, &scored, model, &rule, &options));
            }
            Err(problem) if alone => return Err(problem),
            Err(problem) => results.push(ImageResult::failed(id, problem)),
        }
    }
    let encoding = Instant::now();
    let response = Json(ClassifyReply::of(model, &rule, results)).into_response();
    app.telemetry.encoded(model, encoding.elapsed());
    Ok((response, began.elapsed()))
}

/// Lists the models
#[cfg_attr(feature = "openapi", utoipa::path(get, path = "/v1/models", tag = "models", responses(
    (status = 200, description = "The models, sorted by name", body = ModelList),
    (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
)))]
pub(crate) async fn models(State(app): State<App>) -> Json<ModelList> {
    let default = app.registry.default_model();
    let summary = |model: &Arc<ServedModel>| ModelSummary {
        name: model.name.clone(),
        version: model.version.clone(),
        default: default.as_ref().is_some_and(|d| Arc::ptr_eq(d, model)),
        arch: model.manifest.arch.clone(),
        classes: model.manifest.classes.len(),
        precision: model.manifest.precision(),
    };
    Json(ModelList { models: app.registry.models().iter().map(summary).collect() })
}

/// Shows a model's card
#[cfg_attr(feature = "openapi", utoipa::path(get, path = "/v1/models/{model}", tag = "models",
    params(("model" = String, Path, description = "Name of the model")),
    responses(
        (status = 200, description = "Classes, counts, preprocessing, fold proof, calibration, measured figures", body = ModelCard),
        (status = "default", description = "404", body = ProblemBody, content_type = "application/problem+json"),
    )
))]
pub(crate) async fn model(State(app): State<App>, Path(name): Path<String>) -> Result<Json<ModelCard>, Problem> {
    Ok(Json(ModelCard::of(&*find(&app, &name, None)?)?))
}

/// Says that the process is alive
#[cfg_attr(feature = "openapi", utoipa::path(get, path = "/livez", tag = "health", responses(
    (status = 200, description = "Alive", body = String, content_type = "text/plain"),
)))]
pub(crate) async fn live() -> &'static str {
    "ok\n"
}

/// Says whether the server is ready for requests
#[cfg_attr(feature = "openapi", utoipa::path(get, path = "/readyz", tag = "health", responses(
    (status = 200, description = "Every model is loaded and warm", body = String, content_type = "text/plain"),
    (status = "default", description = "503 while models are being loaded, and while the server shuts down", body = ProblemBody, content_type = "application/problem+json"),
)))]
pub(crate) async fn ready(State(app): State<App>) -> Result<&'static str, Problem> {
    app.ready().map(|()| "ready\n")
}

/// Metrics for Prometheus, in its own text format, or as OpenMetrics if the header `accept` prefers that
#[cfg_attr(feature = "openapi", utoipa::path(get, path = "/metrics", tag = "health", responses(
    (status = 200, description = "The metrics; on the admin listener, if there is one", content(
        (String = "text/plain"), (String = "application/openmetrics-text"))),
    (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
)))]
pub(crate) async fn metrics(State(app): State<App>, headers: HeaderMap) -> Response {
    let form = prometheus::Form::of(&headers);
    ([(header::CONTENT_TYPE, form.content_type())], app.telemetry.text(&app.registry, form)).into_response()
}

/// This document
#[cfg_attr(feature = "openapi", utoipa::path(get, path = "/openapi.yaml", tag = "health", responses(
    (status = 200, description = "OpenAPI 3.1", body = String, content_type = "application/yaml"),
)))]
pub(crate) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/yaml")], OPENAPI_YAML).into_response()
}

pub(crate) async fn not_found() -> Problem {
    Problem::new(Code::NotFound, "there is nothing at this path; /openapi.yaml lists the paths that exist")
}

pub(crate) async fn method_not_allowed() -> Problem {
    Problem::new(
        Code::MethodNotAllowed,
        "this path does not accept that method; the header Allow lists those that it accepts",
    )
}
