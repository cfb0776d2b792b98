//! Encoded bytes → RGB, refusing what is too large before anything is allocated for it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::{ColorType, DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};

use super::input::{Watch, Watched};
use super::limits::{DecodeError, DecodeLimits, Stored};
use super::picture::Picture;
use super::{exif, gif, jpeg, pnm, tiff, tiff_planes, tiff_samples, webp};
use crate::bundle::Exif;
use crate::stop::Stop;

const FORMATS: [ImageFormat; 6] =
    [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Bmp, ImageFormat::Tiff];

/// Bytes that a decoder may take for what stands before a picture, such as a colour profile; also a PNG's for its rows.
const HEAD_BYTES: u64 = 16 << 20;

/// Decodes the first frame of `bytes` to 8-bit RGB. Grey is repeated, alpha is dropped, 16 bits are scaled to 8. The work is
/// bounded in proportion to the picture's pixels and the file's bytes, and ends soon after `stop` is asked for; only a lossy
/// WebP is decoded to its end.
///
/// # Errors
/// See [`DecodeError`]; both limits are held before the picture's memory is allocated.
pub fn decode(bytes: &[u8], exif: Exif, limits: &DecodeLimits, stop: &Stop) -> Result<Picture, DecodeError> {
    decode_at_least(bytes, exif, limits, stop, None)
}

/// As [`decode`], or smaller: of JPEGs as few pixels as leave `least` of them along the shorter side.
///
/// # Errors
/// As [`decode`].
pub fn decode_at_least(
    bytes: &[u8],
    exif: Exif,
    limits: &DecodeLimits,
    stop: &Stop,
    least: Option<u32>,
) -> Result<Picture, DecodeError> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    if pnm::is_pnm(bytes) {
        let watch = Watch::new(stop, limits.max_decoded_bytes);
        let picture = pnm::read(bytes, limits, &watch)?;
        return Picture::try_from(picture)
            .map_err(|error| DecodeError::Damaged { format: pnm::NAME, reason: error.to_string() });
    }
    let format = image::guess_format(bytes).ok().filter(|f| FORMATS.contains(f)).ok_or_else(|| foreign(bytes))?;
    let damaged = |reason: String| DecodeError::Damaged { format: name(format), reason };
    // libjpeg's fatal errors unwind through here, with the message as the payload; the other decoders should not panic, but
    // some do on files that they did not expect.
    let watch = Watch::new(stop, limits.max_decoded_bytes);
    let decoded = catch_unwind(AssertUnwindSafe(|| match format {
        ImageFormat::Jpeg => jpeg::read(bytes, exif, limits, &watch, least),
        _ => read(bytes, format, exif, limits, &watch),
    }));
    let decoded = decoded.unwrap_or_else(|panic| {
        Err(match panic.downcast_ref::<String>() {
            Some(message) if format == ImageFormat::Jpeg => damaged(message.clone()),
            _ => {
                let reason = "its decoder failed on the file, which may also be damaged".into();
                DecodeError::Unsupported { format: name(format), reason }
            }
        })
    });
    let (mut picture, orientation) = match decoded {
        // What a decoder makes of a reader that fails is of no interest.
        _ if stop.asked() => return Err(DecodeError::Stopped),
        _ if watch.exceeded() => return Err(DecodeError::TooMuchMemory),
        decoded => decoded?,
    };
    if let Some(orientation) = orientation {
        let mut turned = DynamicImage::ImageRgb8(picture);
        turned.apply_orientation(orientation);
        picture = turned.into_rgb8();
    }
    Picture::try_from(picture).map_err(|error| damaged(error.to_string()))
}

/// What bytes of no known format are, where that can be told.
fn foreign(bytes: &[u8]) -> DecodeError {
    let brand = bytes.get(4..12).and_then(|head| head.strip_prefix(b"ftyp"));
    let begin = &bytes[..bytes.len().min(1000)];
    let holds = |part: &[u8]| begin.windows(part.len()).any(|window| window.eq_ignore_ascii_case(part));
    const KNOWN: [(&[u8], &str); 14] = [
        (b"\xFF\x0A", "JPEG XL"),
        (b"\0\0\0\x0CJXL ", "JPEG XL"),
        (b"\0\0\0\x0CjP  ", "JPEG 2000"),
        (b"\xFF\x4F\xFF\x51", "JPEG 2000"),
        (b"%PDF", "PDF"),
        (b"%!PS", "PostScript"),
        (b"8BPS", "Photoshop"),
        (b"\0\0\x01\0", "an icon (ICO)"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x1F\x8B", "gzip"),
        (b"SIMPLE  =", "FITS"),
        (b"P7", "PAM"),
        (b"II\x2B\0", "BigTIFF"),
        (b"MM\0\x2B", "BigTIFF"),
    ];
    let format = match brand {
        Some(b"avif" | b"avis") => Some("AVIF"),
        Some(b"heic" | b"heix" | b"hevc" | b"heim" | b"mif1" | b"msf1") => Some("HEIC"),
        Some(_) => Some("a film (MP4 or the like)"),
        None if bytes.get(128..132) == Some(b"DICM") => Some("DICOM"),
        None if holds(b"<svg") => Some("SVG"),
        None if holds(b"<!doctype html") || holds(b"<html") => Some("a web page (HTML)"),
        None => KNOWN.iter().find(|(head, _)| bytes.starts_with(head)).map(|(_, name)| *name),
    };
    format.map_or(DecodeError::UnknownFormat, |format| DecodeError::Foreign { format })
}

/// By the decoders of `image`.
fn read(
    bytes: &[u8],
    format: ImageFormat,
    wanted: Exif,
    limits: &DecodeLimits,
    watch: &Watch<'_>,
) -> Result<Stored, DecodeError> {
    let fault = |error: ImageError| match error {
        // Before the picture's size is known: of what stands before it.
        ImageError::Limits(_) => DecodeError::TooMuchMemory,
        ImageError::Unsupported(error) => {
            let told = if format == ImageFormat::Tiff { tiff::unreadable(bytes) } else { None };
            DecodeError::Unsupported { format: name(format), reason: told.unwrap_or_else(|| error.to_string()) }
        }
        error => DecodeError::Damaged { format: name(format), reason: error.to_string() },
    };
    let orientation = || match wanted {
        Exif::Apply => exif::blocks(bytes, format).orientation(),
        Exif::Ignore => None,
    };
    match format {
        ImageFormat::WebP => webp::check(bytes)?,
        ImageFormat::Tiff => {
            tiff::check_fields(bytes)?;
            if let Some(picture) = tiff_samples::read(bytes, limits, watch) {
                return Ok((picture?, orientation()));
            }
            if let Some(picture) = tiff_planes::read(bytes, limits, watch) {
                return Ok((picture?, orientation()));
            }
        }
        _ => {}
    }
    let mut reader = ImageReader::with_format(Watched::new(bytes, watch), format);
    let mut head = Limits::default();
    head.max_alloc = Some(head_bytes(bytes, format).min(limits.max_decoded_bytes));
    reader.limits(head);
    let mut decoder = reader.into_decoder().map_err(fault)?;
    let (width, height) = decoder.dimensions();
    let decoded_bytes = decoder.total_bytes();
    let bytes_taken = peak(format, decoder.color_type(), width, height);
    limits.check(width, height, bytes_taken)?;
    watch.allow(bytes_taken);
    match format {
        ImageFormat::Tiff => tiff::check_work(bytes)?,
        // A frame takes time and memory as a picture of its own does.
        ImageFormat::Gif => {
            if let Some(frame) = gif::first_frame(bytes) {
                let pixels = u64::from(frame.width) * u64::from(frame.height);
                let frame = pixels * u64::from(decoder.color_type().bytes_per_pixel());
                let bytes_taken = bytes_taken.max(decoded_bytes.saturating_add(frame));
                limits.check(width, height, bytes_taken)?;
                watch.allow(bytes_taken);
            }
        }
        _ => {}
    }
    let mut allocation = Limits::default();
    // The decoder's own limits do not count the buffer that it decodes into.
    allocation.max_alloc = Some(limits.max_decoded_bytes.saturating_sub(decoded_bytes));
    let too_many_bytes = || DecodeError::TooManyBytes { width, height, limit: limits.max_decoded_bytes };
    decoder.set_limits(allocation).map_err(|_| too_many_bytes())?;
    let orientation = orientation();
    let picture = DynamicImage::from_decoder(decoder).map_err(|error| match error {
        ImageError::Limits(_) => too_many_bytes(),
        error => fault(error),
    })?;
    let picture = match (picture, format) {
        (DynamicImage::ImageRgba8(mut picture), ImageFormat::Gif) => {
            let background = gif::first_frame(bytes).map_or([0; 3], |frame| frame.background);
            for pixel in picture.pixels_mut().filter(|pixel| pixel.0[3] == 0) {
                pixel.0[..3].copy_from_slice(&background);
            }
            DynamicImage::ImageRgba8(picture)
        }
        (picture, _) => picture,
    };
    Ok((rgb8(picture), orientation))
}

/// What a decoder may take before the picture's size is known. A PNG's rows count there, too: they may be as long as the file
/// says, unless it also holds what unpacks to any length.
fn head_bytes(bytes: &[u8], format: ImageFormat) -> u64 {
    let Some(&[a, b, c, d]) = bytes.get(16..20).and_then(|width| width.first_chunk()) else { return HEAD_BYTES };
    // Three rows of four samples of 16 bits.
    let rows = 24 * u64::from(u32::from_be_bytes([a, b, c, d]));
    let unpacks = || bytes.windows(4).any(|name| [b"iCCP", b"zTXt", b"iTXt"].iter().any(|known| name == *known));
    if format != ImageFormat::Png || rows <= HEAD_BYTES / 2 || unpacks() { HEAD_BYTES } else { HEAD_BYTES + rows }
}

/// The most bytes that are held at once while a picture of this size is decoded, converted and turned.
fn peak(format: ImageFormat, color: ColorType, width: u32, height: u32) -> u64 {
    let pixels = u64::from(width) * u64::from(height);
    let stored = u64::from(color.bytes_per_pixel());
    // What a decoder holds beside the picture that it fills: a second one, an animation's canvas, planes.
    let beside = match format {
        ImageFormat::Tiff => stored.max(4),
        ImageFormat::WebP | ImageFormat::Gif => 4,
        _ => 1,
    };
    let converted = if color == ColorType::Rgb8 { 0 } else { 3 };
    let turned = 6;
    pixels.saturating_mul((stored + beside).max(stored + converted).max(turned))
}

/// 8-bit RGB of any picture; its own memory goes as soon as the new one is there.
fn rgb8(picture: DynamicImage) -> RgbImage {
    // Pillow takes the high byte of colours with 16 bits; `image` would round.
    let high = |value: u16| (value >> 8) as u8;
    let (width, height) = (picture.width(), picture.height());
    let pixels: Vec<u8> = match &picture {
        DynamicImage::ImageRgb16(picture) => picture.as_raw().iter().copied().map(high).collect(),
        DynamicImage::ImageRgba16(picture) => {
            let (pixels, _) = picture.as_raw().as_chunks::<4>();
            pixels.iter().flat_map(|[r, g, b, _]| [high(*r), high(*g), high(*b)]).collect()
        }
        DynamicImage::ImageLumaA16(picture) => {
            let (pixels, _) = picture.as_raw().as_chunks::<2>();
            pixels.iter().flat_map(|[grey, _]| [high(*grey); 3]).collect()
        }
        _ => return picture.into_rgb8(),
    };
    // The conversions above make three bytes of each pixel.
    RgbImage::from_raw(width, height, pixels).unwrap_or_default()
}

pub(super) fn name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Jpeg => "JPEG",
        ImageFormat::Png => "PNG",
        ImageFormat::WebP => "WebP",
        ImageFormat::Gif => "GIF",
        ImageFormat::Bmp => "BMP",
        _ => "TIFF",
    }
}
