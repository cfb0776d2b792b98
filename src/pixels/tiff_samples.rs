//! TIFFs whose samples `image` does not know, or knows in another way than Pillow: palettes, grey of 2 and 4 bits, grey with
//! alpha, CMYK, and colours that were multiplied by their alpha. The decoder gives their samples when it is told that they
//! are levels of grey; what they mean is applied here.

use image::RgbImage;
use tiff::decoder::DecodingResult;

use super::input::Watch;
use super::limits::{DecodeError, DecodeLimits};
use super::tiff::{Layout, check_work, damaged, stored};

/// What a pixel's samples mean.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Meaning {
    /// An index into colours.
    Palette(Vec<[u8; 3]>),
    /// A level of grey, with alpha behind it or without; white may be 0.
    Grey { white_is_zero: bool },
    /// Inks, 0 for none.
    Cmyk,
    /// Red, green and blue, each multiplied by alpha.
    Multiplied,
}

impl Meaning {
    /// None for what `image` reads as Pillow does, or what nobody reads.
    fn of(layout: &Layout) -> Option<Self> {
        let Layout { photometric, bits, samples, extra, is_planar, is_jpeg, .. } = *layout;
        if is_planar || is_jpeg {
            return None;
        }
        match (photometric, bits, samples) {
            (3, 1 | 2 | 4 | 8, 1) => {
                // Red for each index, then green, then blue, of 16 bits each.
                let count = 1 << bits;
                let high = |at: usize| layout.colours.get(at).map_or(0, |value| (value >> 8) as u8);
                Some(Self::Palette((0..count).map(|n| [high(n), high(n + count), high(n + 2 * count)]).collect()))
            }
            (0 | 1, 2 | 4, 1) | (0 | 1, 8, 2) => Some(Self::Grey { white_is_zero: photometric == 0 }),
            (5, 8, 4) => Some(Self::Cmyk),
            (2, 8, 4) if extra == 1 => Some(Self::Multiplied),
            _ => None,
        }
    }

    /// The colour of a pixel whose samples have `bits` bits.
    fn rgb(&self, samples: &[u8], bits: u32) -> [u8; 3] {
        match (self, samples) {
            (Self::Palette(colours), &[index, ..]) => colours.get(usize::from(index)).copied().unwrap_or_default(),
            (Self::Grey { white_is_zero }, &[level, ..]) => {
                // 15, 85 and 1 are what 4, 2 and 8 bits are scaled by.
                let level = (u32::from(level) * (255 / ((1 << bits) - 1))) as u8;
                [if *white_is_zero { 255 - level } else { level }; 3]
            }
            (Self::Cmyk, &[c, m, y, k]) => super::jpeg::rgb_of_inks_left([c, m, y, k].map(|ink| 255 - ink)),
            (Self::Multiplied, &[r, g, b, alpha]) => match alpha {
                0 => [0; 3],
                255 => [r, g, b],
                _ => [r, g, b].map(|value| (u32::from(value) * 255 / u32::from(alpha)).min(255) as u8),
            },
            _ => [0; 3],
        }
    }
}

/// The picture, where it is of a form that this module reads. Its fields were checked.
///
/// # Errors
/// When it is damaged, or too large.
pub(super) fn read(bytes: &[u8], limits: &DecodeLimits, watch: &Watch<'_>) -> Option<Result<RgbImage, DecodeError>> {
    let layout = Layout::of(bytes)?;
    let meaning = Meaning::of(&layout)?;
    Some(read_as(bytes, &layout, &meaning, limits, watch))
}

fn read_as(
    bytes: &[u8],
    layout: &Layout,
    meaning: &Meaning,
    limits: &DecodeLimits,
    watch: &Watch<'_>,
) -> Result<RgbImage, DecodeError> {
    let Layout { width, height, bits, samples, .. } = *layout;
    let pixels = u64::from(width) * u64::from(height);
    // The file as it is told to the decoder, its samples, and the picture.
    let bytes_taken = pixels.saturating_mul(u64::from(samples) + 4) + bytes.len() as u64;
    limits.check(width, height, bytes_taken)?;
    check_work(bytes)?;
    watch.allow(bytes_taken);
    let decoded = stored(&layout.as_grey(bytes), (pixels as usize).saturating_mul(samples as usize), watch)?;
    let DecodingResult::U8(data) = decoded else { return Err(damaged("its samples are not of 8 bits")) };
    let per_pixel = samples as usize;
    let row = (width as usize * per_pixel * bits as usize).div_ceil(8);
    if data.len() < row * height as usize {
        return Err(damaged(format!("it has {} of {} bytes", data.len(), row * height as usize)));
    }
    let mut out = Vec::with_capacity(3 * pixels as usize);
    for line in data.chunks_exact(row.max(1)).take(height as usize) {
        if bits == 8 {
            line.chunks_exact(per_pixel).for_each(|samples| out.extend(meaning.rgb(samples, bits)));
        } else {
            // One sample a pixel, the first in a byte's highest bits.
            let sample = |x: usize| {
                let at = x * bits as usize;
                line[at / 8] >> (8 - bits as usize - at % 8) & ((1 << bits) - 1)
            };
            (0..width as usize).for_each(|x| out.extend(meaning.rgb(&[sample(x)], bits)));
        }
    }
    RgbImage::from_raw(width, height, out).ok_or_else(|| damaged("its size and its data disagree"))
}
