//! From inputs to predictions, for every protocol alike.

use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use tokio::time::{Instant, timeout_at};

use super::App;
use super::code::Code;
use super::cut::quoted;
use super::notes::Notes;
use super::problem::{self, Problem};
use crate::classify::{ClassifyError, Input, Prediction, ScoreError, ScoreRequest, ScoreRule, Scored};
use crate::registry::ServedModel;
use crate::scores::{Familiarities, LogitsError};

/// A model, for as long as one request needs it: a swap meanwhile does not take it away.
pub(crate) fn find(app: &App, name: &str, version: Option<&str>) -> Result<Arc<ServedModel>, Problem> {
    if let Some(model) = app.registry.get(name, version) {
        return Ok(model);
    }
    if !app.registry.is_filled() {
        return Err(problem::loading());
    }
    if let Some(version) = version.filter(|_| app.registry.get(name, None).is_some()) {
        let served: Vec<String> =
            app.registry.models().iter().filter(|m| m.name == name).map(|m| m.version.clone()).collect();
        let served = served.join(", ");
        return Err(Problem::new(
            Code::NoSuchVersion,
            format!("model {} has no version {}; the versions served are {served}", quoted(name), quoted(version)),
        ));
    }
    let known = match app.registry.names() {
        names if names.is_empty() => "none".to_owned(),
        names => names.join(", "),
    };
    Err(Problem::new(Code::NoSuchModel, format!("no model is named {}; this server has {known}", quoted(name))))
}

/// The model for requests that name none.
pub(crate) fn default_model(app: &App) -> Result<Arc<ServedModel>, Problem> {
    if let Some(model) = app.registry.default_model() {
        return Ok(model);
    }
    if !app.registry.is_filled() {
        return Err(problem::loading());
    }
    let detail = match (app.registry.names(), app.registry.default_name()) {
        (names, _) if names.is_empty() => "no model is loaded".to_owned(),
        (names, Some(default)) => {
            format!("the default model {default:?} is not loaded; this server has {}", names.join(", "))
        }
        (names, None) => {
            let names = names.join(", ");
            format!("this server has several models and no default: use /v1/models/NAME/classify with one of {names}")
        }
    };
    Err(Problem::new(Code::NoDefaultModel, detail))
}

/// When a request that begins now must be answered: after the server's `--timeout`, or the client's own when shorter.
pub(crate) fn deadline(app: &App, headers: &HeaderMap) -> Instant {
    let server = app.limits.timeout;
    let client = headers.get("grpc-timeout").and_then(|v| grpc_timeout(v.to_str().ok()?));
    Instant::now() + client.map_or(server, |client| client.min(server))
}

/// gRPC over HTTP/2: at most eight digits and a unit.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let n: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

/// Counts `work` in the model's statistics. It gives its answer, and how long shaping that took.
pub(crate) async fn counted<T>(
    model: &ServedModel,
    work: impl Future<Output = Result<(T, Duration), Problem>>,
) -> Result<T, Problem> {
    let began = Instant::now();
    let result = work.await;
    match &result {
        Ok((_, output)) => model.requests.succeeded(began.elapsed(), *output),
        Err(_) => model.requests.failed(began.elapsed()),
    }
    Ok(result?.0)
}

/// Has `model` look at `inputs`. The answers are in their order.
pub(crate) async fn predict(
    app: &App,
    model: &ServedModel,
    inputs: Vec<Input>,
    deadline: Instant,
) -> Result<Vec<Result<Prediction, Problem>>, Problem> {
    // A tensor's values are the client's: what becomes of them in the network is not the server's failure.
    let tensors = matches!(inputs.first(), Some(Input::Pixels(_)));
    let tickets = model.engine.submit(inputs, Some(deadline.into_std()))?;
    let mut answers = Vec::with_capacity(tickets.len());
    for ticket in tickets {
        let reply = timeout_at(deadline, ticket).await.map_err(|_| late(app))?;
        let answer = reply.map_err(|_| lost())?.map_err(|error| match error {
            ClassifyError::Logits(LogitsError::NotFinite { .. }) if tensors => overflow(),
            error => Problem::from(&error),
        });
        if let Ok(prediction) = &answer {
            app.telemetry.prediction(model, prediction);
        }
        answers.push(answer);
    }
    Ok(answers)
}

/// What `request` asks of `model`, with the server's own where it leaves something open.
pub(crate) fn rule(app: &App, model: &ServedModel, mut request: ScoreRequest) -> Result<ScoreRule, ScoreError> {
    if let (None, Some(unlike)) = (request.abstention.unlike, app.unlike) {
        // A request is not refused for what it has not asked for.
        match model.scorer.familiarities().map(Familiarities::least) {
            Some(least) if unlike >= least => request.abstention.unlike = Some(unlike),
            least => app.without_unlike(model, least),
        }
    }
    model.scorer.rule(request, &app.prior)
}

/// Scores a prediction and notes what it cost.
pub(crate) fn score(
    app: &App,
    model: &ServedModel,
    rule: &ScoreRule,
    prediction: &Prediction,
    notes: &Notes,
) -> Scored {
    let began = Instant::now();
    let scored = model.scorer.score(prediction, rule);
    let took = began.elapsed();
    notes.image(&prediction.timings, took);
    app.telemetry.scored(model, &scored, took);
    scored
}

pub(crate) fn late(app: &App) -> Problem {
    let seconds = app.limits.timeout.as_secs();
    let detail = format!(
        "no answer within the request's deadline, at most {seconds} s (--timeout): send fewer images, or try again \
         when the load is lower"
    );
    Problem::new(Code::Deadline, detail).with_limit(seconds)
}

fn overflow() -> Problem {
    let detail = "the network's answer to this tensor is not finite, because values overflow in the network: send the \
                  pixels of an image, normalised by the mean and std of /v1/models/NAME";
    Problem::new(Code::Overflow, detail)
}

/// A worker went away without an answer; it cannot, short of a bug.
pub(crate) fn lost() -> Problem {
    tracing::error!("a worker gave no answer");
    Problem::new(Code::Internal, "the server lost this image; try again")
}
