//! What benches share: medians, and a picture.
#![allow(dead_code, reason = "none uses all of it")]

use std::io::Cursor;

/// The median of the rounds' ratios, and the least and the greatest.
pub(crate) fn ratio(of: &[f64], to: &[f64]) -> String {
    let all: Vec<f64> = of.iter().zip(to).map(|(a, b)| a / b).collect();
    let [least, most] = [f64::min, f64::max].map(|best| all.iter().copied().fold(all[0], best));
    format!("{:.3} ({least:.3} to {most:.3})", median(all))
}

/// The middle one.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A JPEG of 500×375 with the entropy of a photo.
pub(crate) fn photo() -> Vec<u8> {
    let mut state = 1u32;
    let image = image::RgbImage::from_fn(500, 375, |x, y| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let noise = (state >> 27) as f32;
        let wave = |period: f32| ((x as f32 / period).sin() + (y as f32 / (period * 1.3)).cos()) * 50.0 + 115.0 + noise;
        image::Rgb([wave(23.0) as u8, wave(41.0) as u8, wave(67.0) as u8])
    });
    let mut bytes = Cursor::new(Vec::new());
    // Writing to memory an image of this size cannot fail.
    let _ = image.write_to(&mut bytes, image::ImageFormat::Jpeg);
    bytes.into_inner()
}
