//! What the GIF decoder does not check by itself: a frame may be larger than the screen that it is shown on.

/// What stands before the first frame's pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FirstFrame {
    /// In pixels.
    pub(super) width: u32,
    /// In pixels.
    pub(super) height: u32,
    /// The colour that is seen where the frame leaves the screen free or is transparent: that of the transparent index, else
    /// of the first, as in Pillow.
    pub(super) background: [u8; 3],
}

/// The first frame; none where it cannot be found, which the decoder will tell.
pub(super) fn first_frame(bytes: &[u8]) -> Option<FirstFrame> {
    let length = |flags: u8| if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) };
    let of_screen = length(*bytes.get(10)?);
    let mut table = bytes.get(13..)?.get(..of_screen).unwrap_or_default();
    let mut at = 13 + of_screen;
    let mut transparent = None;
    loop {
        match *bytes.get(at)? {
            0x2C => {
                let &[_, _, _, _, a, b, c, d, flags] = bytes.get(at + 1..)?.first_chunk()?;
                if let Some(own) =
                    bytes.get(at + 10..).and_then(|rest| rest.get(..length(flags))).filter(|t| !t.is_empty())
                {
                    table = own;
                }
                let index = transparent.unwrap_or(0);
                let colour = table.get(3 * usize::from(index)..).and_then(|rest| rest.first_chunk::<3>());
                // Without a table, an index is a shade of grey.
                let background = colour.copied().unwrap_or(if table.is_empty() { [index; 3] } else { [0; 3] });
                let side = |low, high| u32::from(u16::from_le_bytes([low, high]));
                return Some(FirstFrame { width: side(a, b), height: side(c, d), background });
            }
            // An extension: its label, and blocks each behind its length, up to an empty one.
            0x21 => {
                if let Some(&[0xF9, 4, flags, _, _, index]) = bytes.get(at + 1..).and_then(|rest| rest.first_chunk()) {
                    transparent = (flags & 1 == 1).then_some(index);
                }
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
        let frame = [0x2C, 1, 0, 1, 0, 0x2C, 1, 7, 0, 0];
        let found = |bytes: &[u8]| first_frame(bytes).map(|f| ((f.width, f.height), f.background));
        let head = |flags: u8| [&b"GIF89a\x01\0\x01\0"[..], &[flags, 0, 0]].concat();
        let extension = [0x21, 0xF9, 2, 0x2C, 9, 1, 0x2C, 0];
        assert_eq!(found(&[&head(0)[..], &frame].concat()), Some(((300, 7), [0; 3])));
        let table = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        assert_eq!(found(&[&head(0x81)[..], &table, &extension, &frame].concat()), Some(((300, 7), [1, 2, 3])));
        let control = [0x21, 0xF9, 4, 1, 0, 0, 2, 0];
        assert_eq!(found(&[&head(0x81)[..], &table, &control, &frame].concat()), Some(((300, 7), [7, 8, 9])));
        assert_eq!(found(&[&head(0)[..], &control, &frame].concat()), Some(((300, 7), [2; 3])));
        let own = [&frame[..9], &[0x80, 9, 8, 7, 6, 5, 4]].concat();
        assert_eq!(found(&[&head(0x81)[..], &table, &own].concat()), Some(((300, 7), [9, 8, 7])));
        assert_eq!(first_frame(&[&head(0)[..], &extension, &[0x3B]].concat()), None);
        assert_eq!(first_frame(&[&head(0)[..], &frame[..5]].concat()), None);
        assert_eq!(first_frame(b"GIF"), None);
    }
}
