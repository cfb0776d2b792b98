//! What stands for many pictures: a folder, and a line of a list.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry};
use std::io;
use std::path::{Path, PathBuf};

use crate::pixels::has_picture_ending;

/// Names that a table's column of images has when none is given, in the order of preference.
pub const IMAGE_COLUMNS: [&str; 7] = ["path", "image", "image_path", "file", "file_name", "filename", "bytes"];
/// The same for the true class.
pub const LABEL_COLUMNS: [&str; 3] = ["label", "class", "target"];

/// What a walk through folders comes upon.
#[derive(Debug)]
pub enum Found {
    /// A picture, by its name's ending.
    Picture(PathBuf),
    /// A folder that cannot be read.
    Shut(PathBuf, io::Error),
    /// A file or folder whose name begins with a dot: notebooks' checkpoints, thumbnails, what another system keeps beside
    /// each file. It is not looked into.
    Hidden(PathBuf),
    /// A link to a folder, which is not followed.
    Link(PathBuf),
    /// A file whose name does not end as a picture's.
    Other(PathBuf),
}

/// Whether a file or folder is hidden, by its name.
pub fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// How many parts of a name are hidden: the file, and folders that it lies in. What a source finds is passed over when it has
/// more of them than what the source was asked for.
pub fn hidden_parts(name: &str) -> usize {
    name.split('/').filter(|part| part.starts_with('.') && !["", ".", ".."].contains(part)).count()
}

/// Tells what is in `folder` and below, in the order of their names. Symbolic links to folders are not followed: they may form
/// a circle.
///
/// # Errors
/// When `folder` itself cannot be read.
pub fn walk(folder: &Path, found: &mut dyn FnMut(Found)) -> io::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if is_hidden(&path) {
            found(Found::Hidden(path));
        } else if entry.file_type()?.is_dir() {
            if let Err(error) = walk(&path, found) {
                found(Found::Shut(path, error));
            }
        } else if entry.file_type()?.is_symlink() && path.is_dir() {
            found(Found::Link(path));
        } else if has_picture_ending(&path) {
            found(Found::Picture(path));
        } else {
            found(Found::Other(path));
        }
    }
    Ok(())
}

/// What a walk through a folder passed over.
#[derive(Debug, Default)]
pub struct PassedOver {
    /// Hidden files and folders.
    pub hidden: Vec<PathBuf>,
    /// Links to folders.
    pub links: Vec<PathBuf>,
    /// Links that cannot be followed.
    pub broken_links: Vec<PathBuf>,
    /// Files whose names do not end as a picture's.
    pub others: Vec<PathBuf>,
}

impl PassedOver {
    /// Says so in the log, if there is any.
    pub fn tell(&self, folder: &Path) {
        let folder = folder.display();
        if let Some(first) = self.hidden.first() {
            tracing::warn!(
                "{folder}: files and folders whose names begin with a dot are left out: {}, such as {}",
                self.hidden.len(),
                first.display()
            );
        }
        if let Some(first) = self.links.first() {
            tracing::warn!(
                "{folder}: links to folders are not followed: {}, such as {}",
                self.links.len(),
                first.display()
            );
        }
        if let Some(first) = self.broken_links.first() {
            tracing::warn!(
                "{folder}: links that cannot be followed are left out: {}, such as {}",
                self.broken_links.len(),
                first.display()
            );
        }
        if !self.others.is_empty() {
            tracing::warn!("{folder}: files that do not end as pictures do are left out: {}", endings(&self.others));
        }
    }
}

/// The endings of `others`, the most frequent first, and how many files have each: for a folder that holds no picture.
pub fn endings(others: &[PathBuf]) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for path in others {
        let ending = path.extension().map_or_else(|| "no ending".into(), |e| format!(".{}", e.to_string_lossy()));
        *counts.entry(ending.to_lowercase()).or_default() += 1;
    }
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let shown: Vec<String> = counts.iter().take(5).map(|(ending, count)| format!("{count} with {ending}")).collect();
    shown.join(", ")
}

/// Parts a line of a list into a path and a label. Both may contain spaces. The longest label at the end of the line that
/// `is_label` knows counts; without one, what follows the last word that ends as a picture's name does; without that, the last
/// word.
pub fn labelled(line: &str, is_label: impl Fn(&str) -> bool) -> Option<(&str, &str)> {
    let line = line.trim();
    let parts = |(at, _): (usize, &str)| (line[..at].trim_end(), line[at..].trim_start());
    let splits = || line.match_indices(char::is_whitespace).map(parts);
    let known = splits().find(|(_, label)| is_label(label));
    known
        .or_else(|| splits().rfind(|(path, _)| has_picture_ending(Path::new(path))))
        .or_else(|| line.rmatch_indices(char::is_whitespace).next().map(parts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_known_label_counts() {
        let classes = ["tabby cat", "cat"];
        let known = |label: &str| classes.contains(&label);
        assert_eq!(labelled("my photos/1.jpg tabby cat", known), Some(("my photos/1.jpg", "tabby cat")));
        assert_eq!(labelled(" my photos/1.jpg \t cat ", known), Some(("my photos/1.jpg", "cat")));
        assert_eq!(labelled("my photos/1.jpg 3", known), Some(("my photos/1.jpg", "3")));
        assert_eq!(labelled("1.jpg", known), None);
        // Labels that nobody knows yet.
        let none = |_: &str| false;
        assert_eq!(labelled("my photos/1.jpg tabby cat", none), Some(("my photos/1.jpg", "tabby cat")));
        assert_eq!(labelled("a.png b/1.JPG tabby cat", none), Some(("a.png b/1.JPG", "tabby cat")));
        assert_eq!(labelled("my photos/1 cat", none), Some(("my photos/1", "cat")));
    }
}
