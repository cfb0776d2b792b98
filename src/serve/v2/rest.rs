//! The protocol over REST.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use super::super::body::{self, Held};
use super::super::code::Code;
use super::super::control::Control;
use super::super::cut::shown;
use super::super::objects;
use super::super::wire::ClientId;
use super::tensors::{Data, RawData, RawTensor};
use super::wire::{
    IndexQuery, InferReply, Live, ModelReady, Ready, WireData, WireInfer, WireInput, WireOutput, WireTensor,
};
use super::{
    Answer, App, Call, IndexLine, IndexState, Notes, Output, Problem, ServerInfo, Stats, Wanted, bad, best_of,
    describe, find, infer as shared,
};
#[cfg(feature = "openapi")]
use super::{ErrorBody, describe::ModelInfo};

/// The binary extension: bytes of the JSON before the tensors; 0 when the body is one encoded picture.
const JSON_LENGTH: &str = "inference-header-content-length";

/// Bytes of a request about the repository.
const SMALL_BODY: usize = 64 << 10;

/// Describes the server
#[cfg_attr(feature = "openapi", utoipa::path(get, path = "/v2", tag = "v2", responses((status = 200, description = "Name, version, extensions", body = ServerInfo))))]
pub(crate) async fn server() -> Json<ServerInfo> {
    Json(describe::server())
}

/// Says that the process is alive
#[cfg_attr(feature = "openapi", utoipa::path(get, path = "/v2/health/live", tag = "v2", responses((status = 200, description = "Alive", body = Live))))]
pub(crate) async fn live() -> Json<Live> {
    Json(Live { live: true })
}

/// Says whether the server is ready for requests
#[cfg_attr(feature = "openapi", utoipa::path(get, path = "/v2/health/ready", tag = "v2", responses(
    (status = 200, description = "Every model is loaded and warm", body = Ready),
    (status = "default", description = "503 while models are being loaded, and while the server shuts down", body = ErrorBody),
)))]
pub(crate) async fn ready(State(app): State<App>) -> Result<Json<Ready>, Problem> {
    app.ready().map(|()| Json(Ready { live: true, ready: true }))
}

macro_rules! with_and_without_version {
    ($(#[$doc:meta])* $plain:ident $versioned:ident $path:literal $versioned_path:literal $reply:ty, $description:literal, $look:expr) => {
        $(#[$doc])*
        #[cfg_attr(feature = "openapi", utoipa::path(get, path = $path, tag = "v2",
            params(("model" = String, Path, description = "Name of the model")),
            responses(
                (status = 200, description = $description, body = $reply),
                (status = "default", description = "404", body = ErrorBody),
            )
        ))]
        pub(crate) async fn $plain(State(app): State<App>, Path(model): Path<String>) -> Result<Response, Problem> {
            ($look)(&app, &model, None)
        }

        $(#[$doc])*
        #[cfg_attr(feature = "openapi", utoipa::path(get, path = $versioned_path, tag = "v2",
            params(
                ("model" = String, Path, description = "Name of the model"),
                ("version" = String, Path, description = "A decimal number"),
            ),
            responses(
                (status = 200, description = $description, body = $reply),
                (status = "default", description = "404", body = ErrorBody),
            )
        ))]
        pub(crate) async fn $versioned(
            State(app): State<App>,
            Path((model, version)): Path<(String, String)>,
        ) -> Result<Response, Problem> {
            ($look)(&app, &model, Some(&version))
        }
    };
}

with_and_without_version! {
    /// Describes a model's tensors
    metadata metadata_version "/v2/models/{model}" "/v2/models/{model}/versions/{version}" ModelInfo,
    "Inputs and outputs",
    |app: &App, name: &str, version: Option<&str>| {
        let model = find(app, name, version)?;
        Ok(Json(describe::model(&model, versions(app, name))).into_response())
    }
}

with_and_without_version! {
    /// Says whether a model is ready
    model_ready model_ready_version "/v2/models/{model}/ready" "/v2/models/{model}/versions/{version}/ready" ModelReady,
    "The model is ready",
    |app: &App, name: &str, version: Option<&str>| {
        let model = find(app, name, version)?;
        Ok(Json(ModelReady { name: model.name.clone(), ready: true }).into_response())
    }
}

with_and_without_version! {
    /// Counts and times since the model was loaded
    stats stats_version "/v2/models/{model}/stats" "/v2/models/{model}/versions/{version}/stats" Stats,
    "The statistics, in the form that perf_analyzer reads",
    |app: &App, name: &str, version: Option<&str>| {
        let model = find(app, name, version)?;
        Ok(Json(Stats { model_stats: vec![describe::stats(&model)] }).into_response())
    }
}

with_and_without_version! {
    /// The part of Triton's model configuration that its clients read
    config config_version "/v2/models/{model}/config" "/v2/models/{model}/versions/{version}/config" Object,
    "Tensors and batch size",
    |app: &App, name: &str, version: Option<&str>| {
        Ok(Json(describe::config(&*find(app, name, version)?, app.limits.max_images)).into_response())
    }
}

/// Counts and times of every model
#[cfg_attr(feature = "openapi", utoipa::path(get, path = "/v2/models/stats", tag = "v2", responses(
    (status = 200, description = "The statistics, in the form that perf_analyzer reads", body = Stats),
)))]
pub(crate) async fn all_stats(State(app): State<App>) -> Json<Stats> {
    Json(Stats { model_stats: app.registry.models().iter().map(|model| describe::stats(model)).collect() })
}

/// The versions of `name` that answer.
pub(super) fn versions(app: &App, name: &str) -> Vec<String> {
    app.registry.models().iter().filter(|m| m.name == name).map(|m| m.version.clone()).collect()
}

/// Runs the named model
#[cfg_attr(feature = "openapi", utoipa::path(post, path = "/v2/models/{model}/infer", tag = "v2",
    params(("model" = String, Path, description = "Name of the model")),
    request_body(content((WireInfer = "application/json"), (Vec<u8> = "application/octet-stream"))),
    responses(
        (status = 200, description = "The outputs", content(
            (InferReply = "application/json"), (Vec<u8> = "application/octet-stream"))),
        (status = "default", description = "As in /v1/classify", body = ErrorBody),
    )
))]
pub(crate) async fn infer(
    State(app): State<App>,
    Extension(notes): Extension<Notes>,
    Path(model): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    answer(&app, &notes, &model, None, request).await
}

/// Runs a version of the named model
#[cfg_attr(feature = "openapi", utoipa::path(post, path = "/v2/models/{model}/versions/{version}/infer", tag = "v2",
    params(
        ("model" = String, Path, description = "Name of the model"),
        ("version" = String, Path, description = "A decimal number"),
    ),
    request_body(content((WireInfer = "application/json"), (Vec<u8> = "application/octet-stream"))),
    responses(
        (status = 200, description = "The outputs", content(
            (InferReply = "application/json"), (Vec<u8> = "application/octet-stream"))),
        (status = "default", description = "As in /v1/classify", body = ErrorBody),
    )
))]
pub(crate) async fn infer_version(
    State(app): State<App>,
    Extension(notes): Extension<Notes>,
    Path((model, version)): Path<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    answer(&app, &notes, &model, Some(&version), request).await
}

async fn answer(
    app: &App,
    notes: &Notes,
    model: &str,
    version: Option<&str>,
    request: Request,
) -> Result<Response, Problem> {
    // A wrong name is told before the body is read.
    let model = find(app, model, version)?;
    let deadline = shared::deadline(app, request.headers());
    let (parts, body) = request.into_parts();
    let held = body::receive(app, body, &parts.headers, deadline).await?;
    let size = held.bytes.len();
    let parsed = async move { Ok((parse(&parts.headers, &held)?, held)) };
    let ((call, binary), held) = body::parse(app, size, deadline, parsed).await?;
    let answer = super::answer(app, notes, &model, call, deadline).await?;
    drop(held);
    reply(answer, &binary)
}

fn unfit(error: serde_json::Error) -> Problem {
    bad(format!("the JSON is not valid: {}", objects::reason(&error)))
}

/// Which outputs follow the JSON as bytes.
struct BinaryOutputs {
    default: bool,
    by_name: BTreeMap<&'static str, bool>,
}

fn parse(headers: &HeaderMap, held: &Held) -> Result<(Call, BinaryOutputs), Problem> {
    let bytes = &held.bytes;
    let length = match headers.get(JSON_LENGTH) {
        None => None,
        Some(value) => {
            let length = value.to_str().ok().and_then(|text| text.parse::<usize>().ok());
            Some(length.ok_or_else(|| {
                let value = shown(format_args!("{value:?}"));
                bad(format!("{JSON_LENGTH} is {value}; expected a whole number"))
            })?)
        }
    };
    if length == Some(0) {
        // One picture and nothing else; the answer is JSON.
        let input = RawTensor {
            name: "image".into(),
            datatype: "BYTES".into(),
            shape: vec![1],
            data: RawData::One(bytes.clone()),
        };
        let call =
            Call { id: ClientId::default(), parameters: BTreeMap::new(), inputs: vec![input], outputs: Vec::new() };
        return Ok((call, BinaryOutputs { default: false, by_name: BTreeMap::new() }));
    }
    let json = length.unwrap_or(bytes.len());
    if json > bytes.len() {
        return Err(bad(format!("{JSON_LENGTH} is {json}; the body has {} bytes", bytes.len())));
    }
    let request: WireInfer = objects::from_slice(&bytes[..json]).map_err(unfit)?;
    let mut rest = bytes.slice(json..);
    let mut inputs = Vec::with_capacity(request.inputs.len());
    for input in request.inputs {
        inputs.push(raw(input, &mut rest)?);
    }
    if !rest.is_empty() {
        return Err(bad(format!("{} bytes are left after the inputs' binary_data_size", rest.len())));
    }
    let flag = |value: Option<&Value>| value.and_then(Value::as_bool);
    let default = flag(request.parameters.get("binary_data_output")).unwrap_or(false);
    let mut binary = BinaryOutputs { default, by_name: BTreeMap::new() };
    let mut outputs = Vec::with_capacity(request.outputs.len());
    for WireOutput { name, parameters } in request.outputs {
        let output = Output::of(&name)?;
        super::once(output, &outputs)?;
        super::no_shared_memory("output", &name, &parameters)?;
        if let Some(flag) = flag(parameters.get("binary_data")) {
            binary.by_name.insert(output.name(), flag);
        }
        outputs.push(Wanted { output, classification: best_of("classification", &parameters)? });
    }
    Ok((Call { id: request.id, parameters: request.parameters, inputs, outputs }, binary))
}

fn raw(input: WireInput, rest: &mut Bytes) -> Result<RawTensor, Problem> {
    let WireInput { name, datatype, shape, parameters, data } = input;
    super::no_shared_memory("input", &name, &parameters)?;
    let data = match (parameters.get("binary_data_size"), data) {
        (Some(_), Some(_)) => return Err(bad(format!("input {} has both data and binary_data_size", shown(&name)))),
        (None, None) => return Err(bad(format!("input {} has neither data nor binary_data_size", shown(&name)))),
        (None, Some(data)) => data.raw()?,
        (Some(size), None) => {
            let bytes = size.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n <= rest.len());
            let bytes = bytes.ok_or_else(|| {
                let (name, size) = (shown(&name), shown(size));
                bad(format!("binary_data_size of input {name} is {size}; {} bytes are left after the JSON", rest.len()))
            })?;
            RawData::Binary(rest.split_to(bytes))
        }
    };
    Ok(RawTensor { name, datatype, shape, data })
}

fn reply(answer: Answer, binary: &BinaryOutputs) -> Result<Response, Problem> {
    let mut after = Vec::new();
    let mut outputs = Vec::with_capacity(answer.tensors.len());
    for tensor in answer.tensors {
        let as_bytes = binary.by_name.get(tensor.name).copied().unwrap_or(binary.default);
        let (parameters, data) = if as_bytes {
            let bytes = tensor.data.binary();
            after.extend_from_slice(&bytes);
            (Some(serde_json::json!({"binary_data_size": bytes.len()})), None)
        } else {
            let text = |element: Vec<u8>| String::from_utf8_lossy(&element).into_owned();
            let data = match tensor.data {
                Data::F32(values) => WireData::F32(values),
                Data::Bool(values) => WireData::Bool(values),
                Data::Bytes(elements) => WireData::Strings(elements.into_iter().map(text).collect()),
            };
            (None, Some(data))
        };
        outputs.push(WireTensor {
            name: tensor.name,
            datatype: tensor.datatype,
            shape: tensor.shape,
            parameters,
            data,
        });
    }
    let has_bytes = outputs.iter().any(|output| output.data.is_none());
    let reply = InferReply { model_name: answer.model, model_version: answer.version, id: answer.id, outputs };
    if !has_bytes {
        return Ok(Json(reply).into_response());
    }
    let mut body = serde_json::to_vec(&reply).map_err(|error| {
        tracing::error!(%error, "an answer cannot be written as JSON");
        Problem::new(Code::Internal, "the server failed to write the answer")
    })?;
    let length = HeaderValue::from(body.len());
    body.extend_from_slice(&after);
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(JSON_LENGTH, length);
    Ok(response)
}

/// Lists the repository's models
#[cfg_attr(feature = "openapi", utoipa::path(post, path = "/v2/repository/index", tag = "v2",
    request_body(content = Option<IndexQuery>, description = "May be empty"),
    responses(
        (status = 200, description = "Each version with its state", body = Vec<IndexLine>),
        (status = "default", description = "An error", body = ErrorBody),
    )
))]
pub(crate) async fn index(State(app): State<App>, request: Request) -> Result<Json<Vec<IndexLine>>, Problem> {
    let body = small(&app, request).await?.bytes;
    let query = if body.is_empty() || body.trim_ascii() == b"null" {
        IndexQuery::default()
    } else {
        objects::from_slice(&body).map_err(unfit)?
    };
    let lines = app.registry.index().into_iter().map(IndexLine::from);
    Ok(Json(lines.filter(|line| !query.ready || line.state == IndexState::Ready).collect()))
}

/// Loads a model, or loads it again
///
/// The new state is warmed up beside the old one, and replaces it without failing a request. The model comes from the
/// repository; parameters that would upload one are refused.
#[cfg_attr(feature = "openapi", utoipa::path(post, path = "/v2/repository/models/{model}/load", tag = "v2",
    params(("model" = String, Path, description = "Name of the model")),
    responses(
        (status = 200, description = "Loaded"),
        (status = "default", description = "400 when it cannot be loaded, 403, 404", body = ErrorBody),
    )
))]
pub(crate) async fn load(
    control: Control,
    State(app): State<App>,
    Path(model): Path<String>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let body = match small(&app, request).await {
        // Only uploads are large.
        Err(problem) if problem.status() == StatusCode::PAYLOAD_TOO_LARGE => {
            return no_upload(true).map(|()| StatusCode::OK);
        }
        body => body?.bytes,
    };
    let value: Value = serde_json::from_slice(&body).unwrap_or_default();
    let parameters = value.get("parameters").and_then(Value::as_object);
    no_upload(parameters.is_some_and(|p| !p.is_empty()))?;
    app.registry.change(control, move |registry| registry.load(&model)).await?;
    Ok(StatusCode::OK)
}

/// Unloads a model
///
/// Requests in progress are still answered.
#[cfg_attr(feature = "openapi", utoipa::path(post, path = "/v2/repository/models/{model}/unload", tag = "v2",
    params(("model" = String, Path, description = "Name of the model")),
    responses(
        (status = 200, description = "Unloaded"),
        (status = "default", description = "403, 404", body = ErrorBody),
    )
))]
pub(crate) async fn unload(
    control: Control,
    State(app): State<App>,
    Path(model): Path<String>,
) -> Result<StatusCode, Problem> {
    app.registry.change(control, move |registry| registry.unload(&model)).await?;
    Ok(StatusCode::OK)
}

/// Reads the body of a request that has little to say.
async fn small(app: &App, request: Request) -> Result<Held, Problem> {
    let (parts, body) = request.into_parts();
    let deadline = shared::deadline(app, &parts.headers);
    body::read_little(body, &parts.headers, &app.limits, &app.memory, deadline, SMALL_BODY).await
}

pub(super) fn no_upload(parameters: bool) -> Result<(), Problem> {
    let detail = "load takes no parameters: models come from the repository and are not uploaded";
    if parameters { Err(bad(detail)) } else { Ok(()) }
}
