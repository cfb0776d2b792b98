//! The command line as a calibration records it.

use std::ffi::OsString;
use std::path::Path;

/// `nbn fold` and `words`, for a file that goes to other machines: paths below the folder `here` are given from there, of other
/// absolute paths only the name.
pub fn command_line(words: impl Iterator<Item = OsString>, here: &Path) -> String {
    let words = words.map(|word| without_folders(&word.to_string_lossy(), here));
    std::iter::once("nbn fold".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

fn without_folders(word: &str, here: &Path) -> String {
    let (flag, value) = match word.split_once('=') {
        Some((flag, value)) if flag.starts_with("--") => (format!("{flag}="), value),
        _ => (String::new(), word),
    };
    let path = Path::new(value);
    if !path.is_absolute() {
        return word.to_owned();
    }
    let shown = match path.strip_prefix(here) {
        Ok(below) if below.as_os_str().is_empty() => ".".into(),
        Ok(below) => below.to_string_lossy(),
        Err(_) => path.file_name().unwrap_or_default().to_string_lossy(),
    };
    let outside = if path.starts_with(here) { "" } else { "…/" };
    format!("{flag}{outside}{shown}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_folder_of_the_machine_is_recorded() {
        let words = [
            "calibrate",
            "/project/m/1",
            "--data",
            "/elsewhere/photos",
            "--out=/project/x.json",
            "a/b",
            "/project",
            "/",
        ];
        let line = command_line(words.into_iter().map(OsString::from), Path::new("/project"));
        assert_eq!(line, "nbn fold calibrate m/1 --data …/photos --out=x.json a/b . …/");
    }
}
