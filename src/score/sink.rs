//! Where the rows go: JSON lines or CSV.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

use crate::bundle::{Group, Manifest};
use crate::classify::{Decision, Prediction, ScoreRule, Scorer};

/// The form of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// One JSON object a line.
    Jsonl,
    /// A header, then one record per image: path, error, decision, reason, the set's labels as a JSON list (with
    /// --alpha), then label and score of each of the top classes.
    Csv,
}

#[derive(Serialize)]
struct Row<'a> {
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    predictions: Option<Vec<ClassScore<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    set: Option<Vec<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decision: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

#[derive(Serialize)]
struct ClassScore<'a> {
    class_id: usize,
    label: &'a str,
    score: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<&'static str>,
}

/// What a row tells of a prediction.
pub struct Scoring<'a> {
    /// The classes.
    pub manifest: &'a Manifest,
    /// What scores are.
    pub scorer: &'a Scorer,
    /// The request that holds for every image.
    pub rule: ScoreRule,
    /// Classes per image, the best first.
    pub top_k: usize,
    /// Classes that score less are left out.
    pub min_score: f64,
}

/// Writes rows to `W`.
pub struct Sink<'a, W: Write> {
    writer: Writer<W>,
    scoring: Scoring<'a>,
}

enum Writer<W: Write> {
    Jsonl(W),
    Csv(Box<csv::Writer<W>>),
}

impl<'a, W: Write> Sink<'a, W> {
    /// A sink for what `scoring` tells; writes the CSV's header.
    ///
    /// # Errors
    /// When the header cannot be written.
    pub fn new(output: W, format: Format, scoring: Scoring<'a>) -> io::Result<Self> {
        let writer = match format {
            Format::Jsonl => Writer::Jsonl(output),
            Format::Csv => {
                let mut csv = csv::Writer::from_writer(output);
                let mut header: Vec<String> = ["path", "error", "decision", "reason"].map(str::to_owned).into();
                header.extend(scoring.rule.set_request().map(|_| "set".to_owned()));
                header.extend((1..=scoring.top_k).flat_map(|k| [format!("label_{k}"), format!("score_{k}")]));
                csv.write_record(&header)?;
                Writer::Csv(Box::new(csv))
            }
        };
        Ok(Self { writer, scoring })
    }

    pub(super) fn prediction(&mut self, path: &Path, prediction: &Prediction) -> io::Result<()> {
        let Scoring { manifest, scorer, ref rule, top_k, min_score } = self.scoring;
        let scored = scorer.score(&prediction.logits, rule);
        let score = |(class_id, score): (usize, f64)| {
            let class = &manifest.classes[class_id];
            ClassScore { class_id, label: &class.label, score, group: class.group().map(Group::name) }
        };
        let best = scored.probabilities.top(top_k).into_iter().filter(|(_, score)| *score >= min_score);
        let label = |(k, _): (usize, _)| manifest.classes[k].label.as_str();
        let (decision, reason) = match &scored.decision {
            Decision::Accept => ("accept", None),
            Decision::Abstain(reason) => ("abstain", Some(reason.as_str())),
        };
        let row = Row {
            path: &path.to_string_lossy(),
            predictions: Some(best.map(score).collect()),
            set: scored.set.map(|set| set.members.into_iter().map(label).collect()),
            decision: Some(decision),
            reason,
            error: None,
        };
        write(&mut self.writer, &self.scoring, row)
    }

    pub(super) fn error(&mut self, path: &Path, error: &str) -> io::Result<()> {
        let path = &path.to_string_lossy();
        let row = Row { path, predictions: None, set: None, decision: None, reason: None, error: Some(error) };
        write(&mut self.writer, &self.scoring, row)
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        match &mut self.writer {
            Writer::Jsonl(output) => output.flush(),
            Writer::Csv(csv) => csv.flush(),
        }
    }
}

fn write<W: Write>(writer: &mut Writer<W>, scoring: &Scoring<'_>, row: Row<'_>) -> io::Result<()> {
    match writer {
        Writer::Jsonl(output) => {
            serde_json::to_writer(&mut *output, &row)?;
            output.write_all(b"\n")
        }
        Writer::Csv(csv) => {
            let text = |value: Option<&str>| value.unwrap_or_default().to_owned();
            let mut record = vec![row.path.to_owned(), text(row.error), text(row.decision), text(row.reason)];
            if scoring.rule.set_request().is_some() {
                record.push(row.set.map_or(Ok(String::new()), |set| serde_json::to_string(&set))?);
            }
            let columns = record.len() + 2 * scoring.top_k;
            for score in row.predictions.iter().flatten() {
                record.extend([score.label.to_owned(), score.score.to_string()]);
            }
            record.resize(columns, String::new());
            Ok(csv.write_record(&record)?)
        }
    }
}
