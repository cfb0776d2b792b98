//! The preprocessing that a network was trained with, as other programs write it down: timm's `config.json` and Hugging
//! Face's `preprocessor_config.json`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ValueEnum;
use serde_json::{Map, Value};

use super::FoldError;
use super::export::{Preset, read};
use crate::bundle::{CropOffset, Exif, Filter, Preprocessing, Resize, Scale};

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

/// Single settings that overrule what a source says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PreprocessingChanges {
    /// Which sides are resized.
    pub resize: Option<Resize>,
    /// To how many pixels.
    pub shorter_side: Option<u32>,
    /// By which filter.
    pub filter: Option<Filter>,
    /// What bytes are multiplied by.
    pub factor: Option<f64>,
    /// Mean per channel (R, G, B) of scaled values.
    pub mean: Option<[f32; 3]>,
    /// Standard deviation per channel (R, G, B).
    pub std: Option<[f32; 3]>,
}

impl PreprocessingChanges {
    /// `settings` with these changes.
    pub(super) fn apply(&self, settings: Preprocessing) -> Preprocessing {
        Preprocessing {
            resize: self.resize.unwrap_or(settings.resize),
            shorter_side: self.shorter_side.unwrap_or(settings.shorter_side),
            filter: self.filter.unwrap_or(settings.filter),
            scale: self.factor.map_or(settings.scale, Scale::Factor),
            mean: self.mean.unwrap_or(settings.mean),
            std: self.std.unwrap_or(settings.std),
            ..settings
        }
    }
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
        let &[3.0, height, width] = &size[..] else {
            return Err(format!("input_size is {size:?}; this version serves [3, side, side]"));
        };
        let crop = whole("input_size", height)?;
        if height != width {
            return Err(format!("input_size is {size:?}; this version serves square inputs only"));
        }
        let share = self.number("crop_pct")?.unwrap_or(0.875);
        let resize = match self.text("crop_mode").unwrap_or("center") {
            "center" => Resize::ShorterSide,
            "squash" => Resize::Both,
            other => return Err(format!("crop_mode is {other:?}; supported are center and squash")),
        };
        let filter = match self.text("interpolation").unwrap_or("bilinear") {
            // timm evaluates so where training draws one.
            "random" => Filter::Bilinear,
            other => Filter::from_str(other, true).map_err(|_| unknown_filter("interpolation", other))?,
        };
        Ok(Preprocessing {
            resize,
            filter,
            mean: self.three("mean")?.unwrap_or([0.485, 0.456, 0.406]),
            std: self.three("std")?.unwrap_or([0.229, 0.224, 0.225]),
            ..Preprocessing::bilinear((f64::from(crop) / share).floor() as u32, crop)
        })
    }

    /// As the image processors that work on PIL images do.
    fn hugging_face(&self) -> Result<Preprocessing, String> {
        if self.flag("do_pad") {
            return Err("do_pad is true, which is not supported".into());
        }
        if !self.flag("do_resize") {
            return Err("do_resize is not true; pictures must come to one size".into());
        }
        let crops = self.flag("do_center_crop");
        let (mut resize, mut side) = self.size("size", crops)?.ok_or("it has no size")?;
        let crop = match self.size("crop_size", false)?.filter(|_| crops) {
            Some((_, crop)) => crop,
            None => side,
        };
        match self.number("crop_pct")? {
            // ConvNeXt's: below 384 pixels the shorter side is resized to more, of which the middle is cut.
            Some(share) if resize == Resize::ShorterSide && side < 384 => side = (f64::from(side) / share) as u32,
            Some(_) => resize = Resize::Both,
            None if resize == Resize::ShorterSide && !crops => {
                return Err(
                    "it resizes the shorter edge and crops nothing, so that pictures keep different sizes".into()
                );
            }
            None => {}
        }
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
        let of = |name: &str, none: [f32; 3]| {
            if !normalizes {
                return Ok(none);
            }
            self.three(name)?.ok_or_else(|| format!("do_normalize is true, but it has no {name}"))
        };
        Ok(Preprocessing {
            resize,
            filter,
            crop_offset: CropOffset::Floor,
            scale,
            mean: of("image_mean", [0.0; 3])?,
            std: of("image_std", [1.0; 3])?,
            ..Preprocessing::bilinear(side, crop)
        })
    }

    /// `{"shortest_edge": 256}`, `{"height": 224, "width": 224}`, or a number, which is the shorter edge where `crops`.
    fn size(&self, name: &str, crops: bool) -> Result<Option<(Resize, u32)>, String> {
        let Some(found) = self.found.get(name) else { return Ok(None) };
        let number = |key: &str| found.get(key).and_then(Value::as_f64);
        if let Some(edge) = number("shortest_edge") {
            return Ok(Some((Resize::ShorterSide, whole(name, edge)?)));
        }
        if let Some(side) = found.as_f64() {
            return Ok(Some((if crops { Resize::ShorterSide } else { Resize::Both }, whole(name, side)?)));
        }
        match (number("height"), number("width")) {
            (Some(height), Some(width)) if height == width => Ok(Some((Resize::Both, whole(name, height)?))),
            _ => Err(format!(
                "{name} is {found}; this version serves one number, shortest_edge, or height equal to width"
            )),
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

    fn three(&self, name: &str) -> Result<Option<[f32; 3]>, String> {
        let Some(found) = self.numbers(name)? else { return Ok(None) };
        match found[..] {
            [r, g, b] => Ok(Some([r, g, b].map(|v| v as f32))),
            _ => Err(format!("{name} has {} values; this version serves three channels", found.len())),
        }
    }
}

fn unknown_filter(name: &str, found: &str) -> String {
    format!("{name} is {found:?}; supported are nearest, box, bilinear, hamming, bicubic and lanczos")
}

fn whole(name: &str, number: f64) -> Result<u32, String> {
    let fits = number.fract() == 0.0 && (1.0..=4096.0).contains(&number);
    if fits { Ok(number as u32) } else { Err(format!("{name} is {number}; expected a whole number from 1 to 4096")) }
}
