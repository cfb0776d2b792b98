//! JSON lines and CSV.

use std::io::{self, BufRead, Write};

use serde::{Deserialize, Serialize};

use super::{Form, Origin, Row, Scores, WriteError, group, label};

/// JSON lines.
pub struct JsonLines<'a, W: Write> {
    output: W,
    form: Form<'a>,
}

#[derive(Serialize)]
struct Line<'a> {
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    predictions: Option<Vec<ClassScore<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    set: Option<Vec<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    familiarity: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    probabilities: Option<&'a [f64]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logits: Option<&'a [f32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    features: Option<&'a [f32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decision: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    #[serde(flatten)]
    origin: &'a Origin,
}

#[derive(Serialize)]
struct ClassScore<'a> {
    class_id: usize,
    label: &'a str,
    score: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<&'static str>,
}

impl<'a, W: Write> JsonLines<'a, W> {
    pub(super) fn new(output: W, form: Form<'a>) -> Self {
        Self { output, form }
    }

    pub(super) fn write(&mut self, row: &Row) -> Result<(), WriteError> {
        let Form { columns, classes, origin, .. } = self.form;
        let scores = row.outcome.as_ref().ok();
        let of = |&(class_id, score): &(usize, f64)| ClassScore {
            class_id,
            label: label(classes, class_id),
            score,
            group: group(classes, class_id),
        };
        let line = Line {
            path: &row.key,
            label: row.label.as_deref().filter(|_| columns.label),
            predictions: scores.map(|s| s.top.iter().map(of).collect()),
            set: scores.and_then(|s| Some(s.set.as_ref()?.iter().map(|&k| label(classes, k)).collect())),
            familiarity: scores.and_then(|s| s.familiarity),
            probabilities: scores.and_then(|s| s.probabilities.as_deref()),
            logits: scores.and_then(|s| s.logits.as_deref()),
            features: scores.and_then(|s| s.features.as_deref()),
            decision: scores.map(Scores::decision),
            reason: scores.and_then(|s| s.abstained.as_deref()),
            error: row.outcome.as_ref().err().map(String::as_str),
            origin,
        };
        serde_json::to_writer(&mut self.output, &line).map_err(io::Error::from)?;
        Ok(self.output.write_all(b"\n")?)
    }

    pub(super) fn flush(&mut self) -> Result<(), WriteError> {
        Ok(self.output.flush()?)
    }

    pub(super) fn into_inner(mut self) -> Result<W, WriteError> {
        self.flush()?;
        Ok(self.output)
    }
}

/// CSV.
pub struct Csv<'a, W: Write> {
    output: csv::Writer<W>,
    form: Form<'a>,
}

impl<'a, W: Write> Csv<'a, W> {
    pub(super) fn new(output: W, form: Form<'a>) -> Result<Self, WriteError> {
        let Form { columns, .. } = form;
        let mut output = csv::Writer::from_writer(output);
        let mut header: Vec<String> = vec!["path".into()];
        let optional = |wanted: bool, name: &str| wanted.then(|| name.to_owned());
        header.extend(optional(columns.label, "label"));
        header.extend(["error", "decision", "reason"].map(str::to_owned));
        header.extend(optional(columns.set, "set"));
        header.extend(optional(columns.familiarity, "familiarity"));
        header.extend(optional(columns.probabilities, "probabilities"));
        header.extend(optional(columns.logits, "logits"));
        header.extend(optional(columns.features, "features"));
        header.extend((1..=columns.top_k).flat_map(|k| [format!("label_{k}"), format!("score_{k}")]));
        header.extend(form.origin.columns().into_iter().map(|(name, _)| name.to_owned()));
        output.write_record(&header).map_err(csv_error)?;
        Ok(Self { output, form })
    }

    pub(super) fn write(&mut self, row: &Row) -> Result<(), WriteError> {
        let Form { columns, classes, origin, .. } = self.form;
        let scores = row.outcome.as_ref().ok();
        let mut record = vec![row.key.clone()];
        if columns.label {
            record.push(row.label.clone().unwrap_or_default());
        }
        record.push(row.outcome.as_ref().err().cloned().unwrap_or_default());
        record.push(scores.map(Scores::decision).unwrap_or_default().to_owned());
        record.push(scores.and_then(|s| s.abstained.clone()).unwrap_or_default());
        if columns.set {
            let set = scores.and_then(|s| Some(s.set.as_ref()?.iter().map(|&k| label(classes, k)).collect::<Vec<_>>()));
            record.push(json(set)?);
        }
        if columns.familiarity {
            record.push(scores.and_then(|s| s.familiarity).map(|p| p.to_string()).unwrap_or_default());
        }
        if columns.probabilities {
            record.push(json(scores.and_then(|s| s.probabilities.as_ref()))?);
        }
        if columns.logits {
            record.push(json(scores.and_then(|s| s.logits.as_ref()))?);
        }
        if columns.features {
            record.push(json(scores.and_then(|s| s.features.as_ref()))?);
        }
        let width = record.len() + 2 * columns.top_k;
        for &(class, score) in scores.iter().flat_map(|s| &s.top) {
            record.extend([label(classes, class).to_owned(), score.to_string()]);
        }
        record.resize(width, String::new());
        record.extend(origin.columns().into_iter().map(|(_, value)| value.unwrap_or_default().to_owned()));
        self.output.write_record(&record).map_err(csv_error)
    }

    pub(super) fn flush(&mut self) -> Result<(), WriteError> {
        Ok(self.output.flush()?)
    }

    pub(super) fn into_inner(mut self) -> Result<W, WriteError> {
        self.flush()?;
        self.output.into_inner().map_err(|error| WriteError::Io(error.into_error()))
    }
}

/// The system's error keeps its kind, which csv's conversion forgets.
fn csv_error(error: csv::Error) -> WriteError {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => WriteError::Io(error),
        other => WriteError::Form(format!("{other:?}")),
    }
}

/// A list in a field, which is empty when there is none.
fn json(list: Option<impl Serialize>) -> Result<String, WriteError> {
    Ok(list.map_or(Ok(String::new()), |list| serde_json::to_string(&list)).map_err(io::Error::from)?)
}

/// The keys of rows that were written as JSON lines.
pub(in super::super) fn keys_in_json_lines(rows: impl BufRead, mut each: impl FnMut(&str)) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Key<'a> {
        #[serde(borrow)]
        path: std::borrow::Cow<'a, str>,
    }
    for (number, line) in (1..).zip(rows.lines()) {
        let line = line.map_err(|error| error.to_string())?;
        let key: Key<'_> = serde_json::from_str(&line).map_err(|error| format!("row {number}: {error}"))?;
        each(&key.path);
    }
    Ok(())
}

/// The keys of rows that were written as CSV.
pub(in super::super) fn keys_in_csv(rows: impl BufRead, mut each: impl FnMut(&str)) -> Result<(), String> {
    let mut reader = csv::Reader::from_reader(rows);
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record).map_err(|error| error.to_string())? {
        each(record.get(0).unwrap_or_default());
    }
    Ok(())
}
