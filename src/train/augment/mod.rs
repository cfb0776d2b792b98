//! Varies training pictures, every draw from the generator that it is handed.

mod colour;
mod geometry;
mod policy;

pub use policy::Operation;

use fastrand::Rng;

use super::recipe::Augmentation;
use crate::pixels::{Picture, RgbImage, shorter_side_then_centre_crop, stretch};

/// Extremes of [`Augmentation::ColorJitter`]'s factors.
const JITTER: (f32, f32) = (0.6, 1.4);
/// Area and aspect ratio of [`Augmentation::ResizedCrop`] (torchvision's defaults).
const CROP_AREA: (f64, f64) = (0.08, 1.0);
const CROP_RATIO: (f64, f64) = (3.0 / 4.0, 4.0 / 3.0);

/// A square of the normalised input that is set to 0: left, top, right, bottom.
pub type Hole = [usize; 4];

/// Varies `picture` into one of `side × side` pixels. `shorter_side` is what evaluation resizes to before it crops.
pub fn vary(
    picture: &Picture,
    shorter_side: u32,
    side: u32,
    steps: &[Augmentation],
    rng: &mut Rng,
) -> (RgbImage, Option<Hole>) {
    let mut picture = if steps.contains(&Augmentation::ResizedCrop) {
        resized_crop(picture, side, rng)
    } else {
        let pixels = shorter_side_then_centre_crop(picture, shorter_side, side);
        RgbImage::from_raw(side, side, pixels).unwrap_or_else(|| RgbImage::new(side, side))
    };
    let mut hole = None;
    for step in steps {
        match step {
            Augmentation::ResizedCrop => {}
            Augmentation::Crop => {
                let pad = (side / 8) as i32;
                let draw = |rng: &mut Rng| rng.i32(-pad..=pad);
                picture = geometry::shifted(&picture, draw(rng), draw(rng));
            }
            Augmentation::Flip => {
                if rng.bool() {
                    picture = image::imageops::flip_horizontal(&picture);
                }
            }
            Augmentation::ColorJitter => jitter(&mut picture, rng),
            Augmentation::AutoAugment => picture = policy::auto_augment_cifar(picture, rng),
            Augmentation::TrivialAugment => picture = policy::trivial_augment(picture, rng),
            Augmentation::Cutout => hole = Some(cutout(side as usize, rng)),
        }
    }
    (picture, hole)
}

fn jitter(picture: &mut RgbImage, rng: &mut Rng) {
    let mut order = [0, 1, 2];
    rng.shuffle(&mut order);
    for which in order {
        let factor = JITTER.0 + (JITTER.1 - JITTER.0) * rng.f32();
        match which {
            0 => colour::brightness(picture, factor),
            1 => colour::contrast(picture, factor),
            _ => colour::colour(picture, factor),
        }
    }
}

/// Ten tries for a part of a random area and ratio that lies within the picture, else its centre, as torchvision's
/// `RandomResizedCrop`.
fn resized_crop(picture: &Picture, side: u32, rng: &mut Rng) -> RgbImage {
    let (width, height) = picture.dimensions();
    let area = f64::from(width) * f64::from(height);
    for _ in 0..10 {
        let target = area * (CROP_AREA.0 + (CROP_AREA.1 - CROP_AREA.0) * rng.f64());
        let ratio = (CROP_RATIO.0.ln() + (CROP_RATIO.1 / CROP_RATIO.0).ln() * rng.f64()).exp();
        let (w, h) = ((target * ratio).sqrt().round() as u32, (target / ratio).sqrt().round() as u32);
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let (x, y) = (rng.u32(0..=width - w), rng.u32(0..=height - h));
            return stretch(&picture.part(x, y, w, h), side);
        }
    }
    let ratio = f64::from(width) / f64::from(height);
    let (w, h) = if ratio < CROP_RATIO.0 {
        (width, (f64::from(width) / CROP_RATIO.0).round() as u32)
    } else if ratio > CROP_RATIO.1 {
        ((f64::from(height) * CROP_RATIO.1).round() as u32, height)
    } else {
        (width, height)
    };
    let (w, h) = (w.clamp(1, width), h.clamp(1, height));
    stretch(&picture.part((width - w) / 2, (height - h) / 2, w, h), side)
}

/// Half the side, around a centre anywhere in the picture.
fn cutout(side: usize, rng: &mut Rng) -> Hole {
    let half = side / 4;
    let (x, y) = (rng.usize(0..side), rng.usize(0..side));
    let span = |at: usize| (at.saturating_sub(half), (at + half).min(side));
    let ((left, right), (top, bottom)) = (span(x), span(y));
    [left, top, right, bottom]
}
