//! Encoded bytes → RGB, refusing what is too large before anything is allocated for it.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};
use mozjpeg::ColorSpace;

use crate::bundle::Exif;

const FORMATS: [ImageFormat; 6] =
    [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Bmp, ImageFormat::Tiff];

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
    #[error("not an image of a known format; JPEG, PNG, WebP, GIF, BMP and TIFF are")]
    UnknownFormat,
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
    #[error("decoding this {width}×{height} image needs more than {limit} bytes of memory: resize it")]
    TooManyBytes {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Most bytes that decoding may allocate.
        limit: u64,
    },
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
            Self::TooManyPixels { .. } => "too_many_pixels",
            Self::TooManyBytes { .. } => "too_many_bytes",
            Self::Damaged { .. } => "damaged_image",
        }
    }
}

/// Decodes the first frame of `bytes` to 8-bit RGB. Grey is repeated, alpha is dropped, 16 bits are scaled to 8.
///
/// # Errors
/// See [`DecodeError`]; both limits are held before the picture's memory is allocated.
pub fn decode(bytes: &[u8], exif: Exif, limits: &DecodeLimits) -> Result<RgbImage, DecodeError> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    let format = image::guess_format(bytes).ok().filter(|f| FORMATS.contains(f)).ok_or(DecodeError::UnknownFormat)?;
    let damaged = |reason: String| DecodeError::Damaged { format: name(format), reason };
    let mut decoder = ImageReader::with_format(Cursor::new(bytes), format)
        .into_decoder()
        .map_err(|error| damaged(error.to_string()))?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > limits.max_pixels {
        return Err(DecodeError::TooManyPixels { width, height, limit: limits.max_pixels });
    }
    let too_many_bytes = || DecodeError::TooManyBytes { width, height, limit: limits.max_decoded_bytes };
    let mut allocation = Limits::default();
    allocation.max_alloc = Some(limits.max_decoded_bytes);
    // The decoder's own limits do not count the buffer that it decodes into.
    // A progressive JPEG's coefficients take two bytes more per sample.
    let copies = if format == ImageFormat::Jpeg { 3 } else { 1 };
    allocation.reserve(decoder.total_bytes().saturating_mul(copies)).map_err(|_| too_many_bytes())?;
    decoder.set_limits(allocation).map_err(|_| too_many_bytes())?;
    let orientation = match exif {
        Exif::Apply => decoder.orientation().ok(),
        Exif::Ignore => None,
    };
    let mut picture = if format == ImageFormat::Jpeg {
        DynamicImage::ImageRgb8(decode_jpeg(bytes, width, height).map_err(damaged)?)
    } else {
        DynamicImage::from_decoder(decoder).map_err(|error| match error {
            ImageError::Limits(_) => too_many_bytes(),
            error => damaged(error.to_string()),
        })?
    };
    if let Some(orientation) = orientation {
        picture.apply_orientation(orientation);
    }
    Ok(picture.into_rgb8())
}

/// Decodes with libjpeg, whose inverse transform and chroma upsampling Pillow uses too: equal bit for bit. The
/// pure-Rust decoder of `image` differs by up to 16 levels at the edges of colours.
fn decode_jpeg(bytes: &[u8], width: u32, height: u32) -> Result<RgbImage, String> {
    if !jpeg_has_an_end(bytes) {
        return Err("its last scan has no end".into());
    }
    // libjpeg's fatal errors unwind through this frame, with the message as the payload.
    let decoded = catch_unwind(AssertUnwindSafe(|| {
        let decompress = mozjpeg::Decompress::new_mem(bytes)?;
        let inks = matches!(decompress.color_space(), ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK);
        let mut scanlines = if inks { decompress.to_colorspace(ColorSpace::JCS_CMYK)? } else { decompress.rgb()? };
        let size = (scanlines.width(), scanlines.height());
        let pixels: Vec<u8> = scanlines.read_scanlines()?;
        scanlines.finish()?;
        std::io::Result::Ok((size, if inks { rgb_of_inks(&pixels) } else { pixels }))
    }));
    let (size, pixels) = match decoded {
        Ok(result) => result.map_err(|error| error.to_string())?,
        Err(panic) => return Err(panic.downcast_ref::<String>().map_or("libjpeg failed", String::as_str).to_owned()),
    };
    if size != (width as usize, height as usize) {
        return Err(format!("its headers disagree: {width}×{height} and {}×{}", size.0, size.1));
    }
    RgbImage::from_raw(width, height, pixels).ok_or_else(|| "its size and its data disagree".into())
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

/// Whether an end-of-image marker follows the last start-of-scan marker. The decoder fills a missing rest
/// with grey; a classifier must not see that. Scan data escapes 0xFF, so neither marker occurs inside it.
fn jpeg_has_an_end(bytes: &[u8]) -> bool {
    let last = |marker: [u8; 2]| bytes.windows(2).rposition(|pair| pair == marker);
    matches!((last([0xFF, 0xDA]), last([0xFF, 0xD9])), (Some(scan), Some(end)) if end > scan)
}

fn name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Jpeg => "JPEG",
        ImageFormat::Png => "PNG",
        ImageFormat::WebP => "WebP",
        ImageFormat::Gif => "GIF",
        ImageFormat::Bmp => "BMP",
        _ => "TIFF",
    }
}
