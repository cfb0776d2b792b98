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
    if !options.shard.has(&name) {
        return Ok(Source::of_files(Vec::new(), options));
    }
    if let Place::File(path) = &place {
        File::open(path).map_err(|cause| SourceError::Io { path: path.to_owned(), cause })?;
    }
    let options = options.clone();
    let labelled = options.labels.with_column(true);
    Ok(Source::of_thread(name.clone(), labelled, &options.stopped.clone(), move |out| {
        if let Err(fault) = unpack(&place).and_then(|reader| read(reader, &name, &options, out)) {
            let detail = format!("{name} cannot be read further: {}", fault.detail);
            // The receiver may have gone: nobody wants more then.
            let _ = out.send(Item { key: name, label: None, content: Content::Lost(Fault::new("archive", detail)) });
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
    label: Option<String>,
}

impl Sample {
    /// False when nobody wants more.
    fn send(&mut self, labels: Labels, out: &SyncSender<Item>) -> bool {
        let label = self.label.take().filter(|_| labels != Labels::None);
        self.pictures
            .drain(..)
            .all(|item| out.send(Item { label: item.label.or_else(|| label.clone()), ..item }).is_ok())
    }
}

fn read(reader: impl Read, name: &str, options: &SourceOptions, out: &SyncSender<Item>) -> Result<(), Fault> {
    let mut archive = tar::Archive::new(reader);
    let mut sample = Sample::default();
    for entry in archive.entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path()?.into_owned();
        let member = path.to_string_lossy().into_owned();
        let file = member.rsplit('/').next().unwrap_or_default();
        let stem = member[..member.len() - file.len() + file.find('.').unwrap_or(file.len())].to_owned();
        if stem != sample.stem {
            if !sample.send(options.labels, out) {
                return Ok(());
            }
            sample.stem = stem;
        }
        if member.ends_with(".cls") {
            let mut text = String::new();
            entry.by_ref().take(MAX_LABEL).read_to_string(&mut text)?;
            sample.label = Some(text.trim().to_owned());
        } else if has_picture_ending(&path) {
            let mut bytes = Vec::new();
            let content = if entry.size() > options.max_file_bytes {
                Content::Lost(Fault::too_large(options.max_file_bytes))
            } else {
                entry.read_to_end(&mut bytes)?;
                if (bytes.len() as u64) < entry.size() {
                    return Err(Fault::new("archive", format!("it ends in the middle of {member}")));
                }
                Content::Bytes(bytes.into())
            };
            let label = place::folder(&member).filter(|_| options.labels == Labels::Folder);
            sample.pictures.push(Item { key: format!("{name}/{member}"), label, content });
        }
    }
    sample.send(options.labels, out);
    Ok(())
}
