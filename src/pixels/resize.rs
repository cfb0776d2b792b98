//! Bilinear, antialiased resizing in Pillow's own 8-bit fixed-point arithmetic, computed only where the
//! centre crop keeps it: bit-equal to torchvision's `Resize` + `CenterCrop` on a PIL image, and bounded in
//! time and memory for extreme aspect ratios.

use std::ops::Range;

use image::RgbImage;

/// Fractional bits of a weight; 32 − 8 bits of a sample − 2 of headroom.
const PRECISION_BITS: u32 = 22;
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// The input samples that make one output sample, and their fixed-point weights.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// Resizes so that the shorter side is `shorter_side`, then cuts the central `crop × crop` pixels.
/// Returns `crop × crop` RGB triples, row by row. Needs `1 ≤ crop ≤ shorter_side`.
pub(crate) fn shorter_side_then_centre_crop(picture: &RgbImage, shorter_side: u32, crop: u32) -> Vec<u8> {
    let (width, height) = picture.dimensions();
    let short = width.min(height);
    let scaled = |side: u32| {
        if side == short {
            u64::from(shorter_side)
        } else {
            (u64::from(shorter_side) as f64 * f64::from(side) / f64::from(short)) as u64
        }
    };
    let columns = taps(width, scaled(width), crop);
    let rows = taps(height, scaled(height), crop);
    let needed = span(&rows);
    let narrow = horizontal(picture, &columns, needed.clone());
    vertical(&narrow, &rows, needed.start, columns.len())
}

/// Resizes the whole picture to `side × side`, whatever its ratio.
#[cfg(feature = "train")]
pub(crate) fn stretch(picture: &RgbImage, side: u32) -> RgbImage {
    let (width, height) = picture.dimensions();
    let columns = taps(width, side.into(), side);
    let rows = taps(height, side.into(), side);
    let needed = span(&rows);
    let narrow = horizontal(picture, &columns, needed.clone());
    RgbImage::from_raw(side, side, vertical(&narrow, &rows, needed.start, columns.len()))
        .unwrap_or_else(|| RgbImage::new(side, side))
}

/// Taps of the central `crop` of `scaled` output samples made from `input` samples.
fn taps(input: u32, scaled: u64, crop: u32) -> Vec<Taps> {
    // torchvision rounds the offset half to even.
    let offset = ((scaled - u64::from(crop)) as f64 / 2.0).round_ties_even() as u64;
    let scale = f64::from(input) / scaled as f64;
    let support = scale.max(1.0);
    (offset..offset + u64::from(crop))
        .map(|index| {
            let centre = (index as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(input as usize);
            let raw: Vec<f64> =
                (first..end).map(|x| (1.0 - ((x as f64 - centre + 0.5) / support).abs()).max(0.0)).collect();
            let total: f64 = raw.iter().sum();
            let inverse = if total == 0.0 { 1.0 } else { 1.0 / total };
            let unit = f64::from(1u32 << PRECISION_BITS);
            Taps { first, weights: raw.iter().map(|w| (0.5 + w * inverse * unit) as i32).collect() }
        })
        .collect()
}

/// The input samples that any of `taps` reads.
fn span(taps: &[Taps]) -> Range<usize> {
    let start = taps.iter().map(|t| t.first).min().unwrap_or(0);
    let end = taps.iter().map(|t| t.first + t.weights.len()).max().unwrap_or(0);
    start..end
}

fn clamp(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

fn horizontal(picture: &RgbImage, columns: &[Taps], rows: Range<usize>) -> Vec<u8> {
    let stride = picture.width() as usize * 3;
    let mut out = vec![0; rows.len() * columns.len() * 3];
    for (row, line) in rows.zip(out.chunks_exact_mut(columns.len() * 3)) {
        let source = &picture.as_raw()[row * stride..][..stride];
        for (taps, pixel) in columns.iter().zip(line.chunks_exact_mut(3)) {
            let mut sums = [HALF; 3];
            for (sample, &weight) in source[taps.first * 3..].chunks_exact(3).zip(&taps.weights) {
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

fn vertical(narrow: &[u8], rows: &[Taps], first_row: usize, columns: usize) -> Vec<u8> {
    let stride = columns * 3;
    let mut out = vec![0; rows.len() * stride];
    let mut sums = vec![HALF; stride];
    for (taps, line) in rows.iter().zip(out.chunks_exact_mut(stride)) {
        sums.fill(HALF);
        for (source, &weight) in narrow[(taps.first - first_row) * stride..].chunks_exact(stride).zip(&taps.weights) {
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
