//! What an input is by its name.

use std::path::{Path, PathBuf};

use super::{Labels, SourceError, SourceOptions};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Archive,
    Table,
    Csv,
    JsonLines,
    Text,
    /// A picture, or the head of names in a store.
    Other,
}

impl Form {
    pub(super) fn of(input: &Path) -> Self {
        let name = input.to_string_lossy().to_ascii_lowercase();
        let endings = [
            (".tar", Self::Archive),
            (".tar.gz", Self::Archive),
            (".tgz", Self::Archive),
            (".parquet", Self::Table),
            (".csv", Self::Csv),
            (".jsonl", Self::JsonLines),
            (".ndjson", Self::JsonLines),
            (".txt", Self::Text),
        ];
        endings.iter().find(|(ending, _)| name.ends_with(ending)).map_or(Self::Other, |(_, form)| *form)
    }

    fn has_columns(self) -> bool {
        matches!(self, Self::Table | Self::Csv | Self::JsonLines)
    }
}

/// Refuses options that none of `inputs` can use.
pub(super) fn fits(inputs: &[PathBuf], options: &SourceOptions) -> Result<(), SourceError> {
    const COLUMNS: &str = "a list or table with columns (.csv, .jsonl, .parquet)";
    let columns = inputs.iter().any(|input| Form::of(input).has_columns());
    let lines = inputs.iter().any(|input| Form::of(input) == Form::Text || input == Path::new("-"));
    for (given, usable, option, wanted) in [
        (options.image_column.is_some(), columns, "--image-column", COLUMNS),
        (options.label_column.is_some(), columns, "--label-column", COLUMNS),
        (options.labels == Labels::Line, lines, "--labels line", "a text list (.txt, or - for stdin)"),
    ] {
        if given && !usable {
            return Err(SourceError::Unused { option, wanted });
        }
    }
    Ok(())
}
