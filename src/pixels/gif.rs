//! What the GIF decoder does not check by itself: a frame may be larger than the screen that it is shown on.

/// Width and height of the first frame; none where it cannot be found, which the decoder will tell.
pub(super) fn first_frame(bytes: &[u8]) -> Option<(u32, u32)> {
    let table = |flags: u8| if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) };
    let mut at = 13 + table(*bytes.get(10)?);
    loop {
        match *bytes.get(at)? {
            0x2C => {
                let &[_, _, _, _, a, b, c, d] = bytes.get(at + 1..)?.first_chunk()?;
                return Some((u16::from_le_bytes([a, b]).into(), u16::from_le_bytes([c, d]).into()));
            }
            // An extension: its label, and blocks each behind its length, up to an empty one.
            0x21 => {
                at += 2;
                loop {
                    let length = usize::from(*bytes.get(at)?);
                    at += 1 + length;
                    if length == 0 {
                        break;
                    }
                }
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_frame_is_found_behind_tables_and_extensions() {
        let frame = [0x2C, 1, 0, 1, 0, 0x2C, 1, 7, 0];
        let head = |flags: u8| [&b"GIF89a\x01\0\x01\0"[..], &[flags, 0, 0]].concat();
        let extension = [0x21, 0xF9, 2, 0x2C, 9, 1, 0x2C, 0];
        assert_eq!(first_frame(&[&head(0)[..], &frame].concat()), Some((300, 7)));
        assert_eq!(first_frame(&[&head(0x81)[..], &[0x2C; 12], &extension, &frame].concat()), Some((300, 7)));
        assert_eq!(first_frame(&[&head(0)[..], &extension, &[0x3B]].concat()), None);
        assert_eq!(first_frame(&[&head(0)[..], &frame[..5]].concat()), None);
        assert_eq!(first_frame(b"GIF"), None);
    }
}
