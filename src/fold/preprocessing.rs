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
        let (mode, size) = match settings.resize {
            Resize::ShorterSide(pixels) => (ResizeMode::ShorterSide, Size::square(pixels)),
            Resize::Cover(size) => (ResizeMode::Cover, size),
            Resize::Fit(size) => (ResizeMode::Fit, size),
            Resize::Both(size) => (ResizeMode::Both, size),
            Resize::None => (ResizeMode::None, crop),
        };
        // As timm does.
        let share = |side: u32, fraction: f64| (f64::from(side) / fraction).floor() as u32;
        let of_crop = |fraction| Size { height: share(crop.height, fraction), width: share(crop.width, fraction) };
        let size = self.resize_to.or(self.crop_fraction.map(of_crop)).unwrap_or(size);
        let resize = match self.resize.unwrap_or(mode) {
            ResizeMode::ShorterSide if size.height == size.width => Resize::ShorterSide(size.height),
            ResizeMode::ShorterSide => {
                return Err(FoldError::Input(format!(
                    "--resize-to {size} has two numbers, but only the shorter side is resized: give one, or --resize both, \
                     cover or fit"
                )));
            }
            ResizeMode::Cover => Resize::Cover(size),
            ResizeMode::Fit => Resize::Fit(size),
            ResizeMode::Both => Resize::Both(size),
            ResizeMode::None => Resize::None,
        };
        Ok(Preprocessing {
            color: self.color.unwrap_or(settings.color),
            resize,
            filter: self.filter.unwrap_or(settings.filter),
            crop_offset: self.crop_offset.unwrap_or(settings.crop_offset),
            fill: self.fill.unwrap_or(settings.fill),
            scale: self.scale.unwrap_or(settings.scale),
            mean: self.mean.clone().unwrap_or(settings.mean),
            std: self.std.clone().unwrap_or(settings.std),
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

/// Reads the preprocessing in the file at `path`.
///
/// # Errors
/// When it is of another form, or asks for what is not supported; names it.
pub fn from_file(path: &Path, exif: Exif) -> Result<Preprocessing, FoldError> {
    let fail = |reason: String| FoldError::Input(format!("{}: {reason}", path.display()));
    let found: Map<String, Value> = serde_json::from_slice(&read(path)?)
        .map_err(|error| fail(format!("it is not a JSON object: {error}: give timm's or Hugging Face's file")))?;
    let settings = Settings { found: found.get("pretrained_cfg").and_then(Value::as_object).unwrap_or(&found) };
    let preprocessing = if settings.found.contains_key("input_size") {
        settings.timm()
    } else if settings.found.keys().any(|key| key.starts_with("do_") || key.starts_with("image_")) {
        settings.hugging_face()
    } else {
        Err("it has neither timm's input_size nor Hugging Face's do_resize, do_normalize and so on: give timm's \
             config.json or Hugging Face's preprocessor_config.json"
            .into())
    };
    let preprocessing = Preprocessing { exif, ..preprocessing.map_err(fail)? };
    preprocessing.check().map_err(|error| fail(error.to_string()))?;
    Ok(preprocessing)
}

struct Settings<'a> {
    found: &'a Map<String, Value>,
}

impl Settings<'_> {
    /// As `timm.data.create_transform` makes it for evaluation.
    fn timm(&self) -> Result<Preprocessing, String> {
        let size = self.numbers("input_size")?.unwrap_or_default();
        let &[channels, height, width] = &size[..] else {
            return Err(format!("input_size is {size:?}; expected [channels, height, width]"));
        };
        let color = color_of("input_size", channels as usize)?;
        let crop = Size { height: whole("input_size", height)?, width: whole("input_size", width)? };
        let share = self.number("crop_pct")?.filter(|share| *share != 0.0).unwrap_or(0.875);
        let scaled = |side: u32| (f64::from(side) / share).floor() as u32;
        let size = Size { height: scaled(crop.height), width: scaled(crop.width) };
        let mean = self.channels("mean")?.unwrap_or_else(|| vec![0.485, 0.456, 0.406]);
        let resize = match self.text("crop_mode").unwrap_or("center") {
            "squash" => Resize::Both(size),
            "border" => Resize::Fit(size),
            "center" if size.height == size.width => Resize::ShorterSide(size.height),
            "center" => Resize::Cover(size),
            other => return Err(format!("crop_mode is {other:?}; supported are center, squash and border")),
        };
        let shade = |channel: usize| {
            let mean = mean.get(channel).or(mean.first()).copied().map_or(0.0, f64::from);
            (255.0 * mean).round_ties_even().clamp(0.0, 255.0) as u8
        };
        let fill = if matches!(resize, Resize::Fit(_)) { [0, 1, 2].map(shade) } else { [0; 3] };
        let filter = match self.text("interpolation").unwrap_or("bilinear") {
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
        if self.flag("do_pad") {
            return Err("do_pad is true, which is not supported".into());
        }
        let crops = self.flag("do_center_crop");
        let resized =
            if self.flag("do_resize") { self.size("size", crops)?.ok_or("it has no size")? } else { Resize::None };
        let cropped = if crops { self.size("crop_size", false)?.and_then(size_of) } else { None };
        let (resize, crop) = match (resized, self.number("crop_pct")?) {
            // ConvNeXt's: below 384 pixels the shorter side is resized to more, of which the middle is cut.
            (Resize::ShorterSide(side), Some(share)) if side < 384 => {
                (Resize::ShorterSide((f64::from(side) / share) as u32), cropped.unwrap_or(Size::square(side)))
            }
            (Resize::ShorterSide(side), Some(_)) => (Resize::Both(Size::square(side)), Size::square(side)),
            (resize, _) => match cropped.or(size_of(resize)) {
                Some(crop) => (resize, crop),
                None if resize == Resize::None => {
                    return Err("do_resize and do_center_crop are not true; pictures must come to one size".into());
                }
                None => {
                    return Err(
                        "it resizes the shorter edge and crops nothing, so that pictures keep different sizes".into()
                    );
                }
            },
        };
        let filter = match self.number("resample")?.map_or(2, |code| code as i64) {
            0 => Filter::Nearest,
            1 => Filter::Lanczos,
            2 => Filter::Bilinear,
            3 => Filter::Bicubic,
            4 => Filter::Box,
            5 => Filter::Hamming,
            other => return Err(format!("resample is {other}; Pillow's filters are 0 to 5")),
        };
        let scale = match self.flag("do_rescale") || !self.found.contains_key("do_rescale") {
            true => Scale::Factor(self.number("rescale_factor")?.unwrap_or(1.0 / 255.0)),
            false => Scale::Factor(1.0),
        };
        let normalizes = self.flag("do_normalize");
        let of = |name: &str, none: f32| {
            if !normalizes {
                return Ok(vec![none; 3]);
            }
            self.channels(name)?.ok_or_else(|| format!("do_normalize is true, but it has no {name}"))
        };
        let mean = of("image_mean", 0.0)?;
        Ok(Preprocessing {
            color: color_of("image_mean", mean.len())?,
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

    /// `{"shortest_edge": 256}`, `{"height": 224, "width": 224}`, or a number, which is the shorter edge where `crops`.
    fn size(&self, name: &str, crops: bool) -> Result<Option<Resize>, String> {
        let Some(found) = self.found.get(name) else { return Ok(None) };
        let number = |key: &str| found.get(key).and_then(Value::as_f64);
        if let Some(edge) = number("shortest_edge") {
            return Ok(Some(Resize::ShorterSide(whole(name, edge)?)));
        }
        if let Some(side) = found.as_f64() {
            let side = whole(name, side)?;
            return Ok(Some(if crops { Resize::ShorterSide(side) } else { Resize::Both(Size::square(side)) }));
        }
        match (number("height"), number("width")) {
            (Some(height), Some(width)) => {
                Ok(Some(Resize::Both(Size { height: whole(name, height)?, width: whole(name, width)? })))
            }
            _ => Err(format!("{name} is {found}; supported are one number, shortest_edge, and height with width")),
        }
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.found.get(name).and_then(Value::as_str)
    }

    fn flag(&self, name: &str) -> bool {
        self.found.get(name).and_then(Value::as_bool).unwrap_or(false)
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
