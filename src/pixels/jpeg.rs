//! JPEGs by libjpeg, whose inverse transform and chroma upsampling Pillow uses too: equal bit for bit. The pure-Rust
//! decoder of `image` differs by up to 16 levels at the edges of colours.

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::RgbImage;
use image::metadata::Orientation;
use mozjpeg::{ColorSpace, Decompress, Marker};

use super::decode::{DecodeError, DecodeLimits};
use crate::bundle::Exif;

/// Where cameras write how they were held.
const APP1: Marker = Marker::APP(1);
const EXIF: &[u8] = b"Exif\0\0";

pub(super) enum Fault {
    /// What libjpeg said.
    Damaged(String),
    /// A limit.
    Refused(DecodeError),
}

/// The picture as it is stored, and how it is to be turned when that is asked.
pub(super) fn decode(
    bytes: &[u8],
    exif: Exif,
    limits: &DecodeLimits,
) -> Result<(RgbImage, Option<Orientation>), Fault> {
    if !has_an_end(bytes) {
        return Err(Fault::Damaged("its last scan has no end".into()));
    }
    // libjpeg's fatal errors unwind through this frame, with the message as the payload.
    catch_unwind(AssertUnwindSafe(|| read(bytes, exif, limits))).unwrap_or_else(|panic| {
        let message = panic.downcast_ref::<String>().map_or("libjpeg failed", String::as_str);
        Err(Fault::Damaged(message.to_owned()))
    })
}

fn read(bytes: &[u8], exif: Exif, limits: &DecodeLimits) -> Result<(RgbImage, Option<Orientation>), Fault> {
    let damaged = |error: std::io::Error| Fault::Damaged(error.to_string());
    let wanted: &[Marker] = if exif == Exif::Apply { &[APP1] } else { &[] };
    let decompress = Decompress::with_markers(wanted).from_mem(bytes).map_err(damaged)?;
    let tags = decompress.markers().find_map(|marker| marker.data.strip_prefix(EXIF));
    let orientation = tags.and_then(Orientation::from_exif_chunk);
    let inks = matches!(decompress.color_space(), ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK);
    // JPEG's sizes have 16 bits.
    let (width, height) = (decompress.width() as u32, decompress.height() as u32);
    // A progressive JPEG's coefficients take two bytes per sample beside what is decoded.
    let each = 2 * decompress.components().len() as u64 + if inks { 7 } else { 3 };
    limits.check(width, height, u64::from(width) * u64::from(height) * each).map_err(Fault::Refused)?;
    let scanlines = if inks { decompress.to_colorspace(ColorSpace::JCS_CMYK) } else { decompress.rgb() };
    let mut scanlines = scanlines.map_err(damaged)?;
    let pixels: Vec<u8> = scanlines.read_scanlines().map_err(damaged)?;
    scanlines.finish().map_err(damaged)?;
    let pixels = if inks { rgb_of_inks(&pixels) } else { pixels };
    let picture = RgbImage::from_raw(width, height, pixels);
    Ok((picture.ok_or_else(|| Fault::Damaged("its size and its data disagree".into()))?, orientation))
}

/// RGB of CMYK samples as Pillow has it: JPEGs store inks inverted, and each colour is (255 − ink) darkened by black, with
/// Pillow's rounded division by 255.
fn rgb_of_inks(samples: &[u8]) -> Vec<u8> {
    let darken = |ink_left: u8, black_left: u8| {
        let product = u32::from(255 - ink_left) * u32::from(black_left) + 128;
        black_left - (((product >> 8) + product) >> 8) as u8
    };
    let (pixels, _) = samples.as_chunks::<4>();
    pixels.iter().flat_map(|[c, m, y, k]| [darken(*c, *k), darken(*m, *k), darken(*y, *k)]).collect()
}

/// Whether the picture's end-of-image marker is there. libjpeg fills a missing rest with grey; a classifier must not see
/// that. What follows the end, as a phone's film does, is nobody's.
fn has_an_end(bytes: &[u8]) -> bool {
    // Behind the start-of-image marker.
    let mut at = 2;
    loop {
        // What stands before the next marker is a scan's data, in which 0xFF is followed by 0.
        let Some(skipped) = bytes.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == 0xFF)) else {
            return false;
        };
        at += skipped + 1;
        match bytes.get(at) {
            Some(0xD9) => return true,
            // Another picture begins before this one has ended.
            None | Some(0xD8) => return false,
            // Filling.
            Some(0xFF) => {}
            // A scan's own 0xFF, and the markers without a length.
            Some(0x00 | 0x01 | 0xD0..=0xD7) => at += 1,
            Some(_) => match bytes.get(at + 1..at + 3) {
                Some(&[high, low]) => at += 1 + usize::from(u16::from_be_bytes([high, low])),
                _ => return false,
            },
        }
    }
}
