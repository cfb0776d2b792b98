//! Operations on places, bit for bit those of Pillow's `Image.transform` with nearest neighbours.

use image::Rgb;

use crate::pixels::RgbImage;

/// What comes from beyond the picture, as in AutoAugment's own code.
const BEYOND: Rgb<u8> = Rgb([128; 3]);
/// Fractional bits of a place.
const BITS: u32 = 16;

/// The picture moved by (−dx, −dy): its pixel (x + dx, y + dy) at (x, y), black beyond.
pub(super) fn shifted(picture: &RgbImage, dx: i32, dy: i32) -> RgbImage {
    let (width, height) = picture.dimensions();
    RgbImage::from_fn(width, height, |x, y| {
        let from = (u32::try_from(x as i32 + dx), u32::try_from(y as i32 + dy));
        match from {
            (Ok(x), Ok(y)) if x < width && y < height => *picture.get_pixel(x, y),
            _ => Rgb([0; 3]),
        }
    })
}

/// The picture's pixel at (a·x + b·y + c, d·x + e·y + f) at (x, y).
pub(super) fn affine(picture: &RgbImage, [a, b, c, d, e, f]: [f64; 6]) -> RgbImage {
    let (width, height) = picture.dimensions();
    let fixed = |v: f64| (v * f64::from(1u32 << BITS) + 0.5).floor() as i64;
    let (dx, dy) = ((fixed(a), fixed(d)), (fixed(b), fixed(e)));
    let start = (fixed(c + a * 0.5 + b * 0.5), fixed(f + d * 0.5 + e * 0.5));
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y) = (i64::from(x), i64::from(y));
        let at = |start: i64, dx: i64, dy: i64| u32::try_from((start + dx * x + dy * y) >> BITS);
        match (at(start.0, dx.0, dy.0), at(start.1, dx.1, dy.1)) {
            (Ok(x), Ok(y)) if x < width && y < height => *picture.get_pixel(x, y),
            _ => BEYOND,
        }
    })
}

/// Rows moved by `factor` times their number.
pub(super) fn shear_x(picture: &RgbImage, factor: f64) -> RgbImage {
    affine(picture, [1.0, factor, 0.0, 0.0, 1.0, 0.0])
}

/// Columns moved by `factor` times their number.
pub(super) fn shear_y(picture: &RgbImage, factor: f64) -> RgbImage {
    affine(picture, [1.0, 0.0, 0.0, factor, 1.0, 0.0])
}

/// Counter-clockwise about the centre.
pub(super) fn rotate(picture: &RgbImage, degrees: f64) -> RgbImage {
    let (width, height) = picture.dimensions();
    let (centre_x, centre_y) = (f64::from(width) / 2.0, f64::from(height) / 2.0);
    // Pillow rounds to 15 places so that right angles are exact.
    let round = |v: f64| (v * 1e15).round() / 1e15;
    let angle = -(degrees.rem_euclid(360.0)).to_radians();
    let (cos, sin) = (round(angle.cos()), round(angle.sin()));
    let x = cos * -centre_x + sin * -centre_y + centre_x;
    let y = -sin * -centre_x + cos * -centre_y + centre_y;
    affine(picture, [cos, sin, x, -sin, cos, y])
}
