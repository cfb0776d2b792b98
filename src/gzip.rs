//! Reads gzip without letting a small file become any amount of work.

use std::io::{self, Read};

use flate2::read::MultiGzDecoder;

/// Unpacked bytes for each packed one, at most. Deflate reaches 1,032; uncompressed pictures of one colour come near it,
/// sets of pictures do not.
const MOST: u64 = 200;
/// Unpacked bytes whose share is not looked at.
const FREE: u64 = 256 << 20;

/// What one or several gzip members hold. Reading fails once it is more than 256 MiB and more than 200 times what was
/// read of the file.
pub(crate) struct Gunzip<R> {
    decoder: MultiGzDecoder<Counted<R>>,
    unpacked: u64,
}

impl<R: Read> Gunzip<R> {
    pub(crate) fn new(packed: R) -> Self {
        Self { decoder: MultiGzDecoder::new(Counted { reader: packed, bytes: 0 }), unpacked: 0 }
    }
}

impl<R: Read> Read for Gunzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.decoder.read(buffer)?;
        self.unpacked += read as u64;
        let packed = self.decoder.get_ref().bytes;
        if self.unpacked > FREE && self.unpacked / MOST > packed {
            let reason = format!(
                "its first {packed} bytes of gzip unpack to more than {} bytes; nbn accepts up to {MOST} times as \
                 many: unpack the file and give the result",
                self.unpacked
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        Ok(read)
    }
}

/// Counts what is read.
struct Counted<R> {
    reader: R,
    bytes: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.bytes += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn packed(mut content: impl Read) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        io::copy(&mut content, &mut encoder).unwrap();
        encoder.finish().unwrap()
    }

    fn unpacked(packed: &[u8]) -> (u64, Option<String>) {
        let mut reader = Gunzip::new(packed);
        let (mut buffer, mut bytes) = (vec![0; 1 << 16], 0);
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return (bytes, None),
                Ok(read) => bytes += read as u64,
                Err(error) => return (bytes, Some(error.to_string())),
            }
        }
    }

    #[test]
    fn all_members_are_read_and_a_short_file_may_be_packed_to_any_share() {
        let zeros = packed(io::repeat(0).take(FREE));
        assert!((zeros.len() as u64) < FREE / MOST);
        assert_eq!(unpacked(&zeros), (FREE, None));
        let mut two = packed(&b"one"[..]);
        two.write_all(&packed(&b"three"[..])).unwrap();
        assert_eq!(unpacked(&two), (8, None));
    }

    #[test]
    fn what_unpacks_to_more_than_its_size_explains_is_refused() {
        let zeros = packed(io::repeat(0).take(4 * FREE));
        let (bytes, error) = unpacked(&zeros);
        assert!(bytes <= FREE + (1 << 16), "{bytes}");
        assert!(error.unwrap().contains("200 times as many: unpack the file and give the result"));
        // Noise does not shrink: however long, it is read.
        let mut random = fastrand::Rng::with_seed(1);
        let noise: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(2 << 20).collect();
        let zeros = io::repeat(0).take(FREE + (100 << 20));
        assert_eq!(unpacked(&packed(noise.chain(zeros))), (FREE + (102 << 20), None));
    }
}
