//! From a picture to the input of a network.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::manifest::{ManifestError, value};

/// Longest side of a network's input, and of what a picture is resized to, in pixels.
pub const MAX_SIDE: u32 = 4096;

/// From a decoded picture to the network's input: colours, resize, centre crop with a border where the picture is smaller,
/// scale, subtract `mean`, divide by `std`. In JSON, what the first version of the schema could not say is left out where it
/// has its default, so that older files and the digests of older calibrations stay the same.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(try_from = "Form", into = "Form")]
pub struct Preprocessing {
    /// The channels and their order.
    pub color: Color,
    /// What pictures are resized to.
    pub resize: Resize,
    /// The filter, as Pillow has it, antialiased.
    pub filter: Filter,
    /// The centre crop: height and width of the network's input.
    pub crop: Size,
    /// Where an odd number of spare pixels goes.
    pub crop_offset: CropOffset,
    /// Colour (R, G, B) of the border around pictures that are smaller than the crop.
    pub fill: [u8; 3],
    /// From bytes to numbers.
    pub scale: Scale,
    /// Mean per channel, in the network's order, of scaled values.
    pub mean: Vec<f32>,
    /// Standard deviation per channel, in the network's order.
    pub std: Vec<f32>,
    /// The order of the input's axes.
    pub layout: Layout,
    /// What to do with a photo's EXIF orientation.
    pub exif: Exif,
}

/// As it is written in JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    #[serde(default, skip_serializing_if = "is_default")]
    color: Color,
    /// Absent where `shorter_side` says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resize: Option<Resize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shorter_side: Option<u32>,
    #[serde(default, skip_serializing_if = "is_default")]
    filter: Filter,
    crop: Size,
    #[serde(default, skip_serializing_if = "is_default")]
    crop_offset: CropOffset,
    #[serde(default, skip_serializing_if = "is_default")]
    fill: [u8; 3],
    #[serde(default, skip_serializing_if = "is_default")]
    scale: Scale,
    mean: Vec<f32>,
    std: Vec<f32>,
    #[serde(default, skip_serializing_if = "is_default")]
    layout: Layout,
    exif: Exif,
}

impl From<Preprocessing> for Form {
    fn from(settings: Preprocessing) -> Self {
        let Preprocessing { color, resize, filter, crop, crop_offset, fill, scale, mean, std, layout, exif } = settings;
        let (resize, shorter_side) = match resize {
            Resize::ShorterSide(pixels) => (None, Some(pixels)),
            other => (Some(other), None),
        };
        Self { color, resize, shorter_side, filter, crop, crop_offset, fill, scale, mean, std, layout, exif }
    }
}

impl TryFrom<Form> for Preprocessing {
    type Error = String;

    fn try_from(form: Form) -> Result<Self, String> {
        let Form { color, resize, shorter_side, filter, crop, crop_offset, fill, scale, mean, std, layout, exif } =
            form;
        let resize = match (resize, shorter_side) {
            (None, Some(pixels)) => Resize::ShorterSide(pixels),
            (Some(resize), None) => resize,
            (None, None) => return Err("missing field `shorter_side` or `resize`".into()),
            (Some(_), Some(_)) => return Err("both `shorter_side` and `resize` are given, which contradict".into()),
        };
        Ok(Self { color, resize, filter, crop, crop_offset, fill, scale, mean, std, layout, exif })
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Height and width in pixels. In JSON, a number where they are equal, else `[height, width]`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(from = "SizeForm", into = "SizeForm")]
pub struct Size {
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected pixels, or [height, width] in pixels")]
enum SizeForm {
    Square(u32),
    Both([u32; 2]),
}

impl From<SizeForm> for Size {
    fn from(form: SizeForm) -> Self {
        match form {
            SizeForm::Square(side) => Self::square(side),
            SizeForm::Both([height, width]) => Self { height, width },
        }
    }
}

impl From<Size> for SizeForm {
    fn from(size: Size) -> Self {
        if size.height == size.width { Self::Square(size.height) } else { Self::Both([size.height, size.width]) }
    }
}

impl Size {
    /// As high as wide.
    pub fn square(side: u32) -> Self {
        Self { height: side, width: side }
    }

    fn is_within(self) -> bool {
        (1..=MAX_SIDE).contains(&self.height) && (1..=MAX_SIDE).contains(&self.width)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { height, width } = self;
        if height == width { write!(f, "{height}") } else { write!(f, "{height}×{width}") }
    }
}

impl FromStr for Size {
    type Err = String;

    /// `224`, or height and width as `192x256`.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse().ok().filter(|side| (1..=MAX_SIDE).contains(side));
        let size = match text.split_once(['x', 'X', '×']) {
            Some((height, width)) => number(height).zip(number(width)).map(|(height, width)| Self { height, width }),
            None => number(text).map(Self::square),
        };
        size.ok_or_else(|| {
            format!("expected pixels, 1 to {MAX_SIDE}, such as 224, or height and width, such as 192x256")
        })
    }
}

/// The channels of a network's input.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq, Eq, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Color {
    /// Red, green, blue
    #[default]
    Rgb,
    /// Blue, green, red, as OpenCV and Caffe have them
    Bgr,
    /// One channel, as Pillow's mode L
    Grey,
}

impl Color {
    /// How many there are.
    pub fn channels(self) -> usize {
        if self == Self::Grey { 1 } else { 3 }
    }
}

impl fmt::Display for Color {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rgb => "RGB",
            Self::Bgr => "BGR",
            Self::Grey => "grey",
        })
    }
}

/// The order of an input's axes.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq, Eq, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Pictures, channels, rows, columns
    #[default]
    Nchw,
    /// Pictures, rows, columns, channels, as TensorFlow has them
    Nhwc,
}

/// Which pixels of a JPEG are decoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Pixels {
    /// All of them, as Pillow does.
    #[default]
    Exact,
    /// Every second, fourth or eighth, by libjpeg's scaled transform, where at least twice as many are left as the picture
    /// is resized to.
    Fast,
}

impl Pixels {
    /// Whether these are all.
    pub fn is_exact(&self) -> bool {
        *self == Self::Exact
    }

    /// `exact` or `fast`.
    pub fn name(self) -> &'static str {
        if self == Self::Fast { "fast" } else { "exact" }
    }
}

/// What a picture is resized to.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Resize {
    /// The shorter side to so many pixels; the other keeps the ratio, and what is left of a pixel is dropped, as
    /// torchvision and Hugging Face do.
    ShorterSide(u32),
    /// The smallest size of the picture's ratio that covers this one, rounded half to even, as timm's `ResizeKeepRatio` does.
    Cover(Size),
    /// The largest size of the picture's ratio that fits into this one, rounded alike.
    Fit(Size),
    /// This size, whatever the ratio.
    Both(Size),
    /// Its own.
    None,
}

impl fmt::Display for Resize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ShorterSide(pixels) => write!(f, "shorter side to {pixels}"),
            Self::Cover(size) => write!(f, "to cover {size}"),
            Self::Fit(size) => write!(f, "to fit into {size}"),
            Self::Both(size) => write!(f, "both sides to {size}"),
            Self::None => f.write_str("not resized"),
        }
    }
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
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq, Eq, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CropOffset {
    /// Half of them, rounded half to even, as torchvision and timm do; of a border, rounded down
    #[default]
    HalfEven,
    /// Half of them, rounded down, as Hugging Face's processors do; of a border, rounded up
    Floor,
}

/// How a byte becomes a number before mean and deviation are applied, to the last bit.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// Divided by 255 in 32 bits, as torchvision and timm do.
    #[default]
    Div255,
    /// Divided by a number in 32 bits, as Keras does with 127.5.
    Divisor(f32),
    /// Multiplied by a factor in 64 bits, then rounded to 32, as Hugging Face's processors do; 1 keeps 0 to 255.
    Factor(f64),
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Div255 => f.write_str("divided by 255"),
            Self::Divisor(divisor) => write!(f, "divided by {divisor}"),
            Self::Factor(factor) => write!(f, "times {factor}"),
        }
    }
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
    /// RGB, bilinear, the shorter side, divided by 255, with mean 0 and deviation 1, channels first.
    pub fn bilinear(shorter_side: u32, crop: u32) -> Self {
        Self {
            color: Color::Rgb,
            resize: Resize::ShorterSide(shorter_side),
            filter: Filter::Bilinear,
            crop: Size::square(crop),
            crop_offset: CropOffset::HalfEven,
            fill: [0; 3],
            scale: Scale::Div255,
            mean: vec![0.0; 3],
            std: vec![1.0; 3],
            layout: Layout::Nchw,
            exif: Exif::Apply,
        }
    }

    /// The shape of one picture's tensor: `[C, H, W]` or `[H, W, C]`, as the layout is.
    pub fn shape(&self) -> [usize; 3] {
        let (channels, height, width) = (self.color.channels(), self.crop.height as usize, self.crop.width as usize);
        match self.layout {
            Layout::Nchw => [channels, height, width],
            Layout::Nhwc => [height, width, channels],
        }
    }

    /// The longest side, in pixels, that a picture's shorter side is resized to; none where it is not resized.
    pub fn resized_side(&self) -> Option<u32> {
        match self.resize {
            Resize::ShorterSide(side) => Some(side),
            Resize::Cover(size) | Resize::Fit(size) | Resize::Both(size) => Some(size.height.max(size.width)),
            Resize::None => None,
        }
    }

    /// Length of the shorter side and side of the crop, of pictures as the trainer takes them: three channels first, the
    /// shorter side resized, a square cut out of the middle.
    pub fn trained(&self) -> Option<(u32, u32)> {
        let Resize::ShorterSide(shorter_side) = self.resize else { return None };
        let crop = self.crop.height;
        let Self { mean, std, scale, exif, .. } = self.clone();
        let plain = Self { mean, std, scale, exif, ..Self::bilinear(shorter_side, crop) };
        (*self == plain).then_some((shorter_side, crop))
    }

    /// Whether the first version of the schema could say it.
    pub(super) fn is_of_first_schema(&self) -> bool {
        self.trained().is_some() && self.scale == Scale::Div255
    }

    /// Checks the ranges of sizes and statistics: within them, every pixel value is finite.
    ///
    /// # Errors
    /// Names the values that are out of range.
    pub fn check(&self) -> Result<(), ManifestError> {
        let Self { resize, crop, mean, std, scale, .. } = self;
        match *scale {
            Scale::Factor(factor) if !(1e-9..=1e3).contains(&factor.abs()) => {
                return Err(value("the factor of preprocessing.scale", &factor, "it must lie in 1e-9..=1000"));
            }
            Scale::Divisor(divisor) if !(1e-3..=1e9).contains(&divisor.abs()) => {
                return Err(value("the divisor of preprocessing.scale", &divisor, "it must lie in 0.001..=1e9"));
            }
            _ => {}
        }
        let resized = match *resize {
            Resize::ShorterSide(pixels) => Some(Size::square(pixels)),
            Resize::Cover(size) | Resize::Fit(size) | Resize::Both(size) => Some(size),
            Resize::None => None,
        };
        // Only pictures that are fitted in, or keep their size, may be smaller both ways than what is cut out of them; of a
        // shorter side it is not known which one that is.
        let smaller = |size: Size| match resize {
            Resize::Fit(_) => false,
            Resize::ShorterSide(pixels) => *pixels < crop.height.min(crop.width),
            _ => size.height < crop.height || size.width < crop.width,
        };
        if !crop.is_within() || resized.is_some_and(|size| !size.is_within() || smaller(size)) {
            return Err(ManifestError::Size { resize: *resize, crop: *crop });
        }
        let channels = self.color.channels();
        if mean.len() != channels || std.len() != channels {
            return Err(ManifestError::Channels { color: self.color, mean: mean.clone(), std: std.clone() });
        }
        let fit = mean.iter().all(|v| v.abs() <= 1e3) && std.iter().all(|v| (1e-6..=1e6).contains(v));
        if fit { Ok(()) } else { Err(ManifestError::Normalization { mean: mean.clone(), std: std.clone() }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_first_schema_could_say_is_written_as_it_was() {
        let text =
            r#"{"shorter_side":256,"crop":224,"mean":[0.485,0.456,0.406],"std":[0.229,0.224,0.225],"exif":"apply"}"#;
        let settings: Preprocessing = serde_json::from_str(text).unwrap();
        assert!(settings.is_of_first_schema());
        assert_eq!(settings.trained(), Some((256, 224)));
        assert_eq!(serde_json::to_string(&settings).unwrap(), text);
    }

    #[test]
    fn every_setting_comes_back() {
        let settings = Preprocessing {
            color: Color::Grey,
            resize: Resize::Fit(Size { height: 100, width: 200 }),
            filter: Filter::Bicubic,
            crop: Size { height: 110, width: 200 },
            crop_offset: CropOffset::Floor,
            fill: [1, 2, 3],
            scale: Scale::Divisor(127.5),
            mean: vec![1.0],
            std: vec![2.0],
            layout: Layout::Nhwc,
            exif: Exif::Ignore,
        };
        settings.check().unwrap();
        assert!(!settings.is_of_first_schema());
        assert_eq!(settings.shape(), [110, 200, 1]);
        let text = serde_json::to_string(&settings).unwrap();
        assert!(
            text.starts_with(r#"{"color":"grey","resize":{"fit":[100,200]},"filter":"bicubic","crop":[110,200]"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Preprocessing>(&text).unwrap(), settings);
        for resize in [Resize::None, Resize::Both(Size::square(7)), Resize::Cover(Size::square(8))] {
            let settings = Preprocessing { resize, ..Preprocessing::bilinear(9, 7) };
            let text = serde_json::to_string(&settings).unwrap();
            assert_eq!(serde_json::from_str::<Preprocessing>(&text).unwrap(), settings, "{text}");
        }
        let both = text.replace("\"crop\"", "\"shorter_side\":5,\"crop\"");
        assert!(serde_json::from_str::<Preprocessing>(&both).unwrap_err().to_string().contains("which contradict"));
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let refused = |settings: Preprocessing| settings.check().unwrap_err().to_string();
        let plain = || Preprocessing::bilinear(8, 8);
        assert!(refused(Preprocessing { color: Color::Grey, ..plain() }).contains("grey has 1 channel"));
        assert!(refused(Preprocessing { mean: vec![0.0], ..plain() }).contains("RGB has 3 channels"));
        let crop = Size { height: 8, width: 9 };
        assert!(refused(Preprocessing { crop, ..Preprocessing::bilinear(7, 7) }).contains("crop 8×9"));
        Preprocessing { crop, ..plain() }.check().unwrap();
        assert!(refused(Preprocessing { crop, resize: Resize::Both(Size::square(8)), ..plain() }).contains("crop"));
        assert!(refused(Preprocessing { resize: Resize::None, crop: Size::square(0), ..plain() }).contains("crop 0"));
        assert!(refused(Preprocessing { scale: Scale::Divisor(0.0), ..plain() }).contains("divisor"));
        Preprocessing { crop, resize: Resize::Fit(Size::square(8)), ..plain() }.check().unwrap();
        Preprocessing { crop, resize: Resize::None, ..plain() }.check().unwrap();
    }
}
