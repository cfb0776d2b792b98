//! Lines on a terminal. Where nobody reads what is told (a full disk, a log that has ended, a closed window), work goes on: the
//! standard library's `eprintln!` would end the process in the middle of it.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

/// Writes a line to standard error, as `eprintln!` does, if somebody reads it.
#[macro_export]
macro_rules! tell {
    ($($format:tt)*) => { $crate::console::tell(format_args!($($format)*)) };
}

/// Writes a line to standard output, as `println!` does, and returns an error where it cannot.
#[macro_export]
macro_rules! show {
    ($($format:tt)*) => { $crate::console::show(format_args!("{}\n", format_args!($($format)*))) };
}

/// Writes a line to standard error.
pub fn tell(line: Arguments<'_>) {
    // There is nowhere to say that nothing can be said.
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes `text` to standard output. A reader that has seen enough of it, as `head` has, is no error.
///
/// # Errors
/// When it cannot be written, as on a full disk.
pub fn show(text: Arguments<'_>) -> io::Result<()> {
    let mut to = io::stdout().lock();
    match to.write_fmt(text).and_then(|()| to.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(io::Error::new(error.kind(), format!("standard output cannot be written: {error}")))
        }
        _ => Ok(()),
    }
}
