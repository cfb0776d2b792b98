//! Protobuf's wire format, for messages that keep the fields they do not know.
//!
//! A message is declared with [`messages!`] by the fields that this program looks at. Every other field is kept as the
//! bytes that it came in, and is written behind the known ones. Source: protobuf.dev, "Encoding".

use bytes::Bytes;

/// Deepest nesting that is read. A graph in a node is three levels deeper than the node's own graph.
const MAX_DEPTH: usize = 100;
/// Longest message: protobuf's own limit.
pub(crate) const MAX_MESSAGE: usize = i32::MAX as usize;

/// Why bytes are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes end within a field.
    #[error("it ends within a field: it is cut off or damaged")]
    CutOff,
    /// A key or a length that cannot be.
    #[error("it is no protobuf message, or is damaged: {0}")]
    Malformed(&'static str),
    /// A known field that holds another kind of value.
    #[error("field {number} of {message} has another type than ONNX gives it: it is damaged, or no ONNX")]
    Type {
        /// The message's name.
        message: &'static str,
        /// The field's number.
        number: u32,
    },
    /// Messages within messages.
    #[error("it is nested more than {MAX_DEPTH} levels deep")]
    Depth,
}

/// The value of a field, as it lies on the wire.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(Bytes),
    Fixed32([u8; 4]),
}

/// A message that [`messages!`] declares.
pub(crate) trait Message: Default {
    /// Takes a field in; false when the message does not know it.
    fn take(&mut self, number: u32, value: &Value, depth: usize) -> Result<bool, WireError>;
    /// Keeps the bytes of a field that it does not know.
    fn keep(&mut self, field: &[u8]);
    /// Bytes that [`Message::write`] writes.
    fn len(&self) -> usize;
    /// Appends the message.
    fn write(&self, out: &mut Vec<u8>);
}

/// Reads a message.
pub(crate) fn decode<M: Message>(bytes: &Bytes) -> Result<M, WireError> {
    decode_at(bytes, 0)
}

/// The message's bytes.
pub(crate) fn encode<M: Message>(message: &M) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len());
    message.write(&mut out);
    out
}

fn decode_at<M: Message>(bytes: &Bytes, depth: usize) -> Result<M, WireError> {
    if depth > MAX_DEPTH {
        return Err(WireError::Depth);
    }
    let mut message = M::default();
    let mut at = 0;
    while at < bytes.len() {
        let begin = at;
        let key = varint(bytes, &mut at)?;
        let number = u32::try_from(key >> 3).ok().filter(|n| (1..1 << 29).contains(n));
        let number = number.ok_or(WireError::Malformed("a field's number is out of range"))?;
        let value = match key & 7 {
            0 => Value::Varint(varint(bytes, &mut at)?),
            1 => Value::Fixed64(fixed(bytes, &mut at)?),
            2 => {
                let length = usize::try_from(varint(bytes, &mut at)?).map_err(|_| WireError::CutOff)?;
                let end = at.checked_add(length).filter(|end| *end <= bytes.len()).ok_or(WireError::CutOff)?;
                let value = bytes.slice(at..end);
                at = end;
                Value::Bytes(value)
            }
            5 => Value::Fixed32(fixed(bytes, &mut at)?),
            // Groups (3, 4) were given up before ONNX began.
            _ => return Err(WireError::Malformed("a field is of an unknown type")),
        };
        if !message.take(number, &value, depth)? {
            message.keep(&bytes[begin..at]);
        }
    }
    Ok(message)
}

fn varint(bytes: &[u8], at: &mut usize) -> Result<u64, WireError> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at).ok_or(WireError::CutOff)?;
        *at += 1;
        // The tenth byte has one bit left.
        if shift == 63 && byte > 1 {
            break;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(WireError::Malformed("a number has more than 64 bits"))
}

fn fixed<const N: usize>(bytes: &[u8], at: &mut usize) -> Result<[u8; N], WireError> {
    let value = bytes.get(*at..).and_then(|rest| rest.first_chunk::<N>()).ok_or(WireError::CutOff)?;
    *at += N;
    Ok(*value)
}

fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn write_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn key_len(number: u32) -> usize {
    varint_len(u64::from(number) << 3)
}

fn write_key(number: u32, kind: u64, out: &mut Vec<u8>) {
    write_varint(u64::from(number) << 3 | kind, out);
}

/// A value of a kind that a field may have.
pub(crate) trait Element: Sized {
    /// How it is announced when it stands by itself.
    const KIND: u64;
    /// Reads one; none when the value is of another kind.
    fn read(value: &Value, depth: usize) -> Result<Option<Self>, WireError>;
    /// Its length by itself, with the length that stands before bytes.
    fn len(&self) -> usize;
    /// Appends it.
    fn write(&self, out: &mut Vec<u8>);
}

macro_rules! varints {
    ($($kind:ty),*) => {$(
        impl Element for $kind {
            const KIND: u64 = 0;
            fn read(value: &Value, _: usize) -> Result<Option<Self>, WireError> {
                Ok(if let Value::Varint(value) = value { Some(*value as Self) } else { None })
            }
            fn len(&self) -> usize {
                // Negative numbers are widened to 64 bits.
                varint_len(*self as i64 as u64)
            }
            fn write(&self, out: &mut Vec<u8>) {
                write_varint(*self as i64 as u64, out);
            }
        }
    )*};
}
varints!(i32, i64, u64);

macro_rules! floats {
    ($($kind:ty, $wire:ident, $number:literal;)*) => {$(
        impl Element for $kind {
            const KIND: u64 = $number;
            fn read(value: &Value, _: usize) -> Result<Option<Self>, WireError> {
                Ok(if let Value::$wire(bytes) = value { Some(Self::from_le_bytes(*bytes)) } else { None })
            }
            fn len(&self) -> usize {
                size_of::<Self>()
            }
            fn write(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
floats! { f32, Fixed32, 5; f64, Fixed64, 1; }

impl Element for Bytes {
    const KIND: u64 = 2;
    fn read(value: &Value, _: usize) -> Result<Option<Self>, WireError> {
        Ok(if let Value::Bytes(bytes) = value { Some(bytes.clone()) } else { None })
    }
    fn len(&self) -> usize {
        varint_len((**self).len() as u64) + (**self).len()
    }
    fn write(&self, out: &mut Vec<u8>) {
        write_varint((**self).len() as u64, out);
        out.extend_from_slice(self);
    }
}

impl Element for String {
    const KIND: u64 = 2;
    fn read(value: &Value, _: usize) -> Result<Option<Self>, WireError> {
        let Value::Bytes(bytes) = value else { return Ok(None) };
        let text = std::str::from_utf8(bytes).map_err(|_| WireError::Malformed("a name is not UTF-8"))?;
        Ok(Some(text.to_owned()))
    }
    fn len(&self) -> usize {
        varint_len(self.as_str().len() as u64) + self.as_str().len()
    }
    fn write(&self, out: &mut Vec<u8>) {
        write_varint(self.as_str().len() as u64, out);
        out.extend_from_slice(self.as_bytes());
    }
}

impl<M: Message> Element for M {
    const KIND: u64 = 2;
    fn read(value: &Value, depth: usize) -> Result<Option<Self>, WireError> {
        if let Value::Bytes(bytes) = value { decode_at(bytes, depth + 1).map(Some) } else { Ok(None) }
    }
    fn len(&self) -> usize {
        let len = Message::len(self);
        varint_len(len as u64) + len
    }
    fn write(&self, out: &mut Vec<u8>) {
        write_varint(Message::len(self) as u64, out);
        Message::write(self, out);
    }
}

/// The content of a field: none or one, several, or several in one.
pub(crate) trait Content: Default {
    /// Takes a value in; false when it is of another kind.
    fn take(&mut self, value: &Value, depth: usize) -> Result<bool, WireError>;
    /// Bytes that [`Content::write`] writes.
    fn len(&self, number: u32) -> usize;
    /// Appends every value with its key.
    fn write(&self, number: u32, out: &mut Vec<u8>);
}

impl<E: Element> Content for Option<E> {
    fn take(&mut self, value: &Value, depth: usize) -> Result<bool, WireError> {
        // Of several, the last holds.
        let found = E::read(value, depth)?;
        let fits = found.is_some();
        *self = found.or(self.take());
        Ok(fits)
    }
    fn len(&self, number: u32) -> usize {
        self.as_ref().map_or(0, |element| key_len(number) + element.len())
    }
    fn write(&self, number: u32, out: &mut Vec<u8>) {
        if let Some(element) = self {
            write_key(number, E::KIND, out);
            element.write(out);
        }
    }
}

impl<E: Element> Content for Vec<E> {
    fn take(&mut self, value: &Value, depth: usize) -> Result<bool, WireError> {
        match (value, E::read(value, depth)?) {
            (_, Some(element)) => self.push(element),
            (Value::Bytes(bytes), None) if E::KIND != 2 => unpack(bytes, self)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
    fn len(&self, number: u32) -> usize {
        self.iter().map(|element| key_len(number) + element.len()).sum()
    }
    fn write(&self, number: u32, out: &mut Vec<u8>) {
        for element in self {
            write_key(number, E::KIND, out);
            element.write(out);
        }
    }
}

/// Numbers that are written one behind the other under one key.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Packed<E>(pub(crate) Vec<E>);

impl<E> Default for Packed<E> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<E: Element> Content for Packed<E> {
    fn take(&mut self, value: &Value, depth: usize) -> Result<bool, WireError> {
        Content::take(&mut self.0, value, depth)
    }
    fn len(&self, number: u32) -> usize {
        let len: usize = self.0.iter().map(Element::len).sum();
        if len == 0 { 0 } else { key_len(number) + varint_len(len as u64) + len }
    }
    fn write(&self, number: u32, out: &mut Vec<u8>) {
        let len: usize = self.0.iter().map(Element::len).sum();
        if len > 0 {
            write_key(number, 2, out);
            write_varint(len as u64, out);
            self.0.iter().for_each(|element| element.write(out));
        }
    }
}

fn unpack<E: Element>(bytes: &Bytes, into: &mut Vec<E>) -> Result<(), WireError> {
    let mut at = 0;
    while at < bytes.len() {
        let value = match E::KIND {
            0 => Value::Varint(varint(bytes, &mut at)?),
            1 => Value::Fixed64(fixed(bytes, &mut at)?),
            _ => Value::Fixed32(fixed(bytes, &mut at)?),
        };
        into.extend(E::read(&value, 0)?);
    }
    Ok(())
}

/// Declares messages by the fields that are looked at: `name: Type = number`.
macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty = $number:literal,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq)]
        pub(crate) struct $name {
            $($(#[$field_doc])* pub(crate) $field: $kind,)*
            /// Fields that are not known, as they came.
            pub(crate) unknown: Vec<u8>,
        }

        impl $crate::fold::onnx::wire::Message for $name {
            fn take(&mut self, number: u32, value: &$crate::fold::onnx::wire::Value, depth: usize) -> Result<bool, $crate::fold::onnx::wire::WireError> {
                use $crate::fold::onnx::wire::{Content, WireError};
                let fits = match number {
                    $($number => Content::take(&mut self.$field, value, depth)?,)*
                    _ => return Ok(false),
                };
                if fits { Ok(true) } else { Err(WireError::Type { message: stringify!($name), number }) }
            }

            fn keep(&mut self, field: &[u8]) {
                self.unknown.extend_from_slice(field);
            }

            fn len(&self) -> usize {
                use $crate::fold::onnx::wire::Content;
                self.unknown.len() $(+ Content::len(&self.$field, $number))*
            }

            fn write(&self, out: &mut Vec<u8>) {
                use $crate::fold::onnx::wire::Content;
                $(Content::write(&self.$field, $number, out);)*
                out.extend_from_slice(&self.unknown);
            }
        }
    )*};
}
pub(crate) use messages;

#[cfg(test)]
mod tests {
    use super::*;

    messages! {
        /// For these tests.
        Outer {
            number: Option<i64> = 1,
            text: Option<String> = 2,
            numbers: Vec<i64> = 3,
            packed: Packed<f32> = 4,
            inner: Vec<Outer> = 5,
        }
    }

    fn bytes(bytes: &[u8]) -> Bytes {
        Bytes::copy_from_slice(bytes)
    }

    #[test]
    fn what_is_not_known_is_kept() {
        // Fields 1 (-1), 9 (bytes), 15 (fixed32), and 5 with a field 100 within.
        let mut given = vec![8, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 42, 4, 160, 6, 172, 2];
        given.extend([74, 2, 7, 7, 125, 1, 2, 3, 4]);
        let message: Outer = decode(&bytes(&given)).unwrap();
        assert_eq!((message.number, message.unknown.as_slice()), (Some(-1), [74, 2, 7, 7, 125, 1, 2, 3, 4].as_slice()));
        assert_eq!(message.inner[0].unknown, [160, 6, 172, 2]);
        assert_eq!(encode(&message), given);
    }

    #[test]
    fn numbers_are_read_in_both_forms() {
        let one_by_one: Outer = decode(&bytes(&[24, 1, 24, 2, 37, 0, 0, 128, 63])).unwrap();
        let together: Outer = decode(&bytes(&[26, 2, 1, 2, 34, 4, 0, 0, 128, 63])).unwrap();
        assert_eq!(one_by_one, together);
        assert_eq!((&*together.numbers, &*together.packed.0), ([1, 2].as_slice(), [1.0].as_slice()));
        assert_eq!(encode(&together), [24, 1, 24, 2, 34, 4, 0, 0, 128, 63]);
    }

    #[test]
    fn damage_is_an_error() {
        let error = |given: &[u8]| decode::<Outer>(&bytes(given)).unwrap_err();
        assert_eq!(error(&[8]), WireError::CutOff);
        assert_eq!(error(&[18, 5, b'a']), WireError::CutOff);
        assert_eq!(error(&[37, 1, 2]), WireError::CutOff);
        assert_eq!(error(&[18, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1]), WireError::CutOff);
        assert_eq!(error(&[18, 1, b'a', 16, 1]), WireError::Type { message: "Outer", number: 2 });
        assert!(matches!(error(&[18, 1, 0xff]), WireError::Malformed(_)));
        assert!(matches!(error(&[8; 12].map(|_| 0xff)), WireError::Malformed(_)));
        assert!(matches!(error(&[0, 1]), WireError::Malformed(_)));
        assert!(matches!(error(&[11, 1]), WireError::Malformed(_)));
        let mut deep = Vec::new();
        for _ in 0..200 {
            let mut outer = vec![42];
            write_varint(deep.len() as u64, &mut outer);
            outer.append(&mut deep);
            deep = outer;
        }
        assert_eq!(error(&deep), WireError::Depth);
    }
}
