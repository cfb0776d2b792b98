//! The protocol over gRPC. Calls are unary; bodies are read within the same bounds as over REST.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use futures_util::{future, stream};
use prost::Message;
use serde_json::Value;
use tokio::time::Instant;
use tonic::Status;
use tonic::codec::{Codec, EncodeBody, SingleMessageCompressionOverride};
use tonic_prost::ProstCodec;

use super::super::body::{self, Held};
use super::super::code::Code;
use super::super::coding::Coding;
use super::super::control::Control;
use super::super::cut::shown;
use super::super::keys::Caller;
use super::super::wire::ClientId;
use super::bounds;
use super::describe::{self, CountAndTime, TensorInfo};
use super::messages as m;
use super::messages::Choice;
use super::tensors::{RawData, RawTensor};
use super::{
    Answer, App, Call, IndexLine, IndexState, Notes, Output, Problem, Wanted, bad, find, infer as shared, is_grpc, rest,
};

/// How the messages of a call are compressed.
const ENCODING: &str = "grpc-encoding";
/// How they may be.
const ACCEPTED: &str = "grpc-accept-encoding";

/// A problem as gRPC says it.
pub(crate) fn refusal(problem: &Problem) -> Response {
    let code = match problem.status() {
        StatusCode::UNAUTHORIZED => tonic::Code::Unauthenticated,
        StatusCode::FORBIDDEN => tonic::Code::PermissionDenied,
        StatusCode::NOT_FOUND if [Code::NoSuchMethod, Code::NotFound].contains(&problem.code) => {
            tonic::Code::Unimplemented
        }
        StatusCode::NOT_FOUND => tonic::Code::NotFound,
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => tonic::Code::DeadlineExceeded,
        StatusCode::PAYLOAD_TOO_LARGE | StatusCode::TOO_MANY_REQUESTS => tonic::Code::ResourceExhausted,
        StatusCode::UNSUPPORTED_MEDIA_TYPE => tonic::Code::Unimplemented,
        StatusCode::SERVICE_UNAVAILABLE if problem.code == Code::Memory => tonic::Code::ResourceExhausted,
        StatusCode::SERVICE_UNAVAILABLE => tonic::Code::Unavailable,
        status if status.is_client_error() => tonic::Code::InvalidArgument,
        _ => tonic::Code::Internal,
    };
    let mut response = Status::new(code, problem.detail.to_string()).into_http();
    response.headers_mut().insert(ACCEPTED, HeaderValue::from_static("identity,gzip"));
    response
}

/// A call: its message, and what answering it needs.
struct Context {
    app: App,
    notes: Notes,
    /// Whether the caller may load and unload.
    control: Result<Control, Problem>,
    deadline: Instant,
    held: Held,
    /// Whether messages may be compressed by gzip.
    gzip: bool,
}

impl Context {
    /// # Errors
    /// Also 415, when the request does not say that it is gRPC.
    async fn read(app: App, notes: Notes, caller: &Caller, request: Request) -> Result<Self, Problem> {
        must_be_grpc(request.headers())?;
        let control = Control::of(&app, caller, request.headers(), request.uri());
        let deadline = shared::deadline(&app, request.headers());
        let (parts, body) = request.into_parts();
        let held = body::read(body, &parts.headers, &app.limits, &app.memory, deadline).await?;
        let gzip = parts.headers.get(ENCODING).is_some_and(|coding| coding.as_bytes().eq_ignore_ascii_case(b"gzip"));
        Ok(Self { app, notes, control, deadline, held, gzip })
    }

    async fn message<Q: Message + Default + 'static>(&self) -> Result<Q, Problem> {
        self.checked_message(|_| Ok(())).await
    }

    /// The message, if `check` lets its bytes pass.
    async fn checked_message<Q: Message + Default + 'static>(
        &self,
        check: fn(Bytes) -> Result<(), Problem>,
    ) -> Result<Q, Problem> {
        let framed = self.held.bytes.clone();
        let (limit, memory, gzip) = (self.app.limits.max_body_bytes, self.app.memory.clone(), self.gzip);
        // What is compressed may be much.
        let size = if gzip { usize::MAX } else { framed.len() };
        body::parse(&self.app, size, self.deadline, async move {
            let (message, compressed) = framed_message(&framed)?;
            let held = match (compressed, gzip) {
                (false, _) => Held::of(message),
                (true, true) => Held::of(message).unpacked(Coding::Gzip, limit, &memory)?,
                (true, false) => return Err(unknown_compression()),
            };
            check(held.bytes.clone())?;
            decode(held.bytes)
        })
        .await
    }
}

/// `/inference.GRPCInferenceService/{method}`
pub(crate) async fn method(
    State(app): State<App>,
    Extension(notes): Extension<Notes>,
    Extension(caller): Extension<Arc<Caller>>,
    Path(method): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let context = Context::read(app, notes, &caller, request).await?;
    let app = &context.app;
    match method.as_str() {
        "ServerLive" => {
            context.message::<m::Empty>().await?;
            Ok(reply(m::Live { live: true }))
        }
        "ServerReady" => {
            context.message::<m::Empty>().await?;
            Ok(reply(m::Ready { ready: app.ready().is_ok() }))
        }
        "ModelReady" => {
            let request: m::ModelRequest = context.message().await?;
            Ok(reply(m::Ready { ready: find(app, &request.name, version(&request.version)).is_ok() }))
        }
        "ServerMetadata" => {
            context.message::<m::Empty>().await?;
            Ok(reply(server()))
        }
        "ModelMetadata" => metadata(app, &context.message().await?).map(reply),
        "ModelConfig" => config(app, &context.message().await?).map(reply),
        "ModelInfer" => infer(&context, context.checked_message(bounds::check).await?).await.map(reply),
        "ModelStatistics" => statistics(app, &context.message().await?).map(reply),
        "RepositoryIndex" | "RepositoryModelLoad" | "RepositoryModelUnload" if !app.administers => {
            let detail = "the model repository is available only on the admin listener (--admin-addr), also over gRPC";
            Err(Problem::new(Code::NotAdmin, detail))
        }
        "RepositoryIndex" => Ok(reply(index(app, &context.message().await?))),
        "RepositoryModelLoad" => {
            let request: m::ControlRequest = context.message().await?;
            let control = context.control?;
            rest::no_upload(!request.parameters.is_empty())?;
            app.registry.change(control, move |registry| registry.load(&request.model_name)).await?;
            Ok(reply(m::Empty {}))
        }
        "RepositoryModelUnload" => {
            let request: m::ControlRequest = context.message().await?;
            let control = context.control?;
            app.registry.change(control, move |registry| registry.unload(&request.model_name)).await?;
            Ok(reply(m::Empty {}))
        }
        _ => Err(no_such_method(&method)),
    }
}

pub(super) fn no_such_method(method: &str) -> Problem {
    Problem::new(Code::NoSuchMethod, format!("this server has no method {}", shown(method)))
}

pub(super) fn must_be_grpc(headers: &HeaderMap) -> Result<(), Problem> {
    if is_grpc(headers) {
        return Ok(());
    }
    let given = headers.get(header::CONTENT_TYPE).map_or_else(|| "none".into(), |v| shown(format_args!("{v:?}")));
    let detail = format!("the content-type of a gRPC call is application/grpc; this request's is {given}");
    Err(Problem::new(Code::MediaType, detail))
}

/// The one message of a unary call, and whether it is compressed. Before it stand a byte that says so, and its length in
/// four.
fn framed_message(body: &Bytes) -> Result<(Bytes, bool), Problem> {
    let Some((&[compressed, length @ ..], message)) = body.split_first_chunk::<5>() else {
        return Err(bad("the call has no message: expected five bytes and then a message"));
    };
    let (announced, found) = (u32::from_be_bytes(length), message.len());
    if u32::try_from(found).ok() != Some(announced) {
        return Err(bad(format!("the call announces one message of {announced} bytes, but has {found} bytes")));
    }
    Ok((body.slice(5..), compressed != 0))
}

fn unknown_compression() -> Problem {
    let detail = "the message is compressed in a way that this server does not accept: send it uncompressed, or by gzip \
                  (grpc-encoding)";
    Problem::new(Code::ContentEncoding, detail)
}

fn decode<Q: Message + Default>(message: Bytes) -> Result<Q, Problem> {
    Q::decode(message).map_err(|error| bad(format!("the message is not valid: {error}")))
}

/// An answer with the status OK.
fn reply<A: Message + Default + 'static>(answer: A) -> Response {
    let encoder = ProstCodec::<A, A>::default().encoder();
    let answer = stream::once(future::ready(Ok(answer)));
    let body = EncodeBody::new_server(encoder, answer, None, SingleMessageCompressionOverride::default(), None);
    let mut response = Response::new(Body::new(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response.headers_mut().insert(ACCEPTED, HeaderValue::from_static("identity,gzip"));
    response
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
        m::ModelInput { name, data_type, dims, optional: true }
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
    let wanted = lines.filter(|line| !request.ready || line.state == IndexState::Ready);
    let entry = |line: IndexLine| m::IndexEntry {
        name: line.name,
        version: line.version,
        state: line.state.word().into(),
        reason: line.reason,
    };
    m::Index { models: wanted.map(entry).collect() }
}

async fn infer(context: &Context, request: m::InferRequest) -> Result<m::InferResponse, Problem> {
    let m::InferRequest { model_name, model_version, id, parameters, inputs, outputs, raw_input_contents } = request;
    if !raw_input_contents.is_empty() && raw_input_contents.len() != inputs.len() {
        let (raw, inputs) = (raw_input_contents.len(), inputs.len());
        return Err(bad(format!(
            "the request has {inputs} inputs but {raw} raw_input_contents: give one for each input"
        )));
    }
    let mut raw = raw_input_contents.into_iter();
    let mut tensors = Vec::with_capacity(inputs.len());
    for m::InputTensor { name, datatype, shape, contents, parameters } in inputs {
        super::no_shared_memory("input", &name, &values(parameters))?;
        let data = match (raw.next(), contents) {
            (Some(bytes), None) => RawData::Binary(bytes),
            (Some(_), Some(_)) => {
                return Err(bad(format!("input {} has both contents and raw_input_contents", shown(&name))));
            }
            (None, Some(contents)) if datatype == "BYTES" => RawData::Elements(contents.bytes),
            (None, Some(contents)) => RawData::Floats(contents.fp32),
            (None, None) => {
                return Err(bad(format!("input {} has neither contents nor raw_input_contents", shown(&name))));
            }
        };
        tensors.push(RawTensor { name, datatype, shape, data });
    }
    let wanted = |output: m::RequestedOutput| {
        let parameters = values(output.parameters);
        super::no_shared_memory("output", &output.name, &parameters)?;
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
    let call = Call { id: ClientId::try_new(id)?, parameters: values(parameters), inputs: tensors, outputs };
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
        id: id.into(),
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
