//! The handlers: thin; bodies are read in `input`, answers are shaped in `wire`.

use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::problem::{self, Problem, ProblemBody};
use super::registry::ServedModel;
use super::wire::{ClassifyReply, ClassifyRequest, ImageResult, ModelCard, ModelList, ModelSummary};
use super::{App, input, openapi};

/// Classifies with the default model
///
/// Needs one model, or `--default-model`.
#[utoipa::path(
    post, path = "/v1/classify", tag = "classify",
    params(
        ("top_k" = Option<usize>, Query, description = "Classes per image, the best first; 5 when absent", minimum = 1),
        ("min_score" = Option<f64>, Query, description = "Leave out classes that score less; abstain when that leaves none", minimum = 0.0, maximum = 1.0),
        ("prior" = Option<String>, Query, description = "Class prior to answer under: `uniform` or `train`; JSON takes one of your own, too"),
        ("alpha" = Option<f64>, Query, description = "Add a prediction set that misses the true class at most this often", minimum = 0.0, maximum = 1.0),
        ("set_score" = Option<String>, Query, description = "Score of the set: `pas` (default) or `plain`"),
        ("set_rung" = Option<String>, Query, description = "For whom the set's coverage shall hold: `marginal` (default), `group` or `class`"),
        ("max_set_size" = Option<usize>, Query, description = "Abstain when the set is larger", minimum = 1),
        ("abstain_prior_only" = Option<bool>, Query, description = "Abstain when the best class has no calibration image"),
        ("include" = Option<String>, Query, description = "Extras, with commas: `logits`, `uncalibrated`, `support`, `timings`"),
    ),
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
        (status = "default", description = "400, 404, 405, 408, 413, 415, 422, 500, 503 or 504", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn classify_default(State(app): State<App>, request: Request) -> Result<Json<ClassifyReply>, Problem> {
    let model = app.registry.default_model().ok_or_else(|| {
        let names = app.registry.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ");
        let detail =
            format!("this server has several models and no default: use /v1/models/NAME/classify with one of {names}");
        Problem::new(StatusCode::NOT_FOUND, "no_default_model", detail)
    })?;
    classify(&app, model, request).await
}

/// Classifies with the named model
#[utoipa::path(
    post, path = "/v1/models/{model}/classify", tag = "classify",
    params(
        ("model" = String, Path, description = "Name of the model"),
        ("top_k" = Option<usize>, Query, description = "As in /v1/classify", minimum = 1),
        ("min_score" = Option<f64>, Query, description = "As in /v1/classify", minimum = 0.0, maximum = 1.0),
        ("prior" = Option<String>, Query, description = "As in /v1/classify"),
        ("alpha" = Option<f64>, Query, description = "As in /v1/classify", minimum = 0.0, maximum = 1.0),
        ("set_score" = Option<String>, Query, description = "As in /v1/classify"),
        ("set_rung" = Option<String>, Query, description = "As in /v1/classify"),
        ("max_set_size" = Option<usize>, Query, description = "As in /v1/classify", minimum = 1),
        ("abstain_prior_only" = Option<bool>, Query, description = "As in /v1/classify"),
        ("include" = Option<String>, Query, description = "As in /v1/classify"),
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
)]
pub(crate) async fn classify_model(
    State(app): State<App>,
    Path(model): Path<String>,
    request: Request,
) -> Result<Json<ClassifyReply>, Problem> {
    classify(&app, find(&app, &model)?, request).await
}

/// Classifies with the named model, if that version is served
#[utoipa::path(
    post, path = "/v1/models/{model}/versions/{version}/classify", tag = "classify",
    params(
        ("model" = String, Path, description = "Name of the model"),
        ("version" = String, Path, description = "A decimal number"),
        ("top_k" = Option<usize>, Query, description = "As in /v1/classify", minimum = 1),
        ("min_score" = Option<f64>, Query, description = "As in /v1/classify", minimum = 0.0, maximum = 1.0),
        ("prior" = Option<String>, Query, description = "As in /v1/classify"),
        ("alpha" = Option<f64>, Query, description = "As in /v1/classify", minimum = 0.0, maximum = 1.0),
        ("set_score" = Option<String>, Query, description = "As in /v1/classify"),
        ("set_rung" = Option<String>, Query, description = "As in /v1/classify"),
        ("max_set_size" = Option<usize>, Query, description = "As in /v1/classify", minimum = 1),
        ("abstain_prior_only" = Option<bool>, Query, description = "As in /v1/classify"),
        ("include" = Option<String>, Query, description = "As in /v1/classify"),
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
)]
pub(crate) async fn classify_version(
    State(app): State<App>,
    Path((model, version)): Path<(String, String)>,
    request: Request,
) -> Result<Json<ClassifyReply>, Problem> {
    let found = find(&app, &model)?;
    if found.version != version {
        let detail = format!("model {model:?} is served in version {} only", found.version);
        return Err(Problem::new(StatusCode::NOT_FOUND, "no_such_version", detail));
    }
    classify(&app, found, request).await
}

async fn classify(app: &App, model: &ServedModel, request: Request) -> Result<Json<ClassifyReply>, Problem> {
    let began = tokio::time::Instant::now();
    let input::Images { items, options } = input::read(request, &app.limits).await?;
    let rule = model.scorer.rule(options.score_request(&model.manifest)?, &app.prior)?;
    let alone = items.len() == 1;
    let images = items.iter().filter_map(|(_, image)| image.as_ref().ok().cloned()).collect();
    let mut replies = model.engine.submit(images)?.into_iter();
    let mut results = Vec::with_capacity(items.len());
    for (id, image) in items {
        let outcome = match image {
            Err(problem) => Err(problem),
            Ok(_) => {
                let Some(reply) = replies.next() else { return Err(lost()) };
                let reply = tokio::time::timeout_at(began + app.limits.timeout, reply).await.map_err(|_| {
                    let seconds = app.limits.timeout.as_secs();
                    let detail = format!("no answer within {seconds} s (--timeout): send fewer images, or try again when the load is less");
                    Problem::new(StatusCode::GATEWAY_TIMEOUT, "deadline", detail).with_limit(seconds)
                })?;
                reply.map_err(|_| lost())?.map_err(|error| Problem::from(&error))
            }
        };
        match outcome {
            Ok(prediction) => results.push(ImageResult::of(id, &prediction, model, &rule, &options)),
            Err(problem) if alone => return Err(problem),
            Err(problem) => results.push(ImageResult::failed(id, problem)),
        }
    }
    Ok(Json(ClassifyReply::of(model, &rule, results)))
}

/// A worker went away without an answer; it cannot, short of a bug.
fn lost() -> Problem {
    tracing::error!("a worker gave no answer");
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the server lost this image; try again")
}

fn find<'a>(app: &'a App, name: &str) -> Result<&'a ServedModel, Problem> {
    app.registry.get(name).ok_or_else(|| {
        let known = app.registry.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ");
        Problem::new(
            StatusCode::NOT_FOUND,
            "no_such_model",
            format!("no model is named {name:?}; this server has {known}"),
        )
    })
}

/// Lists the models
#[utoipa::path(get, path = "/v1/models", tag = "models", responses(
    (status = 200, description = "By name", body = ModelList),
    (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
))]
pub(crate) async fn models(State(app): State<App>) -> Json<ModelList> {
    let default = app.registry.default_model().map(|m| m.name.clone());
    let summary = |model: &ServedModel| ModelSummary {
        name: model.name.clone(),
        version: model.version.clone(),
        default: default.as_ref() == Some(&model.name),
        arch: model.manifest.arch.clone(),
        classes: model.manifest.classes.len(),
    };
    Json(ModelList { models: app.registry.iter().map(summary).collect() })
}

/// Shows a model's card
#[utoipa::path(get, path = "/v1/models/{model}", tag = "models",
    params(("model" = String, Path, description = "Name of the model")),
    responses(
        (status = 200, description = "Classes, counts, preprocessing, fold proof, calibration, measured figures", body = ModelCard),
        (status = "default", description = "404", body = ProblemBody, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn model(State(app): State<App>, Path(name): Path<String>) -> Result<Json<ModelCard>, Problem> {
    Ok(Json(ModelCard::of(find(&app, &name)?)?))
}

/// Says that the process answers
#[utoipa::path(get, path = "/livez", tag = "health", responses(
    (status = 200, description = "Alive", body = String, content_type = "text/plain"),
))]
pub(crate) async fn live() -> &'static str {
    "ok\n"
}

/// Says whether requests should be sent here
#[utoipa::path(get, path = "/readyz", tag = "health", responses(
    (status = 200, description = "Every model is loaded and warm", body = String, content_type = "text/plain"),
    (status = "default", description = "503 while draining", body = ProblemBody, content_type = "application/problem+json"),
))]
pub(crate) async fn ready(State(app): State<App>) -> Result<&'static str, Problem> {
    if app.draining.load(Ordering::Acquire) { Err(problem::draining()) } else { Ok("ready\n") }
}

/// This document
#[utoipa::path(get, path = "/openapi.yaml", tag = "health", responses(
    (status = 200, description = "OpenAPI 3.1", body = String, content_type = "application/yaml"),
))]
pub(crate) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/yaml")], openapi::document()).into_response()
}

pub(crate) async fn not_found() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path; /openapi.yaml lists what there is")
}

pub(crate) async fn method_not_allowed() -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        "this path does not take that method; the header Allow lists those it takes",
    )
}
