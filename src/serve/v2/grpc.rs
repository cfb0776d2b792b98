//! The protocol over gRPC, and `grpc.health.v1`. Calls are unary; bodies are read within the same bounds as over REST.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use axum::body::{Body, Bytes};
use axum::extract::{Extension, Path, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use http_body_util::Full;
use prost::Message;
use serde_json::Value;
use tonic::codec::EnabledCompressionEncodings;
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

use super::super::body::{self, BodyMemory};
use super::super::keys::Caller;
use super::bounds;
use super::describe::{self, CountAndTime, TensorInfo};
use super::messages as m;
use super::messages::Choice;
use super::tensors::{RawData, RawTensor};
use super::{Answer, App, Call, IndexLine, Notes, Output, Problem, Wanted, bad, find, infer as shared, rest};

/// A problem as gRPC says it.
pub(crate) fn status_of(problem: &Problem) -> Status {
    let code = match problem.status {
        StatusCode::UNAUTHORIZED => Code::Unauthenticated,
        StatusCode::FORBIDDEN => Code::PermissionDenied,
        StatusCode::NOT_FOUND if ["no_such_method", "not_found"].contains(&problem.code) => Code::Unimplemented,
        StatusCode::NOT_FOUND => Code::NotFound,
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => Code::DeadlineExceeded,
        StatusCode::PAYLOAD_TOO_LARGE | StatusCode::TOO_MANY_REQUESTS => Code::ResourceExhausted,
        StatusCode::SERVICE_UNAVAILABLE if problem.code == "memory" => Code::ResourceExhausted,
        StatusCode::SERVICE_UNAVAILABLE => Code::Unavailable,
        status if status.is_client_error() => Code::InvalidArgument,
        _ => Code::Internal,
    };
    Status::new(code, problem.detail.clone())
}

/// What a call needs beside its message.
#[derive(Clone)]
struct Context {
    app: App,
    notes: Notes,
    caller: Arc<Caller>,
    deadline: tokio::time::Instant,
}

/// `/inference.GRPCInferenceService/{method}`
pub(crate) async fn method(
    State(app): State<App>,
    Extension(notes): Extension<Notes>,
    Extension(caller): Extension<Arc<Caller>>,
    Path(method): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let (context, request) = read(app, notes, caller, request).await?;
    match method.as_str() {
        "ServerLive" => unary(request, |_: m::Empty| async { Ok(m::Live { live: true }) }).await,
        "ServerReady" => {
            let ready = context.app.ready().is_ok();
            unary(request, |_: m::Empty| async move { Ok(m::Ready { ready }) }).await
        }
        "ModelReady" => {
            let ready = |r: m::ModelRequest| async move {
                Ok(m::Ready { ready: find(&context.app, &r.name, version(&r.version)).is_ok() })
            };
            unary(request, ready).await
        }
        "ServerMetadata" => unary(request, |_: m::Empty| async { Ok(server()) }).await,
        "ModelMetadata" => unary(request, |r| async move { metadata(&context.app, &r) }).await,
        "ModelConfig" => unary(request, |r| async move { config(&context.app, &r) }).await,
        "ModelInfer" => {
            bounds::check(message(request.body()))?;
            unary(request, |r| async move { infer(&context, r).await }).await
        }
        "ModelStatistics" => unary(request, |r| async move { statistics(&context.app, &r) }).await,
        "RepositoryIndex" | "RepositoryModelLoad" | "RepositoryModelUnload" if !context.app.administers => {
            let detail = "the repository is spoken of on the admin listener (--admin-addr), over gRPC, too";
            Err(Problem::new(StatusCode::FORBIDDEN, "not_admin", detail))
        }
        "RepositoryIndex" => unary(request, |r| async move { Ok(index(&context.app, &r)) }).await,
        "RepositoryModelLoad" => {
            let load = |r: m::ControlRequest| async move {
                super::may_control(&context.app, context.caller.admin)?;
                rest::no_upload(!r.parameters.is_empty())?;
                rest::control(&context.app, move |registry| registry.load(&r.model_name)).await.map(|()| m::Empty {})
            };
            unary(request, load).await
        }
        "RepositoryModelUnload" => {
            let unload = |r: m::ControlRequest| async move {
                super::may_control(&context.app, context.caller.admin)?;
                let done = rest::control(&context.app, move |registry| registry.unload(&r.model_name)).await;
                done.map(|()| m::Empty {})
            };
            unary(request, unload).await
        }
        _ => Err(no_such_method(&method)),
    }
}

/// `/grpc.health.v1.Health/{method}`: the server's health, or a model's.
pub(crate) async fn health(
    State(app): State<App>,
    Path(method): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    const SERVING: i32 = 1;
    const NOT_SERVING: i32 = 2;
    /// Bytes: a model's name.
    const HEALTH_BODY: usize = 4 << 10;
    if method != "Check" {
        return Err(no_such_method(&method));
    }
    // Anybody may ask: little is read, and not out of the memory that requests with a key share.
    let deadline = shared::deadline(&app, request.headers());
    let (parts, body) = request.into_parts();
    let own = BodyMemory::of(HEALTH_BODY);
    let held = body::read_little(body, &parts.headers, &app.limits, &own, deadline, HEALTH_BODY).await?;
    let request = axum::http::Request::from_parts(parts, Full::new(held.bytes));
    let check = |r: m::HealthRequest| async move {
        let ready = app.ready().is_ok();
        let own = r.service.is_empty() || r.service == "inference.GRPCInferenceService";
        if !own && ready && app.registry.get(&r.service, None).is_none() {
            // Without the names that there are: a key is needed to learn them.
            let detail = format!("no model is named {:?}", r.service);
            return Err(Problem::new(StatusCode::NOT_FOUND, "no_such_model", detail));
        }
        Ok(m::Health { status: if ready { SERVING } else { NOT_SERVING } })
    };
    unary(request, check).await
}

fn no_such_method(method: &str) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "no_such_method", format!("this server has no method {method}"))
}

async fn read(
    app: App,
    notes: Notes,
    caller: Arc<Caller>,
    request: Request,
) -> Result<(Context, axum::http::Request<Full<Bytes>>), Problem> {
    let deadline = shared::deadline(&app, request.headers());
    let (parts, body) = request.into_parts();
    let held = body::read(body, &parts.headers, &app.limits, &app.memory, deadline).await?;
    let mut request = axum::http::Request::from_parts(parts, Full::new(held.bytes.clone()));
    // Its share of the memory lasts as long as the request does.
    request.extensions_mut().insert(Arc::new(held));
    Ok((Context { app, notes, caller, deadline }, request))
}

/// Decodes the message, has `work` answer it, and encodes the answer or the status. A problem of the work is given back as
/// it is: the envelope counts it, and says when to try again.
async fn unary<Q, A, F, W>(request: axum::http::Request<Full<Bytes>>, work: W) -> Result<Response, Problem>
where
    Q: Message + Default + Send + 'static,
    A: Message + Send + 'static,
    F: Future<Output = Result<A, Problem>> + Send,
    W: FnOnce(Q) -> F + Send,
{
    let mut work = Some(work);
    let failed = Arc::new(OnceLock::new());
    let service = tower::service_fn(|request: tonic::Request<Q>| {
        let (work, failed) = (work.take(), failed.clone());
        async move {
            let Some(work) = work else { return Err(Status::internal("a unary call has one message")) };
            let (_metadata, _extensions, message) = request.into_parts();
            work(message).await.map(tonic::Response::new).map_err(|problem| {
                let status = status_of(&problem);
                // Once: a unary call has one message.
                let _ = failed.set(problem);
                status
            })
        }
    });
    let limit = usize::MAX;
    let response = tonic::server::Grpc::new(ProstCodec::<A, Q>::default())
        .apply_compression_config(EnabledCompressionEncodings::default(), EnabledCompressionEncodings::default())
        // The body's size was limited when it was read.
        .apply_max_message_size_config(Some(limit), Some(limit))
        .unary(service, request)
        .await;
    failed.get().cloned().map_or_else(|| Ok(response.map(Body::new)), Err)
}

/// The message of a unary call, behind the byte that says whether it is compressed and its length in four.
fn message(body: &Full<Bytes>) -> Bytes {
    let framed = body.clone().into_inner().unwrap_or_default();
    if framed.len() > 5 { framed.slice(5..) } else { Bytes::new() }
}

/// The empty string is no version.
fn version(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

fn server() -> m::ServerMetadata {
    let info = describe::server();
    let extensions = info.extensions.into_iter().map(str::to_owned).collect();
    m::ServerMetadata { name: info.name.into(), version: info.version.into(), extensions }
}

fn metadata(app: &App, request: &m::ModelRequest) -> Result<m::ModelMetadata, Problem> {
    let model = find(app, &request.name, version(&request.version))?;
    let info = describe::model(&model, rest::versions(app, &request.name));
    let tensors = |tensors: Vec<TensorInfo>| {
        let one =
            |t: TensorInfo| m::TensorMetadata { name: t.name.into(), datatype: t.datatype.into(), shape: t.shape };
        tensors.into_iter().map(one).collect()
    };
    Ok(m::ModelMetadata {
        name: info.name,
        versions: info.versions,
        platform: info.platform.into(),
        inputs: tensors(info.inputs),
        outputs: tensors(info.outputs),
    })
}

fn config(app: &App, request: &m::ModelRequest) -> Result<m::ModelConfigResponse, Problem> {
    let model = find(app, &request.name, version(&request.version))?;
    let info = describe::model(&model, Vec::new());
    let parts = |t: TensorInfo| (t.name.to_owned(), describe::triton_type(t.datatype).1, t.shape[1..].to_vec());
    let input = |t| {
        let (name, data_type, dims) = parts(t);
        m::ModelInput { name, data_type, dims }
    };
    let output = |t| {
        let (name, data_type, dims) = parts(t);
        m::ModelOutput { name, data_type, dims }
    };
    let config = m::ModelConfig {
        name: model.name.clone(),
        platform: info.platform.into(),
        max_batch_size: i32::try_from(app.limits.max_images).unwrap_or(i32::MAX),
        input: info.inputs.into_iter().map(input).collect(),
        output: info.outputs.into_iter().map(output).collect(),
        backend: "onnxruntime".into(),
    };
    Ok(m::ModelConfigResponse { config: Some(config) })
}

fn statistics(app: &App, request: &m::ModelRequest) -> Result<m::Statistics, Problem> {
    let models = if request.name.is_empty() {
        app.registry.models()
    } else {
        vec![find(app, &request.name, version(&request.version))?]
    };
    let time = |t: CountAndTime| Some(m::Duration { count: t.count, ns: t.ns });
    let one = |stats: describe::VersionStats| {
        let infer = stats.inference_stats;
        m::ModelStatistics {
            name: stats.name,
            version: stats.version,
            last_inference: stats.last_inference,
            inference_count: stats.inference_count,
            execution_count: stats.execution_count,
            inference_stats: Some(m::InferStatistics {
                success: time(infer.success),
                fail: time(infer.fail),
                queue: time(infer.queue),
                compute_input: time(infer.compute_input),
                compute_infer: time(infer.compute_infer),
                compute_output: time(infer.compute_output),
                cache_hit: time(infer.cache_hit),
                cache_miss: time(infer.cache_miss),
            }),
            batch_stats: stats
                .batch_stats
                .into_iter()
                .map(|batch| m::BatchStatistics {
                    batch_size: batch.batch_size,
                    compute_input: time(batch.compute_input),
                    compute_infer: time(batch.compute_infer),
                    compute_output: time(batch.compute_output),
                })
                .collect(),
        }
    };
    Ok(m::Statistics { model_stats: models.iter().map(|model| one(describe::stats(model))).collect() })
}

fn index(app: &App, request: &m::IndexRequest) -> m::Index {
    let lines = app.registry.index().into_iter().map(IndexLine::from);
    let wanted = lines.filter(|line| !request.ready || line.state == "READY");
    let entry = |line: IndexLine| m::IndexEntry {
        name: line.name,
        version: line.version,
        state: line.state.into(),
        reason: line.reason,
    };
    m::Index { models: wanted.map(entry).collect() }
}

async fn infer(context: &Context, request: m::InferRequest) -> Result<m::InferResponse, Problem> {
    let m::InferRequest { model_name, model_version, id, parameters, inputs, outputs, raw_input_contents } = request;
    if !raw_input_contents.is_empty() && raw_input_contents.len() != inputs.len() {
        let (raw, inputs) = (raw_input_contents.len(), inputs.len());
        return Err(bad(format!("the request has {inputs} inputs and {raw} raw_input_contents")));
    }
    let mut raw = raw_input_contents.into_iter();
    let mut tensors = Vec::with_capacity(inputs.len());
    for m::InputTensor { name, datatype, shape, contents, .. } in inputs {
        let data = match (raw.next(), contents) {
            (Some(bytes), None) => RawData::Binary(bytes),
            (Some(_), Some(_)) => return Err(bad(format!("input {name} has both contents and raw_input_contents"))),
            (None, Some(contents)) if datatype == "BYTES" => RawData::Elements(contents.bytes),
            (None, Some(contents)) => RawData::Floats(contents.fp32),
            (None, None) => return Err(bad(format!("input {name} has neither contents nor raw_input_contents"))),
        };
        tensors.push(RawTensor { name, datatype, shape, data });
    }
    let wanted = |output: m::RequestedOutput| {
        let parameters = values(output.parameters);
        let classification = super::best_of("classification", &parameters)?;
        Ok::<_, Problem>(Wanted { output: Output::of(&output.name)?, classification })
    };
    let mut asked = Vec::new();
    for output in outputs {
        let one = wanted(output)?;
        super::once(one.output, &asked)?;
        asked.push(one);
    }
    let outputs = asked;
    let call = Call { id, parameters: values(parameters), inputs: tensors, outputs };
    let Context { app, notes, deadline, .. } = context;
    let model = find(app, &model_name, version(&model_version))?;
    let answer = super::answer(app, notes, &model, call, *deadline).await?;
    let Answer { model, version, id, tensors } = answer;
    let mut outputs = Vec::with_capacity(tensors.len());
    let mut raw_output_contents = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        outputs.push(m::OutputTensor {
            name: tensor.name.into(),
            datatype: tensor.datatype.into(),
            shape: tensor.shape.iter().map(|&n| n as i64).collect(),
            parameters: m::Parameters::new(),
        });
        raw_output_contents.push(Bytes::from(tensor.data.binary()));
    }
    Ok(m::InferResponse {
        model_name: model,
        model_version: version,
        id,
        parameters: m::Parameters::new(),
        outputs,
        raw_output_contents,
    })
}

fn values(parameters: m::Parameters) -> BTreeMap<String, Value> {
    let value = |choice: Option<Choice>| match choice {
        Some(Choice::Bool(value)) => value.into(),
        Some(Choice::Int64(value)) => value.into(),
        Some(Choice::String(value)) => value.into(),
        Some(Choice::Double(value)) => value.into(),
        Some(Choice::Uint64(value)) => value.into(),
        None => Value::Null,
    };
    parameters.into_iter().map(|(name, parameter)| (name, value(parameter.choice))).collect()
}
