//! Tar archives of pictures, as WebDataset writes them: members of one sample follow each other and share their name up to
//! the first dot; `.cls` has the class.

use std::fs::File;
use std::io::{BufReader, Read};
use std::sync::mpsc::SyncSender;

use super::{Content, Fault, Item, Labels, Place, Source, SourceError, SourceOptions, place};
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
    Ok(if packed { Box::new(flate2::read::MultiGzDecoder::new(file)) } else { Box::new(file) })
}

/// Members of one sample.
#[derive(Default)]
struct Sample {
    stem: String,
    pictures: Vec<Item>,
    /// Of the pictures.
    bytes: u64,
    label: Option<String>,
}

impl Sample {
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
    let mut archive = tar::Archive::new(Counted { reader, bytes: 0 });
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let kind = entry.header().entry_type();
        if kind.is_dir() || (!kind.is_file() && !has_picture_ending(&path)) {
            continue;
        }
        let member = path.to_string_lossy().into_owned();
        let file = member.rsplit('/').next().unwrap_or_default();
        let stem = member[..member.len() - file.len() + file.find('.').unwrap_or(file.len())].to_owned();
        // Many pictures of one stem are no sample, and must not all be held.
        if stem != sample.stem || sample.bytes > options.max_file_bytes {
            if !sample.send(options.labels, out) {
                return Ok(());
            }
            sample.stem = stem;
        }
        if member.ends_with(".cls") {
            let mut text = Vec::new();
            entry.by_ref().take(MAX_LABEL).read_to_end(&mut text)?;
            sample.label = Some(String::from_utf8_lossy(&text).trim().to_owned());
        } else if has_picture_ending(&path) {
            let mut bytes = Vec::new();
            let content = if !kind.is_file() {
                Content::Lost(Fault::new("archive_link", "the archive has a link here, no file"))
            } else if entry.size() > options.max_file_bytes {
                Content::Lost(Fault::too_large(options.max_file_bytes))
            } else {
                entry.read_to_end(&mut bytes)?;
                if (bytes.len() as u64) < entry.size() {
                    return Err(Fault::new("archive", format!("it ends in the middle of {member}")));
                }
                sample.bytes += bytes.len() as u64;
                Content::Bytes(bytes.into())
            };
            let label = place::folder(&member).filter(|_| options.labels == Labels::Folder);
            sample.pictures.push(Item { key: format!("{name}/{member}"), label, content });
        }
    }
    sample.send(options.labels, out);
    // An upload that failed before its first byte; an archive without members has its end marker.
    if archive.into_inner().bytes == 0 {
        return Err(Fault::new("archive", "it is empty (0 bytes)"));
    }
    Ok(())
}

struct Counted<R> {
    reader: R,
    bytes: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.reader.read(buffer)?;
        self.bytes += n as u64;
        Ok(n)
    }
}
