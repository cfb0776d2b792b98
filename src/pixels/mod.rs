//! Turns encoded image bytes into the tensor a bundle asks for. Knows nothing of HTTP.

mod decode;
mod jpeg;
mod resize;

pub use decode::{DecodeError, DecodeLimits, decode};
pub use image::RgbImage;
#[cfg(feature = "train")]
pub(crate) use resize::{shorter_side_then_centre_crop, stretch};

use std::path::Path;

use crate::bundle::Preprocessing;

/// Endings of the files that are taken for pictures when a folder is read.
pub const ENDINGS: [&str; 8] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"];

/// Whether `path` ends as a picture does, in upper or lower case.
pub fn has_picture_ending(path: &Path) -> bool {
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    ENDINGS.iter().any(|known| ending.eq_ignore_ascii_case(known))
}

/// One picture ready for the network: `[3, side, side]`, row-major, normalised.
#[derive(Debug, Clone, PartialEq)]
pub struct PixelTensor {
    side: usize,
    values: Vec<f32>,
}

impl PixelTensor {
    /// Height and width in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// The `3 × side × side` values: planes R, G, B, each row by row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}

/// The preprocessing of one bundle, with its per-channel tables made once.
#[derive(Debug, Clone)]
pub struct Preprocessor {
    settings: Preprocessing,
    limits: DecodeLimits,
    /// `(value / 255 − mean) / std` in f32, in torchvision's order of operations, for each byte value.
    tables: Box<[[f32; 256]; 3]>,
}

impl Preprocessor {
    /// A preprocessor for checked `settings`.
    pub fn new(settings: Preprocessing, limits: DecodeLimits) -> Self {
        let mut tables = Box::new([[0.0; 256]; 3]);
        for (channel, table) in tables.iter_mut().enumerate() {
            for (value, entry) in table.iter_mut().enumerate() {
                *entry = (value as f32 / 255.0 - settings.mean[channel]) / settings.std[channel];
            }
        }
        Self { settings, limits, tables }
    }

    /// Height and width of the tensor, in pixels.
    pub fn side(&self) -> usize {
        self.settings.crop as usize
    }

    /// Decodes, and turns upright if asked.
    ///
    /// # Errors
    /// When the bytes are no picture of a known format, are damaged, or exceed the limits.
    pub fn decode(&self, bytes: &[u8]) -> Result<RgbImage, DecodeError> {
        decode(bytes, self.settings.exif, &self.limits)
    }

    /// Decodes, turns upright if asked, resizes, crops and normalises.
    ///
    /// # Errors
    /// When the bytes are no picture of a known format, are damaged, or exceed the limits.
    pub fn prepare(&self, bytes: &[u8]) -> Result<PixelTensor, DecodeError> {
        Ok(self.normalize(&self.decode(bytes)?))
    }

    /// Resizes, crops and normalises a decoded picture of any size.
    pub fn normalize(&self, picture: &RgbImage) -> PixelTensor {
        let side = self.side();
        let mut values = vec![0.0; 3 * side * side];
        self.normalize_into(picture, &mut values);
        PixelTensor { side, values }
    }

    /// As [`Self::normalize`], into `out`, whose length must be 3 × side × side.
    pub fn normalize_into(&self, picture: &RgbImage, out: &mut [f32]) {
        let side = self.side();
        let cropped = resize::shorter_side_then_centre_crop(picture, self.settings.shorter_side, self.settings.crop);
        for (channel, (plane, table)) in out.chunks_exact_mut(side * side).zip(self.tables.iter()).enumerate() {
            for (out, pixel) in plane.iter_mut().zip(cropped.chunks_exact(3)) {
                *out = table[usize::from(pixel[channel])];
            }
        }
    }

    /// A grey picture's tensor, for warming a network up.
    pub fn blank(&self) -> PixelTensor {
        let side = self.settings.crop;
        self.normalize(&RgbImage::from_pixel(side, side, image::Rgb([128; 3])))
    }
}
