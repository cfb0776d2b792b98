//! Turns encoded image bytes into the tensor a bundle asks for. Knows nothing of HTTP.

mod decode;
mod exif;
mod gif;
mod input;
mod jpeg;
mod limits;
mod look;
mod picture;
mod pnm;
mod resize;
mod tiff;
mod tiff_planes;
mod tiff_samples;
mod webp;

pub use decode::{decode, decode_at_least};
pub use image::RgbImage;
pub use limits::{DecodeError, DecodeLimits};
pub use look::look;
use picture::Channels;
pub use picture::{Picture, PictureError, TensorBatch, TensorLength};
#[cfg(feature = "train")]
pub(crate) use resize::{shorter_side_then_centre_crop, stretch};

use std::path::Path;

use crate::bundle::{Color, Pixels, Preprocessing, Scale};
use crate::stop::Stop;

/// Endings of the files that are taken for pictures when a folder is read.
pub const ENDINGS: [&str; 12] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"];

/// Pixels that a picture keeps for each that it is resized to, where not all of them are decoded.
const SPARE: u32 = 2;

/// Whether `path` ends as a picture does, in upper or lower case.
pub fn has_picture_ending(path: &Path) -> bool {
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    ENDINGS.iter().any(|known| ending.eq_ignore_ascii_case(known))
}

/// The preprocessing of one bundle, with its per-channel tables made once.
#[derive(Debug, Clone)]
pub struct Preprocessor {
    settings: Preprocessing,
    limits: DecodeLimits,
    /// The network's value for each byte of each channel, in the order of operations that [`Scale`] names.
    channels: Channels,
}

impl Scale {
    /// A byte, scaled.
    fn of(self, value: u8) -> f32 {
        match self {
            Self::Div255 => f32::from(value) / 255.0,
            Self::Divisor(divisor) => f32::from(value) / divisor,
            Self::Factor(factor) => (f64::from(value) * factor) as f32,
        }
    }
}

impl Preprocessor {
    /// A preprocessor for checked `settings`.
    pub fn new(settings: Preprocessing, limits: DecodeLimits) -> Self {
        let Preprocessing { scale, mean, std, .. } = &settings;
        let channels = Channels::new(&settings, |byte, channel| (scale.of(byte) - mean[channel]) / std[channel]);
        Self { settings, limits, channels }
    }

    /// The shape of a picture's tensor.
    pub fn shape(&self) -> [usize; 3] {
        self.settings.shape()
    }

    /// Decodes, and turns upright if asked.
    ///
    /// # Errors
    /// When the bytes are no picture of a known format, are damaged, or exceed the limits, or `stop` is asked for.
    pub fn decode(&self, bytes: &[u8], stop: &Stop) -> Result<Picture, DecodeError> {
        let picture = decode_at_least(bytes, self.settings.exif, &self.limits, stop, self.least())?;
        Ok(if self.settings.color == Color::Grey { picture.grey() } else { picture })
    }

    /// Pixels along a picture's shorter side that suffice, where not all of them are decoded.
    pub fn least(&self) -> Option<u32> {
        let side = self.settings.resized_side().filter(|_| self.limits.pixels == Pixels::Fast);
        side.map(|side| side.saturating_mul(SPARE))
    }

    /// Decodes, turns upright if asked, resizes, crops and normalises: as [`Self::normalize`].
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn prepare(&self, bytes: &[u8], stop: &Stop) -> Result<Vec<f32>, DecodeError> {
        Ok(self.normalize(&self.decode(bytes, stop)?))
    }

    /// Resizes, crops and normalises a decoded picture of any size: its tensor, of [`Self::shape`], row by row.
    pub fn normalize(&self, picture: &Picture) -> Vec<f32> {
        let cropped = self.crop(picture);
        let mut values = Vec::with_capacity(self.shape().iter().product());
        self.channels.write(cropped.as_chunks::<3>().0, &mut values);
        values
    }

    /// As [`Self::normalize`], as one more picture of `batch`.
    ///
    /// # Errors
    /// When the batch is of another shape; then nothing is added.
    pub fn normalize_into(&self, picture: &Picture, batch: &mut TensorBatch) -> Result<(), TensorLength> {
        batch.push(&self.crop(picture), &self.channels)
    }

    /// RGB triples, as many as the crop has pixels.
    fn crop(&self, picture: &Picture) -> Vec<u8> {
        resize::resize_then_centre_crop(picture, &self.settings)
    }

    /// A grey picture's tensor, for warming a network up.
    pub fn blank(&self) -> Vec<f32> {
        let [a, b, c] = self.shape();
        let mut values = Vec::with_capacity(a * b * c);
        self.channels.write(
            &vec![[128; 3]; self.settings.crop.height as usize * self.settings.crop.width as usize],
            &mut values,
        );
        values
    }
}
