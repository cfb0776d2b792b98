//! What the WebP decoder does not check by itself: it takes memory for a chunk as long as the chunk says it is.

use super::decode::DecodeError;

/// Bytes of a file's head, and of a chunk's.
const HEADS: (usize, usize) = (12, 8);

/// Refuses a file with a chunk that is longer than the rest of the file.
pub(super) fn check(bytes: &[u8]) -> Result<(), DecodeError> {
    let mut rest = bytes.get(HEADS.0..).unwrap_or_default();
    while let Some((&[_, _, _, _, a, b, c, d], after)) = rest.split_first_chunk::<{ HEADS.1 }>() {
        let length = u32::from_le_bytes([a, b, c, d]);
        let held = after.len();
        if length as usize > held {
            let reason = format!("one of its chunks says that it has {length} bytes, where the file has {held}");
            return Err(DecodeError::Damaged { format: "WebP", reason });
        }
        // Chunks are filled up to an even length.
        rest = after.get(length as usize + length as usize % 2..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_has_no_more_bytes_than_the_file() {
        let head = b"RIFF\x1e\0\0\0WEBP";
        let whole = [&head[..], b"ABCD\x03\0\0\0xyz\0", b"EFGH\x02\0\0\0xy"].concat();
        assert!(check(&whole).is_ok());
        assert!(check(&whole[..20]).is_err());
        assert!(check(&[&whole[..], b"EXIF\xff\xff\xff\xff"].concat()).is_err());
        assert!(check(&head[..7]).is_ok(), "that is the decoder's to tell");
    }
}
