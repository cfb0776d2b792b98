//! What a network's file says of itself, read without the rest of it. Source of the numbers: onnx.proto of ONNX 1.19, and
//! protobuf.dev, "Encoding".

/// Field of a model with its metadata, and the fields of an entry.
const METADATA: u64 = 14;
const KEY: u64 = 1;
const VALUE: u64 = 2;

/// The entries of an ONNX file's metadata, as far as it can be read.
pub(super) fn metadata(file: &[u8]) -> impl Iterator<Item = (&str, &str)> {
    let entries = Fields(file).filter(|(number, _)| *number == METADATA).map(|(_, entry)| entry);
    entries.filter_map(|entry| {
        let text = |wanted| {
            let (_, text) = Fields(entry).find(|(number, _)| *number == wanted)?;
            std::str::from_utf8(text).ok()
        };
        Some((text(KEY)?, text(VALUE)?))
    })
}

/// The fields of a message that hold bytes, with their numbers. It ends where the message is damaged.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let key = self.varint()?;
            match key & 7 {
                0 => {
                    self.varint()?;
                }
                1 => self.0 = self.0.get(8..)?,
                5 => self.0 = self.0.get(4..)?,
                2 => {
                    let length = usize::try_from(self.varint()?).ok()?;
                    let (content, rest) = self.0.split_at_checked(length)?;
                    self.0 = rest;
                    return Some((key >> 3, content));
                }
                _ => return None,
            }
        }
    }
}

impl Fields<'_> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_found_among_other_fields_and_damage_ends_it() {
        // ir_version 8, a graph of two bytes, an entry, one without a value, a fixed number.
        let file = b"\x08\x08\x3A\x02\xFF\xFF\x72\x08\x0A\x01a\x12\x03bcd\x72\x03\x0A\x01x\x0D\0\0\0\0";
        assert_eq!(metadata(file).collect::<Vec<_>>(), [("a", "bcd")]);
        for end in 0..file.len() {
            assert!(metadata(&file[..end]).count() <= 1);
        }
        assert_eq!(metadata(&[0xFF; 20]).count(), 0);
    }
}
