//! What the TIFF decoder does not bound by itself. It takes memory for a field as long as the field says it is. A picture is
//! made of strips or tiles, each of which is decoded whole, and which may be many, much larger than the picture, or lie in the
//! same place of the file; JPEGs among them have a size and a number of scans of their own.

use std::collections::HashMap;

use tiff::decoder::{Decoder, DecodingResult, Limits};

use super::input::{Watch, Watched};
use super::limits::DecodeError;

/// Fields of an image; a classic TIFF cannot say that it has more.
const MOST_FIELDS: u64 = 65_535;
/// Pixels of strips and tiles for each pixel of the picture, and pixels that small pictures may have beside.
const AREA: u64 = 4;
const FILLING: u64 = 1_000_000;
/// Strips and tiles that any picture may have, and pixels for each further one.
const FEW: u64 = 16_384;
const PIXELS_EACH: u64 = 64;
/// Pixels that JPEGs decode for each pixel of the picture, scan by scan. Ordinary files have up to four.
const WORK: u64 = 16;

pub(super) const WIDTH: u16 = 256;
pub(super) const HEIGHT: u16 = 257;
pub(super) const BITS: u16 = 258;
pub(super) const COMPRESSION: u16 = 259;
pub(super) const PHOTOMETRIC: u16 = 262;
const STRIP_OFFSETS: u16 = 273;
pub(super) const SAMPLES: u16 = 277;
pub(super) const ROWS_PER_STRIP: u16 = 278;
const STRIP_BYTES: u16 = 279;
pub(super) const PLANES: u16 = 284;
const COLOURS: u16 = 320;
pub(super) const TILE_WIDTH: u16 = 322;
pub(super) const TILE_HEIGHT: u16 = 323;
pub(super) const TILE_OFFSETS: u16 = 324;
pub(super) const TILE_BYTES: u16 = 325;
pub(super) const EXTRA_SAMPLES: u16 = 338;
pub(super) const SAMPLE_FORMAT: u16 = 339;
const JPEG_TABLES: u16 = 347;
/// Values of [`COMPRESSION`] and [`PLANES`].
pub(super) const JPEG: u64 = 7;
const OLD_JPEG: u64 = 6;
const SEPARATE: u64 = 2;

pub(super) fn damaged(reason: impl Into<String>) -> DecodeError {
    DecodeError::Damaged { format: "TIFF", reason: reason.into() }
}

pub(super) fn unsupported(reason: impl Into<String>) -> DecodeError {
    DecodeError::Unsupported { format: "TIFF", reason: reason.into() }
}

/// The samples of `file` as they are stored, which take at most `bytes`.
pub(super) fn stored(file: &[u8], bytes: usize, watch: &Watch<'_>) -> Result<DecodingResult, DecodeError> {
    let mut own = Limits::default();
    own.decoding_buffer_size = bytes;
    own.intermediate_buffer_size = bytes.max(1 << 20);
    let decoder = Decoder::new(Watched::new(file, watch)).map(|decoder| decoder.with_limits(own));
    decoder.and_then(|mut decoder| decoder.read_image()).map_err(|error| match error {
        tiff::TiffError::UnsupportedError(error) => unsupported(error.to_string()),
        error => damaged(error.to_string()),
    })
}

/// Refuses a TIFF with fields that are longer than the file, before anything is decoded. What cannot be read otherwise is for
/// the decoder to tell.
pub(super) fn check_fields(bytes: &[u8]) -> Result<(), DecodeError> {
    let (fields, held) = (Image::of(bytes).map(|image| image.fields).unwrap_or_default(), bytes.len());
    if fields.len() as u64 > MOST_FIELDS {
        return Err(damaged(format!("its image has more than {MOST_FIELDS} fields")));
    }
    match fields.into_iter().find(|field| field.length() > held as u128) {
        None => Ok(()),
        Some(field) => {
            let (tag, length) = (field.tag, field.length());
            Err(damaged(format!("its field {tag} claims to have {length} bytes; the file has {held}")))
        }
    }
}

/// Refuses a TIFF whose strips or tiles take more work than a picture of its size explains. Its fields were checked.
pub(super) fn check_work(bytes: &[u8]) -> Result<(), DecodeError> {
    let Some(image) = Image::of(bytes) else { return Ok(()) };
    let one = |tag| image.numbers(tag).next();
    let (Some(width), Some(height)) = (one(WIDTH), one(HEIGHT)) else { return Ok(()) };
    let (offsets, lengths, area) = match (one(TILE_WIDTH), one(TILE_HEIGHT)) {
        (Some(tile_width), Some(tile_height)) => (TILE_OFFSETS, TILE_BYTES, tile_width.saturating_mul(tile_height)),
        _ => {
            let rows = one(ROWS_PER_STRIP).unwrap_or(height).min(height);
            (STRIP_OFFSETS, STRIP_BYTES, width.saturating_mul(rows))
        }
    };
    let planes = if one(PLANES) == Some(SEPARATE) { one(SAMPLES).unwrap_or(1).max(1) } else { 1 };
    let pixels = width.saturating_mul(height).saturating_mul(planes);
    let count = image.numbers(offsets).count() as u64;
    if count > FEW + pixels / PIXELS_EACH {
        return Err(unsupported(format!("{width}×{height} pixels in {count} strips or tiles")));
    }
    if count.saturating_mul(area) > pixels.saturating_mul(AREA).saturating_add(FILLING) {
        return Err(unsupported(format!("{width}×{height} pixels in {count} strips or tiles of {area} pixels each")));
    }
    if one(COMPRESSION) != Some(JPEG) {
        return Ok(());
    }
    let places = || image.numbers(offsets).zip(image.numbers(lengths));
    let all: u64 = places().fold(0, |all, (_, length)| all.saturating_add(length));
    if all > 4 * bytes.len() as u64 + FILLING {
        return Err(unsupported("its JPEG strips overlap"));
    }
    let most = pixels.saturating_add(FILLING);
    let tables = image.bytes_of(JPEG_TABLES).map(work_of).unwrap_or_default();
    // Those that lie in the same place are looked at once, and decoded each time.
    let mut known: HashMap<(u64, u64), Work> = HashMap::new();
    let mut work = 0u64;
    for (offset, length) in places() {
        let found = *known.entry((offset, length)).or_insert_with(|| work_of(part(bytes, offset, length)));
        work = work.saturating_add(found.scanned);
        if found.largest > most || work > most.saturating_mul(WORK) || tables.largest > 0 || tables.scanned > 0 {
            return Err(unsupported("its JPEG strips have more pixels or scans than the image's size explains"));
        }
    }
    Ok(())
}

fn part(bytes: &[u8], offset: u64, length: u64) -> &[u8] {
    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
    let length = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len() - from);
    &bytes[from..from + length]
}

/// What a JPEG takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Work {
    /// Pixels of its largest frame.
    largest: u64,
    /// Pixels of its frames, for each of their scans.
    scanned: u64,
}

fn work_of(jpeg: &[u8]) -> Work {
    let (mut work, mut frame) = (Work::default(), 0);
    for at in jpeg.iter().enumerate().filter(|(_, byte)| **byte == 0xFF).map(|(at, _)| at) {
        if let Some(area) = frame_at(&jpeg[at..]) {
            frame = area;
            work.largest = work.largest.max(area);
        } else if jpeg.get(at + 1) == Some(&0xDA) {
            work.scanned = work.scanned.saturating_add(frame);
        }
    }
    work
}

/// The pixels of the JPEG whose frame header `bytes` begin with.
fn frame_at(bytes: &[u8]) -> Option<u64> {
    let &[_, marker, high, low, precision, h1, h0, w1, w0, components] = bytes.first_chunk::<10>()?;
    let is_frame = (0xC0..=0xCF).contains(&marker) && ![0xC4, 0xC8, 0xCC].contains(&marker);
    let fits = high == 0 && u16::from(low) == 8 + 3 * u16::from(components) && [8, 12, 16].contains(&precision);
    let side = |high, low| u64::from(u16::from_be_bytes([high, low]));
    (is_frame && fits).then(|| side(w1, w0) * side(h1, h0))
}

/// The first image's fields.
pub(super) struct Image<'a> {
    pub(super) bytes: &'a [u8],
    little: bool,
    fields: Vec<Field>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Field {
    tag: u16,
    /// Bytes of a value; 0 where the type is not known, and the field is skipped or refused whatever its length.
    size: u8,
    kind: u16,
    count: u64,
    /// Where the values lie.
    at: u64,
    /// Where the field lies, in a list of 12 bytes each.
    entry: u64,
}

impl Field {
    fn length(&self) -> u128 {
        u128::from(self.size) * u128::from(self.count)
    }
}

impl<'a> Image<'a> {
    /// Of a TIFF or BigTIFF; none when its first image cannot be found.
    pub(super) fn of(bytes: &'a [u8]) -> Option<Self> {
        let little = match bytes.get(..2)? {
            b"II" => true,
            b"MM" => false,
            _ => return None,
        };
        let mut image = Self { bytes, little, fields: Vec::new() };
        // Sizes of an offset, of the number of fields, and of a field.
        let (offset, many, each) = if image.number(2, 2)? == 43 { (8, 8, 20) } else { (4, 2, 12) };
        let first = image.number(if offset == 8 { 8 } else { 4 }, offset)?;
        let count = image.number(first, many)?;
        for n in 0..count.min(MOST_FIELDS + 1) {
            let at = first.checked_add(u64::from(many))?.checked_add(n * each)?;
            // The file ends in the middle of the list: the decoder tells it.
            let Some(tag) = image.number(at, 2) else { break };
            let (Some(kind), Some(count)) = (image.number(at + 2, 2), image.number(at + 4, offset)) else { break };
            let size: u8 = match kind {
                1 | 2 | 6 | 7 => 1,
                3 | 8 => 2,
                4 | 9 | 11 | 13 => 4,
                5 | 10 | 12 | 16 | 17 | 18 => 8,
                _ => 0,
            };
            let entry = at;
            let inline = at + 4 + u64::from(offset);
            let is_inline = u128::from(size) * u128::from(count) <= u128::from(offset);
            let at = if is_inline { Some(inline) } else { image.number(inline, offset) };
            let Some(at) = at else { break };
            image.fields.push(Field { tag: tag as u16, size, kind: kind as u16, count, at, entry });
        }
        Some(image)
    }

    fn number(&self, at: u64, size: u8) -> Option<u64> {
        let at = usize::try_from(at).ok()?;
        let number = self.bytes.get(at..at.checked_add(usize::from(size))?)?.iter();
        let add = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        Some(if self.little { number.rev().fold(0, add) } else { number.fold(0, add) })
    }

    fn field(&self, tag: u16) -> Option<Field> {
        self.fields.iter().find(|field| field.tag == tag).copied()
    }

    /// The whole numbers of a field, as far as the file has them.
    pub(super) fn numbers(&self, tag: u16) -> impl Iterator<Item = u64> {
        let Field { size, count, at, .. } =
            self.field(tag).unwrap_or(Field { tag, size: 0, kind: 0, count: 0, at: 0, entry: 0 });
        let count = if size == 0 { 0 } else { count };
        (0..count).map_while(move |n| self.number(at.checked_add(n.checked_mul(u64::from(size))?)?, size))
    }

    /// The fractions of a field; none where one has no value.
    pub(super) fn fractions(&self, tag: u16) -> Vec<f32> {
        let Some(field) = self.field(tag).filter(|field| field.kind == 5) else { return Vec::new() };
        let fraction = |n: u64| {
            let at = field.at.checked_add(n.checked_mul(8)?)?;
            let (above, below) = (self.number(at, 4)?, self.number(at.checked_add(4)?, 4)?);
            (below > 0).then(|| (above as f64 / below as f64) as f32)
        };
        (0..field.count.min(16)).map(fraction).collect::<Option<_>>().unwrap_or_default()
    }

    /// A copy of the file whose fields have these numbers, as far as it has such fields.
    ///
    /// # Errors
    /// When it is a BigTIFF, or a number does not fit into a field.
    pub(super) fn with(&self, numbers: &[(u16, u64)]) -> Result<Vec<u8>, DecodeError> {
        let mut file = self.bytes.to_vec();
        for (tag, number) in numbers {
            let number = u32::try_from(*number);
            let number = number.map_err(|_| damaged("it is too wide"))?;
            if let Some(field) = self.field(*tag) {
                // One of LONG, or of SHORT where that does.
                let is_short = field.kind == 3 && number < 1 << 16;
                let value = if is_short && !self.little { number << 16 } else { number };
                self.write(&mut file, field, if is_short { 3 } else { 4 }, 1, value);
            }
        }
        Ok(file)
    }

    /// Has the field `tag` of `file` keep the `part`-th of so many equal parts of its numbers.
    ///
    /// # Errors
    /// When it has no such parts.
    pub(super) fn keep_part(&self, file: &mut [u8], tag: u16, part: u64, parts: u64) -> Result<(), DecodeError> {
        let unequal = || damaged("its planes differ in their tiles");
        let field = self.field(tag).filter(|field| [2, 4].contains(&field.size)).ok_or_else(unequal)?;
        let count = field.count / parts.max(1);
        if count == 0 || count * parts != field.count {
            return Err(unequal());
        }
        let at = field.at.saturating_add(part * count * u64::from(field.size));
        let is_inline = count * u64::from(field.size) <= 4;
        let value = if is_inline {
            let (first, second) = (self.number(at, field.size), self.number(at + u64::from(field.size), field.size));
            match (field.size, count, self.little) {
                (4, ..) => first,
                (_, 1, true) => first,
                (_, 1, false) => first.map(|first| first << 16),
                (_, _, true) => first.zip(second).map(|(first, second)| first | second << 16),
                (_, _, false) => first.zip(second).map(|(first, second)| first << 16 | second),
            }
        } else {
            Some(at)
        };
        let value = value.and_then(|value| u32::try_from(value).ok()).ok_or_else(unequal)?;
        self.write(file, field, field.kind, count as u32, value);
        Ok(())
    }

    /// Calls the field `tag` of `file` otherwise.
    pub(super) fn rename(&self, file: &mut [u8], tag: u16, name: u16) {
        if let Some(field) = self.field(tag) {
            self.put(file, field.entry, &name.to_le_bytes());
        }
    }

    fn write(&self, file: &mut [u8], field: Field, kind: u16, count: u32, value: u32) {
        self.put(file, field.entry + 2, &kind.to_le_bytes());
        self.put(file, field.entry + 4, &count.to_le_bytes());
        self.put(file, field.entry + 8, &value.to_le_bytes());
    }

    /// Puts a number, given in little-endian order, in the file's own.
    fn put(&self, file: &mut [u8], at: u64, number: &[u8]) {
        let place = usize::try_from(at).ok().and_then(|at| file.get_mut(at..at + number.len()));
        if let Some(place) = place {
            place.copy_from_slice(number);
            if !self.little {
                place.reverse();
            }
        }
    }

    fn bytes_of(&self, tag: u16) -> Option<&'a [u8]> {
        let field = self.field(tag)?;
        Some(part(self.bytes, field.at, u64::try_from(field.length()).unwrap_or(u64::MAX)))
    }
}

/// How the first image's samples are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) width: u32,
    pub(super) height: u32,
    /// PhotometricInterpretation.
    pub(super) photometric: u64,
    /// Of each sample.
    pub(super) bits: u32,
    /// Of each pixel.
    pub(super) samples: u32,
    /// The first of ExtraSamples: 1 for alpha that the colours were multiplied by.
    pub(super) extra: u64,
    pub(super) is_planar: bool,
    pub(super) is_jpeg: bool,
    /// ColorMap.
    pub(super) colours: Vec<u16>,
    /// Where the photometric interpretation stands in the file.
    photometric_at: usize,
    little: bool,
}

impl Layout {
    /// None when a field that is needed is not there, or samples differ in their bits.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let image = Image::of(bytes)?;
        let one = |tag| image.numbers(tag).next();
        let bits: Vec<u64> = image.numbers(BITS).take(5).collect();
        let bits = bits.first().copied().filter(|first| bits.iter().all(|bits| bits == first)).unwrap_or(1);
        let photometric = image.field(PHOTOMETRIC).filter(|field| field.kind == 3 && field.count == 1)?;
        Some(Self {
            width: u32::try_from(one(WIDTH)?).ok()?,
            height: u32::try_from(one(HEIGHT)?).ok()?,
            photometric: one(PHOTOMETRIC)?,
            bits: u32::try_from(bits).ok()?,
            samples: u32::try_from(one(SAMPLES).unwrap_or(1)).ok()?,
            extra: one(EXTRA_SAMPLES).unwrap_or(0),
            is_planar: one(PLANES) == Some(SEPARATE),
            is_jpeg: matches!(one(COMPRESSION), Some(OLD_JPEG | JPEG)),
            colours: image.numbers(COLOURS).take(3 << 8).map(|value| value as u16).collect(),
            photometric_at: usize::try_from(photometric.at).ok()?,
            little: image.little,
        })
    }

    /// The file with samples that are levels of grey, 0 for black.
    pub(super) fn as_grey(&self, bytes: &[u8]) -> Vec<u8> {
        let mut grey = bytes.to_vec();
        if let Some(value) = grey.get_mut(self.photometric_at..self.photometric_at + 2) {
            value.copy_from_slice(&if self.little { 1u16.to_le_bytes() } else { 1u16.to_be_bytes() });
        }
        grey
    }
}

/// What an image is that no decoder reads, in words.
pub(super) fn unreadable(bytes: &[u8]) -> Option<String> {
    let image = Image::of(bytes)?;
    let one = |tag| image.numbers(tag).next();
    match (one(PHOTOMETRIC), one(COMPRESSION)) {
        (Some(8..=10), _) => Some("its colours are CIELAB".into()),
        (_, Some(2..=4)) => Some("it is compressed as faxes are (CCITT)".into()),
        (_, Some(6)) => Some("it is compressed by JPEG in the form that TIFF gave up".into()),
        _ if one(SAMPLE_FORMAT) == Some(3) => Some("its samples are floating-point numbers".into()),
        _ => one(BITS).filter(|bits| *bits > 16).map(|bits| format!("its samples have {bits} bits")),
    }
}

/// The value of a field of the first image: None without such a field, and none within where it is not one whole number
/// that is not negative.
pub(super) fn whole_number(bytes: &[u8], tag: u16) -> Option<Option<u64>> {
    let image = Image::of(bytes)?;
    // Of several the last one counts, as in Pillow.
    let field = *image.fields.iter().rev().find(|field| field.tag == tag)?;
    let value = image.number(field.at, field.size).filter(|_| field.count == 1);
    Some(match field.kind {
        3 | 4 | 13 | 16 => value,
        6 => value.filter(|value| *value < 1 << 7),
        8 => value.filter(|value| *value < 1 << 15),
        9 => value.filter(|value| *value < 1 << 31),
        _ => None,
    })
}

/// The bytes of a field of the first image.
pub(super) fn bytes_of(bytes: &[u8], tag: u16) -> Option<&[u8]> {
    Image::of(bytes)?.bytes_of(tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_both_orders_and_sizes_and_must_fit_into_the_file() {
        let little = b"II*\0\x08\0\0\0\x02\0\x03\x01\x03\0\x01\0\0\0\x07\0\0\0\x12\x01\x04\0\xff\xff\xff\x7f\0\0\0\0";
        let big = b"MM\0\x2b\0\x08\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x01\x01\x03\0\x03\0\0\0\0\0\0\0\x02\0\x07\0\x09\0\0\0\0";
        let image = Image::of(little).unwrap();
        assert_eq!(image.numbers(COMPRESSION).collect::<Vec<_>>(), [7]);
        assert_eq!(image.field(274).unwrap().length(), 4 * 0x7FFF_FFFF);
        assert_eq!(Image::of(big).unwrap().numbers(COMPRESSION).collect::<Vec<_>>(), [7, 9]);
        assert!(check_fields(little).is_err() && check_fields(big).is_ok());
        for end in 0..little.len() {
            let _ = (check_fields(&little[..end]), check_work(&little[..end]));
        }
        assert!(Image::of(b"no TIFF at all").is_none());
    }
}
