//! PBM, PGM and PPM, plain and raw, as Pillow reads them. Source: the formats' own pages (netpbm.sourceforge.net/doc) and
//! Pillow's values, which are scaled to 255 and rounded half to even.

use image::RgbImage;

use super::input::Watch;
use super::limits::{DecodeError, DecodeLimits};

/// The format's name in errors.
pub(super) const NAME: &str = "PNM";
/// Longest number in a header or in plain data, in characters.
const MOST_DIGITS: usize = 10;
/// Samples between two looks at the stop.
const PIECE: usize = 1 << 20;

/// What a file's two first characters say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    /// Whether numbers are written as text.
    plain: bool,
    /// Samples of a pixel.
    channels: usize,
    /// Whether samples are bits, 1 for black.
    bits: bool,
}

fn kind(bytes: &[u8]) -> Option<Kind> {
    let (&[b'P', digit @ b'1'..=b'6'], rest) = bytes.split_first_chunk::<2>()? else { return None };
    // Anything may begin with a P and a digit.
    if !rest.first().is_some_and(|byte| is_space(*byte) || *byte == b'#') {
        return None;
    }
    let channels = if matches!(digit, b'3' | b'6') { 3 } else { 1 };
    Some(Kind { plain: digit <= b'3', channels, bits: matches!(digit, b'1' | b'4') })
}

/// Whether the bytes begin as a file of this format does.
pub(super) fn is_pnm(bytes: &[u8]) -> bool {
    kind(bytes).is_some()
}

fn is_space(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == 0x0B
}

fn damaged(reason: impl Into<String>) -> DecodeError {
    DecodeError::Damaged { format: NAME, reason: reason.into() }
}

/// The file from where it was read to.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Goes to the next character that is neither white space nor in a comment.
    fn skip(&mut self) {
        loop {
            let spaces = self.0.iter().take_while(|byte| is_space(**byte)).count();
            self.0 = &self.0[spaces..];
            if self.0.first() != Some(&b'#') {
                return;
            }
            let comment = self.0.iter().take_while(|byte| !matches!(byte, b'\n' | b'\r')).count();
            self.0 = &self.0[comment..];
        }
    }

    /// The next number; none at the end.
    fn number(&mut self, what: &str) -> Result<Option<u32>, DecodeError> {
        self.skip();
        let length = self.0.iter().take_while(|byte| !is_space(**byte) && **byte != b'#').take(MOST_DIGITS + 1).count();
        let (word, rest) = self.0.split_at(length);
        self.0 = rest;
        if word.is_empty() {
            return Ok(None);
        }
        let text = std::str::from_utf8(word).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        match text.filter(|text| text.len() <= MOST_DIGITS).and_then(|text| text.parse().ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(damaged(format!("{what} is {:?}, not a whole number", String::from_utf8_lossy(word)))),
        }
    }

    fn of_head(&mut self, what: &str) -> Result<u32, DecodeError> {
        self.number(what)?.ok_or_else(|| damaged(format!("it ends before {what}")))
    }

    fn next(&mut self) -> Option<u8> {
        self.skip();
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }
}

/// Decodes a file of this format.
///
/// # Errors
/// When it is cut off or damaged, or too large.
pub(super) fn read(bytes: &[u8], limits: &DecodeLimits, watch: &Watch<'_>) -> Result<RgbImage, DecodeError> {
    let kind = kind(bytes).ok_or(DecodeError::UnknownFormat)?;
    let mut reader = Reader(&bytes[2..]);
    let (width, height) = (reader.of_head("its width")?, reader.of_head("its height")?);
    let most = if kind.bits { 1 } else { reader.of_head("its largest value")? };
    if !(1..=0xFFFF).contains(&most) {
        return Err(damaged(format!("its largest value is {most}; it lies in 1..=65535")));
    }
    let pixels = u64::from(width) * u64::from(height);
    limits.check(width, height, pixels.saturating_mul(3 + kind.channels as u64))?;
    let count = pixels as usize * kind.channels;
    let samples = match (kind.plain, kind.bits) {
        (true, _) => plain(&mut reader, kind, most, count, watch)?,
        // One white space stands before the data.
        (false, true) => raw_bits(reader.0.get(1..).unwrap_or_default(), width as usize, height as usize)?,
        (false, false) => raw(reader.0.get(1..).unwrap_or_default(), most, count)?,
    };
    let rgb = if kind.channels == 3 { samples } else { samples.iter().flat_map(|&grey| [grey; 3]).collect() };
    RgbImage::from_raw(width, height, rgb).ok_or_else(|| damaged("its size and its data disagree"))
}

/// `value` of `most`, scaled to 255.
fn scaled(value: u32, most: u32) -> u8 {
    if most == 255 {
        value.min(255) as u8
    } else {
        (f64::from(value) / f64::from(most) * 255.0).round_ties_even().min(255.0) as u8
    }
}

fn short(found: usize, count: usize) -> DecodeError {
    damaged(format!("it has {found} of {count} values"))
}

fn plain(
    reader: &mut Reader<'_>,
    kind: Kind,
    most: u32,
    count: usize,
    watch: &Watch<'_>,
) -> Result<Vec<u8>, DecodeError> {
    // A value takes a character at least.
    if reader.0.len() < count {
        return Err(short(reader.0.len(), count));
    }
    let mut samples = Vec::with_capacity(count);
    while samples.len() < count {
        if samples.len().is_multiple_of(PIECE) && watch.stopped() {
            return Err(DecodeError::Stopped);
        }
        // Bits need no space between them.
        let sample = if kind.bits {
            match reader.next() {
                Some(b'0') => Some(255),
                Some(b'1') => Some(0),
                Some(_) => return Err(damaged("a value is neither 0 nor 1")),
                None => None,
            }
        } else {
            match reader.number("a value")? {
                Some(value) if value > most => {
                    return Err(damaged(format!("a value is {value}; its largest is {most}")));
                }
                value => value.map(|value| scaled(value, most)),
            }
        };
        samples.push(sample.ok_or_else(|| short(samples.len(), count))?);
    }
    Ok(samples)
}

/// Samples of one byte, or of two, the high one first.
fn raw(data: &[u8], most: u32, count: usize) -> Result<Vec<u8>, DecodeError> {
    let each = if most < 256 { 1 } else { 2 };
    let Some(data) = data.get(..count * each) else { return Err(short(data.len() / each, count)) };
    Ok(match each {
        1 if most == 255 => data.to_vec(),
        1 => data.iter().map(|&value| scaled(value.into(), most)).collect(),
        _ => data.as_chunks::<2>().0.iter().map(|&pair| scaled(u16::from_be_bytes(pair).into(), most)).collect(),
    })
}

/// Bits, the highest first, each row filled up to a whole byte.
fn raw_bits(data: &[u8], width: usize, height: usize) -> Result<Vec<u8>, DecodeError> {
    let row = width.div_ceil(8);
    let Some(data) = data.get(..row * height) else {
        return Err(short((data.len() / row.max(1)) * width, width * height));
    };
    let bit = |row: &[u8], x: usize| if row[x / 8] >> (7 - x % 8) & 1 == 1 { 0 } else { 255 };
    Ok(data.chunks_exact(row.max(1)).flat_map(|row| (0..width).map(move |x| bit(row, x))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stop::Stop;

    fn decode(bytes: &[u8]) -> Result<Vec<u8>, String> {
        let stop = Stop::default();
        let watch = Watch::new(&stop, 1 << 30);
        read(bytes, &DecodeLimits::default(), &watch).map(RgbImage::into_raw).map_err(|error| error.to_string())
    }

    fn grey(values: &[u8]) -> Vec<u8> {
        values.iter().flat_map(|&value| [value; 3]).collect()
    }

    #[test]
    fn every_kind_is_read() {
        assert_eq!(decode(b"P6 1 2 255\n\x01\x02\x03\x04\x05\x06behind"), Ok(vec![1, 2, 3, 4, 5, 6]));
        assert_eq!(decode(b"P3\n# a comment\n1 1 # another\n15\n15 7\t0"), Ok(vec![255, 119, 0]));
        assert_eq!(decode(b"P5\n3 1\n100\r\x00\x32\x64"), Ok(grey(&[0, 128, 255])));
        assert_eq!(decode(b"P5 2 1 65535\n\xff\xff\x80\x00"), Ok(grey(&[255, 128])));
        assert_eq!(decode(b"P2 2 1 255 7 9"), Ok(grey(&[7, 9])));
        assert_eq!(decode(b"P1 3 1 1 01"), Ok(grey(&[0, 255, 0])));
        assert_eq!(decode(b"P4 9 1\n\x80\x80"), Ok(grey(&[0, 255, 255, 255, 255, 255, 255, 255, 0])));
    }

    #[test]
    fn what_is_damaged_is_told() {
        for (bytes, words) in [
            (&b"P6 1"[..], "it ends before its height"),
            (b"P6 1 x 255\n", "its height is \"x\", not a whole number"),
            (b"P6 1 99999999999 255\n", "not a whole number"),
            (b"P5 1 1 0\n\0", "its largest value is 0"),
            (b"P5 1 1 70000\n\0", "its largest value is 70000"),
            (b"P6 1 2 255\n\x01\x02\x03\x04\x05", "it has 5 of 6 values"),
            (b"P4 9 2\n\x80\x80\x80", "it has 9 of 18 values"),
            (b"P2 2 1 255 7", "it has 1 of 2 values"),
            (b"P2 1 1 9 10", "a value is 10; its largest is 9"),
            (b"P1 1 1 2", "a value is neither 0 nor 1"),
            (b"P5 0 1 255\n", "it has no pixels"),
            (b"P5 99999 99999 255\n", "the limit is"),
        ] {
            let error = decode(bytes).unwrap_err();
            assert!(error.contains(words), "{}: {error}", String::from_utf8_lossy(bytes));
        }
        assert!(!is_pnm(b"P7 WIDTH 1") && !is_pnm(b"P5x") && !is_pnm(b"PK"));
    }
}
