//! Lists of paths: text, CSV, JSON lines. Relative paths are relative to the list's folder.

use std::io::{self, BufRead, BufReader, Read};

use serde_json::Value;

use super::lines::{Records, lines};
use super::{Content, Fault, Item, Labels, Place, Source, SourceError, SourceOptions, Stores, cut, picture};
use crate::listing::{IMAGE_COLUMNS, LABEL_COLUMNS, labelled};

fn open(place: &Place) -> Result<BufReader<Box<dyn Read + Send>>, SourceError> {
    let opened = place.open().map_err(|cause| SourceError::Io { path: place.name().into(), cause });
    Ok(BufReader::with_capacity(1 << 16, opened?))
}

/// What entries of a list stand for.
struct Entries {
    list: Place,
    name: String,
    stores: Stores,
    labels: Labels,
}

impl Entries {
    fn new(list: Place, options: &SourceOptions) -> Self {
        Self { name: list.name(), list, stores: options.stores.clone(), labels: options.labels }
    }

    fn item(&self, line: u64, path: &str, label: Option<String>) -> Item {
        match self.list.entry(path, &self.stores) {
            Ok(place) => picture(place, label, self.labels),
            Err(fault) => self.lost(line, fault.detail),
        }
    }

    /// A line that is no text or too long, or the end of what can be read.
    fn unread(&self, line: u64, error: &io::Error) -> Item {
        if error.kind() == io::ErrorKind::InvalidData {
            return self.lost(line, error);
        }
        Item::broken(&self.name, &error.to_string())
    }

    /// A line that names no picture: its row says why.
    fn lost(&self, line: u64, reason: impl std::fmt::Display) -> Item {
        let (name, reason) = (&self.name, reason.to_string());
        let fault = Fault::new("list_entry", format!("line {line} of {name} names no image: {}", cut(&reason)));
        Item { key: format!("{name}#{line}"), label: None, content: Content::Lost(fault) }
    }
}

/// One path a line, from standard input; relative paths are relative to the working folder.
pub(super) fn text_on_stdin(stdin: impl BufRead + Send + 'static, options: &SourceOptions) -> Source {
    let labelled = matches!(options.labels, Labels::Folder | Labels::Line);
    // Its folder is the working folder.
    let entries = Entries::new(Place::File("stdin".into()), options);
    let shard = options.shard;
    Source::of_thread("stdin".into(), labelled, &options.stopped, move |out| {
        // The receiver may have gone: nobody wants more then.
        let _ = paths(stdin, entries).filter(|item| item.is_for(shard)).all(|item| out.send(item).is_ok());
    })
}

/// One path a line, in a file.
pub(super) fn text(place: Place, options: &SourceOptions) -> Result<Source, SourceError> {
    let items = paths(open(&place)?, Entries::new(place, options));
    Ok(Source::of(items, options.shard, matches!(options.labels, Labels::Folder | Labels::Line)))
}

/// Empty lines are skipped.
fn paths(list: impl BufRead + Send + 'static, entries: Entries) -> impl Iterator<Item = Item> + Send {
    (1..).zip(lines(list)).filter_map(move |(number, line)| {
        let line = match line {
            Ok(line) => line,
            Err(error) => return Some(entries.unread(number, &error)),
        };
        let line = line.trim_start_matches('\u{feff}').trim();
        if line.is_empty() {
            return None;
        }
        if entries.labels != Labels::Line {
            return Some(entries.item(number, line, None));
        }
        Some(match labelled(line, |_| false) {
            Some((path, label)) => entries.item(number, path, Some(label.to_owned())),
            None => entries.lost(number, "--labels line expects a path and a label"),
        })
    })
}

/// A header that names the columns, then one picture a record.
pub(super) fn csv(place: Place, options: &SourceOptions) -> Result<Source, SourceError> {
    let content = |reason: String| SourceError::Content { path: place.name().into(), reason };
    let (list, budget) = Records::new(open(&place)?);
    let mut reader = csv::ReaderBuilder::new().from_reader(list);
    let header = reader.headers().map_err(|error| content(error.to_string()))?.clone();
    let (image, label) = columns(header.iter(), options).map_err(content)?;
    let labelled = options.labels.with_column(label.is_some());
    let entries = Entries::new(place, options);
    let mut number = 1;
    budget.renew();
    let items = reader.into_records().map(move |record| {
        budget.renew();
        number += 1;
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                return match error.kind() {
                    csv::ErrorKind::Io(error) => entries.unread(number, error),
                    _ => entries.lost(number, error),
                };
            }
        };
        number = record.position().map_or(number, csv::Position::line);
        let label = label.and_then(|at| record.get(at)).filter(|text| !text.is_empty()).map(str::to_owned);
        match record.get(image).filter(|text| !text.is_empty()) {
            Some(path) => entries.item(number, path, label),
            None => entries.lost(number, "its path is empty"),
        }
    });
    Ok(Source::of(items, options.shard, labelled))
}

/// One object a line.
pub(super) fn json_lines(place: Place, options: &SourceOptions) -> Result<Source, SourceError> {
    let (shard, labelled, options) = (options.shard, options.labels.with_column(true), options.clone());
    let list = open(&place)?;
    let entries = Entries::new(place, &options);
    let items = (1..).zip(lines(list)).filter_map(move |(number, line)| {
        let item = |line: &str| {
            let object: serde_json::Map<String, Value> = serde_json::from_str(line).map_err(|e| e.to_string())?;
            let (image, label) = columns(object.keys().map(String::as_str), &options)?;
            let mut values = object.values();
            let path = values.nth(image).and_then(Value::as_str).ok_or("its path is not a string")?;
            let label = match label.and_then(|at| object.values().nth(at)) {
                None | Some(Value::Null) => None,
                Some(Value::String(text)) => Some(text.clone()),
                Some(other) => Some(other.to_string()),
            };
            Ok::<_, String>(entries.item(number, path, label))
        };
        match line {
            Ok(line) if line.trim().is_empty() => None,
            Ok(line) => {
                Some(item(line.trim_start_matches('\u{feff}')).unwrap_or_else(|reason| entries.lost(number, reason)))
            }
            Err(error) => Some(entries.unread(number, &error)),
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
    let there = if names.is_empty() {
        "there are no columns".into()
    } else {
        format!("the columns are {}", cut(&names.join(", ")))
    };
    let find = |wanted: &Option<String>, usual: &[&str], flag: &str| {
        let at = |name: &str| names.iter().position(|n| *n == name);
        match wanted {
            Some(name) => match at(name) {
                Some(found) => Ok(Some(found)),
                None => Err(format!("there is no column {name:?} ({flag}); {there}")),
            },
            None => Ok(usual.iter().find_map(|name| at(name))),
        }
    };
    let image = find(&options.image_column, &IMAGE_COLUMNS, "--image-column")?.ok_or_else(|| {
        let usual = IMAGE_COLUMNS.join(", ");
        format!("no column has one of the usual names ({usual}); {there}: name one with --image-column")
    })?;
    if options.labels == Labels::Line {
        return Ok((image, None));
    }
    Ok((image, find(&options.label_column, &LABEL_COLUMNS, "--label-column")?))
}
