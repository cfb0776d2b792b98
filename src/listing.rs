//! What stands for many pictures: a folder, and a line of a list.

use std::fs::{self, DirEntry};
use std::io;
use std::path::{Path, PathBuf};

use crate::pixels::has_picture_ending;

/// Tells `picture` each picture in `folder` and below, in the order of their names, and `shut` each folder below that
/// cannot be read. Symbolic links to folders are not followed: they may form a circle.
///
/// # Errors
/// When `folder` itself cannot be read.
pub fn walk(
    folder: &Path,
    picture: &mut dyn FnMut(PathBuf),
    shut: &mut dyn FnMut(PathBuf, io::Error),
) -> io::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if let Err(error) = walk(&path, picture, shut) {
                shut(path, error);
            }
        } else if has_picture_ending(&path) {
            picture(path);
        }
    }
    Ok(())
}

/// Parts a line of a list into a path and a label. Both may contain spaces: the longest label at the end of the line that
/// `is_label` knows counts, and without one the last word.
pub fn labelled(line: &str, is_label: impl Fn(&str) -> bool) -> Option<(&str, &str)> {
    let line = line.trim();
    let parts = |(at, _): (usize, &str)| (line[..at].trim_end(), line[at..].trim_start());
    let mut known = line.match_indices(char::is_whitespace).map(parts).filter(|(_, label)| is_label(label));
    known.next().or_else(|| line.rmatch_indices(char::is_whitespace).next().map(parts))
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
    }
}
