//! Antialiased resizing with Pillow's filters, in its own 8-bit fixed-point arithmetic, computed only where the centre crop
//! keeps it: bit-equal to torchvision's `Resize` + `CenterCrop` on a PIL image, and bounded in time and memory for extreme
//! aspect ratios.

use std::f64::consts::PI;
use std::ops::Range;

use image::RgbImage;

use super::picture::Picture;
use crate::bundle::{CropOffset, Filter, Preprocessing, Resize, Size};

#[cfg(target_arch = "x86_64")]
mod avx2;

/// Fractional bits of a weight; 32 − 8 bits of a sample − 2 of headroom.
const PRECISION_BITS: u32 = 22;
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// The input samples that make each output sample, and their fixed-point weights.
struct Taps {
    samples: Vec<Range<usize>>,
    /// As many for each output sample as the longest of `samples` has; zero beyond its own.
    weights: Vec<i32>,
    longest: usize,
}

/// Which samples of a resized side are kept, and how many of the border stand before them and in all.
struct Window {
    kept: Range<u64>,
    before: usize,
    length: usize,
}

impl Window {
    /// The central `crop` samples of `scaled`, with a border where those are fewer.
    fn new(scaled: u64, crop: u32, offset: CropOffset) -> Self {
        let length = crop as usize;
        match scaled.checked_sub(crop.into()) {
            Some(spare) => {
                let first = offset.of_spare(spare);
                Self { kept: first..first + u64::from(crop), before: 0, length }
            }
            None => Self { kept: 0..scaled, before: offset.of_border(u64::from(crop) - scaled) as usize, length },
        }
    }
}

/// Resizes as `settings` say, then cuts the central pixels out, or puts a border around them. Returns RGB triples, row by
/// row, as many as the crop says. `settings` must be checked.
pub(crate) fn resize_then_centre_crop(picture: &Picture, settings: &Preprocessing) -> Vec<u8> {
    let (width, height) = picture.dimensions();
    let (scaled_width, scaled_height) = scaled((width, height), settings.resize);
    let window = |scaled: u64, crop: u32| Window::new(scaled, crop, settings.crop_offset);
    let (across, down) = (window(scaled_width, settings.crop.width), window(scaled_height, settings.crop.height));
    let columns = Taps::new(width, scaled_width, across.kept.clone(), settings.filter);
    let rows = Taps::new(height, scaled_height, down.kept.clone(), settings.filter);
    let pixels = if vertical_first((width, height), (scaled_width, scaled_height)) {
        // Both passes round to bytes, so their order shows.
        resize_vertically_first(picture, &columns, &rows)
    } else {
        resize(picture, &columns, &rows)
    };
    if pixels.len() == 3 * across.length * down.length {
        pixels
    } else {
        framed(&pixels, &across, &down, settings.color.shade(settings.fill))
    }
}

/// Width and height of a picture after its resize.
fn scaled((width, height): (u32, u32), resize: Resize) -> (u64, u64) {
    let ratio = |size: Size| {
        let (rows, columns) = (f64::from(height) / f64::from(size.height), f64::from(width) / f64::from(size.width));
        if matches!(resize, Resize::Fit(_)) { rows.max(columns) } else { rows.min(columns) }
    };
    let rounded = |side: u32, ratio: f64| ((f64::from(side) / ratio).round_ties_even() as u64).max(1);
    match resize {
        Resize::None => (width.into(), height.into()),
        Resize::Both(size) => (size.width.into(), size.height.into()),
        Resize::Cover(size) | Resize::Fit(size) => (rounded(width, ratio(size)), rounded(height, ratio(size))),
        Resize::ShorterSide(pixels) => {
            let short = width.min(height);
            let of = |side: u32| match side == short {
                true => u64::from(pixels),
                false => (u64::from(pixels) as f64 * f64::from(side) / f64::from(short)) as u64,
            };
            (of(width), of(height))
        }
    }
}

/// `pixels`, as many as are kept of both sides, within a border of the colour `fill`.
fn framed(pixels: &[u8], across: &Window, down: &Window, fill: [u8; 3]) -> Vec<u8> {
    let mut out = fill.repeat(across.length * down.length);
    let (line, stride) = (3 * (across.kept.end - across.kept.start) as usize, 3 * across.length);
    let rows = out.chunks_exact_mut(stride.max(1)).skip(down.before);
    for (row, from) in rows.zip(pixels.chunks_exact(line.max(1))) {
        row[3 * across.before..][..line].copy_from_slice(from);
    }
    out
}

/// Whether Pillow (from 13 on, its pull request 9549) resizes the height before the width: where more than twice as many
/// rows as columns go.
fn vertical_first((width, height): (u32, u32), (scaled_width, scaled_height): (u64, u64)) -> bool {
    let less = |from: u32, to: u64| i64::from(from) - i64::try_from(to).unwrap_or(i64::MAX);
    let (columns, rows) = (less(width, scaled_width), less(height, scaled_height));
    rows > 0 && rows > columns.saturating_mul(2)
}

fn resize_vertically_first(picture: &RgbImage, columns: &Taps, rows: &Taps) -> Vec<u8> {
    let stride = picture.width() as usize * 3;
    let span = rows.span();
    let short = vertical(&picture.as_raw()[span.start * stride..span.end * stride], rows, picture.width() as usize);
    match RgbImage::from_raw(picture.width(), rows.len() as u32, short) {
        Some(short) => horizontal(&short, columns, 0..rows.len()),
        // The buffer has as many bytes as rows and columns say.
        None => vec![0; rows.len() * columns.len() * 3],
    }
}

/// As [`resize_then_centre_crop`], bilinear, with the shorter side resized to `shorter_side`.
#[cfg(feature = "train")]
pub(crate) fn shorter_side_then_centre_crop(picture: &Picture, shorter_side: u32, crop: u32) -> Vec<u8> {
    resize_then_centre_crop(picture, &Preprocessing::bilinear(shorter_side, crop))
}

impl CropOffset {
    /// How many of `spare` samples stand before what is kept.
    fn of_spare(self, spare: u64) -> u64 {
        match self {
            Self::HalfEven => (spare as f64 / 2.0).round_ties_even() as u64,
            Self::Floor => spare / 2,
        }
    }

    /// How many samples of a border stand before the picture.
    fn of_border(self, missing: u64) -> u64 {
        match self {
            Self::HalfEven => missing / 2,
            Self::Floor => missing.div_ceil(2),
        }
    }
}

impl Filter {
    /// How far from a sample's centre the filter reaches, in output samples.
    fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.0,
            Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    /// The filter's value. Source: Pillow's Resample.c.
    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let sinc = |x: f64| {
            if x == 0.0 {
                return 1.0;
            }
            let x = x * PI;
            x.sin() / x
        };
        match self {
            Self::Nearest => 1.0,
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Hamming => match x.abs() {
                0.0 => 1.0,
                x if x >= 1.0 => 0.0,
                x => {
                    let x = x * PI;
                    x.sin() / x * (0.54 + 0.46 * x.cos())
                }
            },
            Self::Bicubic => match x.abs() {
                x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
                x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
                _ => 0.0,
            },
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

/// Resizes the whole picture to `side × side`, whatever its ratio.
#[cfg(feature = "train")]
pub(crate) fn stretch(picture: &Picture, side: u32) -> RgbImage {
    let (width, height) = picture.dimensions();
    let taps = |length: u32| Taps::new(length, side.into(), 0..side.into(), Filter::Bilinear);
    let pixels = resize(picture, &taps(width), &taps(height));
    RgbImage::from_raw(side, side, pixels).unwrap_or_else(|| RgbImage::new(side, side))
}

impl Taps {
    /// Taps of the output samples `kept` of `scaled` made from `input` samples.
    fn new(input: u32, scaled: u64, kept: Range<u64>, filter: Filter) -> Self {
        let scale = f64::from(input) / scaled as f64;
        let filter_scale = scale.max(1.0);
        let support = filter.support() * filter_scale;
        let inverse_scale = 1.0 / filter_scale;
        let count = (kept.end - kept.start) as usize;
        let centres = kept.clone().map(|index| (index as f64 + 0.5) * scale);
        if filter == Filter::Nearest {
            return Self::nearest(input, scale, kept);
        }
        let samples = |centre: f64| {
            let first = (centre - support + 0.5).max(0.0) as usize;
            first..((centre + support + 0.5) as usize).min(input as usize)
        };
        let longest = centres.clone().map(|centre| samples(centre).len()).max().unwrap_or(0);
        let mut taps = Self { samples: Vec::new(), weights: vec![0; longest * count], longest };
        let mut raw = Vec::with_capacity(longest);
        for (centre, weights) in centres.zip(taps.weights.chunks_exact_mut(longest.max(1))) {
            let samples = samples(centre);
            raw.clear();
            raw.extend(samples.clone().map(|x| filter.weight((x as f64 - centre + 0.5) * inverse_scale)));
            let total: f64 = raw.iter().sum();
            let unit = f64::from(1u32 << PRECISION_BITS);
            for (weight, raw) in weights.iter_mut().zip(&raw) {
                let share = if total == 0.0 { *raw } else { raw / total };
                *weight = (share * unit + if share < 0.0 { -0.5 } else { 0.5 }) as i32;
            }
            taps.samples.push(samples);
        }
        taps
    }

    /// As Pillow's affine transform, which adds the scale up sample by sample; of sizes that Pillow cannot make, only from
    /// the first sample that is kept.
    fn nearest(input: u32, scale: f64, kept: Range<u64>) -> Self {
        const MOST: u64 = 1 << 20;
        let first = if kept.end > MOST { kept.start } else { 0 };
        let mut at = (first as f64 + 0.5) * scale;
        let mut samples = Vec::with_capacity((kept.end - kept.start) as usize);
        for index in first..kept.end {
            if index >= kept.start {
                let sample = (at as usize).min(input as usize - 1);
                samples.push(sample..sample + 1);
            }
            at += scale;
        }
        Self { weights: vec![1 << PRECISION_BITS; samples.len()], samples, longest: 1 }
    }

    /// Output samples.
    fn len(&self) -> usize {
        self.samples.len()
    }

    /// Of each output sample, its input samples and their weights.
    fn iter(&self) -> impl Iterator<Item = (&Range<usize>, &[i32])> {
        let weights = self.weights.chunks_exact(self.longest.max(1));
        self.samples.iter().zip(weights).map(|(samples, weights)| (samples, &weights[..samples.len()]))
    }

    /// The input samples that any output sample is made of.
    fn span(&self) -> Range<usize> {
        let start = self.samples.iter().map(|samples| samples.start).min().unwrap_or(0);
        start..self.samples.iter().map(|samples| samples.end).max().unwrap_or(0)
    }
}

fn resize(picture: &RgbImage, columns: &Taps, rows: &Taps) -> Vec<u8> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2; it was just asked.
        #[allow(unsafe_code)]
        return unsafe { avx2::resize(picture, columns, rows) };
    }
    resize_anywhere(picture, columns, rows)
}

/// For processors of any kind.
fn resize_anywhere(picture: &RgbImage, columns: &Taps, rows: &Taps) -> Vec<u8> {
    vertical(&horizontal(picture, columns, rows.span()), rows, columns.len())
}

fn clamp(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// The rows `rows` of the picture, as many pixels wide as `columns`.
fn horizontal(picture: &RgbImage, columns: &Taps, rows: Range<usize>) -> Vec<u8> {
    let stride = picture.width() as usize * 3;
    let mut out = vec![0; rows.len() * columns.len() * 3];
    for (row, line) in rows.zip(out.chunks_exact_mut(columns.len() * 3)) {
        let source = &picture.as_raw()[row * stride..][..stride];
        for ((samples, weights), pixel) in columns.iter().zip(line.chunks_exact_mut(3)) {
            let mut sums = [HALF; 3];
            for (sample, &weight) in source[samples.start * 3..].chunks_exact(3).zip(weights) {
                for (sum, &value) in sums.iter_mut().zip(sample) {
                    *sum += i32::from(value) * weight;
                }
            }
            for (value, sum) in pixel.iter_mut().zip(sums) {
                *value = clamp(sum);
            }
        }
    }
    out
}

/// `narrow`, which holds the span of `rows`, as many pixels high as `rows`. Inlined to be compiled for the caller's
/// processor.
#[inline(always)]
fn vertical(narrow: &[u8], rows: &Taps, columns: usize) -> Vec<u8> {
    let stride = columns * 3;
    let first = rows.span().start;
    let mut out = vec![0; rows.len() * stride];
    let mut sums = vec![HALF; stride];
    for ((samples, weights), line) in rows.iter().zip(out.chunks_exact_mut(stride)) {
        sums.fill(HALF);
        for (source, &weight) in narrow[(samples.start - first) * stride..].chunks_exact(stride).zip(weights) {
            for (sum, &value) in sums.iter_mut().zip(source) {
                *sum += i32::from(value) * weight;
            }
        }
        for (value, &sum) in line.iter_mut().zip(&sums) {
            *value = clamp(sum);
        }
    }
    out
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn a_processor_with_avx2_gives_the_same_bytes_as_any_other() {
        if !std::arch::is_x86_feature_detected!("avx2") {
            eprintln!("this processor has no AVX2: its half of the comparison is the other half");
        }
        let mut state = 1u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Extremes often: there the sums are largest.
            match state >> 29 {
                0 => 0,
                1 | 2 => 255,
                _ => (state >> 21) as u8,
            }
        };
        for (width, height, side, crop) in [
            (1, 1, 1, 1),
            (1, 1, 32, 32),
            (1, 700, 8, 5),
            (700, 1, 8, 8),
            (2, 3, 256, 224),
            (31, 33, 32, 32),
            (97, 64, 96, 64),
            (348, 348, 256, 224),
            (501, 375, 32, 31),
            (1500, 20, 20, 20),
            (1023, 769, 3, 2),
        ] {
            let picture = RgbImage::from_fn(width, height, |_, _| image::Rgb([noise(), noise(), noise()]));
            let short = width.min(height);
            let scaled = |of: u32| u64::from(of) * side / u64::from(short);
            use Filter::{Bicubic, Bilinear, Box, Hamming, Lanczos, Nearest};
            for filter in [Nearest, Box, Bilinear, Hamming, Bicubic, Lanczos] {
                let taps = |length: u32| {
                    let kept = Window::new(scaled(length), crop, CropOffset::HalfEven).kept;
                    Taps::new(length, scaled(length), kept, filter)
                };
                let (columns, rows) = (taps(width), taps(height));
                let found = resize(&picture, &columns, &rows);
                let expected = resize_anywhere(&picture, &columns, &rows);
                assert_eq!(found, expected, "{width}×{height} to {side}, {crop}, {filter:?}");
            }
        }
    }
}
