//! Parquet, column by column. Levels are Dremel's (Melnik et al. 2010): a value's definition level counts the optional and
//! repeated fields on its path that are there, its repetition level says at which repeated field it goes on.

use std::fs::File;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, DataType, DoubleType, FloatType, Int32Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::record::RowAccessor;
use parquet::record::reader::RowIter;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::Type;
use serde::Serialize;

use super::{Columns, Form, Origin, Row, Scores, WriteError, group, label};

/// Rows of a row group, and values of it, at most: what is held in memory.
const GROUP_ROWS: usize = 10_000;
const GROUP_VALUES: usize = 1 << 22;

/// Name of the entry in the file's metadata: JSON with the rows' origin and, in the order of `class_id`, the classes' labels.
const METADATA: &str = "nbn";

/// Parquet.
pub struct Parquet<'a, W: Write + Send> {
    output: Option<SerializedFileWriter<W>>,
    form: Form<'a>,
    rows: Vec<Row>,
    values: usize,
}

impl From<ParquetError> for WriteError {
    fn from(error: ParquetError) -> Self {
        match error {
            ParquetError::External(inner) => match inner.downcast::<io::Error>() {
                Ok(error) => Self::Io(*error),
                Err(other) => Self::Form(other.to_string()),
            },
            other => Self::Form(other.to_string()),
        }
    }
}

fn schema(columns: Columns, origin: &Origin) -> String {
    let text = |name: &str| format!("optional binary {name} (STRING);");
    let list =
        |name: &str, element: &str| format!("optional group {name} (LIST) {{ repeated group list {{ {element} }} }}");
    let mut fields = vec!["required binary path (STRING);".to_owned()];
    if columns.label {
        fields.push(text("label"));
    }
    fields.extend(["error", "decision", "reason"].map(text));
    fields.push(list(
        "predictions",
        "required group element { required int32 class_id; required binary label (STRING); required double score; \
         optional binary group (STRING); }",
    ));
    if columns.set {
        fields.push(list("set", "required binary element (STRING);"));
    }
    if columns.familiarity {
        fields.push("optional double familiarity;".to_owned());
    }
    if columns.probabilities {
        fields.push(list("probabilities", "required double element;"));
    }
    if columns.logits {
        fields.push(list("logits", "required float element;"));
    }
    if columns.features {
        fields.push(list("features", "required float element;"));
    }
    fields.extend(origin.columns().into_iter().map(|(name, _)| text(name)));
    format!("message nbn {{ {} }}", fields.join(" "))
}

fn metadata(form: Form<'_>) -> Result<String, WriteError> {
    #[derive(Serialize)]
    struct Metadata<'a> {
        #[serde(flatten)]
        origin: &'a Origin,
        classes: Vec<&'a str>,
    }
    let classes = form.classes.iter().map(|class| class.label.as_str()).collect();
    Ok(serde_json::to_string(&Metadata { origin: form.origin, classes }).map_err(io::Error::from)?)
}

impl<'a, W: Write + Send> Parquet<'a, W> {
    pub(super) fn new(output: W, form: Form<'a>) -> Result<Self, WriteError> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
            .set_key_value_metadata(Some(vec![KeyValue::new(METADATA.to_owned(), metadata(form)?)]))
            .build();
        let schema = Arc::new(parse_message_type(&schema(form.columns, form.origin))?);
        let output = Some(SerializedFileWriter::new(output, schema, Arc::new(properties))?);
        Ok(Self { output, form, rows: Vec::new(), values: 0 })
    }

    pub(super) fn write(&mut self, row: &Row) -> Result<(), WriteError> {
        let Columns { top_k, probabilities, logits, set, .. } = self.form.columns;
        let all = usize::from(probabilities) + usize::from(logits) + usize::from(set);
        let features = scores(row).and_then(|s| s.features.as_ref()).map_or(0, Vec::len);
        self.values += top_k + all * self.form.classes.len() + features;
        self.rows.push(row.clone());
        if self.rows.len() >= GROUP_ROWS || self.values >= GROUP_VALUES {
            self.write_group()?;
        }
        Ok(())
    }

    fn write_group(&mut self) -> Result<(), WriteError> {
        let rows = std::mem::take(&mut self.rows);
        self.values = 0;
        let Some(output) = self.output.as_mut().filter(|_| !rows.is_empty()) else { return Ok(()) };
        let Form { columns, classes, origin, .. } = self.form;
        let mut group_writer = output.next_row_group()?;
        let out = &mut group_writer;
        let text = |text: &str| ByteArray::from(text);
        let keys: Vec<ByteArray> = rows.iter().map(|row| text(&row.key)).collect();
        column::<ByteArrayType>(out, &keys, None, None)?;
        if columns.label {
            optional(out, rows.iter().map(|row| row.label.as_deref().map(text)))?;
        }
        optional(out, rows.iter().map(|row| row.outcome.as_ref().err().map(|error| text(error))))?;
        optional(out, rows.iter().map(|row| scores(row).map(|s| text(s.decision()))))?;
        optional(out, rows.iter().map(|row| scores(row)?.abstained.as_deref().map(text)))?;
        let each = || rows.iter().map(|row| Some(scores(row)?.top.as_slice()));
        list::<Int32Type, _>(out, each(), 2, |&(class, _)| Some(class as i32))?;
        list::<ByteArrayType, _>(out, each(), 2, |&(class, _)| Some(text(label(classes, class))))?;
        list::<DoubleType, _>(out, each(), 2, |&(_, score)| Some(score))?;
        list::<ByteArrayType, _>(out, each(), 3, |&(class, _)| group(classes, class).map(text))?;
        if columns.set {
            let sets = rows.iter().map(|row| scores(row)?.set.as_deref());
            list::<ByteArrayType, _>(out, sets, 2, |&class| Some(text(label(classes, class))))?;
        }
        if columns.familiarity {
            optional_of::<DoubleType>(out, rows.iter().map(|row| scores(row)?.familiarity))?;
        }
        if columns.probabilities {
            let all = rows.iter().map(|row| scores(row)?.probabilities.as_deref());
            list::<DoubleType, _>(out, all, 2, |&p| Some(p))?;
        }
        if columns.logits {
            let all = rows.iter().map(|row| scores(row)?.logits.as_deref());
            list::<FloatType, _>(out, all, 2, |&z| Some(z))?;
        }
        if columns.features {
            let all = rows.iter().map(|row| scores(row)?.features.as_deref());
            list::<FloatType, _>(out, all, 2, |&v| Some(v))?;
        }
        for (_, value) in origin.columns() {
            optional(out, rows.iter().map(|_| value.map(text)))?;
        }
        group_writer.close()?;
        Ok(())
    }

    pub(super) fn finish(&mut self) -> Result<(), WriteError> {
        self.write_group()?;
        if let Some(output) = &mut self.output {
            output.finish()?;
            output.inner_mut().flush()?;
        }
        Ok(())
    }

    pub(super) fn into_inner(mut self) -> Result<W, WriteError> {
        self.write_group()?;
        match self.output.take() {
            Some(output) => Ok(output.into_inner()?),
            None => Err(WriteError::Form("the file is finished already".into())),
        }
    }
}

fn scores(row: &Row) -> Option<&Scores> {
    row.outcome.as_ref().ok()
}

fn column<T: DataType>(
    out: &mut SerializedRowGroupWriter<'_, impl Write + Send>,
    values: &[T::T],
    definition: Option<&[i16]>,
    repetition: Option<&[i16]>,
) -> Result<(), WriteError> {
    let mut column = out.next_column()?.ok_or_else(|| WriteError::Form("the schema has fewer columns".into()))?;
    column.typed::<T>().write_batch(values, definition, repetition)?;
    Ok(column.close()?)
}

/// A column of values that may be missing.
fn optional(
    out: &mut SerializedRowGroupWriter<'_, impl Write + Send>,
    rows: impl Iterator<Item = Option<ByteArray>>,
) -> Result<(), WriteError> {
    optional_of::<ByteArrayType>(out, rows)
}

fn optional_of<T: DataType>(
    out: &mut SerializedRowGroupWriter<'_, impl Write + Send>,
    rows: impl Iterator<Item = Option<T::T>>,
) -> Result<(), WriteError> {
    let (mut values, mut definition) = (Vec::new(), Vec::new());
    for row in rows {
        definition.push(i16::from(row.is_some()));
        values.extend(row);
    }
    column::<T>(out, &values, Some(&definition), None)
}

/// A leaf of an optional list: level 0 is no list, 1 an empty one, 2 an element, 3 an optional leaf of it that is there.
fn list<'r, T: DataType, E: 'r>(
    out: &mut SerializedRowGroupWriter<'_, impl Write + Send>,
    rows: impl Iterator<Item = Option<&'r [E]>>,
    deepest: i16,
    value: impl Fn(&E) -> Option<T::T>,
) -> Result<(), WriteError> {
    let (mut values, mut definition, mut repetition) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let elements = row.unwrap_or_default();
        if elements.is_empty() {
            definition.push(i16::from(row.is_some()));
            repetition.push(0);
        }
        for (n, element) in elements.iter().enumerate() {
            let value = value(element);
            definition.push(if value.is_some() { deepest } else { 2 });
            repetition.push(i16::from(n > 0));
            values.extend(value);
        }
    }
    column::<T>(out, &values, Some(&definition), Some(&repetition))
}

/// The keys of rows that were written as Parquet.
pub(in super::super) fn keys(file: File, mut each: impl FnMut(&str)) -> Result<(), String> {
    let read = || {
        let reader = SerializedFileReader::new(file)?;
        let fields = reader.metadata().file_metadata().schema().get_fields();
        let path = fields.iter().filter(|field| field.name() == "path").cloned().collect();
        let projection = Type::group_type_builder("nbn").with_fields(path).build()?;
        for row in RowIter::from_file_into(Box::new(reader)).project(Some(projection))? {
            each(row?.get_string(0)?);
        }
        Ok(())
    };
    // The reader panics on some damaged files.
    let read = catch_unwind(AssertUnwindSafe(|| read().map_err(|error: ParquetError| error.to_string())));
    read.unwrap_or_else(|_| Err("the table is damaged".into()))
}
