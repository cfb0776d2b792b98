//! TIFFs that the decoder does not know, or would not put together rightly: tiles whose colours lie in planes of their own, and
//! YCbCr that is not JPEG, whose colours are stored for blocks of pixels. Both are images of grey levels to the decoder when
//! the file's fields say so; what it gives is put together here.
//!
//! Source of the colours: libtiff's `TIFFYCbCrToRGBInit` and `TIFFYCbCrtoRGB` (tif_color.c), in 16-bit fixed point; of images
//! without compression and with the colours of each pixel, Pillow's `ConvertYCbCr.c`, in 6-bit fixed point.

use image::RgbImage;
use tiff::decoder::DecodingResult;

use super::input::Watch;
use super::limits::{DecodeError, DecodeLimits};
use super::tiff::{
    BITS, COMPRESSION, EXTRA_SAMPLES, HEIGHT, Image, Layout, PHOTOMETRIC, PLANES, ROWS_PER_STRIP, SAMPLE_FORMAT,
    SAMPLES, TILE_BYTES, TILE_HEIGHT, TILE_OFFSETS, TILE_WIDTH, WIDTH, check_work, damaged, stored, unsupported,
};

const PREDICTOR: u16 = 317;
const COEFFICIENTS: u16 = 529;
const SUBSAMPLING: u16 = 530;
const REFERENCE: u16 = 532;
/// A tag that no decoder looks at.
const NO_TAG: u16 = 65_000;

/// The picture, where it is of a form that this module reads. Its fields were checked.
///
/// # Errors
/// When it is damaged, or too large.
pub(super) fn read(bytes: &[u8], limits: &DecodeLimits, watch: &Watch<'_>) -> Option<Result<RgbImage, DecodeError>> {
    let layout = Layout::of(bytes)?;
    let image = Image::of(bytes)?;
    let one = |tag| image.numbers(tag).next();
    let is_tiled = one(TILE_WIDTH).is_some();
    if layout.is_planar && is_tiled && layout.photometric == 2 && [8, 16].contains(&layout.bits) {
        return Some(planes(&image, &layout, limits, watch));
    }
    if layout.photometric == 6 && !layout.is_jpeg && !layout.is_planar && layout.bits == 8 && layout.samples == 3 {
        return Some(blocks(&image, &layout, limits, watch));
    }
    None
}

/// The grey levels of `file`, of `size` samples, 16 bits as their high bytes.
fn levels(file: &[u8], size: usize, watch: &Watch<'_>) -> Result<Vec<u8>, DecodeError> {
    let levels: Vec<u8> = match stored(file, size.saturating_mul(2), watch)? {
        DecodingResult::U8(levels) => levels,
        DecodingResult::U16(levels) => levels.into_iter().map(|level| (level >> 8) as u8).collect(),
        _ => return Err(damaged("its samples are not whole numbers of 8 or 16 bits")),
    };
    if levels.len() == size { Ok(levels) } else { Err(damaged("its size and its data disagree")) }
}

/// Red, green and blue, each an image of its own.
fn planes(
    image: &Image<'_>,
    layout: &Layout,
    limits: &DecodeLimits,
    watch: &Watch<'_>,
) -> Result<RgbImage, DecodeError> {
    let Layout { width, height, samples, bits, .. } = *layout;
    let pixels = u64::from(width) * u64::from(height);
    let bytes_taken = pixels.saturating_mul(3 + 2 * u64::from(bits / 8)) + image.bytes.len() as u64;
    limits.check(width, height, bytes_taken)?;
    check_work(image.bytes)?;
    watch.allow(bytes_taken);
    let mut picture = vec![0; 3 * pixels as usize];
    for plane in 0..3 {
        let numbers = [(SAMPLES, 1), (BITS, u64::from(bits)), (PHOTOMETRIC, 1), (PLANES, 1), (SAMPLE_FORMAT, 1)];
        let mut file = image.with(&numbers)?;
        image.keep_part(&mut file, TILE_OFFSETS, plane, u64::from(samples))?;
        image.keep_part(&mut file, TILE_BYTES, plane, u64::from(samples))?;
        image.rename(&mut file, EXTRA_SAMPLES, NO_TAG);
        let levels = levels(&file, pixels as usize, watch)?;
        picture.chunks_exact_mut(3).zip(levels).for_each(|(rgb, level)| rgb[plane as usize] = level);
    }
    RgbImage::from_raw(width, height, picture).ok_or_else(|| damaged("its size and its data disagree"))
}

/// How the luma of `across`×`down` pixels lies before the two colours that they share.
#[derive(Debug, Clone, Copy)]
struct Block {
    across: u32,
    down: u32,
}

impl Block {
    fn of(image: &Image<'_>) -> Result<Self, DecodeError> {
        let mut sides = image.numbers(SUBSAMPLING);
        // What a file that does not say it has.
        let (across, down) = (sides.next().unwrap_or(2), sides.next().unwrap_or(2));
        let fits = |side| [1, 2, 4].contains(&side);
        if !fits(across) || !fits(down) || down > across.max(2) {
            return Err(unsupported(format!("its colours are YCbCr, each for {across}×{down} pixels")));
        }
        Ok(Self { across: across as u32, down: down as u32 })
    }

    fn bytes(self) -> u32 {
        self.across * self.down + 2
    }
}

/// YCbCr, as rows of blocks.
fn blocks(
    image: &Image<'_>,
    layout: &Layout,
    limits: &DecodeLimits,
    watch: &Watch<'_>,
) -> Result<RgbImage, DecodeError> {
    let Layout { width, height, .. } = *layout;
    let block = Block::of(image)?;
    let pixels = u64::from(width) * u64::from(height);
    let row = u64::from(width.div_ceil(block.across)) * u64::from(block.bytes());
    let rows = height.div_ceil(block.down);
    let bytes_taken = pixels.saturating_mul(3) + row.saturating_mul(u64::from(rows)) + image.bytes.len() as u64;
    limits.check(width, height, bytes_taken)?;
    check_work(image.bytes)?;
    watch.allow(bytes_taken);
    let one = |tag| image.numbers(tag).next();
    if one(PREDICTOR).is_some_and(|predictor| predictor != 1) {
        return Err(unsupported("its colours are YCbCr without JPEG, and stored as differences"));
    }
    let mut numbers =
        vec![(WIDTH, row), (HEIGHT, u64::from(rows)), (SAMPLES, 1), (BITS, 8), (PHOTOMETRIC, 1), (SAMPLE_FORMAT, 1)];
    // Sides of strips and tiles are whole blocks, but for a strip that is as high as the image.
    let whole = |side: u64, by: u32| side.is_multiple_of(u64::from(by));
    let misfit = || damaged("its strips or tiles divide blocks of YCbCr");
    match (one(TILE_WIDTH), one(TILE_HEIGHT)) {
        (Some(across), Some(down)) if whole(across, block.across) && whole(down, block.down) => {
            numbers.push((TILE_WIDTH, across / u64::from(block.across) * u64::from(block.bytes())));
            numbers.push((TILE_HEIGHT, down / u64::from(block.down)));
        }
        (Some(_), _) => return Err(misfit()),
        (None, _) => match one(ROWS_PER_STRIP) {
            Some(rows) if rows >= u64::from(height) => {
                numbers.push((ROWS_PER_STRIP, u64::from(height.div_ceil(block.down))))
            }
            Some(rows) if whole(rows, block.down) => numbers.push((ROWS_PER_STRIP, rows / u64::from(block.down))),
            Some(_) => return Err(misfit()),
            None => {}
        },
    }
    let size = usize::try_from(row.saturating_mul(u64::from(rows))).unwrap_or(usize::MAX);
    let levels = levels(&image.with(&numbers)?, size, watch)?;
    // Without compression, Pillow reads the samples by itself.
    let is_plain = one(COMPRESSION) == Some(1) && block.across * block.down == 1;
    let colours = if is_plain { Colours::of_pillow() } else { Colours::of(image) };
    let mut picture = RgbImage::new(width, height);
    let luma = (block.across * block.down) as usize;
    for (y, line) in (0..height).step_by(block.down as usize).zip(levels.chunks_exact(row as usize)) {
        for (x, stored) in (0..width).step_by(block.across as usize).zip(line.chunks_exact(block.bytes() as usize)) {
            let (cb, cr) = (stored[luma], stored[luma + 1]);
            for (n, &level) in (0..).zip(&stored[..luma]) {
                let at = (x + n % block.across, y + n / block.across);
                if let Some(pixel) = picture.get_pixel_mut_checked(at.0, at.1) {
                    pixel.0 = colours.rgb(level, cb, cr);
                }
            }
        }
    }
    Ok(picture)
}

/// What a level of each component adds to red, green and blue.
struct Colours {
    luma: [i32; 256],
    red: [i32; 256],
    blue: [i32; 256],
    green_of_red: [i32; 256],
    green_of_blue: [i32; 256],
    /// Bits behind the point of the latter two.
    shift: u32,
}

const SHIFT: u32 = 16;
const HALF: i32 = 1 << (SHIFT - 1);

impl Colours {
    fn of(image: &Image<'_>) -> Self {
        let coefficients = image.fractions(COEFFICIENTS).first_chunk().copied();
        let reference = image.fractions(REFERENCE).first_chunk().copied();
        Self::with(
            coefficients.unwrap_or([0.299, 0.587, 0.114]),
            reference.unwrap_or([0.0, 255.0, 128.0, 255.0, 128.0, 255.0]),
        )
    }

    /// With what the file says of red, green and blue, and the levels of black and white in Y, Cb and Cr.
    fn with([red, green, blue]: [f32; 3], reference: [f32; 6]) -> Self {
        let fixed = |x: f32| (f64::from(x.clamp(0.0, 2.0)) * f64::from(1 << SHIFT) + 0.5) as i32;
        let (of_red, of_blue) = (2.0 - 2.0 * red, 2.0 - 2.0 * blue);
        let [d1, d3] = [of_red, of_blue].map(fixed);
        let [d2, d4] = [red * of_red / green, blue * of_blue / green].map(|x| -fixed(x));
        // A level between the references for black and white, in 0..range.
        let value = |level: i32, black: f32, white: f32, range: f32| {
            let span = if white - black == 0.0 { 1.0 } else { white - black };
            (level.saturating_sub(black as i32) as f32 * range / span).clamp(-4096.0, 4096.0) as i32
        };
        let table = |of: &dyn Fn(i32) -> i32| std::array::from_fn(|n| of(n as i32));
        let cr = |n: i32| value(n - 128, reference[4] - 128.0, reference[5] - 128.0, 127.0);
        let cb = |n: i32| value(n - 128, reference[2] - 128.0, reference[3] - 128.0, 127.0);
        Self {
            luma: table(&|n| value(n, reference[0], reference[1], 255.0)),
            red: table(&|n| d1.wrapping_mul(cr(n)).wrapping_add(HALF) >> SHIFT),
            blue: table(&|n| d3.wrapping_mul(cb(n)).wrapping_add(HALF) >> SHIFT),
            green_of_red: table(&|n| d2.wrapping_mul(cr(n))),
            green_of_blue: table(&|n| d4.wrapping_mul(cb(n)).wrapping_add(HALF)),
            shift: SHIFT,
        }
    }

    /// Those of JPEG, in fewer bits.
    fn of_pillow() -> Self {
        let table = |factor: f64| std::array::from_fn(|n| (factor * (n as f64 - 128.0) * 64.0 + 0.5) as i32);
        Self {
            luma: std::array::from_fn(|n| n as i32),
            red: table(1.402).map(|value| value >> 6),
            blue: table(1.772).map(|value| value >> 6),
            green_of_red: table(-0.71414),
            green_of_blue: table(-0.34414),
            shift: 6,
        }
    }

    fn rgb(&self, luma: u8, cb: u8, cr: u8) -> [u8; 3] {
        let (luma, cb, cr) = (self.luma[usize::from(luma)], usize::from(cb), usize::from(cr));
        let green = self.green_of_blue[cb].wrapping_add(self.green_of_red[cr]) >> self.shift;
        [luma + self.red[cr], luma + green, luma + self.blue[cb]].map(|value| value.clamp(0, 255) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_reference_and_no_coefficient_is_too_wild() {
        let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.5, 4e9, 255.0];
        for a in values {
            for b in values {
                let colours = Colours::with([a, b, a], [b, a, a, b, b, b]);
                for level in [0, 127, 255] {
                    colours.rgb(level, level, 255 - level);
                }
            }
        }
        // Half a level of black and of white.
        let colours = Colours::with([0.299, 0.587, 0.114], [0.5, 255.5, 128.0, 255.0, 128.0, 255.0]);
        assert_eq!(colours.rgb(90, 128, 128), [90; 3]);
    }
}
