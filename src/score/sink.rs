//! Where the rows go: JSON lines or CSV.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

use crate::bundle::Manifest;
use crate::classify::Prediction;

/// The form of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// One JSON object a line.
    Jsonl,
    /// A header, then one record per image: path, error, then label and score of each of the top classes.
    Csv,
}

#[derive(Serialize)]
struct Row<'a> {
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    predictions: Option<Vec<ClassScore<'a>>>,
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

/// Writes rows to `W`.
pub struct Sink<W: Write> {
    writer: Writer<W>,
    top_k: usize,
}

enum Writer<W: Write> {
    Jsonl(W),
    Csv(Box<csv::Writer<W>>),
}

impl<W: Write> Sink<W> {
    /// A sink for the best `top_k` classes per image; writes the CSV's header.
    ///
    /// # Errors
    /// When the header cannot be written.
    pub fn new(output: W, format: Format, top_k: usize) -> io::Result<Self> {
        let writer = match format {
            Format::Jsonl => Writer::Jsonl(output),
            Format::Csv => {
                let mut csv = csv::Writer::from_writer(output);
                let mut header = vec!["path".to_owned(), "error".to_owned()];
                header.extend((1..=top_k).flat_map(|k| [format!("label_{k}"), format!("score_{k}")]));
                csv.write_record(&header)?;
                Writer::Csv(Box::new(csv))
            }
        };
        Ok(Self { writer, top_k })
    }

    pub(super) fn prediction(&mut self, path: &Path, prediction: &Prediction, manifest: &Manifest) -> io::Result<()> {
        let score = |(class_id, score): (usize, f64)| {
            let class = &manifest.classes[class_id];
            ClassScore { class_id, label: &class.label, score, group: class.group().map(crate::bundle::Group::name) }
        };
        let scores = prediction.probabilities.top(self.top_k).into_iter().map(score).collect();
        self.row(Row { path: &path.to_string_lossy(), predictions: Some(scores), error: None })
    }

    pub(super) fn error(&mut self, path: &Path, error: &str) -> io::Result<()> {
        self.row(Row { path: &path.to_string_lossy(), predictions: None, error: Some(error) })
    }

    fn row(&mut self, row: Row<'_>) -> io::Result<()> {
        match &mut self.writer {
            Writer::Jsonl(output) => {
                serde_json::to_writer(&mut *output, &row)?;
                output.write_all(b"\n")
            }
            Writer::Csv(csv) => {
                let mut record = vec![row.path.to_owned(), row.error.unwrap_or_default().to_owned()];
                for score in row.predictions.iter().flatten() {
                    record.extend([score.label.to_owned(), score.score.to_string()]);
                }
                record.resize(2 + 2 * self.top_k, String::new());
                Ok(csv.write_record(&record)?)
            }
        }
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        match &mut self.writer {
            Writer::Jsonl(output) => output.flush(),
            Writer::Csv(csv) => csv.flush(),
        }
    }
}
