//! Sets in a CSV file: a record names an image, its class, and whatever else is known of it.

use std::path::Path;
use std::sync::Arc;

use csv::StringRecord;

use super::DataError;
use super::source::{LabelledImages, class_index, content, text};
use crate::listing::{IMAGE_COLUMNS, LABEL_COLUMNS};

/// What a table is.
const TABLE: &str = "a table has a header and one image a record";

/// A table's columns, and what they say of each image of a set.
#[derive(Debug, Clone)]
pub(super) struct Columns {
    names: Arc<StringRecord>,
    records: Vec<StringRecord>,
}

impl Columns {
    /// Of the images with these numbers.
    pub(super) fn select(&self, records: &[usize]) -> Self {
        let records = records.iter().map(|&r| self.records[r].clone()).collect();
        Self { names: self.names.clone(), records }
    }

    /// What the column `name` says of each image; nothing when there is no such column.
    pub(super) fn column(&self, name: &str) -> Option<impl Iterator<Item = &str> + use<'_>> {
        let at = self.names.iter().position(|n| n == name)?;
        Some(self.records.iter().map(move |record| record.get(at).unwrap_or_default()))
    }

    /// All names, for an error.
    pub(super) fn names(&self) -> String {
        listed(&self.names)
    }
}

fn listed(names: &StringRecord) -> String {
    names.iter().collect::<Vec<_>>().join(", ")
}

struct Table {
    columns: Columns,
    /// Of each record, for errors.
    lines: Vec<u64>,
    image: usize,
    label: usize,
}

fn read(path: &Path) -> Result<Table, DataError> {
    let text = text(path, TABLE)?;
    let header = text.lines().next().unwrap_or_default();
    // Spreadsheets of some countries write a semicolon in place of the comma.
    let delimiter = [b',', b'\t', b';'].into_iter().find(|byte| header.as_bytes().contains(byte)).unwrap_or(b',');
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).trim(csv::Trim::All).from_reader(text.as_bytes());
    let wrong = |error: csv::Error| content(path, &error.to_string());
    let names = reader.headers().map_err(wrong)?.clone();
    let find = |usual: &[&str], what: &str| {
        let is = |name: &str, other: &str| other.eq_ignore_ascii_case(name);
        if let Some(name) = usual.iter().find(|name| names.iter().filter(|other| is(name, other)).count() > 1) {
            return Err(content(path, &format!("has several columns {name}: name one of them otherwise")));
        }
        usual.iter().find_map(|name| names.iter().position(|other| is(name, other))).ok_or_else(|| {
            let (usual, names) = (usual.join(", "), listed(&names));
            let reason = format!(
                "has no column for {what}, which is named one of {usual}; its columns are {names}. Name it so in the first \
                 line. A list without a header is a text file: --data-format list"
            );
            content(path, &reason)
        })
    };
    let (image, label) = (find(&IMAGE_COLUMNS, "the images' paths")?, find(&LABEL_COLUMNS, "their classes")?);
    let (mut records, mut lines) = (Vec::new(), Vec::new());
    for record in reader.records() {
        let record = record.map_err(wrong)?;
        let line = record.position().map_or(0, csv::Position::line);
        if record.get(label).is_none_or(str::is_empty) {
            return Err(content(path, &format!("line {line} has no label")));
        }
        lines.push(line);
        records.push(record);
    }
    // The reader takes the end of the file for the end of what was quoted.
    let is_open = |last: &StringRecord| last.iter().next_back().is_some_and(|field| field.contains('\n'));
    if records.last().is_some_and(is_open) && text.matches('"').count() % 2 == 1 {
        let line = lines.last().copied().unwrap_or_default();
        return Err(content(path, &format!("line {line} opens a quote that nothing closes")));
    }
    Ok(Table { columns: Columns { names: Arc::new(names), records }, lines, image, label })
}

/// The labels that stand in the table at `path`, in the order in which they are met.
pub(super) fn labels(path: &Path) -> Result<Vec<String>, DataError> {
    let table = read(path)?;
    Ok(table.columns.records.iter().filter_map(|record| record.get(table.label)).map(str::to_owned).collect())
}

/// The images of the table at `path`. Their paths are relative to its folder.
pub(super) fn open(path: &Path, labels: &[String]) -> Result<LabelledImages, DataError> {
    let Table { columns, lines, image, label } = read(path)?;
    let base = path.parent().unwrap_or(Path::new("."));
    let index = class_index(labels);
    let (mut files, mut classes) = (Vec::new(), Vec::new());
    for (record, line) in columns.records.iter().zip(lines) {
        let (file, label) = (record.get(image).unwrap_or_default(), record.get(label).unwrap_or_default());
        if file.is_empty() {
            return Err(content(path, &format!("line {line} names no image")));
        }
        files.push(base.join(file));
        classes.push(index(label).map_err(|reason| content(path, &format!("line {line}: {reason}")))?);
    }
    LabelledImages::of_files(files, classes, path, Some(columns))
}
