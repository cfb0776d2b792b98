//! The bytes of a file, which a decoder can read only as long as somebody waits for the picture and it keeps to its memory.

use std::cell::Cell;
use std::io::{self, BufRead, Read, Seek, SeekFrom};

use crate::memory;
use crate::stop::Stop;

/// Bytes that are handed out between two looks. Compressed a thousandfold, they are eight million pixels.
const CHUNK: usize = 8 << 10;

/// What a decoder may take beside the picture: tables, mostly.
const BESIDE: u64 = 96 << 20;
/// What it may take between two looks.
const BETWEEN: u64 = 4 << 20;

/// What a decoder is watched by.
pub(super) struct Watch<'a> {
    stop: &'a Stop,
    /// What the thread held before decoding, the most that it may take, and the most that any picture may.
    before: i64,
    most: Cell<i64>,
    limit: u64,
    exceeded: Cell<bool>,
    ended: Cell<bool>,
}

impl<'a> Watch<'a> {
    /// Decoding begins now, and may take `limit` bytes.
    pub(super) fn new(stop: &'a Stop, limit: u64) -> Self {
        let watch = Self {
            stop,
            before: memory::held(),
            most: Cell::new(0),
            limit,
            exceeded: Cell::new(false),
            ended: Cell::new(false),
        };
        watch.allow(limit);
        watch
    }

    /// The picture is known to take `bytes`.
    pub(super) fn allow(&self, bytes: u64) {
        let most = bytes.saturating_add(BESIDE).min(self.limit).saturating_sub(BETWEEN);
        self.most.set(i64::try_from(most).unwrap_or(i64::MAX));
    }

    /// Whether decoding should go on.
    fn check(&self) -> io::Result<()> {
        if self.stop.asked() {
            return Err(io::Error::other("stopped"));
        }
        let taken = memory::held().saturating_sub(self.before);
        if taken > self.most.get() {
            self.exceeded.set(true);
            return Err(io::Error::other(format!("{taken} bytes of memory were taken")));
        }
        Ok(())
    }

    /// Whether somebody asked for the end.
    pub(super) fn stopped(&self) -> bool {
        self.stop.asked()
    }

    /// Whether a decoder asked for more bytes than there are.
    pub(super) fn ended(&self) -> bool {
        self.ended.get()
    }

    /// Whether decoding was ended because it took too much memory.
    pub(super) fn exceeded(&self) -> bool {
        self.exceeded.get()
    }
}

/// A reader of bytes in memory that fails once decoding should end.
pub(super) struct Watched<'a> {
    bytes: &'a [u8],
    at: usize,
    chunk: usize,
    /// Places that no chunk reaches beyond, ascending.
    pauses: Vec<usize>,
    watch: &'a Watch<'a>,
}

impl<'a> Watched<'a> {
    /// Looks at the watch before each chunk.
    pub(super) fn new(bytes: &'a [u8], watch: &'a Watch<'a>) -> Self {
        Self { bytes, at: 0, chunk: CHUNK, pauses: Vec::new(), watch }
    }

    /// As [`Self::new`], and at each of `pauses`, which ascend.
    pub(super) fn with_pauses(bytes: &'a [u8], watch: &'a Watch<'a>, pauses: Vec<usize>) -> Self {
        Self { pauses, ..Self::new(bytes, watch) }
    }

    /// Hands all bytes out at once: for decoders that are stopped otherwise.
    pub(super) fn whole(bytes: &'a [u8], watch: &'a Watch<'a>) -> Self {
        Self { chunk: usize::MAX, ..Self::new(bytes, watch) }
    }
}

impl BufRead for Watched<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.watch.check()?;
        if self.at >= self.bytes.len() {
            self.watch.ended.set(true);
        }
        let pause = self.pauses.partition_point(|&pause| pause <= self.at);
        let end = self.pauses.get(pause).copied().unwrap_or(usize::MAX).min(self.at.saturating_add(self.chunk));
        Ok(&self.bytes[self.at..end.min(self.bytes.len())])
    }

    fn consume(&mut self, bytes: usize) {
        self.at = (self.at + bytes).min(self.bytes.len());
    }
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(buffer)?;
        self.consume(n);
        Ok(n)
    }
}

impl Seek for Watched<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (from, by) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::Current(by) => (self.at as u64, by),
            SeekFrom::End(by) => (self.bytes.len() as u64, by),
        };
        let at = from.checked_add_signed(by).ok_or(io::ErrorKind::InvalidInput)?;
        // Beyond the end there is nothing, wherever.
        self.at = usize::try_from(at).unwrap_or(usize::MAX).min(self.bytes.len());
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_end_at_pauses_and_nothing_is_read_after_the_stop() {
        let bytes: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        let stop = Stop::default();
        let watch = Watch::new(&stop, 200 << 20);
        let mut watched = Watched::with_pauses(&bytes, &watch, vec![0, 5, 12, 19_000]);
        let mut lengths = Vec::new();
        let mut read = Vec::new();
        loop {
            let chunk = watched.fill_buf().unwrap().to_vec();
            if chunk.is_empty() {
                break;
            }
            lengths.push(chunk.len());
            watched.consume(chunk.len());
            read.extend(chunk);
        }
        assert_eq!(lengths, [5, 7, 8192, 8192, 2604, 1000]);
        assert_eq!(read, bytes);
        assert_eq!(watched.seek(SeekFrom::Start(3)).unwrap(), 3);
        assert_eq!(watched.fill_buf().unwrap(), [3, 4]);
        assert_eq!(watched.seek(SeekFrom::End(9)).unwrap(), 20_009);
        assert!(watched.fill_buf().unwrap().is_empty());
        assert!(watched.seek(SeekFrom::Current(-30_000)).is_err());
        stop.ask();
        assert!(watched.fill_buf().is_err() && watched.read(&mut [0]).is_err());
        assert!(watch.stopped() && !watch.exceeded());
    }
}
