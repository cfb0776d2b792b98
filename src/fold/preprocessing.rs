//! The preprocessing that a network was trained with, as other programs write it down: timm's `config.json` and Hugging
//! Face's `preprocessor_config.json`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ValueEnum;
use serde_json::{Map, Value};

use super::FoldError;
use super::export::{Preset, read};
use crate::bundle::{Color, CropOffset, Exif, Filter, MAX_SIDE, Preprocessing, Resize, Scale, Size};

/// Where the preprocessing is taken from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PreprocessingSource {
    /// A published pipeline.
    Preset(Preset),
    /// timm's `config.json`, or Hugging Face's `preprocessor_config.json`.
    File(PathBuf),
}

impl FromStr for PreprocessingSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(preset) = Preset::from_str(text, true) {
            return Ok(Self::Preset(preset));
        }
        let path = PathBuf::from(text);
        if path.is_file() {
            return Ok(Self::File(path));
        }
        let presets: Vec<String> = Preset::value_variants()
            .iter()
            .filter_map(|p| Some(p.to_possible_value()?.get_name().to_owned()))
            .collect();
        Err(format!(
            "it is neither a file nor one of {}: give timm's config.json, Hugging Face's preprocessor_config.json, or \
             one of these names",
            presets.join(", ")
        ))
    }
}

impl fmt::Display for PreprocessingSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Preset(preset) => {
                let name = preset.to_possible_value();
                f.write_str(name.as_ref().map_or("a preset", |name| name.get_name()))
            }
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// What is resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ResizeMode {
    /// The shorter side; the other keeps the ratio
    ShorterSide,
    /// Both sides, whatever the ratio
    Both,
    /// The picture, until it covers the size
    Cover,
    /// The picture, until it fits into the size; a border fills the rest
    Fit,
    /// Nothing
    None,
}

/// Single settings that overrule what a source says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PreprocessingChanges {
    /// The channels and their order.
    pub color: Option<Color>,
    /// What is resized.
    pub resize: Option<ResizeMode>,
    /// To how many pixels.
    pub resize_to: Option<Size>,
    /// The share of the resized picture's sides that the crop keeps: as `resize_to`, in another way.
    pub crop_fraction: Option<f64>,
    /// By which filter.
    pub filter: Option<Filter>,
    /// Where an odd number of spare pixels goes.
    pub crop_offset: Option<CropOffset>,
    /// Colour (R, G, B) of a border.
    pub fill: Option<[u8; 3]>,
    /// From bytes to numbers.
    pub scale: Option<Scale>,
    /// Mean per channel, in the network's order, of scaled values.
    pub mean: Option<Vec<f32>>,
    /// Standard deviation per channel, in the network's order.
    pub std: Option<Vec<f32>>,
}

impl PreprocessingChanges {
    /// `settings` with these changes.
    ///
    /// # Errors
    /// When they contradict each other.
    pub(super) fn apply(&self, settings: Preprocessing) -> Result<Preprocessing, FoldError> {
        let crop = settings.crop;
        let (mode, own) = match settings.resize {
            Resize::ShorterSide(pixels) => (ResizeMode::ShorterSide, Size::square(pixels)),
            Resize::Cover(size) => (ResizeMode::Cover, size),
            Resize::Fit(size) => (ResizeMode::Fit, size),
            Resize::Both(size) => (ResizeMode::Both, size),
            Resize::None => (ResizeMode::None, crop),
        };
        // As timm does.
        let share = |side: u32, fraction: f64| (f64::from(side) / fraction).floor() as u32;
        let of_crop = |fraction| Size { height: share(crop.height, fraction), width: share(crop.width, fraction) };
        let given = self.resize_to.or(self.crop_fraction.map(of_crop));
        let size = given.unwrap_or(own);
        let resize = match self.resize.unwrap_or(mode) {
            ResizeMode::None if given.is_some() => {
                let reason = "--resize none leaves pictures as they are: leave --resize-to and --crop-fraction out";
                return Err(FoldError::Input(reason.into()));
            }
            ResizeMode::ShorterSide if size.height == size.width => Resize::ShorterSide(size.height),
            ResizeMode::ShorterSide => {
                return Err(FoldError::Input(format!(
                    "only the shorter side is resized, which takes one number, but there are two, {size}: give \
                     --resize-to PIXELS, or --resize both, cover or fit"
                )));
            }
            ResizeMode::Cover => Resize::Cover(size),
            // What is to fit is not cut.
            ResizeMode::Fit => Resize::Fit(if mode == ResizeMode::Fit { size } else { given.unwrap_or(crop) }),
            ResizeMode::Both => Resize::Both(size),
            ResizeMode::None => Resize::None,
        };
        let color = self.color.unwrap_or(settings.color);
        // A source's numbers are in the order of its own channels.
        let turned = |mut numbers: Vec<f32>| {
            if (color == Color::Bgr) != (settings.color == Color::Bgr) {
                numbers.reverse();
            }
            numbers
        };
        Ok(Preprocessing {
            color,
            resize,
            filter: self.filter.unwrap_or(settings.filter),
            crop_offset: self.crop_offset.unwrap_or(settings.crop_offset),
            fill: self.fill.unwrap_or(settings.fill),
            scale: self.scale.unwrap_or(settings.scale),
            mean: self.mean.clone().unwrap_or_else(|| turned(settings.mean)),
            std: self.std.clone().unwrap_or_else(|| turned(settings.std)),
            ..settings
        })
    }
}

/// `stored` for inputs of `size`: what is resized keeps its ratio to the crop.
pub(super) fn at_size(stored: Preprocessing, size: Size) -> Preprocessing {
    let scaled = |length: u32, new: u32, old: u32| {
        let scaled = (u64::from(new) * u64::from(length)).div_ceil(u64::from(old.max(1)));
        u32::try_from(scaled).unwrap_or(u32::MAX)
    };
    let crop = stored.crop;
    let both = |old: Size| Size {
        height: scaled(old.height, size.height, crop.height),
        width: scaled(old.width, size.width, crop.width),
    };
    let resize = match stored.resize {
        _ if size == crop => stored.resize,
        Resize::ShorterSide(pixels) if size.height == size.width => {
            Resize::ShorterSide(scaled(pixels, size.height, crop.height.min(crop.width)))
        }
        // As timm does for inputs that are not square.
        Resize::ShorterSide(pixels) => Resize::Cover(both(Size::square(pixels))),
        Resize::Cover(old) => Resize::Cover(both(old)),
        Resize::Fit(old) => Resize::Fit(both(old)),
        Resize::Both(old) => Resize::Both(both(old)),
        Resize::None => Resize::None,
    };
    Preprocessing { resize, crop: size, ..stored }
}

/// Reads the preprocessing in the file at `path`, for inputs of `size` where that is known.
///
/// # Errors
/// When it is of another form, or asks for what is not supported; names it.
pub fn from_file(path: &Path, exif: Exif, size: Option<Size>) -> Result<Preprocessing, FoldError> {
    let fail = |reason: String| FoldError::Input(format!("{}: {reason}", path.display()));
    let found: Map<String, Value> = serde_json::from_slice(&read(path)?)
        .map_err(|error| fail(format!("it is not a JSON object: {error}: give timm's or Hugging Face's file")))?;
    let settings = Settings { found: found.get("pretrained_cfg").and_then(Value::as_object).unwrap_or(&found) };
    let preprocessing = if settings.found.contains_key("input_size") {
        settings.timm(size)
    } else if TYPE_KEYS.iter().any(|key| settings.found.contains_key(*key)) {
        settings.hugging_face().map(|found| match size {
            Some(size) => at_size(found, size),
            None => found,
        })
    } else {
        Err("it has neither timm's input_size nor Hugging Face's image_processor_type: give timm's config.json or \
             Hugging Face's preprocessor_config.json"
            .into())
    };
    let preprocessing = Preprocessing { exif, ..preprocessing.map_err(fail)? };
    preprocessing.check().map_err(|error| fail(error.to_string()))?;
    Ok(preprocessing)
}

/// Where Hugging Face's files name their processor, today and in older versions.
const TYPE_KEYS: [&str; 2] = ["image_processor_type", "feature_extractor_type"];

/// What a processor of Hugging Face does where its file does not say. Source: its classes in transformers 5.24.
struct Processor {
    /// Its name, without `ImageProcessor` and the like.
    name: &'static str,
    crops: bool,
    normalizes: bool,
    /// Whether a size of one number is that of both sides.
    square: bool,
    filter: Filter,
}

const fn processor(name: &'static str, crops: bool, square: bool, filter: Filter) -> Processor {
    Processor { name, crops, normalizes: true, square, filter }
}

/// Those that resize, crop, scale and normalise, and do nothing else.
const PROCESSORS: [Processor; 14] = [
    processor("ViT", false, true, Filter::Bilinear),
    processor("DeiT", true, true, Filter::Bicubic),
    processor("Beit", false, true, Filter::Bicubic),
    processor("Bit", true, false, Filter::Bicubic),
    processor("Blip", false, true, Filter::Bicubic),
    processor("CLIP", true, false, Filter::Bicubic),
    processor("ConvNext", false, false, Filter::Bicubic),
    processor("Levit", true, false, Filter::Bicubic),
    processor("MobileNetV1", true, false, Filter::Bilinear),
    processor("MobileNetV2", true, false, Filter::Bilinear),
    Processor { normalizes: false, ..processor("MobileViT", true, false, Filter::Bicubic) },
    processor("Pvt", false, true, Filter::Bicubic),
    processor("Segformer", false, true, Filter::Bilinear),
    processor("Siglip", false, false, Filter::Bicubic),
];

struct Settings<'a> {
    found: &'a Map<String, Value>,
}

impl Settings<'_> {
    /// As `timm.data.create_transform` makes it for evaluation, of inputs of `size` where that is given.
    fn timm(&self, given: Option<Size>) -> Result<Preprocessing, String> {
        let size = self.numbers("input_size")?.unwrap_or_default();
        let &[channels, height, width] = &size[..] else {
            return Err(format!("input_size is {size:?}; expected [channels, height, width]"));
        };
        let color = color_of("input_size", channels as usize)?;
        let own = Size { height: whole("input_size", height)?, width: whole("input_size", width)? };
        let crop = given.unwrap_or(own);
        let share = self.number("crop_pct")?.filter(|share| *share != 0.0).unwrap_or(0.875);
        if !(0.01..=1.0).contains(&share) {
            return Err(format!("crop_pct is {share}; supported are 0.01 to 1"));
        }
        let scaled = |side: u32| (f64::from(side) / share).floor() as u32;
        let size = Size { height: scaled(crop.height), width: scaled(crop.width) };
        let mean = self.channels("mean")?.unwrap_or_else(|| vec![0.485, 0.456, 0.406]);
        let shades = self.numbers("mean")?.unwrap_or_else(|| vec![0.485, 0.456, 0.406]);
        let resize = match self.text("crop_mode").unwrap_or("center") {
            "squash" => Resize::Both(size),
            "border" => Resize::Fit(size),
            "center" if size.height == size.width => Resize::ShorterSide(size.height),
            "center" => Resize::Cover(size),
            other => return Err(format!("crop_mode is {other:?}; supported are center, squash and border")),
        };
        let shade = |channel: usize| {
            let mean = shades.get(channel).or(shades.first()).copied().unwrap_or(0.0);
            (255.0 * mean).round_ties_even().clamp(0.0, 255.0) as u8
        };
        let fill = if matches!(resize, Resize::Fit(_)) { [0, 1, 2].map(shade) } else { [0; 3] };
        let filter = match self.text("interpolation").unwrap_or("bicubic") {
            // timm evaluates so where training draws one.
            "random" => Filter::Bilinear,
            other => Filter::from_str(other, true).map_err(|_| unknown_filter("interpolation", other))?,
        };
        Ok(Preprocessing {
            color,
            resize,
            filter,
            crop,
            fill,
            mean,
            std: self.channels("std")?.unwrap_or_else(|| vec![0.229, 0.224, 0.225]),
            ..Preprocessing::bilinear(crop.height, crop.height)
        })
    }

    /// As the image processors that work on PIL images do.
    fn hugging_face(&self) -> Result<Preprocessing, String> {
        let kind = TYPE_KEYS.iter().find_map(|key| self.text(key)).unwrap_or_default();
        let name = ["ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor"];
        let name = name.iter().find_map(|ending| kind.strip_suffix(ending)).unwrap_or(kind);
        let Some(processor) = PROCESSORS.iter().find(|processor| processor.name == name) else {
            let known = PROCESSORS.map(|processor| processor.name).join(", ");
            return Err(format!(
                "its processor is {kind:?}; supported are those of {known}: give single settings instead (--help)"
            ));
        };
        let unsupported =
            ["do_pad", "rescale_offset", "include_top", "do_convert_grayscale", "do_thumbnail", "do_align_long_axis"];
        for name in unsupported {
            if self.flag(name, false)? {
                return Err(format!("{name} is true, which is not supported: give single settings instead (--help)"));
            }
        }
        let crops = self.flag("do_center_crop", processor.crops)?;
        let resized = match self.flag("do_resize", true)? {
            true => self.size("size", processor.square)?.ok_or("it has no size")?,
            false => Resize::None,
        };
        let resized = match resized {
            // Its networks were trained with a little less than what is cut off.
            Resize::ShorterSide(side) if name == "Levit" => {
                Resize::ShorterSide((256.0 / 224.0 * f64::from(side)) as u32)
            }
            other => other,
        };
        let cropped = if crops { self.size("crop_size", true)?.and_then(size_of) } else { None };
        let share = match name {
            "ConvNext" => Some(self.number("crop_pct")?.unwrap_or(0.875)),
            _ => None,
        };
        if let Some(share) = share.filter(|share| !(0.01..=1.0).contains(share)) {
            return Err(format!("crop_pct is {share}; supported are 0.01 to 1"));
        }
        let (resize, crop) = match (resized, share) {
            // Below 384 pixels the shorter side is resized to more, of which the middle is cut.
            (Resize::ShorterSide(side), Some(share)) if side < 384 => {
                (Resize::ShorterSide((f64::from(side) / share) as u32), Size::square(side))
            }
            (Resize::ShorterSide(side), Some(_)) => (Resize::Both(Size::square(side)), Size::square(side)),
            (resize, _) => match cropped.or(size_of(resize)) {
                Some(crop) => (resize, crop),
                None if crops => return Err("do_center_crop is true, but it has no crop_size".into()),
                None if resize == Resize::None => {
                    return Err("it neither resizes nor crops; pictures must come to one size".into());
                }
                None => {
                    return Err(
                        "it resizes the shorter edge and crops nothing, so that pictures keep different sizes".into()
                    );
                }
            },
        };
        let filter = match self.number("resample")? {
            None => processor.filter,
            Some(0.0) => Filter::Nearest,
            Some(1.0) => Filter::Lanczos,
            Some(2.0) => Filter::Bilinear,
            Some(3.0) => Filter::Bicubic,
            Some(4.0) => Filter::Box,
            Some(5.0) => Filter::Hamming,
            Some(other) => return Err(format!("resample is {other}; Pillow's filters are 0 to 5")),
        };
        let scale = match self.flag("do_rescale", true)? {
            true => Scale::Factor(self.number("rescale_factor")?.unwrap_or(1.0 / 255.0)),
            false => Scale::Factor(1.0),
        };
        let flips = self.flag("do_flip_channel_order", name == "MobileViT")?;
        let normalizes = self.flag("do_normalize", processor.normalizes)?;
        if flips && normalizes {
            return Err("do_flip_channel_order and do_normalize are both true, which is not supported".into());
        }
        let of = |name: &str, none: f32| {
            if !normalizes {
                return Ok(vec![none; 3]);
            }
            self.channels(name)?.ok_or_else(|| format!("it normalises, but has no {name}"))
        };
        let mean = of("image_mean", 0.0)?;
        Ok(Preprocessing {
            color: if flips { Color::Bgr } else { color_of("image_mean", mean.len())? },
            resize,
            filter,
            crop,
            crop_offset: CropOffset::Floor,
            scale,
            mean,
            std: of("image_std", 1.0)?,
            ..Preprocessing::bilinear(crop.height, crop.height)
        })
    }

    /// `{"shortest_edge": 256}`, `{"height": 224, "width": 224}`, or a number, which is of both sides where `square`.
    fn size(&self, name: &str, square: bool) -> Result<Option<Resize>, String> {
        let Some(found) = self.found.get(name).filter(|found| !found.is_null()) else { return Ok(None) };
        let number = |key: &str| found.get(key).and_then(Value::as_f64);
        let keys: Vec<&str> = found.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
        if let (Some(edge), &["shortest_edge"]) = (number("shortest_edge"), &keys[..]) {
            return Ok(Some(Resize::ShorterSide(whole(name, edge)?)));
        }
        if let Some(side) = found.as_f64() {
            let side = whole(name, side)?;
            return Ok(Some(if square { Resize::Both(Size::square(side)) } else { Resize::ShorterSide(side) }));
        }
        match (number("height"), number("width")) {
            (Some(height), Some(width)) if keys.len() == 2 => {
                Ok(Some(Resize::Both(Size { height: whole(name, height)?, width: whole(name, width)? })))
            }
            _ => Err(format!("{name} is {found}; supported are one number, shortest_edge, and height with width")),
        }
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.found.get(name).and_then(Value::as_str)
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool, String> {
        match self.found.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| format!("{name} is {value}; expected true or false")),
        }
    }

    fn number(&self, name: &str) -> Result<Option<f64>, String> {
        match self.found.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| format!("{name} is {value}; expected a number")),
        }
    }

    fn numbers(&self, name: &str) -> Result<Option<Vec<f64>>, String> {
        let wrong = |value: &Value| format!("{name} is {value}; expected a list of numbers");
        match self.found.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let list = value.as_array().ok_or_else(|| wrong(value))?;
                list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>().ok_or_else(|| wrong(value)).map(Some)
            }
        }
    }

    /// One number for each channel, of which there are 1 or 3.
    fn channels(&self, name: &str) -> Result<Option<Vec<f32>>, String> {
        let Some(found) = self.numbers(name)? else { return Ok(None) };
        color_of(name, found.len())?;
        Ok(Some(found.into_iter().map(|value| value as f32).collect()))
    }
}

/// The size that every picture has after a resize, where it has one.
fn size_of(resize: Resize) -> Option<Size> {
    if let Resize::Both(size) = resize { Some(size) } else { None }
}

fn color_of(name: &str, channels: usize) -> Result<Color, String> {
    match channels {
        1 => Ok(Color::Grey),
        3 => Ok(Color::Rgb),
        other => Err(format!("{name} is for {other} channels; supported are 1 and 3")),
    }
}

fn unknown_filter(name: &str, found: &str) -> String {
    format!("{name} is {found:?}; supported are nearest, box, bilinear, hamming, bicubic and lanczos")
}

fn whole(name: &str, number: f64) -> Result<u32, String> {
    let fits = number.fract() == 0.0 && (1.0..=f64::from(MAX_SIDE)).contains(&number);
    let wrong = || format!("{name} is {number}; expected a whole number from 1 to {MAX_SIDE}");
    if fits { Ok(number as u32) } else { Err(wrong()) }
}
