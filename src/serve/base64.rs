//! Images in JSON: base64 in any of the forms that clients write.

use std::borrow::Cow;

use axum::body::Bytes;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{DecodeError, Engine as _};

const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
const OF_STANDARD: GeneralPurpose = GeneralPurpose::new(&STANDARD, LENIENT);
const OF_URLS: GeneralPurpose = GeneralPurpose::new(&URL_SAFE, LENIENT);

/// The bytes that `text` says: in the standard alphabet or that of URLs, with padding or without, in one line or several,
/// by itself or in a `data:` URL.
///
/// # Errors
/// Says why it is none of these.
pub(crate) fn decode(text: &str) -> Result<Bytes, String> {
    let content = match text.trim_start().get(..5).filter(|begin| begin.eq_ignore_ascii_case("data:")) {
        None => text,
        Some(_) => match text.split_once(',') {
            Some((head, content)) if head.trim_end().to_ascii_lowercase().ends_with(";base64") => content,
            _ => return Err("a data: URL has `;base64,` before its content".into()),
        },
    };
    let is_wrapped = content.bytes().any(|byte| byte.is_ascii_whitespace());
    let content =
        if is_wrapped { Cow::Owned(content.split_ascii_whitespace().collect()) } else { Cow::Borrowed(content) };
    let of_urls = content.bytes().any(|byte| byte == b'-' || byte == b'_');
    let engine = if of_urls { &OF_URLS } else { &OF_STANDARD };
    engine.decode(content.as_bytes()).map(Bytes::from).map_err(|error| match error {
        DecodeError::InvalidByte(at, byte) => {
            format!("its character {at} is {:?}, which base64 does not have", char::from(byte))
        }
        other => other.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_gives_the_same_bytes() {
        let bytes = [251, 255, 191, 0, 1];
        for text in [
            "+/+/AAE=",
            "+/+/AAE",
            "-_-_AAE",
            "-_-_AAE=",
            "+/+/\r\nAAE=\n",
            "  +/+/ AAE=",
            "data:image/png;base64,+/+/AAE=",
            "DATA:image/jpeg;name=a;BASE64,+/+/AAE=",
        ] {
            assert_eq!(decode(text).as_deref(), Ok(&bytes[..]), "{text}");
        }
        assert_eq!(decode("").as_deref(), Ok(&[][..]));
    }

    #[test]
    fn what_is_none_is_told_why() {
        for (text, reason) in [
            ("data:image/png,%89PNG", "a data: URL has `;base64,` before its content"),
            ("data:image/png;base64", "a data: URL has"),
            ("AB$C", "its character 2 is '$', which base64 does not have"),
            ("http://a.b/c.png", "its character 4 is ':', which base64 does not have"),
            ("A", "Invalid"),
            ("+-AA", "its character 0 is '+'"),
        ] {
            let error = decode(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
