//! From a picture to the input of a network.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::manifest::{ManifestError, value};

/// From a decoded RGB picture to the network's input: resize, centre crop, scale, subtract `mean`, divide by `std`. What
/// the first version of the schema could not say is left out where it has its default, so that older files and the
/// digests of older calibrations stay the same.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Preprocessing {
    /// Which sides are resized to `shorter_side`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub resize: Resize,
    /// Length in pixels that the shorter side, or both sides, are resized to.
    pub shorter_side: u32,
    /// The filter, as Pillow has it, antialiased.
    #[serde(default, skip_serializing_if = "is_default")]
    pub filter: Filter,
    /// Side in pixels of the square centre crop; the network's input height and width.
    pub crop: u32,
    /// Where an odd number of spare pixels goes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub crop_offset: CropOffset,
    /// From bytes to numbers.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scale: Scale,
    /// Mean per channel (R, G, B) of scaled values.
    pub mean: [f32; 3],
    /// Standard deviation per channel (R, G, B).
    pub std: [f32; 3],
    /// What to do with a photo's EXIF orientation.
    pub exif: Exif,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Which sides of a picture are resized.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Resize {
    /// The shorter one; the other keeps the ratio.
    #[default]
    ShorterSide,
    /// Both, whatever the ratio.
    Both,
}

/// A filter of Pillow's `Image.resize`.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq, Eq, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// The nearest pixel
    Nearest,
    /// The mean of the pixels
    Box,
    /// Linear interpolation
    #[default]
    Bilinear,
    /// As bilinear, sharper
    Hamming,
    /// Cubic interpolation
    Bicubic,
    /// A windowed sinc
    Lanczos,
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nearest => "nearest",
            Self::Box => "box",
            Self::Bilinear => "bilinear",
            Self::Hamming => "hamming",
            Self::Bicubic => "bicubic",
            Self::Lanczos => "lanczos",
        })
    }
}

/// Where the centre crop begins when an odd number of pixels is left over.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum CropOffset {
    /// Half of them, rounded half to even, as torchvision and timm do.
    #[default]
    HalfEven,
    /// Half of them, rounded down, as Hugging Face's processors do.
    Floor,
}

/// How a byte becomes a number before mean and deviation are applied, to the last bit.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// Divided by 255 in 32 bits, as torchvision and timm do.
    #[default]
    Div255,
    /// Multiplied by a factor in 64 bits, then rounded to 32, as Hugging Face's processors do; 1 keeps 0 to 255.
    Factor(f64),
}

/// What to do with a photo's EXIF orientation.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Exif {
    /// Turn the picture upright, as a viewer shows it.
    Apply,
    /// Take the stored pixels as they are, as torchvision's loaders do.
    Ignore,
}

impl Preprocessing {
    /// Bilinear, the shorter side, divided by 255, with mean 0 and deviation 1.
    pub fn bilinear(shorter_side: u32, crop: u32) -> Self {
        Self {
            resize: Resize::ShorterSide,
            shorter_side,
            filter: Filter::Bilinear,
            crop,
            crop_offset: CropOffset::HalfEven,
            scale: Scale::Div255,
            mean: [0.0; 3],
            std: [1.0; 3],
            exif: Exif::Apply,
        }
    }

    /// Whether the first version of the schema could say it.
    pub(super) fn is_of_first_schema(&self) -> bool {
        let Self { shorter_side, crop, mean, std, exif, .. } = *self;
        *self == Self { mean, std, exif, ..Self::bilinear(shorter_side, crop) }
    }

    /// Checks the ranges of sizes and statistics: within them, every pixel value is finite.
    ///
    /// # Errors
    /// Names the values that are out of range.
    pub fn check(&self) -> Result<(), ManifestError> {
        let Self { shorter_side, crop, mean, std, scale, .. } = *self;
        if let Scale::Factor(factor) = scale
            && !(1e-9..=1e3).contains(&factor.abs())
        {
            return Err(value("the factor of preprocessing.scale", &factor, "it must lie in 1e-9..=1000"));
        }
        if !(1..=4096).contains(&shorter_side) || !(1..=shorter_side).contains(&crop) {
            return Err(ManifestError::Size { shorter_side, crop });
        }
        let fit = mean.iter().all(|v| v.abs() <= 1e3) && std.iter().all(|v| (1e-6..=1e6).contains(v));
        if fit { Ok(()) } else { Err(ManifestError::Normalization { mean, std }) }
    }
}
