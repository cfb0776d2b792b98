//! What the WebP decoder does not check by itself: it takes memory for a chunk as long as the chunk says it is, and decodes
//! a lossy frame to its end before it compares the frame's size with the canvas's.

use super::limits::DecodeError;

/// Bytes of a file's head, of a chunk's, and of what stands before the chunks of an animation's frame.
const FILE_HEAD: usize = 12;
const CHUNK_HEAD: usize = 8;
const FRAME_HEAD: usize = 16;

/// Refuses a file with a chunk that is longer than the rest of the file, or with a lossy frame that is larger than its canvas.
pub(super) fn check(bytes: &[u8]) -> Result<(), DecodeError> {
    let damaged = |reason| Err(DecodeError::Damaged { format: "WebP", reason });
    let mut canvas = None;
    let mut rest = bytes.get(FILE_HEAD..).unwrap_or_default();
    while let Some((head, after)) = rest.split_first_chunk::<CHUNK_HEAD>() {
        let &[.., a, b, c, d] = head;
        let length = u32::from_le_bytes([a, b, c, d]);
        let Some(content) = after.get(..length as usize) else {
            let held = after.len();
            return damaged(format!("one of its chunks claims to have {length} bytes; the file has {held} left"));
        };
        let frame = match &head[..4] {
            b"VP8X" => {
                canvas = canvas_of(content);
                None
            }
            b"VP8 " => frame_of(content),
            b"ANMF" => content.get(FRAME_HEAD..).and_then(lossy_frame_in),
            _ => None,
        };
        if let (Some((width, height)), Some((most_width, most_height))) = (frame, canvas)
            && (width > most_width || height > most_height)
        {
            return damaged(format!("it has a frame of {width}×{height} on a canvas of {most_width}×{most_height}"));
        }
        // Chunks are filled up to an even length.
        rest = after.get(length as usize + length as usize % 2..).unwrap_or_default();
    }
    Ok(())
}

/// Width and height of the extended format's canvas.
fn canvas_of(content: &[u8]) -> Option<(u32, u32)> {
    let &[_, _, _, _, a, b, c, d, e, f] = content.first_chunk()?;
    Some((u32::from_le_bytes([a, b, c, 0]) + 1, u32::from_le_bytes([d, e, f, 0]) + 1))
}

/// Width and height of a lossy frame; none where its head is not one.
fn frame_of(content: &[u8]) -> Option<(u32, u32)> {
    let &[_, _, _, 0x9D, 0x01, 0x2A, a, b, c, d] = content.first_chunk()? else { return None };
    // Two bits of each are a scale that nobody applies.
    Some((u32::from(u16::from_le_bytes([a, b]) & 0x3FFF), u32::from(u16::from_le_bytes([c, d]) & 0x3FFF)))
}

/// The lossy frame among the chunks of an animation's frame.
fn lossy_frame_in(mut chunks: &[u8]) -> Option<(u32, u32)> {
    while let Some((head, after)) = chunks.split_first_chunk::<CHUNK_HEAD>() {
        let &[.., a, b, c, d] = head;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        if head.starts_with(b"VP8 ") {
            return frame_of(after);
        }
        chunks = after.get(length + length % 2..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(kind: &[u8; 4], content: &[u8]) -> Vec<u8> {
        let filling = vec![0; content.len() % 2];
        [&kind[..], &(content.len() as u32).to_le_bytes(), content, &filling].concat()
    }

    fn file(chunks: &[Vec<u8>]) -> Vec<u8> {
        [b"RIFF\x1e\0\0\0WEBP".to_vec(), chunks.concat()].concat()
    }

    #[test]
    fn a_chunk_has_no_more_bytes_than_the_file() {
        let whole = file(&[chunk(b"ABCD", b"xyz"), chunk(b"EFGH", b"xy")]);
        assert!(check(&whole).is_ok());
        assert!(check(&whole[..20]).is_err());
        assert!(check(&[&whole[..], b"EXIF\xff\xff\xff\xff"].concat()).is_err());
        assert!(check(&whole[..7]).is_ok(), "that is the decoder's to tell");
    }

    #[test]
    fn a_lossy_frame_is_no_larger_than_its_canvas() {
        let canvas = |width: u8, height: u8| chunk(b"VP8X", &[0, 0, 0, 0, width - 1, 0, 0, height - 1, 0, 0]);
        let content = |width: u8, height: u8| [0, 0, 0, 0x9D, 0x01, 0x2A, width, 0, height, 0x40];
        let frame = chunk(b"VP8 ", &content(9, 5));
        let animated = chunk(b"ANMF", &[vec![0; 16], chunk(b"ALPH", b"123"), frame.clone()].concat());
        for one in [frame, animated] {
            assert!(check(&file(&[canvas(9, 5), one.clone()])).is_ok());
            assert!(check(&file(&[canvas(8, 5), one.clone()])).is_err());
            assert!(check(&file(&[canvas(9, 4), one])).is_err());
        }
        assert!(check(&file(&[chunk(b"VP8 ", &content(200, 100))])).is_ok(), "its size is the picture's");
    }
}
