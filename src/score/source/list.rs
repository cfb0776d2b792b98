//! Lists of paths: text, CSV, JSON lines. Relative paths are relative to the list's folder.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Content, Fault, Item, Labels, Source, SourceError, SourceOptions, file};

/// Names that an image's column has when none is given, in the order of preference.
pub(super) const IMAGE_COLUMNS: [&str; 7] = ["path", "image", "image_path", "file", "file_name", "filename", "bytes"];
/// The same for the true class.
pub(super) const LABEL_COLUMNS: [&str; 3] = ["label", "class", "target"];

fn open(path: &Path) -> Result<BufReader<File>, SourceError> {
    let file = File::open(path).map_err(|cause| SourceError::Io { path: path.to_owned(), cause })?;
    Ok(BufReader::new(file))
}

fn folder(list: &Path) -> PathBuf {
    list.parent().unwrap_or(Path::new("")).to_owned()
}

/// A line that names no picture: its row says why.
fn lost(list: &str, line: u64, reason: impl std::fmt::Display) -> Item {
    let content = Content::Lost(Fault::new("list_entry", format!("line {line} of {list} names no image: {reason}")));
    Item { key: format!("{list}#{line}"), label: None, content }
}

/// One path a line, from standard input; relative paths are relative to the working folder.
pub(super) fn text_on_stdin(stdin: impl BufRead + Send + 'static, options: &SourceOptions) -> Source {
    let labelled = matches!(options.labels, Labels::Folder | Labels::Line);
    Source::of(lines(stdin, "stdin".into(), PathBuf::new(), options.labels), options.shard, labelled)
}

/// One path a line, in a file.
pub(super) fn text(path: &Path, options: &SourceOptions) -> Result<Source, SourceError> {
    let items = lines(open(path)?, path.to_string_lossy().into_owned(), folder(path), options.labels);
    Ok(Source::of(items, options.shard, matches!(options.labels, Labels::Folder | Labels::Line)))
}

/// Empty lines are skipped.
fn lines(
    list: impl BufRead + Send + 'static,
    name: String,
    folder: PathBuf,
    labels: Labels,
) -> impl Iterator<Item = Item> + Send {
    (1..).zip(until_broken(list)).filter_map(move |(number, line)| {
        let line = match line {
            Ok(line) => line,
            Err(error) => return Some(lost(&name, number, error)),
        };
        let line = line.trim();
        if line.is_empty() {
            return None;
        }
        if labels != Labels::Line {
            return Some(file(folder.join(line), None, labels));
        }
        Some(match line.rsplit_once(char::is_whitespace) {
            Some((path, label)) => file(folder.join(path.trim_end()), Some(label.to_owned()), labels),
            None => lost(&name, number, "--labels line expects a path and a label"),
        })
    })
}

/// Lines; after one that cannot be read at all there is no more. One that is not UTF-8 is passed over.
fn until_broken(list: impl BufRead) -> impl Iterator<Item = std::io::Result<String>> {
    let mut broken = false;
    list.lines().take_while(move |line| {
        let stop = broken;
        broken = line.as_ref().is_err_and(|error| error.kind() != std::io::ErrorKind::InvalidData);
        !stop
    })
}

/// A header that names the columns, then one picture a record.
pub(super) fn csv(path: &Path, options: &SourceOptions) -> Result<Source, SourceError> {
    let content = |reason: String| SourceError::Content { path: path.to_owned(), reason };
    let mut reader = csv::ReaderBuilder::new().from_reader(open(path)?);
    let header = reader.headers().map_err(|error| content(error.to_string()))?.clone();
    let (image, label) = columns(header.iter(), options).map_err(content)?;
    let (folder, name, labels) = (folder(path), path.to_string_lossy().into_owned(), options.labels);
    let labelled = labels.with_column(label.is_some());
    let mut number = 1;
    let items = reader.into_records().map(move |record| {
        number += 1;
        let record = match record {
            Ok(record) => record,
            Err(error) => return lost(&name, number, error),
        };
        number = record.position().map_or(number, csv::Position::line);
        let label = label.and_then(|at| record.get(at)).filter(|text| !text.is_empty()).map(str::to_owned);
        match record.get(image).filter(|text| !text.is_empty()) {
            Some(path) => file(folder.join(path), label, labels),
            None => lost(&name, number, "its path is empty"),
        }
    });
    Ok(Source::of(items, options.shard, labelled))
}

/// One object a line.
pub(super) fn json_lines(path: &Path, options: &SourceOptions) -> Result<Source, SourceError> {
    let (folder, name, options) = (folder(path), path.to_string_lossy().into_owned(), options.clone());
    let (shard, labelled) = (options.shard, options.labels.with_column(true));
    let items = (1..).zip(until_broken(open(path)?)).filter_map(move |(number, line)| {
        let item = |line: &str| {
            let object: serde_json::Map<String, Value> = serde_json::from_str(line).map_err(|e| e.to_string())?;
            let (image, label) = columns(object.keys().map(String::as_str), &options)?;
            let mut values = object.values();
            let path = values.nth(image).and_then(Value::as_str).ok_or("its path is no text")?;
            let label = match label.and_then(|at| object.values().nth(at)) {
                None | Some(Value::Null) => None,
                Some(Value::String(text)) => Some(text.clone()),
                Some(other) => Some(other.to_string()),
            };
            Ok::<_, String>(file(folder.join(path), label, options.labels))
        };
        match line {
            Ok(line) if line.trim().is_empty() => None,
            Ok(line) => Some(item(&line).unwrap_or_else(|reason| lost(&name, number, reason))),
            Err(error) => Some(lost(&name, number, error)),
        }
    });
    Ok(Source::of(items, shard, labelled))
}

/// Places of the image's and the label's column among `names`.
pub(super) fn columns<'a>(
    names: impl Iterator<Item = &'a str>,
    options: &SourceOptions,
) -> Result<(usize, Option<usize>), String> {
    let names: Vec<&str> = names.collect();
    let find = |wanted: &Option<String>, usual: &[&str], flag: &str| {
        let at = |name: &str| names.iter().position(|n| *n == name);
        match wanted {
            Some(name) => match at(name) {
                Some(found) => Ok(Some(found)),
                None => Err(format!("there is no column {name:?} ({flag}); there are {}", names.join(", "))),
            },
            None => Ok(usual.iter().find_map(|name| at(name))),
        }
    };
    let image = find(&options.image_column, &IMAGE_COLUMNS, "--image-column")?.ok_or_else(|| {
        let usual = IMAGE_COLUMNS.join(", ");
        format!("no column is called {usual}; there are {}: name one with --image-column", names.join(", "))
    })?;
    Ok((image, find(&options.label_column, &LABEL_COLUMNS, "--label-column")?))
}
