//! Lines on a terminal. Where nobody reads what is told (a full disk, a log that has ended, a closed window), work goes on: the
//! standard library's `eprintln!` would end the process in the middle of it.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

/// Writes to standard error, and ends the line, as `eprintln!` does, if somebody reads it.
#[macro_export]
macro_rules! tell {
    ($($format:tt)*) => { $crate::console::tell(format_args!($($format)*)) };
}

/// Writes to standard output, and ends the line, as `println!` does; an error where it cannot be written, unless the reader has
/// gone.
#[macro_export]
macro_rules! show {
    ($($format:tt)*) => { $crate::console::show(format_args!($($format)*)) };
}

/// Writes `text` to standard error, and ends its last line if it has not.
pub fn tell(text: Arguments<'_>) {
    // There is nowhere to say that nothing can be said.
    let _ = io::stderr().write_all(line(text).as_bytes());
}

/// Writes `text` to standard output, and ends its last line if it has not. A reader that has seen enough, as `head` has, or a
/// terminal that was closed is no error.
///
/// # Errors
/// When it cannot be written, as on a full disk.
pub fn show(text: Arguments<'_>) -> io::Result<()> {
    let mut to = io::stdout().lock();
    match to.write_all(line(text).as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe || is_closed_terminal(&error) => Ok(()),
        Err(error) => Err(io::Error::new(error.kind(), format!("standard output cannot be written: {error}"))),
        Ok(()) => Ok(()),
    }
}

fn line(text: Arguments<'_>) -> String {
    let mut line = text.to_string();
    if !line.ends_with('\n') {
        line.push('\n');
    }
    line
}

/// A terminal that was closed does not call itself one any more, but it is still no file.
#[cfg(unix)]
fn is_closed_terminal(error: &io::Error) -> bool {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileTypeExt;
    let kind = || File::from(io::stdout().as_fd().try_clone_to_owned()?).metadata();
    error.raw_os_error() == Some(libc::EIO) && kind().is_ok_and(|found| found.file_type().is_char_device())
}

#[cfg(not(unix))]
fn is_closed_terminal(_: &io::Error) -> bool {
    false
}
