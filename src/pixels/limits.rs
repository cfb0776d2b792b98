//! How large a picture may be, and why one is refused.

use image::RgbImage;
use image::metadata::Orientation;

use crate::bundle::Pixels;

/// A picture as it is stored, and how it is to be turned when that is asked.
pub(super) type Stored = (RgbImage, Option<Orientation>);

/// What decoding takes of nearly every picture: a progressive JPEG has six bytes of coefficients and three of colours.
const BYTES_PER_PIXEL: u64 = 12;

/// How large a picture may be, and which of its pixels are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Width × height, read from the header.
    pub max_pixels: u64,
    /// Bytes that decoding may allocate, the decoded picture included.
    pub max_decoded_bytes: u64,
    /// Of JPEGs that are resized.
    pub pixels: Pixels,
}

impl DecodeLimits {
    /// For the user's own pictures, offline: as many pixels as Pillow opens.
    pub const OFFLINE: Self = Self { max_pixels: 178_956_970, max_decoded_bytes: 2 << 30, pixels: Pixels::Exact };

    /// So many pixels, and the memory that any format takes for them.
    pub fn of_pixels(max_pixels: u64) -> Self {
        let max_decoded_bytes = max_pixels.saturating_mul(BYTES_PER_PIXEL).max(Self::default().max_decoded_bytes);
        Self { max_pixels, max_decoded_bytes, pixels: Pixels::Exact }
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
        Self { max_pixels: 40_000_000, max_decoded_bytes: 512 << 20, pixels: Pixels::Exact }
    }
}

/// Why a picture was refused.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Nothing was sent.
    #[error("the image is empty (0 bytes): give the encoded file itself")]
    Empty,
    /// Not one of the formats.
    #[error("not an image of a known format; the formats are JPEG, PNG, WebP, GIF, BMP, TIFF and PNM (PPM, PGM, PBM)")]
    UnknownFormat,
    /// Another format.
    #[error("the image is {format}, which is not read: convert it to JPEG or PNG")]
    Foreign {
        /// The format that its first bytes announce.
        format: &'static str,
    },
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
        "image is {width}×{height} ({:.1} MP); the limit is {limit} pixels ({:.1} MP): resize it, or raise --max-pixels of `nbn serve` and `nbn score`",
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
        "decoding this {width}×{height} image needs more than {limit} bytes of memory: resize it, or raise --max-pixels of `nbn serve` and `nbn score`"
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
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Empty => "empty_image",
            Self::UnknownFormat | Self::Foreign { .. } => "unknown_format",
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
