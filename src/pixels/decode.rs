//! Encoded bytes → RGB, refusing what is too large before anything is allocated for it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};

use super::input::{Watch, Watched};
use super::picture::Picture;
use super::{gif, jpeg, tiff, webp};
use crate::bundle::Exif;
use crate::stop::Stop;

const FORMATS: [ImageFormat; 6] =
    [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Bmp, ImageFormat::Tiff];

/// What decoding takes of nearly every picture: a progressive JPEG has six bytes of coefficients and three of colours.
const BYTES_PER_PIXEL: u64 = 12;

/// Bytes that a decoder may take for what stands before a picture, such as a colour profile; also a PNG's for its rows.
const HEAD_BYTES: u64 = 16 << 20;

/// How large a picture may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Width × height, read from the header.
    pub max_pixels: u64,
    /// Bytes that decoding may allocate, the decoded picture included.
    pub max_decoded_bytes: u64,
}

impl DecodeLimits {
    /// For the user's own pictures, offline: as many pixels as Pillow opens.
    pub const OFFLINE: Self = Self { max_pixels: 178_956_970, max_decoded_bytes: 2 << 30 };

    /// So many pixels, and the memory that any format takes for them.
    pub fn of_pixels(max_pixels: u64) -> Self {
        let max_decoded_bytes = max_pixels.saturating_mul(BYTES_PER_PIXEL).max(Self::default().max_decoded_bytes);
        Self { max_pixels, max_decoded_bytes }
    }

    /// Refuses a picture without pixels, and one of this size, which takes `bytes` to decode, when that is too much.
    pub(super) fn check(&self, width: u32, height: u32, bytes: u64) -> Result<(), DecodeError> {
        if width == 0 || height == 0 {
            return Err(DecodeError::NoPixels { width, height });
        }
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(DecodeError::TooManyPixels { width, height, limit: self.max_pixels });
        }
        if bytes > self.max_decoded_bytes {
            return Err(DecodeError::TooManyBytes { width, height, limit: self.max_decoded_bytes });
        }
        Ok(())
    }
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self { max_pixels: 40_000_000, max_decoded_bytes: 512 << 20 }
    }
}

/// Why a picture was refused.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Nothing was sent.
    #[error("the image is empty (0 bytes): send the encoded file itself")]
    Empty,
    /// Not one of the formats.
    #[error("not an image of a known format; the formats are JPEG, PNG, WebP, GIF, BMP and TIFF")]
    UnknownFormat,
    /// A width or a height of 0.
    #[error("image is {width}×{height}: it has no pixels, so there is nothing to classify")]
    NoPixels {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// Larger than the pixel limit.
    #[error(
        "image is {width}×{height} ({:.1} MP); the limit is {limit} pixels ({:.1} MP): resize it, or raise `nbn`'s --max-pixels",
        (*width as f64 * *height as f64) / 1e6, *limit as f64 / 1e6
    )]
    TooManyPixels {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Largest accepted width × height.
        limit: u64,
    },
    /// Decoding would allocate more than the byte limit.
    #[error(
        "decoding this {width}×{height} image needs more than {limit} bytes of memory: resize it, or raise `nbn`'s --max-pixels"
    )]
    TooManyBytes {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Most bytes that decoding may allocate.
        limit: u64,
    },
    /// Decoding took more memory than the picture's size explains, and was ended.
    #[error("decoding this image took far more memory than its size explains: save it again with another program")]
    TooMuchMemory,
    /// A progressive JPEG with so many scans that decoding would take far longer than its size explains.
    #[error(
        "the JPEG has {scans} scans; a {width}×{height} image may have {limit}: save it again as a baseline or an ordinary \
         progressive JPEG, which has about 10"
    )]
    TooManyScans {
        /// Scans in the file.
        scans: usize,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Most scans of a picture of that size.
        limit: usize,
    },
    /// A form of the format that is not read.
    #[error("this form of {format} is not supported: {reason}: save it as a PNG or JPEG")]
    Unsupported {
        /// The format that the first bytes announce.
        format: &'static str,
        /// What the decoder said.
        reason: String,
    },
    /// Nobody waits for the picture any more, or its deadline has passed.
    #[error("decoding was stopped: the result is no longer needed, or the deadline has passed")]
    Stopped,
    /// The file ends before the picture does.
    #[error("the {format} file is cut short or damaged: {reason}")]
    Damaged {
        /// The format that the first bytes announce.
        format: &'static str,
        /// What the decoder said.
        reason: String,
    },
}

impl DecodeError {
    /// A word to count by.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Empty => "empty_image",
            Self::UnknownFormat => "unknown_format",
            Self::NoPixels { .. } => "no_pixels",
            Self::TooManyScans { .. } => "too_many_scans",
            Self::Unsupported { .. } => "unsupported_image",
            Self::Stopped => "stopped",
            Self::TooManyPixels { .. } => "too_many_pixels",
            Self::TooManyBytes { .. } | Self::TooMuchMemory => "too_many_bytes",
            Self::Damaged { .. } => "damaged_image",
        }
    }
}

/// Decodes the first frame of `bytes` to 8-bit RGB. Grey is repeated, alpha is dropped, 16 bits are scaled to 8. The work is
/// bounded in proportion to the picture's pixels and the file's bytes, and ends soon after `stop` is asked for; only a lossy
/// WebP is decoded to its end.
///
/// # Errors
/// See [`DecodeError`]; both limits are held before the picture's memory is allocated.
pub fn decode(bytes: &[u8], exif: Exif, limits: &DecodeLimits, stop: &Stop) -> Result<Picture, DecodeError> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    let format = image::guess_format(bytes).ok().filter(|f| FORMATS.contains(f)).ok_or(DecodeError::UnknownFormat)?;
    let damaged = |reason: String| DecodeError::Damaged { format: name(format), reason };
    // libjpeg's fatal errors unwind through here, with the message as the payload; the other decoders should not panic, but
    // some do on files that they did not expect.
    let watch = Watch::new(stop, limits.max_decoded_bytes);
    let decoded = catch_unwind(AssertUnwindSafe(|| match format {
        ImageFormat::Jpeg => jpeg::read(bytes, exif, limits, &watch),
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

/// A picture as it is stored, and how it is to be turned when that is asked.
pub(super) type Stored = (RgbImage, Option<Orientation>);

/// By the decoders of `image`.
fn read(
    bytes: &[u8],
    format: ImageFormat,
    exif: Exif,
    limits: &DecodeLimits,
    watch: &Watch<'_>,
) -> Result<Stored, DecodeError> {
    let fault = |error: ImageError| match error {
        // Before the picture's size is known: of what stands before it.
        ImageError::Limits(_) => DecodeError::TooMuchMemory,
        ImageError::Unsupported(error) => DecodeError::Unsupported { format: name(format), reason: error.to_string() },
        error => DecodeError::Damaged { format: name(format), reason: error.to_string() },
    };
    match format {
        ImageFormat::WebP => webp::check(bytes)?,
        ImageFormat::Tiff => tiff::check_fields(bytes)?,
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
            if let Some((width, height)) = gif::first_frame(bytes) {
                let frame = u64::from(width) * u64::from(height) * u64::from(decoder.color_type().bytes_per_pixel());
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
    let orientation = match exif {
        Exif::Apply => decoder.orientation().ok(),
        Exif::Ignore => None,
    };
    let picture = DynamicImage::from_decoder(decoder).map_err(|error| match error {
        ImageError::Limits(_) => too_many_bytes(),
        error => fault(error),
    })?;
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
