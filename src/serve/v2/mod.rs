//! The Open Inference Protocol, version 2, as KServe and Triton speak it: over REST with binary tensors (`rest`) and over
//! gRPC (`grpc`). Both turn a request into a [`Call`] and an [`Answer`] into their own form. Beside them, gRPC's own services
//! of health and reflection (`services`).

#[cfg(feature = "grpc")]
mod bounds;
mod describe;
#[cfg_attr(not(feature = "grpc"), path = "no_grpc.rs")]
mod grpc;
#[cfg(feature = "grpc")]
mod messages;
mod rest;
#[cfg(feature = "grpc")]
mod services;
mod tensors;
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use super::App;
use super::body;
use super::code::Code;
use super::cut::{quoted, shown};
use super::infer::{self, find};
use super::notes::Notes;
use super::options::{RequestOptions, WirePrior};
use super::problem::{Detail, Problem};
use super::wire::ClientId;
use crate::classify::{Input, Prediction, ScoreRequest, Scored};
use crate::registry::ServedModel;

use describe::{IndexLine, IndexState, ServerInfo, Stats};
#[cfg(not(feature = "grpc"))]
pub(crate) use grpc::services;
pub(crate) use grpc::{method, refusal};
pub(crate) use rest::*;
#[cfg(feature = "grpc")]
pub(crate) use services::services;
use tensors::{Data, RawTensor, Tensor};
#[cfg(feature = "openapi")]
pub(crate) use wire::WireInfer;

/// Whether the request says that it is gRPC. A page sends this type to another site only when CORS allows it.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// An error over REST.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub(crate) struct ErrorBody {
    /// One sentence: the thing, the value, the limit, the way out.
    pub(crate) error: String,
}

/// The miss rate of sets for requests that want `set` and name none.
const DEFAULT_ALPHA: f64 = 0.1;

/// A tensor that the model gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Output {
    Logits,
    Probabilities,
    Set,
    Familiarity,
}

impl Output {
    const ALL: [Self; 4] = [Self::Logits, Self::Probabilities, Self::Set, Self::Familiarity];

    fn name(self) -> &'static str {
        match self {
            Self::Logits => "logits",
            Self::Probabilities => "probabilities",
            Self::Set => "set",
            Self::Familiarity => "familiarity",
        }
    }

    fn datatype(self) -> &'static str {
        if self == Self::Set { "BOOL" } else { "FP32" }
    }

    /// Whether it has a value for each class, which the best can be told of.
    fn ranks_classes(self) -> bool {
        matches!(self, Self::Logits | Self::Probabilities)
    }

    /// Values for an image, of so many classes.
    fn values(self, classes: usize) -> usize {
        if self == Self::Familiarity { 1 } else { classes }
    }

    /// Whether the model can give it.
    fn is_of(self, model: &ServedModel) -> bool {
        match self {
            Self::Logits | Self::Probabilities => true,
            Self::Set => model.scorer.calibration().is_some(),
            Self::Familiarity => model.scorer.familiarities().is_some(),
        }
    }

    fn of(name: &str) -> Result<Self, Problem> {
        Self::ALL.into_iter().find(|output| output.name() == name).ok_or_else(|| {
            bad(format!(
                "no output is named {}; the outputs are logits, probabilities, set and familiarity",
                quoted(name)
            ))
        })
    }
}

/// An output that a request names.
struct Wanted {
    output: Output,
    /// The best so many classes as `value:index:label`.
    classification: Option<usize>,
}

/// A request, whatever carried it.
struct Call {
    id: ClientId,
    parameters: BTreeMap<String, Value>,
    inputs: Vec<RawTensor>,
    /// All there are when empty.
    outputs: Vec<Wanted>,
}

/// Its answer.
struct Answer {
    model: String,
    version: String,
    id: ClientId,
    tensors: Vec<Tensor>,
}

/// Refuses an output that is `before` already: each takes memory for every class of every image.
fn once(output: Output, before: &[Wanted]) -> Result<(), Problem> {
    if before.iter().any(|wanted| wanted.output == output) {
        return Err(bad(format!("the output {} is requested twice: name it once", output.name())));
    }
    Ok(())
}

fn bad(detail: impl Into<String>) -> Problem {
    Problem::new(Code::BadRequest, detail)
}

/// The parameter of that name: so many of the best classes; 0 is none.
/// Refuses a tensor that lies in shared memory.
fn no_shared_memory(kind: &str, name: &str, parameters: &BTreeMap<String, Value>) -> Result<(), Problem> {
    match parameters.get(wire::SHARED_MEMORY) {
        None => Ok(()),
        Some(region) => Err(bad(format!(
            "{kind} {} asks for the shared memory {}, which this server does not have: send and take tensors in the \
             request and its answer",
            quoted(name),
            shown(region)
        ))),
    }
}

fn best_of(name: &str, parameters: &BTreeMap<String, Value>) -> Result<Option<usize>, Problem> {
    let Some(value) = parameters.get(name) else { return Ok(None) };
    match value.as_u64() {
        Some(0) => Ok(None),
        Some(k) => Ok(Some(usize::try_from(k).unwrap_or(usize::MAX))),
        None => Err(bad(format!("{name} is {}; expected a whole number from 1", shown(value)))),
    }
}

impl Call {
    /// Bytes that must be looked at to check it.
    fn bytes(&self) -> usize {
        // Of the parameters only texts are long: of other values there are few.
        let texts = self.parameters.values().filter_map(Value::as_str).map(str::len);
        texts.chain(self.inputs.iter().map(|input| input.data.bytes())).sum()
    }

    /// What the parameters ask of the scorer. Unknown ones are ignored, as the protocol wants it.
    fn options(&self) -> Result<RequestOptions, Problem> {
        let mut options = RequestOptions::default();
        if let Some(alpha) = self.parameters.get("nbn_alpha") {
            let number = alpha.as_f64().or_else(|| alpha.as_str()?.parse().ok());
            options.alpha =
                Some(number.ok_or_else(|| bad(format!("nbn_alpha is {}; expected a number", shown(alpha))))?);
        }
        if let Some(prior) = self.parameters.get("nbn_prior") {
            let expected = "expected uniform, train, a list of numbers or an object that maps labels to numbers";
            let fail = |_| bad(format!("nbn_prior is {}; {expected}", shown(prior)));
            // gRPC's parameters are flat: a list or an object comes as its JSON.
            let prior: WirePrior = match prior.as_str().filter(|text| text.starts_with(['[', '{'])) {
                Some(text) => serde_json::from_str(text).map_err(fail)?,
                None => serde_json::from_value(prior.clone()).map_err(fail)?,
            };
            options.prior = Some(prior);
        }
        options.or(RequestOptions::default())
    }

    /// When it must be answered: `timeout`, in microseconds, may shorten the server's own.
    fn deadline(&self, server: Instant) -> Result<Instant, Problem> {
        let Some(timeout) = self.parameters.get("timeout") else { return Ok(server) };
        let micros = timeout.as_u64().or_else(|| timeout.as_str()?.parse().ok());
        let micros =
            micros.ok_or_else(|| bad(format!("timeout is {}; expected whole microseconds", shown(timeout))))?;
        let own = Instant::now().checked_add(Duration::from_micros(micros)).filter(|_| micros > 0);
        Ok(own.map_or(server, |own| own.min(server)))
    }
}

/// What a [`Call`] asks for, once its values are known to be good.
struct Checked {
    id: ClientId,
    options: RequestOptions,
    top_k: Option<usize>,
    inputs: Vec<Input>,
    outputs: Vec<Wanted>,
}

async fn checked(app: &App, model: &Arc<ServedModel>, call: Call, deadline: Instant) -> Result<Checked, Problem> {
    let (model, limit) = (model.clone(), app.limits.max_images);
    body::parse(app, call.bytes(), deadline, async move {
        let options = call.options()?;
        let top_k = best_of("nbn_top_k", &call.parameters)?;
        let Call { id, inputs, outputs, .. } = call;
        Ok(Checked { id, options, top_k, inputs: tensors::inputs(inputs, &model, limit)?, outputs })
    })
    .await
}

/// Answers `call`, and counts it in the model's statistics.
async fn answer(
    app: &App,
    notes: &Notes,
    model: &Arc<ServedModel>,
    call: Call,
    server_deadline: Instant,
) -> Result<Answer, Problem> {
    notes.model(&model.name);
    infer::counted(model, answer_with(app, notes, model, call, server_deadline)).await
}

async fn answer_with(
    app: &App,
    notes: &Notes,
    model: &Arc<ServedModel>,
    call: Call,
    server_deadline: Instant,
) -> Result<(Answer, Duration), Problem> {
    let deadline = call.deadline(server_deadline)?;
    let Checked { id, options, top_k, inputs, outputs } = checked(app, model, call, deadline).await?;
    let calibrated = model.scorer.calibration().is_some();
    let asked = |output| outputs.iter().any(|wanted| wanted.output == output);
    let every = outputs.is_empty();
    let request = ScoreRequest {
        alpha: options.alpha.or_else(|| asked(Output::Set).then_some(DEFAULT_ALPHA)),
        familiarity: asked(Output::Familiarity) || (every && Output::Familiarity.is_of(model)),
        ..options.score_request(&model.manifest)?
    };
    // There is no decision in an answer: the server's own `unlike` has nothing to withhold.
    let rule = match model.scorer.rule(request.clone(), &app.prior) {
        // Nobody asked for the set by name: it comes when it can be had.
        Ok(rule) if every && calibrated && request.alpha.is_none() => {
            let with_set = ScoreRequest { alpha: Some(DEFAULT_ALPHA), ..request };
            model.scorer.rule(with_set, &app.prior).unwrap_or(rule)
        }
        rule => rule?,
    };
    let has_set = rule.set_request().is_some();
    let mut outputs = match outputs {
        outputs if outputs.is_empty() => Output::ALL
            .into_iter()
            .filter(|output| output.is_of(model) && (*output != Output::Set || has_set))
            .map(|output| Wanted { output, classification: None })
            .collect(),
        outputs => outputs,
    };
    for wanted in outputs.iter_mut().filter(|wanted| wanted.output.ranks_classes()) {
        wanted.classification = wanted.classification.or(top_k);
    }
    let count = inputs.len();
    let mut seen: Vec<(Prediction, Option<Scored>)> = Vec::with_capacity(count);
    let scores_wanted = outputs.iter().any(|wanted| wanted.output != Output::Logits);
    let answers = infer::predict(app, model, inputs, deadline).await?;
    let began = Instant::now();
    for (at, prediction) in answers.into_iter().enumerate() {
        let prediction = prediction.map_err(|problem| {
            let detail = if count > 1 { format!("image {at}: {}", problem.detail) } else { problem.detail.into() };
            Problem { detail: Detail::new(detail), ..problem }
        })?;
        // Scores that nobody asked for cost nothing.
        let scored = if scores_wanted {
            Some(infer::score(app, model, &rule, &prediction, notes))
        } else {
            notes.image(&prediction.timings, Duration::ZERO);
            None
        };
        seen.push((prediction, scored));
    }
    let tensors = outputs.iter().map(|wanted| tensor(wanted, &seen, model)).collect::<Result<_, _>>()?;
    let answer = Answer { model: model.name.clone(), version: model.version.clone(), id, tensors };
    let output = began.elapsed();
    app.telemetry.encoded(model, output);
    Ok((answer, output))
}

fn tensor(wanted: &Wanted, seen: &[(Prediction, Option<Scored>)], model: &ServedModel) -> Result<Tensor, Problem> {
    let Wanted { output, classification } = *wanted;
    let classes = model.manifest.classes.len();
    let row = |(prediction, scored): &(Prediction, Option<Scored>)| -> Vec<f32> {
        match (output, scored) {
            (Output::Probabilities, Some(scored)) => scored.probabilities.values().iter().map(|&p| p as f32).collect(),
            _ => prediction.logits.values().to_vec(),
        }
    };
    let name = output.name();
    if let (Some(k), true) = (classification, output.ranks_classes()) {
        let k = k.min(classes);
        let mut strings = Vec::with_capacity(seen.len() * k);
        for one in seen {
            let values = row(one);
            let mut order: Vec<usize> = (0..classes).collect();
            order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
            strings.extend(
                order[..k]
                    .iter()
                    .map(|&c| format!("{}:{c}:{}", values[c], model.manifest.classes[c].label).into_bytes()),
            );
        }
        return Ok(Tensor { name, datatype: "BYTES", shape: vec![seen.len(), k], data: Data::Bytes(strings) });
    }
    let shape = vec![seen.len(), output.values(classes)];
    let data = match output {
        _ if classification.is_some() => {
            return Err(bad(format!("the output {name} has no scores, so it takes no classification parameter")));
        }
        Output::Set => {
            let mut members = vec![false; seen.len() * classes];
            for ((_, scored), row) in seen.iter().zip(members.chunks_exact_mut(classes)) {
                let set = scored.as_ref().and_then(|scored| scored.set.as_ref());
                let set =
                    set.ok_or_else(|| bad("the output set needs a calibrated model: run `nbn fold calibrate` on it"))?;
                set.members.iter().for_each(|(class, _)| row[*class] = true);
            }
            Data::Bool(members)
        }
        Output::Familiarity => {
            let p = |(_, scored): &(Prediction, Option<Scored>)| Some(scored.as_ref()?.familiarity?.p as f32);
            let p: Option<Vec<f32>> = seen.iter().map(p).collect();
            Data::F32(p.ok_or_else(|| {
                bad("the output familiarity needs a model that knows its training pictures: run `nbn fold calibrate` on it")
            })?)
        }
        Output::Logits | Output::Probabilities => Data::F32(seen.iter().flat_map(row).collect()),
    };
    Ok(Tensor { name, datatype: output.datatype(), shape, data })
}
