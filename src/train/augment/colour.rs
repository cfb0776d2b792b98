//! Operations on colours, bit for bit those of Pillow's `ImageOps` and `ImageEnhance`.

use crate::pixels::RgbImage;

/// Inverts every value.
pub(super) fn invert(picture: &mut RgbImage) {
    picture.iter_mut().for_each(|v| *v = 255 - *v);
}

/// Keeps the `bits` highest bits of every value.
pub(super) fn posterize(picture: &mut RgbImage, bits: u32) {
    let mask = !0u8 << 8u32.saturating_sub(bits).min(7);
    picture.iter_mut().for_each(|v| *v &= mask);
}

/// Inverts the values from `threshold` on.
pub(super) fn solarize(picture: &mut RgbImage, threshold: f32) {
    picture.iter_mut().filter(|v| f32::from(**v) >= threshold).for_each(|v| *v = 255 - *v);
}

/// Stretches every channel over the whole range.
pub(super) fn auto_contrast(picture: &mut RgbImage) {
    per_channel(picture, |counts| {
        let low = counts.iter().position(|&n| n > 0)?;
        let high = counts.iter().rposition(|&n| n > 0)?;
        if high <= low {
            return None;
        }
        let scale = 255.0 / (high - low) as f64;
        let offset = -(low as f64) * scale;
        Some(std::array::from_fn(|v| (v as f64 * scale + offset).clamp(0.0, 255.0) as u8))
    });
}

/// Makes every channel's values about equally frequent.
pub(super) fn equalize(picture: &mut RgbImage) {
    per_channel(picture, |counts| {
        let last = *counts.iter().rev().find(|n| **n > 0)?;
        let step = (counts.iter().sum::<usize>() - last) / 255;
        if step == 0 {
            return None;
        }
        let mut sum = step / 2;
        Some(std::array::from_fn(|v| {
            let value = (sum / step).min(255) as u8;
            sum += counts[v];
            value
        }))
    });
}

/// Blends with black: 0 is black, 1 the picture.
pub(super) fn brightness(picture: &mut RgbImage, factor: f32) {
    picture.iter_mut().for_each(|v| *v = blend(0, *v, factor));
}

/// Blends with the grey of the picture's mean luminance.
pub(super) fn contrast(picture: &mut RgbImage, factor: f32) {
    let pixels = picture.pixels().len().max(1) as f64;
    let sum: u64 = picture.pixels().map(|p| u64::from(luminance(p.0))).sum();
    let mean = (sum as f64 / pixels + 0.5) as u8;
    picture.iter_mut().for_each(|v| *v = blend(mean, *v, factor));
}

/// Blends with the picture in greys.
pub(super) fn colour(picture: &mut RgbImage, factor: f32) {
    for pixel in picture.pixels_mut() {
        let grey = luminance(pixel.0);
        pixel.0.iter_mut().for_each(|v| *v = blend(grey, *v, factor));
    }
}

/// Blends with the picture smoothed by (1 1 1; 1 5 1; 1 1 1)/13, whose border is the picture's own.
pub(super) fn sharpness(picture: &mut RgbImage, factor: f32) {
    let source = picture.clone();
    let (width, height) = source.dimensions();
    for (x, y, pixel) in picture.enumerate_pixels_mut() {
        let inner = x > 0 && y > 0 && x + 1 < width && y + 1 < height;
        for channel in 0..3 {
            let own = pixel.0[channel];
            let smooth = if inner {
                let mut sum = 4.0 * f32::from(own);
                for (dx, dy) in (0..3).flat_map(|dy| (0..3).map(move |dx| (dx, dy))) {
                    sum += f32::from(source.get_pixel(x + dx - 1, y + dy - 1).0[channel]);
                }
                (sum / 13.0 + 0.5) as u8
            } else {
                own
            };
            pixel.0[channel] = blend(smooth, own, factor);
        }
    }
}

/// ITU-R 601-2 luma in 16-bit fixed point.
fn luminance([r, g, b]: [u8; 3]) -> u8 {
    ((u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000) >> 16) as u8
}

/// `from` at 0, `to` at 1, beyond at other factors; cut off towards 0.
fn blend(from: u8, to: u8, factor: f32) -> u8 {
    (f32::from(from) + factor * (f32::from(to) - f32::from(from))).clamp(0.0, 255.0) as u8
}

/// Replaces every channel's values by the table that its histogram gives.
fn per_channel(picture: &mut RgbImage, table: impl Fn(&[usize; 256]) -> Option<[u8; 256]>) {
    for channel in 0..3 {
        let mut counts = [0; 256];
        picture.pixels().for_each(|p| counts[usize::from(p.0[channel])] += 1);
        if let Some(table) = table(&counts) {
            picture.pixels_mut().for_each(|p| p.0[channel] = table[usize::from(p.0[channel])]);
        }
    }
}
