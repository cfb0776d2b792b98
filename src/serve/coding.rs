//! Content codings of request bodies, undone within bounds.

use std::io::{self, Read};

use axum::body::Bytes;
use axum::http::{HeaderMap, header};
use bytes::{Buf, BytesMut};
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use super::code::Code;
use super::cut;
use super::problem::Problem;

/// The codings that are accepted, as `Accept-Encoding` has them.
pub(crate) const ACCEPTED: &str = "gzip, deflate, zstd";

/// Unpacked bytes for each packed one, at most. Pictures hardly shrink; tensors and base64 do by less than ten times.
const MOST: usize = 200;
/// Unpacked bytes whose share is not looked at.
const FREE: usize = 1 << 20;
/// Bytes that are unpacked at a time.
const PIECE: usize = 64 << 10;
/// The window that zstd may use, in bytes: RFC 9659.
const ZSTD_WINDOW: u64 = 8 << 20;

/// How a body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coding {
    Gzip,
    /// With zlib's head, as HTTP has it, or without, as some clients send it.
    Deflate,
    Zstd,
}

impl Coding {
    /// What the headers say; none for a body that is not compressed.
    ///
    /// # Errors
    /// When it is none of the accepted ones, or several.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Option<Self>, Problem> {
        let mut given = headers.get_all(header::CONTENT_ENCODING).iter();
        let (Some(value), another) = (given.next(), given.next()) else { return Ok(None) };
        let name = value.to_str().unwrap_or_default().trim().to_ascii_lowercase();
        match name.as_str() {
            _ if another.is_some() => {}
            "" | "identity" if value.to_str().is_ok() => return Ok(None),
            "gzip" | "x-gzip" => return Ok(Some(Self::Gzip)),
            "deflate" => return Ok(Some(Self::Deflate)),
            "zstd" => return Ok(Some(Self::Zstd)),
            _ => {}
        }
        let given: Vec<_> = headers.get_all(header::CONTENT_ENCODING).iter().take(3).collect();
        let given = cut::shown(format_args!("{given:?}"));
        let detail =
            format!("content-encoding {given} is not accepted: send the body with one of {ACCEPTED}, or with none");
        Err(Problem::new(Code::ContentEncoding, detail))
    }

    /// Refuses every coding, for bodies that are small or in a frame of their own.
    ///
    /// # Errors
    /// When there is one.
    pub(crate) fn none(headers: &HeaderMap) -> Result<(), Problem> {
        match headers
            .get(header::CONTENT_ENCODING)
            .filter(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
        {
            None => Ok(()),
            Some(coding) => {
                let coding = cut::shown(format_args!("{coding:?}"));
                let detail = format!("content-encoding {coding} is not accepted here: send the body without encoding");
                Err(Problem::new(Code::ContentEncoding, detail))
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
            Self::Zstd => "zstd",
        }
    }

    /// What `packed` holds. `grow` is asked with each new length before that is taken.
    ///
    /// # Errors
    /// `grow`'s; when `packed` is damaged, or unpacks to more than 200 times its size.
    pub(crate) fn unpack(
        self,
        packed: &Bytes,
        mut grow: impl FnMut(usize) -> Result<(), Problem>,
    ) -> Result<Bytes, Problem> {
        let mut reader = self.reader(packed.clone());
        let mut whole = BytesMut::new();
        let mut piece = vec![0; PIECE];
        loop {
            let read = reader.read(&mut piece).map_err(|error| {
                let reason = cut::sentence(&error.to_string());
                Problem::new(Code::BodyBroken, format!("the body is no {} that can be unpacked: {reason}", self.name()))
            })?;
            if read == 0 {
                return Ok(whole.freeze());
            }
            let length = whole.len() + read;
            if length > FREE && length / MOST > packed.len() {
                let detail = format!(
                    "the body's {} bytes of {} unpack to more than {MOST} times as many: send it unpacked",
                    packed.len(),
                    self.name()
                );
                return Err(Problem::new(Code::BodyTooLarge, detail).with_limit((MOST * packed.len()) as u64));
            }
            grow(length)?;
            whole.extend_from_slice(&piece[..read]);
        }
    }

    fn reader(self, packed: Bytes) -> Box<dyn Read + Send> {
        match self {
            Self::Gzip => Box::new(MultiGzDecoder::new(packed.reader())),
            Self::Deflate if has_zlib_head(&packed) => Box::new(ZlibDecoder::new(packed.reader())),
            Self::Deflate => Box::new(DeflateDecoder::new(packed.reader())),
            Self::Zstd => Box::new(Frames { packed: Some(packed), frame: None }),
        }
    }
}

/// RFC 1950: method 8, and a multiple of 31.
fn has_zlib_head(packed: &[u8]) -> bool {
    packed
        .first_chunk()
        .is_some_and(|&[method, flags]| method & 15 == 8 && u16::from_be_bytes([method, flags]) % 31 == 0)
}

type Frame = StreamingDecoder<bytes::buf::Reader<Bytes>, FrameDecoder>;

/// The frames of zstd, one after the other.
struct Frames {
    /// What no frame has begun to read.
    packed: Option<Bytes>,
    frame: Option<Frame>,
}

impl Read for Frames {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(frame) = &mut self.frame {
                let read = frame.read(buffer)?;
                if read > 0 {
                    return Ok(read);
                }
                self.packed = self.frame.take().map(|frame| frame.into_inner().into_inner());
            }
            match self.packed.take().filter(|packed| !packed.is_empty()) {
                None => return Ok(0),
                Some(packed) => {
                    let frame = StreamingDecoder::new_with_max_window_size(packed.reader(), ZSTD_WINDOW);
                    self.frame = Some(frame.map_err(io::Error::other)?);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use axum::http::HeaderValue;
    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    use super::*;

    fn content() -> Vec<u8> {
        (0..200_000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect()
    }

    fn packed() -> Vec<(Coding, Vec<u8>)> {
        let content = content();
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(&content).unwrap();
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
        zlib.write_all(&content).unwrap();
        let mut raw = DeflateEncoder::new(Vec::new(), Compression::default());
        raw.write_all(&content).unwrap();
        let (first, second) = content.split_at(70_000);
        let zstd = |part: &[u8]| ruzstd::encoding::compress_to_vec(part, ruzstd::encoding::CompressionLevel::Fastest);
        vec![
            (Coding::Gzip, gzip.finish().unwrap()),
            (Coding::Deflate, zlib.finish().unwrap()),
            (Coding::Deflate, raw.finish().unwrap()),
            (Coding::Zstd, [zstd(first), zstd(second)].concat()),
        ]
    }

    #[test]
    fn every_coding_gives_what_was_packed() {
        for (coding, packed) in packed() {
            let mut lengths = Vec::new();
            let found = coding.unpack(&packed.clone().into(), |length| {
                lengths.push(length);
                Ok(())
            });
            assert_eq!(found.unwrap(), content(), "{coding:?}");
            assert_eq!(lengths.last(), Some(&200_000));
            // Cut off, damaged, or nothing of the kind.
            for wrong in [packed[..packed.len() / 2].to_vec(), b"nothing of the kind".to_vec()] {
                let refused = coding.unpack(&wrong.into(), |_| Ok(())).unwrap_err();
                assert_eq!(refused.code, Code::BodyBroken, "{coding:?}");
            }
            let full = coding.unpack(&packed.into(), |_| Err(Problem::new(Code::Memory, "full")));
            assert_eq!(full.unwrap_err().code, Code::Memory);
        }
    }

    #[test]
    fn what_unpacks_to_too_much_is_refused_long_before_its_end() {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        (0..100).for_each(|_| gzip.write_all(&vec![0; 1 << 20]).unwrap());
        let mut most = 0;
        let refused = Coding::Gzip.unpack(&gzip.finish().unwrap().into(), |length| {
            most = length;
            Ok(())
        });
        assert_eq!(refused.unwrap_err().code, Code::BodyTooLarge);
        assert!(most < 25 << 20, "{most}");
        // A frame that asks for a window of 1 GiB.
        let window = Bytes::from_static(&[0x28, 0xB5, 0x2F, 0xFD, 0x00, 0xA0, 0x01, 0x00, 0x00]);
        assert_eq!(Coding::Zstd.unpack(&window, |_| Ok(())).unwrap_err().code, Code::BodyBroken);
    }

    #[test]
    fn names_are_known_in_any_case_and_others_are_refused() {
        let of = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            values.iter().for_each(|value| {
                headers.append(header::CONTENT_ENCODING, HeaderValue::from_static(value));
            });
            Coding::of(&headers)
        };
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&["Identity"]).unwrap(), None);
        assert_eq!(of(&["GZIP"]).unwrap(), Some(Coding::Gzip));
        assert_eq!(of(&["x-gzip"]).unwrap(), Some(Coding::Gzip));
        assert_eq!(of(&["Deflate"]).unwrap(), Some(Coding::Deflate));
        assert_eq!(of(&["zstd"]).unwrap(), Some(Coding::Zstd));
        for wrong in [&["br"][..], &["gzip, gzip"], &["gzip", "gzip"], &["identity", "br"]] {
            let detail = of(wrong).unwrap_err().detail.to_string();
            assert!(detail.contains("send the body with one of gzip, deflate, zstd"), "{detail}");
        }
    }
}
