//! Encoded bytes → RGB, refusing what is too large before anything is allocated for it.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};

use super::jpeg;
use crate::bundle::Exif;

const FORMATS: [ImageFormat; 6] =
    [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Bmp, ImageFormat::Tiff];

/// What decoding takes of nearly every picture: a progressive JPEG has six bytes of coefficients and three of colours.
const BYTES_PER_PIXEL: u64 = 12;

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

    /// Refuses a picture of this size, which takes `bytes` to decode, when that is too much.
    pub(super) fn check(&self, width: u32, height: u32, bytes: u64) -> Result<(), DecodeError> {
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
    let (mut picture, orientation) = if format == ImageFormat::Jpeg {
        let decoded = jpeg::decode(bytes, exif, limits).map_err(|fault| match fault {
            jpeg::Fault::Damaged(reason) => damaged(reason),
            jpeg::Fault::Refused(error) => error,
        })?;
        (DynamicImage::ImageRgb8(decoded.0), decoded.1)
    } else {
        let mut decoder = ImageReader::with_format(Cursor::new(bytes), format)
            .into_decoder()
            .map_err(|error| damaged(error.to_string()))?;
        let (width, height) = decoder.dimensions();
        // The decoder's own limits do not count the buffer that it decodes into.
        limits.check(width, height, decoder.total_bytes())?;
        let mut allocation = Limits::default();
        allocation.max_alloc = Some(limits.max_decoded_bytes - decoder.total_bytes());
        let too_many_bytes = || DecodeError::TooManyBytes { width, height, limit: limits.max_decoded_bytes };
        decoder.set_limits(allocation).map_err(|_| too_many_bytes())?;
        let orientation = match exif {
            Exif::Apply => decoder.orientation().ok(),
            Exif::Ignore => None,
        };
        let picture = DynamicImage::from_decoder(decoder).map_err(|error| match error {
            ImageError::Limits(_) => too_many_bytes(),
            error => damaged(error.to_string()),
        })?;
        (picture, orientation)
    };
    if let Some(orientation) = orientation {
        picture.apply_orientation(orientation);
    }
    Ok(match picture {
        // Pillow takes the high byte of colours with 16 bits; `image` would round.
        DynamicImage::ImageRgb16(_) | DynamicImage::ImageRgba16(_) | DynamicImage::ImageLumaA16(_) => {
            let picture = picture.into_rgb16();
            RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
                image::Rgb(picture.get_pixel(x, y).0.map(|value| (value >> 8) as u8))
            })
        }
        picture => picture.into_rgb8(),
    })
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
