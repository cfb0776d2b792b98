//! What the TIFF decoder does not bound by itself. It takes memory for a field as long as the field says it is; and JPEGs
//! inside a TIFF, which it hands to another decoder whole, have a size and a number of scans of their own.

use super::decode::DecodeError;

/// Pixels that are decoded for each pixel of the picture, scan by scan. Ordinary files have up to four.
const WORK: u64 = 16;
/// Pixels that a strip or tile may have beside the picture's own, to be filled up.
const FILLING: u64 = 1_000_000;
/// Fields of an image; a classic TIFF cannot say that it has more.
const MOST_FIELDS: u64 = 65_535;
const COMPRESSION: u16 = 259;
/// New-style JPEG.
const JPEG: u64 = 7;

/// A field of the first image.
#[derive(Debug, PartialEq, Eq)]
struct Field {
    tag: u16,
    /// The field's bytes, wherever they lie.
    length: u128,
    /// Its value, where it is one number of 16 bits.
    short: Option<u64>,
}

/// Refuses a TIFF with fields that are longer than the file, and before anything is decoded. What cannot be read otherwise
/// is for the decoder to tell.
pub(super) fn check_fields(bytes: &[u8]) -> Result<(), DecodeError> {
    let damaged = |reason| Err(DecodeError::Damaged { format: "TIFF", reason });
    let (fields, held) = (fields(bytes).unwrap_or_default(), bytes.len());
    if fields.len() as u64 > MOST_FIELDS {
        return damaged(format!("its image has more than {MOST_FIELDS} fields"));
    }
    match fields.into_iter().find(|field| field.length > held as u128) {
        None => Ok(()),
        Some(Field { tag, length, .. }) => {
            damaged(format!("its field {tag} says that it has {length} bytes, where the file has {held}"))
        }
    }
}

/// Refuses a TIFF whose JPEGs take more work than a picture of this size explains.
pub(super) fn check_work(bytes: &[u8], width: u32, height: u32) -> Result<(), DecodeError> {
    let fields = fields(bytes).unwrap_or_default();
    if !fields.iter().any(|field| field.tag == COMPRESSION && field.short == Some(JPEG)) {
        return Ok(());
    }
    let pixels = u64::from(width) * u64::from(height) + FILLING;
    let (mut largest, mut work, mut frame) = (0, 0u64, 0);
    for at in bytes.iter().enumerate().filter(|(_, byte)| **byte == 0xFF).map(|(at, _)| at) {
        if let Some(area) = frame_at(&bytes[at..]) {
            frame = area;
            largest = largest.max(area);
        } else if bytes.get(at + 1) == Some(&0xDA) {
            work = work.saturating_add(frame);
        }
    }
    if largest > pixels || work > pixels.saturating_mul(WORK) {
        let reason = "its JPEG strips have more pixels or more scans than the image's size explains".into();
        return Err(DecodeError::Unsupported { format: "TIFF", reason });
    }
    Ok(())
}

/// The fields of the first image, of TIFF and BigTIFF; none when it cannot be found.
fn fields(bytes: &[u8]) -> Option<Vec<Field>> {
    let little = match bytes.get(..2)? {
        b"II" => true,
        b"MM" => false,
        _ => return None,
    };
    let number = |at: u64, size: usize| -> Option<u64> {
        let at = usize::try_from(at).ok()?;
        let number = bytes.get(at..at.checked_add(size)?)?.iter();
        let add = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        Some(if little { number.rev().fold(0, add) } else { number.fold(0, add) })
    };
    // Sizes of an offset, of the number of fields, and of a field.
    let (offset, many, each) = if number(2, 2)? == 43 { (8, 8, 20) } else { (4, 2, 12) };
    let first = if offset == 8 { number(8, 8)? } else { number(4, 4)? };
    let count = number(first, many)?;
    let mut fields = Vec::new();
    for n in 0..count.min(MOST_FIELDS + 1) {
        let at = first.checked_add(many as u64)?.checked_add(n.checked_mul(each)?)?;
        // The file ends in the middle of the list: the decoder tells it.
        let Some(tag) = number(at, 2) else { break };
        let (kind, values) = (number(at + 2, 2)?, number(at + 4, offset)?);
        let size: u128 = match kind {
            1 | 2 | 6 | 7 => 1,
            3 | 8 => 2,
            4 | 9 | 11 | 13 => 4,
            5 | 10 | 12 | 16 | 17 | 18 => 8,
            // No type that is known: it is skipped, or refused, whatever its length.
            _ => 0,
        };
        let short = if kind == 3 && values == 1 { number(at + 4 + offset as u64, 2) } else { None };
        fields.push(Field { tag: tag as u16, length: size * u128::from(values), short });
    }
    Some(fields)
}

/// The pixels of the JPEG whose frame header `bytes` begin with.
fn frame_at(bytes: &[u8]) -> Option<u64> {
    let &[_, marker, high, low, precision, h1, h0, w1, w0, components] = bytes.first_chunk::<10>()?;
    let is_frame = (0xC0..=0xCF).contains(&marker) && ![0xC4, 0xC8, 0xCC].contains(&marker);
    let fits = high == 0 && u16::from(low) == 8 + 3 * u16::from(components) && [8, 12, 16].contains(&precision);
    let side = |high, low| u64::from(u16::from_be_bytes([high, low]));
    (is_frame && fits).then(|| side(w1, w0) * side(h1, h0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_both_orders_and_sizes_and_must_fit_into_the_file() {
        let little = b"II*\0\x08\0\0\0\x02\0\x03\x01\x03\0\x01\0\0\0\x07\0\0\0\x12\x01\x04\0\xff\xff\xff\x7f\0\0\0\0";
        let big =
            b"MM\0\x2b\0\x08\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x01\x01\x03\0\x03\0\0\0\0\0\0\0\x01\0\x07\0\0\0\0\0\0";
        let compression = Field { tag: 259, length: 2, short: Some(7) };
        let orientation = Field { tag: 274, length: 4 * 0x7FFF_FFFF, short: None };
        assert_eq!(fields(little).unwrap(), [compression, orientation]);
        assert_eq!(fields(big).unwrap(), [Field { tag: 259, length: 2, short: Some(7) }]);
        assert!(check_fields(little).is_err() && check_fields(big).is_ok());
        for end in 0..little.len() {
            let _ = check_fields(&little[..end]);
        }
        assert!(fields(b"no TIFF at all").is_none());
    }
}
