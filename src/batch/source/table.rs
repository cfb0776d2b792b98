//! Parquet tables with a column of paths or of encoded pictures, plain or as the struct of bytes and path that Hugging
//! Face's datasets write.

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::SyncSender;

use bytes::{Buf, Bytes};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};

use super::list::columns;
use super::objects::Object;
use super::{Content, Fault, Item, Labels, Place, Source, SourceError, SourceOptions, picture};

pub(super) fn open(place: Place, options: &SourceOptions) -> Result<Source, SourceError> {
    let content = |reason: String| SourceError::Content { path: place.name().into(), reason };
    // The reader panics on some damaged files.
    let opened = catch_unwind(AssertUnwindSafe(|| open_reader(&place)));
    let reader = match opened.unwrap_or_else(|_| Err(ParquetError::General("the table is damaged".into()))) {
        Err(ParquetError::External(error)) => match error.downcast::<io::Error>() {
            Ok(cause) => return Err(SourceError::Io { path: place.name().into(), cause: *cause }),
            Err(error) => return Err(content(error.to_string())),
        },
        opened => opened.map_err(|error| content(error.to_string()))?,
    };
    let schema = reader.metadata().file_metadata().schema();
    let names: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
    let (image, label) = columns(names.iter().copied(), options).map_err(content)?;
    let table = Table {
        name: place.name(),
        image: names[image].to_owned(),
        label: label.map(|at| names[at].to_owned()),
        options: options.clone(),
        place: place.clone(),
    };
    let labelled = options.labels.with_column(table.label.is_some());
    Ok(Source::of_thread(table.name.clone(), labelled, &options.stopped, move |out| table.send(out)))
}

#[cfg_attr(
    not(feature = "object-stores"),
    expect(unreachable_code, unused_variables, reason = "there is no object then")
)]
fn open_reader(place: &Place) -> Result<Box<dyn FileReader>, ParquetError> {
    Ok(match place {
        Place::File(path) => Box::new(SerializedFileReader::new(File::open(path)?)?),
        Place::Object(object) => {
            let len = object.len()?;
            Box::new(SerializedFileReader::new(Chunks { object: object.clone(), len })?)
        }
    })
}

/// A table in a store, of which pieces are fetched.
struct Chunks {
    object: Object,
    len: u64,
}

/// Bytes that are fetched for a page's header; most of its content comes with them.
const PIECE: u64 = 1 << 18;

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.len
    }
}

impl ChunkReader for Chunks {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(self.object.range(start..self.len.min(start + PIECE))?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        Ok(self.object.range(start..start + length as u64)?)
    }
}

struct Table {
    place: Place,
    name: String,
    image: String,
    label: Option<String>,
    options: SourceOptions,
}

impl Table {
    fn send(&self, out: &SyncSender<Item>) {
        let stop = |error: String| {
            // The receiver may have gone: nobody wants more then.
            let _ = out.send(Item::broken(&self.name, &error));
        };
        let rows = match self.rows() {
            Ok(rows) => rows,
            Err(error) => return stop(error.to_string()),
        };
        for (number, row) in (0..).zip(rows) {
            let item = match row {
                Ok(row) => self.item(number, &row),
                Err(error) => return stop(error.to_string()),
            };
            if self.options.shard.has(&item.key) && out.send(item).is_err() {
                return;
            }
        }
    }

    /// The rows, of which only what is needed is read.
    fn rows(&self) -> Result<RowIter<'static>, ParquetError> {
        let reader = open_reader(&self.place)?;
        let schema = reader.metadata().file_metadata().schema();
        let wanted = |field: &&TypePtr| field.name() == self.image || Some(field.name()) == self.label.as_deref();
        let fields = schema.get_fields().iter().filter(wanted).cloned().collect();
        let projection = Type::group_type_builder(schema.name()).with_fields(fields).build()?;
        // A few rows at a time: pictures are large.
        RowIter::from_file_into(reader).with_batch_size(16).project(Some(projection))
    }

    fn lost(&self, number: u64, fault: Fault) -> Item {
        Item { key: format!("{}#{number}", self.name), label: None, content: Content::Lost(fault) }
    }

    fn item(&self, number: u64, row: &Row) -> Item {
        let field = |name: &str| row.get_column_iter().find(|(n, _)| *n == name).map(|(_, field)| field);
        let label =
            self.label.as_deref().and_then(field).and_then(text).filter(|_| self.options.labels == Labels::Given);
        match field(&self.image) {
            Some(Field::Str(path)) => self.named(number, path, label),
            Some(Field::Bytes(bytes)) => self.encoded(number, bytes.data(), label),
            Some(Field::Group(parts)) => {
                let part = |name: &str| parts.get_column_iter().find(|(n, _)| *n == name).map(|(_, field)| field);
                match (part("bytes"), part("path")) {
                    (Some(Field::Bytes(bytes)), _) => self.encoded(number, bytes.data(), label),
                    (_, Some(Field::Str(path))) => self.named(number, path, label),
                    _ => self.lost(number, Fault::new("list_entry", "the image has neither bytes nor a path")),
                }
            }
            Some(Field::Null) | None => self.lost(number, Fault::new("list_entry", "the image is null")),
            Some(_) => {
                let reason = format!("the column {:?} holds neither paths nor bytes", self.image);
                self.lost(number, Fault::new("list_entry", reason))
            }
        }
    }

    fn named(&self, number: u64, path: &str, label: Option<String>) -> Item {
        match self.place.entry(path, &self.options.stores) {
            Ok(place) => picture(place, label, self.options.labels),
            Err(fault) => self.lost(number, Fault::new("list_entry", fault.detail)),
        }
    }

    fn encoded(&self, number: u64, bytes: &[u8], label: Option<String>) -> Item {
        let limit = self.options.max_file_bytes;
        if bytes.len() as u64 > limit {
            return self.lost(number, Fault::too_large(limit));
        }
        let content = Content::Bytes(Bytes::copy_from_slice(bytes));
        Item { key: format!("{}#{number}", self.name), label, content }
    }
}

/// A label's text: a name, or an index.
fn text(field: &Field) -> Option<String> {
    Some(match field {
        Field::Null => return None,
        Field::Str(text) => text.clone(),
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into_owned(),
        other => other.to_string(),
    })
}
