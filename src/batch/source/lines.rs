//! Lines and records of lists, which are bounded: a list without line ends must not fill the memory.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a line, or of a record of CSV, at most.
const MAX_LINE: u64 = 1 << 20;
/// Bytes that the reader of CSV takes beyond the record's end, at most.
const AHEAD: u64 = 64 << 10;

/// The lines of `list`, without their ends. One that is too long or no text is an error of the kind `InvalidData`,
/// after which the next line follows; any other error is of the list.
pub(super) fn lines(mut list: impl BufRead) -> impl Iterator<Item = io::Result<String>> {
    std::iter::from_fn(move || next_line(&mut list).transpose())
}

fn next_line(list: &mut impl BufRead) -> io::Result<Option<String>> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut line = Vec::new();
    list.take(MAX_LINE + 1).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
        line.pop_if(|byte| *byte == b'\r');
    } else if line.len() as u64 > MAX_LINE {
        list.skip_until(b'\n')?;
        return Err(invalid(format!("it is longer than {MAX_LINE} bytes")));
    }
    String::from_utf8(line).map(Some).map_err(|_| invalid("stream did not contain valid UTF-8".into()))
}

/// A reader that fails when too many bytes are read for one record, as those behind a quote that never ends.
pub(super) struct Records<R> {
    list: R,
    left: Budget,
}

/// The bytes that may be read before the next record begins.
#[derive(Clone)]
pub(super) struct Budget(Arc<AtomicU64>);

impl Budget {
    /// A record has ended.
    pub(super) fn renew(&self) {
        self.0.store(MAX_LINE + AHEAD, Ordering::Relaxed);
    }
}

impl<R> Records<R> {
    pub(super) fn new(list: R) -> (Self, Budget) {
        let left = Budget(Arc::default());
        left.renew();
        (Self { list, left: left.clone() }, left)
    }
}

impl<R: Read> Read for Records<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.0.load(Ordering::Relaxed);
        if left == 0 {
            let reason = format!("a record is longer than {MAX_LINE} bytes: a closing quote may be missing");
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, reason));
        }
        let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = self.list.read(&mut buffer[..wanted])?;
        self.left.0.store(left - n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_the_standard_library_up_to_the_limit() {
        for list in ["", "a", "a\n", "a\r\nb\n\n\nc", "\n", "\r\n", "a\rb\n\r"] {
            let found: Vec<String> = lines(list.as_bytes()).map(Result::unwrap).collect();
            assert_eq!(found, list.lines().map(str::to_owned).collect::<Vec<_>>(), "{list:?}");
        }
        let longest = "a".repeat(MAX_LINE as usize);
        let list = format!("{longest}\n{longest}b\nnext\n{longest}bb");
        let found: Vec<_> = lines(list.as_bytes()).map(|line| line.map_err(|error| error.to_string())).collect();
        let long = || Err("it is longer than 1048576 bytes".to_owned());
        assert_eq!(found, [Ok(longest), long(), Ok("next".into()), long()]);
        let odd: Vec<_> = lines(&b"a\n\xff\nb"[..]).map(|line| line.map_err(|error| error.kind())).collect();
        assert_eq!(odd, [Ok("a".into()), Err(io::ErrorKind::InvalidData), Ok("b".into())]);
    }

    #[test]
    fn a_record_up_to_the_limit_is_read_and_an_endless_one_is_not() {
        let field = "a".repeat(MAX_LINE as usize - 3);
        let list = format!("{field},b\n").repeat(3) + "\"" + &"c\n".repeat(MAX_LINE as usize);
        let (list, budget) = Records::new(list.as_bytes());
        let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(list);
        let mut records = reader.records();
        for _ in 0..3 {
            assert_eq!(records.next().unwrap().unwrap()[0].len(), field.len());
            budget.renew();
        }
        let error = records.next().unwrap().unwrap_err().to_string();
        assert!(error.contains("a record is longer than 1048576 bytes: a closing quote may be missing"), "{error}");
    }
}
