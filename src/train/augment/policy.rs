//! AutoAugment's policy for CIFAR and TrivialAugment: which operations, how often, how strong.

use fastrand::Rng;

use super::{colour, geometry};
use crate::pixels::RgbImage;

/// One operation at its strength.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operation {
    /// Rows move by this times their number.
    ShearX(f64),
    /// Columns move by this times their number.
    ShearY(f64),
    /// Pixels to the left.
    TranslateX(f64),
    /// Pixels upwards.
    TranslateY(f64),
    /// Degrees counter-clockwise.
    Rotate(f64),
    /// Factor; 1 changes nothing.
    Brightness(f32),
    /// Factor; 1 changes nothing.
    Colour(f32),
    /// Factor; 1 changes nothing.
    Contrast(f32),
    /// Factor; 1 changes nothing.
    Sharpness(f32),
    /// Bits kept.
    Posterize(u32),
    /// Values from here on are inverted.
    Solarize(f32),
    /// Every channel over the whole range.
    AutoContrast,
    /// Every channel's values equally frequent.
    Equalize,
    /// Every value inverted.
    Invert,
    /// Nothing.
    Identity,
}

impl Operation {
    /// The picture after the operation.
    pub fn apply(self, mut picture: RgbImage) -> RgbImage {
        match self {
            Self::ShearX(factor) => return geometry::shear_x(&picture, factor),
            Self::ShearY(factor) => return geometry::shear_y(&picture, factor),
            Self::TranslateX(by) => return geometry::affine(&picture, [1.0, 0.0, by, 0.0, 1.0, 0.0]),
            Self::TranslateY(by) => return geometry::affine(&picture, [1.0, 0.0, 0.0, 0.0, 1.0, by]),
            Self::Rotate(degrees) => return geometry::rotate(&picture, degrees),
            Self::Brightness(factor) => colour::brightness(&mut picture, factor),
            Self::Colour(factor) => colour::colour(&mut picture, factor),
            Self::Contrast(factor) => colour::contrast(&mut picture, factor),
            Self::Sharpness(factor) => colour::sharpness(&mut picture, factor),
            Self::Posterize(bits) => colour::posterize(&mut picture, bits),
            Self::Solarize(threshold) => colour::solarize(&mut picture, threshold),
            Self::AutoContrast => colour::auto_contrast(&mut picture),
            Self::Equalize => colour::equalize(&mut picture),
            Self::Invert => colour::invert(&mut picture),
            Self::Identity => {}
        }
        picture
    }
}

/// An operation of the policy, before its strength is known.
#[derive(Clone, Copy)]
enum Kind {
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
    Rotate,
    Brightness,
    Color,
    Contrast,
    Sharpness,
    Posterize,
    Solarize,
    AutoContrast,
    Equalize,
    Invert,
    Identity,
}

use Kind::{
    AutoContrast, Brightness, Color, Contrast, Equalize, Identity, Invert, Posterize, Rotate, Sharpness, ShearX,
    ShearY, Solarize, TranslateX, TranslateY,
};

/// Pairs of (operation, probability, strength of 0 to 9): AutoAugment's policy for CIFAR-10 (arXiv 1805.09501).
const CIFAR: [[(Kind, f32, u32); 2]; 25] = [
    [(Invert, 0.1, 0), (Contrast, 0.2, 6)],
    [(Rotate, 0.7, 2), (TranslateX, 0.3, 9)],
    [(Sharpness, 0.8, 1), (Sharpness, 0.9, 3)],
    [(ShearY, 0.5, 8), (TranslateY, 0.7, 9)],
    [(AutoContrast, 0.5, 0), (Equalize, 0.9, 0)],
    [(ShearY, 0.2, 7), (Posterize, 0.3, 7)],
    [(Color, 0.4, 3), (Brightness, 0.6, 7)],
    [(Sharpness, 0.3, 9), (Brightness, 0.7, 9)],
    [(Equalize, 0.6, 0), (Equalize, 0.5, 0)],
    [(Contrast, 0.6, 7), (Sharpness, 0.6, 5)],
    [(Color, 0.7, 7), (TranslateX, 0.5, 8)],
    [(Equalize, 0.3, 0), (AutoContrast, 0.4, 0)],
    [(TranslateY, 0.4, 3), (Sharpness, 0.2, 6)],
    [(Brightness, 0.9, 6), (Color, 0.2, 8)],
    [(Solarize, 0.5, 2), (Invert, 0.0, 0)],
    [(Equalize, 0.2, 0), (AutoContrast, 0.6, 0)],
    [(Equalize, 0.2, 0), (Equalize, 0.6, 0)],
    [(Color, 0.9, 9), (Equalize, 0.6, 0)],
    [(AutoContrast, 0.8, 0), (Solarize, 0.2, 8)],
    [(Brightness, 0.1, 3), (Color, 0.7, 0)],
    [(Solarize, 0.4, 5), (AutoContrast, 0.9, 0)],
    [(TranslateY, 0.9, 9), (TranslateY, 0.7, 9)],
    [(AutoContrast, 0.9, 0), (Solarize, 0.8, 3)],
    [(Equalize, 0.8, 0), (Invert, 0.1, 0)],
    [(TranslateY, 0.7, 9), (AutoContrast, 0.9, 0)],
];

/// TrivialAugment's operations, each as likely (arXiv 2103.10158, the wide space).
const TRIVIAL: [Kind; 14] = [
    Identity,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
    Rotate,
    Brightness,
    Color,
    Contrast,
    Sharpness,
    Posterize,
    Solarize,
    AutoContrast,
    Equalize,
];

/// The strongest that each operation gets.
struct Range {
    shear: f64,
    translate: f64,
    rotate: f64,
    enhance: f32,
    /// Bits taken away.
    posterize: f32,
}

/// One of the 25 pairs.
pub(super) fn auto_augment_cifar(mut picture: RgbImage, rng: &mut Rng) -> RgbImage {
    let translate = f64::from(picture.width()) * 150.0 / 331.0;
    let range = Range { shear: 0.3, translate, rotate: 30.0, enhance: 0.9, posterize: 4.0 };
    for (kind, probability, strength) in CIFAR[rng.usize(0..CIFAR.len())] {
        if rng.f32() < probability {
            picture = at_strength(kind, f64::from(strength) / 9.0, &range, rng.bool()).apply(picture);
        }
    }
    picture
}

/// One operation at one of 31 strengths.
pub(super) fn trivial_augment(picture: RgbImage, rng: &mut Rng) -> RgbImage {
    let range = Range { shear: 0.99, translate: 32.0, rotate: 135.0, enhance: 0.99, posterize: 6.0 };
    let kind = TRIVIAL[rng.usize(0..TRIVIAL.len())];
    at_strength(kind, f64::from(rng.u32(0..31)) / 30.0, &range, rng.bool()).apply(picture)
}

/// `kind` at `strength`, 0 to 1, of its range; `negative` turns the sign where there is one.
fn at_strength(kind: Kind, strength: f64, range: &Range, negative: bool) -> Operation {
    let sign = if negative { -1.0 } else { 1.0 };
    let enhanced = 1.0 + (sign * strength) as f32 * range.enhance;
    match kind {
        ShearX => Operation::ShearX(sign * strength * range.shear),
        ShearY => Operation::ShearY(sign * strength * range.shear),
        TranslateX => Operation::TranslateX((sign * strength * range.translate).trunc()),
        TranslateY => Operation::TranslateY((sign * strength * range.translate).trunc()),
        Rotate => Operation::Rotate(sign * strength * range.rotate),
        Brightness => Operation::Brightness(enhanced),
        Color => Operation::Colour(enhanced),
        Contrast => Operation::Contrast(enhanced),
        Sharpness => Operation::Sharpness(enhanced),
        Posterize => Operation::Posterize(8 - (strength as f32 * range.posterize).round_ties_even() as u32),
        Solarize => Operation::Solarize((255.0 * (1.0 - strength)) as f32),
        AutoContrast => Operation::AutoContrast,
        Equalize => Operation::Equalize,
        Invert => Operation::Invert,
        Identity => Operation::Identity,
    }
}
