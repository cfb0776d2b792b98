//! How a photo was held, wherever Pillow 13's `ImageOps.exif_transpose` finds it: in EXIF's tag 274, else in XMP's
//! `tiff:Orientation`, in every format that carries either.

use std::borrow::Cow;
use std::io::Read;

use flate2::read::ZlibDecoder;
use image::ImageFormat;
use image::metadata::Orientation;

use super::tiff;

const ORIENTATION: u16 = 274;
const XMP: u16 = 700;
/// What stands before EXIF where it is not by itself; some writers put it there twice.
pub(super) const EXIF_HEAD: &[u8] = b"Exif\0\0";
/// What stands before XMP in a JPEG's marker.
pub(super) const XMP_HEAD: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";
/// Bytes of a PNG's compressed text that are looked at.
const MOST_TEXT: u64 = 1 << 20;

/// The blocks of a file that may say how it was held.
#[derive(Debug, Default)]
pub(super) struct Blocks<'a> {
    pub(super) exif: Option<Cow<'a, [u8]>>,
    pub(super) xmp: Option<Cow<'a, [u8]>>,
}

impl Blocks<'_> {
    /// How the picture is to be turned.
    pub(super) fn orientation(&self) -> Option<Orientation> {
        let mut tags = self.exif.as_deref().unwrap_or_default();
        for _ in 0..2 {
            tags = tags.strip_prefix(EXIF_HEAD).unwrap_or(tags);
        }
        // A tag that says nothing of use is a tag all the same.
        let value = match tiff::whole_number(tags, ORIENTATION) {
            Some(value) => value,
            None => self.xmp.as_deref().and_then(in_xmp),
        };
        Orientation::from_exif(u8::try_from(value?).ok()?)
    }
}

/// `tiff:Orientation="6"` or `tiff:Orientation>6`.
fn in_xmp(xmp: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"tiff:Orientation";
    let mut rest = xmp;
    while let Some(at) = rest.windows(NAME.len()).position(|part| part == NAME) {
        rest = &rest[at + NAME.len()..];
        let value = rest.strip_prefix(b"=\"").or(rest.strip_prefix(b">")).and_then(|value| value.first());
        if let Some(digit) = value.filter(|byte| byte.is_ascii_digit()) {
            return Some(u64::from(digit - b'0'));
        }
    }
    None
}

/// The blocks of a file that is no JPEG.
pub(super) fn blocks(bytes: &[u8], format: ImageFormat) -> Blocks<'_> {
    match format {
        ImageFormat::Png => of_png(bytes),
        ImageFormat::WebP => of_webp(bytes),
        ImageFormat::Tiff => Blocks { exif: Some(bytes.into()), xmp: tiff::bytes_of(bytes, XMP).map(Cow::Borrowed) },
        _ => Blocks::default(),
    }
}

fn of_png(bytes: &[u8]) -> Blocks<'_> {
    let mut found = Blocks::default();
    let mut profile = None;
    // Behind the signature: length, name, content, checksum.
    let mut rest = bytes.get(8..).unwrap_or_default();
    while let Some((&[a, b, c, d, name @ ..], after)) = rest.split_first_chunk::<8>() {
        let Some((content, after)) = after.split_at_checked(u32::from_be_bytes([a, b, c, d]) as usize) else { break };
        rest = after.get(4..).unwrap_or_default();
        match &name {
            b"eXIf" => found.exif = Some(content.into()),
            b"iTXt" => found.xmp = of_international_text(content).or(found.xmp),
            b"tEXt" | b"zTXt" => {
                if let Some(text) = content.strip_prefix(b"Raw profile type exif\0") {
                    // A compressed one has a byte for its method.
                    let text = if &name == b"zTXt" { text.get(1..).map(inflated) } else { Some(text.into()) };
                    profile = text.and_then(|text| of_hexadecimal(&text)).or(profile);
                }
            }
            b"IEND" => break,
            _ => {}
        }
    }
    found.exif = found.exif.or(profile.map(Cow::Owned));
    found
}

/// XMP in a text of several languages: a keyword, whether it is compressed, by what, a language, the keyword there, the text.
fn of_international_text(content: &[u8]) -> Option<Cow<'_, [u8]>> {
    let rest = content.strip_prefix(b"XML:com.adobe.xmp\0")?;
    let (&[compressed, _method], rest) = rest.split_first_chunk::<2>()?;
    let mut parts = rest.splitn(3, |&byte| byte == 0);
    let (_language, _keyword, text) = (parts.next()?, parts.next()?, parts.next()?);
    Some(if compressed == 1 { inflated(text) } else { text.into() })
}

fn inflated(packed: &[u8]) -> Cow<'_, [u8]> {
    let mut text = Vec::new();
    // What is damaged says as much as came before the damage.
    let _ = ZlibDecoder::new(packed).take(MOST_TEXT).read_to_end(&mut text);
    text.into()
}

/// ImageMagick's form: an empty line, a name, a length, and then pairs of digits.
fn of_hexadecimal(text: &[u8]) -> Option<Vec<u8>> {
    let digits: Vec<u8> =
        text.splitn(4, |&byte| byte == b'\n').nth(3)?.iter().copied().filter(|b| *b != b'\n').collect();
    let value = |digit: u8| char::from(digit).to_digit(16);
    let (pairs, rest) = digits.as_chunks::<2>();
    let bytes: Option<Vec<u8>> = pairs.iter().map(|&[a, b]| Some((value(a)? * 16 + value(b)?) as u8)).collect();
    bytes.filter(|_| rest.is_empty())
}

fn of_webp(bytes: &[u8]) -> Blocks<'_> {
    const EXIF_FLAG: u8 = 8;
    const XMP_FLAG: u8 = 4;
    let mut found = Blocks::default();
    let mut flags = 0;
    // Behind RIFF, its length and WEBP: name, length, content, filled up to an even length.
    let mut rest = bytes.get(12..).unwrap_or_default();
    while let Some((&[n0, n1, n2, n3, a, b, c, d], after)) = rest.split_first_chunk::<8>() {
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        let Some(content) = after.get(..length) else { break };
        rest = after.get(length + length % 2..).unwrap_or_default();
        match &[n0, n1, n2, n3] {
            b"VP8X" => flags = content.first().copied().unwrap_or_default(),
            b"EXIF" if flags & EXIF_FLAG != 0 && found.exif.is_none() => found.exif = Some(content.into()),
            b"XMP " if flags & XMP_FLAG != 0 && found.xmp.is_none() => found.xmp = Some(content.into()),
            _ => {}
        }
    }
    found
}
