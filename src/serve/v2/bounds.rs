//! Bounds on what a message decodes to: an empty part takes two bytes on the wire and two hundred in memory.

use bytes::{Buf, Bytes};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use super::super::code::Code;
use super::{Problem, bad};

/// Parts of a request, in all.
const MAX_PARTS: usize = 100_000;
/// Bytes of a shape, whose numbers grow eightfold.
const MAX_SHAPE: usize = 1024;
/// Of a request: its inputs and outputs; of an input, its shape and contents.
const INPUTS: u32 = 5;
const OUTPUTS: u32 = 6;
const SHAPE: u32 = 3;
const CONTENTS: u32 = 5;
const REQUEST: &[u32] = &[INPUTS, OUTPUTS];

/// Refuses an inference request of more than [`MAX_PARTS`] parts. What is broken is left for the decoder to refuse.
pub(super) fn check(message: Bytes) -> Result<(), Problem> {
    let mut left = MAX_PARTS;
    count(message, REQUEST, &mut left).map_err(|beyond| match beyond {
        Beyond::Parts => {
            let detail = format!("the message has more than {MAX_PARTS} parts: send fewer images at a time");
            Problem::new(Code::TooManyImages, detail).with_limit(MAX_PARTS as u64)
        }
        Beyond::Shape => bad("an input's shape has hundreds of dimensions; expected four, or one"),
    })
}

enum Beyond {
    Parts,
    Shape,
}

/// Counts the fields of `message`, and those of its fields `deeper`.
fn count(mut message: Bytes, deeper: &[u32], left: &mut usize) -> Result<(), Beyond> {
    while message.has_remaining() {
        let Ok((tag, wire_type)) = decode_key(&mut message) else { return Ok(()) };
        // Numbers one by one take no more in memory.
        if wire_type != WireType::ThirtyTwoBit {
            *left = left.checked_sub(1).ok_or(Beyond::Parts)?;
        }
        if wire_type == WireType::LengthDelimited && deeper.contains(&tag) {
            let Ok(length) = decode_varint(&mut message) else { return Ok(()) };
            let Some(length) = usize::try_from(length).ok().filter(|n| *n <= message.remaining()) else {
                return Ok(());
            };
            let part = message.split_to(length);
            match (deeper == REQUEST, tag) {
                (true, _) => count(part, &[SHAPE, CONTENTS], left)?,
                (false, SHAPE) if length > MAX_SHAPE => return Err(Beyond::Shape),
                (false, SHAPE) => {}
                _ => count(part, &[], left)?,
            }
        } else if skip_field(wire_type, tag, &mut message, DecodeContext::default()).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::super::messages as m;
    use super::*;

    fn refused(message: &[u8]) -> bool {
        check(Bytes::copy_from_slice(message)).is_err()
    }

    #[test]
    fn parts_are_counted_at_every_level_that_is_decoded() {
        let contents = m::Contents { bytes: vec![Bytes::from_static(b"a picture"); 32], ..Default::default() };
        let input = m::InputTensor { shape: vec![32], contents: Some(contents), ..Default::default() };
        let request = m::InferRequest { inputs: vec![input.clone()], ..Default::default() };
        assert!(!refused(&request.encode_to_vec()));
        // Numbers are as large in memory as on the wire.
        let floats = m::Contents { fp32: vec![0.0; 3 * 224 * 224], ..Default::default() };
        let floats = m::InputTensor { contents: Some(floats), ..Default::default() };
        assert!(!refused(&m::InferRequest { inputs: vec![floats], ..Default::default() }.encode_to_vec()));
        for part in [[0x2A, 0], [0x32, 0], [0x3A, 0]] {
            assert!(refused(&part.repeat(MAX_PARTS + 1)), "{part:?}");
        }
        let many = m::Contents { bytes: vec![Bytes::new(); MAX_PARTS], ..Default::default() };
        let many = m::InputTensor { contents: Some(many), ..input.clone() };
        assert!(refused(&m::InferRequest { inputs: vec![many], ..Default::default() }.encode_to_vec()));
        let long = m::InputTensor { shape: vec![1; 2000], ..input };
        assert!(refused(&m::InferRequest { inputs: vec![long], ..Default::default() }.encode_to_vec()));
        assert!(!refused(b"\xFF\xFF\xFF no message"));
    }
}
