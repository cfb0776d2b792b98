//! JPEGs by libjpeg, whose inverse transform and chroma upsampling Pillow uses too: equal bit for bit. The pure-Rust
//! decoder of `image` differs by up to 16 levels at the edges of colours.

use std::ops::Range;

use image::RgbImage;
use mozjpeg::{ColorSpace, Decompress, Marker};

use super::exif::{Blocks, EXIF_HEAD, XMP_HEAD};
use super::input::{Watch, Watched};
use super::limits::{DecodeError, DecodeLimits, Stored};
use crate::bundle::Exif;

/// Where cameras write how they were held.
const APP1: Marker = Marker::APP(1);
/// Scans of a picture of any size; encoders make about 10. Each costs a pass over all of the picture's coefficients.
const SCANS: u64 = 64;
/// Pixels below which a picture may have more scans: as many as cost no more than [`SCANS`] of a picture of this size.
const SMALL: u64 = 1_000_000;
/// Scans of the smallest picture.
const MOST_SCANS: u64 = 1000;
/// Steps from pixel to pixel that libjpeg's scaled transform has, the largest first.
const STEPS: [u32; 3] = [8, 4, 2];
/// What it counts sizes in.
const EIGHTHS: u32 = 8;
/// Bytes of lines between two looks at the stop.
const LINES: usize = 256 << 10;

fn damaged(reason: impl ToString) -> DecodeError {
    DecodeError::Damaged { format: "JPEG", reason: reason.to_string() }
}

/// The picture as it is stored, or every second, fourth or eighth pixel of it while its shorter side keeps `least` of them,
/// and how it is to be turned when that is asked. libjpeg's fatal errors unwind out of this function.
pub(super) fn read(
    bytes: &[u8],
    exif: Exif,
    limits: &DecodeLimits,
    watch: &Watch<'_>,
    least: Option<u32>,
) -> Result<Stored, DecodeError> {
    let has_end = scans(bytes);
    // Without one, a picture of a single scan is whole all the same if libjpeg never asks for what lies behind the file.
    let no_end = || damaged("its last scan has no end");
    let is_endless = has_end.is_none();
    let (scans, bytes) = match has_end {
        Some(scans) => (scans, bytes),
        None => only_scan(bytes).map(|Range { start, end }| (vec![start], &bytes[..end])).ok_or_else(no_end)?,
    };
    let count = scans.len();
    // All scans but a single one are decoded in one call, which can be ended only where it asks for more bytes. A single scan
    // is decoded with the lines that are read, and faster from bytes that lie together.
    let input = if count > 1 { Watched::with_pauses(bytes, watch, scans) } else { Watched::whole(bytes, watch) };
    let wanted: &[Marker] = if exif == Exif::Apply { &[APP1] } else { &[] };
    let mut decompress = Decompress::with_markers(wanted).from_reader(input).map_err(damaged)?;
    let orientation = blocks(decompress.markers().map(|marker| marker.data)).orientation();
    let inks = matches!(decompress.color_space(), ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK);
    // JPEG's sizes have 16 bits.
    let (width, height) = (decompress.width() as u32, decompress.height() as u32);
    // A progressive JPEG's coefficients take two bytes per sample beside what is decoded.
    let each = 2 * decompress.components().len() as u64 + if inks { 7 } else { 3 };
    limits.check(width, height, u64::from(width) * u64::from(height) * each)?;
    let limit = most_scans(width, height);
    if count > limit {
        return Err(DecodeError::TooManyScans { scans: count, width, height, limit });
    }
    let fits = |step: &u32| least.is_some_and(|least| width.min(height) / step >= least);
    let step = STEPS.into_iter().find(fits).unwrap_or(1);
    if step > 1 {
        decompress.scale((EIGHTHS / step) as u8);
    }
    let scanlines = if inks { decompress.to_colorspace(ColorSpace::JCS_CMYK) } else { decompress.rgb() };
    let mut scanlines = scanlines.map_err(damaged)?;
    // libjpeg rounds up.
    let (width, height) = (scanlines.width() as u32, scanlines.height() as u32);
    let line = width as usize * if inks { 4 } else { 3 };
    let mut pixels = vec![0u8; line * height as usize];
    for lines in pixels.chunks_mut(line * (LINES / line).max(1)) {
        if watch.stopped() {
            return Err(DecodeError::Stopped);
        }
        scanlines.read_scanlines_into(lines).map_err(damaged)?;
    }
    if is_endless {
        if watch.ended() {
            return Err(no_end());
        }
    } else {
        scanlines.finish().map_err(damaged)?;
    }
    let pixels = if inks { rgb_of_inks(&pixels) } else { pixels };
    let picture = RgbImage::from_raw(width, height, pixels);
    Ok((picture.ok_or_else(|| damaged("its size and its data disagree"))?, orientation))
}

/// What the markers say of how the camera was held: EXIF may be longer than one of them.
fn blocks<'a>(markers: impl Iterator<Item = &'a [u8]>) -> Blocks<'a> {
    let mut found = Blocks::default();
    for marker in markers {
        if let Some(tags) = marker.strip_prefix(EXIF_HEAD) {
            found.exif.get_or_insert_default().to_mut().extend_from_slice(tags);
        } else if let Some(xmp) = marker.strip_prefix(XMP_HEAD) {
            found.xmp = Some(xmp.into());
        }
    }
    found
}

/// How many scans a picture of this size may have.
fn most_scans(width: u32, height: u32) -> usize {
    // Small sides are filled up to whole blocks.
    let pixels = u64::from(width.max(32)) * u64::from(height.max(32));
    (SCANS * SMALL / pixels).clamp(SCANS, MOST_SCANS) as usize
}

/// RGB of CMYK samples as Pillow has it: JPEGs store inks inverted, as what is left of the light.
fn rgb_of_inks(samples: &[u8]) -> Vec<u8> {
    let (pixels, _) = samples.as_chunks::<4>();
    pixels.iter().flat_map(|pixel| rgb_of_inks_left(*pixel)).collect()
}

/// RGB of a pixel's CMYK, each 255 less its ink: a colour is (255 − ink) darkened by black, with Pillow's rounded division by
/// 255.
pub(super) fn rgb_of_inks_left([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let darken = |ink_left: u8| {
        let product = u32::from(255 - ink_left) * u32::from(k) + 128;
        k - (((product >> 8) + product) >> 8) as u8
    };
    [darken(c), darken(m), darken(y)]
}

/// Where the scans of the picture begin, when its end-of-image marker is there. libjpeg fills a missing rest with grey, which
/// a classifier must not see. Motion photos append a video after the end; what follows it is ignored.
fn scans(bytes: &[u8]) -> Option<Vec<usize>> {
    let mut scans = Vec::new();
    // Behind the start-of-image marker.
    let mut at = 2;
    loop {
        // What stands before the next marker is a scan's data, in which 0xFF is followed by 0.
        at += bytes.get(at..)?.iter().position(|&byte| byte == 0xFF)? + 1;
        match *bytes.get(at)? {
            0xD9 => return Some(scans),
            // Another picture begins before this one has ended.
            0xD8 => return None,
            // Filling.
            0xFF => {}
            // A scan's own 0xFF, and the markers without a length.
            0x00 | 0x01 | 0xD0..=0xD7 => at += 1,
            marker => {
                if marker == 0xDA {
                    scans.push(at - 1);
                }
                let length = bytes.get(at + 1..at + 3)?;
                at += 1 + usize::from(u16::from_be_bytes([length[0], length[1]]));
            }
        }
    }
}

/// The scan of a picture whose first one has all of its colours, line by line: the only one. It ends at the next marker.
fn only_scan(bytes: &[u8]) -> Option<Range<usize>> {
    let (mut at, mut colours) = (2, None);
    loop {
        let &[0xFF, marker, high, low] = bytes.get(at..)?.first_chunk()? else { return None };
        let content = bytes.get(at + 4..at + 2 + usize::from(u16::from_be_bytes([high, low])))?;
        match marker {
            // Baseline and extended sequential.
            0xC0 | 0xC1 => colours = content.get(5).copied(),
            0xDA if colours.is_some() && content.first().copied() == colours => {
                let data = at + 4 + content.len();
                let ends = |pair: &[u8]| pair[0] == 0xFF && !matches!(pair[1], 0 | 0xD0..=0xD7 | 0xFF);
                let end = bytes[data..].windows(2).position(ends).map_or(bytes.len(), |length| data + length);
                return Some(at..end);
            }
            0xDA => return None,
            _ => {}
        }
        at += 4 + content.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pictures_may_have_more_scans_than_large_ones() {
        assert_eq!(most_scans(6000, 6000), 64);
        assert_eq!(most_scans(1000, 1000), 64);
        assert_eq!(most_scans(500, 500), 256);
        assert_eq!(most_scans(1, 1), 1000);
        assert_eq!(most_scans(65_535, 65_535), 64);
    }

    #[test]
    fn scans_are_counted_up_to_the_end_of_the_picture() {
        let scan = [0xFF, 0xDA, 0, 3, 1, 7, 0xFF, 0, 0xFF, 0xD0, 8];
        let with_end = [&[0xFF, 0xD8][..], &scan, &scan, &[0xFF, 0xFF, 0xD9], &scan].concat();
        assert_eq!(scans(&with_end), Some(vec![2, 13]));
        assert_eq!(scans(&with_end[..24]), None, "cut");
        assert_eq!(scans(&[&with_end[..24], &with_end].concat()), None, "another picture before the end");
        assert_eq!(scans(&[0xFF, 0xD8, 0xFF, 0xDA, 0xFF]), None);
    }
}
