//! Bilinear, antialiased resizing in Pillow's own 8-bit fixed-point arithmetic, computed only where the
//! centre crop keeps it: bit-equal to torchvision's `Resize` + `CenterCrop` on a PIL image, and bounded in
//! time and memory for extreme aspect ratios.

use std::ops::Range;

use image::RgbImage;

use super::picture::Picture;

#[cfg(target_arch = "x86_64")]
mod avx2;

/// Fractional bits of a weight; 32 − 8 bits of a sample − 2 of headroom.
const PRECISION_BITS: u32 = 22;
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// The input samples that make each output sample, and their fixed-point weights, which are not negative.
struct Taps {
    samples: Vec<Range<usize>>,
    /// As many for each output sample as the longest of `samples` has; zero beyond its own.
    weights: Vec<i32>,
    longest: usize,
}

/// Resizes so that the shorter side is `shorter_side`, then cuts the central `crop × crop` pixels.
/// Returns `crop × crop` RGB triples, row by row. Needs `1 ≤ crop ≤ shorter_side`.
pub(crate) fn shorter_side_then_centre_crop(picture: &Picture, shorter_side: u32, crop: u32) -> Vec<u8> {
    let (width, height) = picture.dimensions();
    let short = width.min(height);
    let scaled = |side: u32| {
        if side == short {
            u64::from(shorter_side)
        } else {
            (u64::from(shorter_side) as f64 * f64::from(side) / f64::from(short)) as u64
        }
    };
    resize(picture, &Taps::new(width, scaled(width), crop), &Taps::new(height, scaled(height), crop))
}

/// Resizes the whole picture to `side × side`, whatever its ratio.
#[cfg(feature = "train")]
pub(crate) fn stretch(picture: &Picture, side: u32) -> RgbImage {
    let (width, height) = picture.dimensions();
    let pixels = resize(picture, &Taps::new(width, side.into(), side), &Taps::new(height, side.into(), side));
    RgbImage::from_raw(side, side, pixels).unwrap_or_else(|| RgbImage::new(side, side))
}

impl Taps {
    /// Taps of the central `crop` of `scaled` output samples made from `input` samples.
    fn new(input: u32, scaled: u64, crop: u32) -> Self {
        // torchvision rounds the offset half to even.
        let offset = ((scaled - u64::from(crop)) as f64 / 2.0).round_ties_even() as u64;
        let scale = f64::from(input) / scaled as f64;
        let support = scale.max(1.0);
        let centres = (offset..offset + u64::from(crop)).map(|index| (index as f64 + 0.5) * scale);
        let samples = |centre: f64| {
            let first = (centre - support + 0.5).max(0.0) as usize;
            first..((centre + support + 0.5) as usize).min(input as usize)
        };
        let longest = centres.clone().map(|centre| samples(centre).len()).max().unwrap_or(0);
        let mut taps = Self { samples: Vec::new(), weights: vec![0; longest * crop as usize], longest };
        let mut raw = Vec::with_capacity(longest);
        for (centre, weights) in centres.zip(taps.weights.chunks_exact_mut(longest.max(1))) {
            let samples = samples(centre);
            raw.clear();
            raw.extend(samples.clone().map(|x| (1.0 - ((x as f64 - centre + 0.5) / support).abs()).max(0.0)));
            let total: f64 = raw.iter().sum();
            let inverse = if total == 0.0 { 1.0 } else { 1.0 / total };
            let unit = f64::from(1u32 << PRECISION_BITS);
            for (weight, raw) in weights.iter_mut().zip(&raw) {
                *weight = (0.5 + raw * inverse * unit) as i32;
            }
            taps.samples.push(samples);
        }
        taps
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
            let columns = Taps::new(width, scaled(width), crop);
            let rows = Taps::new(height, scaled(height), crop);
            let found = resize(&picture, &columns, &rows);
            assert_eq!(found, resize_anywhere(&picture, &columns, &rows), "{width}×{height} to {side}, {crop}");
        }
    }
}
