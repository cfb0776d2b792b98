//! Tar archives of pictures, as WebDataset writes them: members of one sample follow each other and share their name up to
//! the first dot; `.cls` has the class.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::mpsc::SyncSender;

use super::members::{Kind, Members};
use super::{Content, Fault, Item, Labels, Place, Source, SourceError, SourceOptions, place};
use crate::gzip::Gunzip;
use crate::listing::hidden_parts;
use crate::pixels::has_picture_ending;

/// Bytes of a `.cls` member that are read.
const MAX_LABEL: u64 = 4096;

pub(super) fn open(place: Place, options: &SourceOptions) -> Result<Source, SourceError> {
    let name = place.name();
    let labelled = options.labels.with_column(true);
    if !options.shard.has(&name) {
        return Ok(Source { labelled, ..Source::of_files(Vec::new(), options) });
    }
    if let Place::File(path) = &place {
        File::open(path).map_err(|cause| SourceError::Io { path: path.to_owned(), cause })?;
    }
    let options = options.clone();
    Ok(Source::of_thread(name.clone(), labelled, &options.stopped.clone(), move |out| {
        let mut sample = Sample::default();
        if let Err(fault) = unpack(&place).and_then(|reader| read(reader, &name, &options, &mut sample, out)) {
            // What was read before the fault is whole.
            sample.send(options.labels, out);
            // The receiver may have gone: nobody wants more then.
            let _ = out.send(Item::broken(&name, &fault.detail));
        }
    }))
}

fn unpack(place: &Place) -> Result<Box<dyn Read>, Fault> {
    let file = BufReader::with_capacity(1 << 20, place.open()?);
    let packed = !place.name().to_ascii_lowercase().ends_with(".tar");
    Ok(if packed { Box::new(Gunzip::new(file)) } else { Box::new(file) })
}

/// Why a member that is called a picture cannot be read.
fn no_file(kind: Kind) -> Fault {
    match kind {
        Kind::Sparse => Fault::new(
            "archive_sparse",
            "the archive stores this file as a sparse file, which nbn does not read: pack it in full",
        ),
        Kind::Link => Fault::new("archive_link", "this member of the archive is a link, not a file"),
        Kind::File | Kind::Folder | Kind::Other => {
            Fault::new("archive_other", "this member of the archive is not a regular file")
        }
    }
}

/// Members of one sample.
#[derive(Default)]
struct Sample {
    stem: String,
    pictures: Vec<Item>,
    /// What the pictures take in memory.
    bytes: u64,
    label: Option<String>,
}

/// Bytes that a picture takes beside its content, as a bound.
const ITEM: usize = 512;

impl Sample {
    fn push(&mut self, item: Item) {
        let content = if let Content::Bytes(bytes) = &item.content { bytes.len() } else { 0 };
        self.bytes += (content + item.key.len() + ITEM) as u64;
        self.pictures.push(item);
    }

    /// False when nobody wants more.
    fn send(&mut self, labels: Labels, out: &SyncSender<Item>) -> bool {
        self.bytes = 0;
        let label = self.label.take().filter(|_| labels == Labels::Given);
        self.pictures
            .drain(..)
            .all(|item| out.send(Item { label: item.label.or_else(|| label.clone()), ..item }).is_ok())
    }
}

fn read(
    reader: impl Read,
    name: &str,
    options: &SourceOptions,
    sample: &mut Sample,
    out: &SyncSender<Item>,
) -> Result<(), Fault> {
    let mut members = Members::new(reader);
    let mut hidden = 0u64;
    while let Some(member) = members.next()? {
        let (path, kind) = (&member.name, member.kind);
        if hidden_parts(path) > 0 {
            hidden += 1;
            continue;
        }
        let is_picture = has_picture_ending(Path::new(path));
        if kind == Kind::Folder || (kind != Kind::File && !is_picture) {
            continue;
        }
        let file = path.rsplit('/').next().unwrap_or_default();
        let stem = &path[..path.len() - file.len() + file.find('.').unwrap_or(file.len())];
        // Many pictures of one stem are no sample, and must not all be held.
        if stem != sample.stem || sample.bytes > options.max_file_bytes {
            if !sample.send(options.labels, out) {
                return Ok(());
            }
            sample.stem = stem.to_owned();
        }
        if path.ends_with(".cls") {
            let text = members.read(&member, MAX_LABEL)?;
            sample.label = Some(String::from_utf8_lossy(&text).trim().to_owned());
        } else if is_picture {
            let content = match kind {
                Kind::File if member.size > options.max_file_bytes => {
                    Content::Lost(Fault::too_large(options.max_file_bytes))
                }
                Kind::File => Content::Bytes(members.read(&member, member.size)?.into()),
                kind => Content::Lost(no_file(kind)),
            };
            let label = place::folder(path).filter(|_| options.labels == Labels::Folder);
            sample.push(Item { key: format!("{name}/{path}"), label, content });
        }
    }
    sample.send(options.labels, out);
    if hidden > 0 {
        tracing::warn!("{name}: members whose names begin with a dot are left out: {hidden}");
    }
    Ok(())
}
