//! What comes out of this room: pictures and tensors that are whole.

use std::ops::{Deref, Range};

use image::RgbImage;
use ndarray::ArrayView4;

use crate::bundle::{Color, Layout, Preprocessing};

/// A decoded picture, 8-bit RGB: at least one pixel wide and high, and every pixel written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture(RgbImage);

/// A picture without pixels, or pixels that are not as many as its size says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a picture of {width}×{height} pixels cannot have {bytes} bytes")]
pub struct PictureError {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Bytes given.
    pub bytes: usize,
}

impl Picture {
    /// A picture of `pixels`, RGB triples row by row.
    ///
    /// # Errors
    /// When the width or the height is 0, or `pixels` is not width × height × 3 bytes long.
    pub fn try_new(width: u32, height: u32, pixels: Vec<u8>) -> Result<Self, PictureError> {
        let bytes = pixels.len();
        let error = PictureError { width, height, bytes };
        if u128::from(width) * u128::from(height) * 3 != bytes as u128 || bytes == 0 {
            return Err(error);
        }
        RgbImage::from_raw(width, height, pixels).map(Self).ok_or(error)
    }

    /// The part of `width` × `height` pixels right of `x` and below `y`, as far as it lies within the picture; one pixel at
    /// least.
    #[cfg(feature = "train")]
    pub(crate) fn part(&self, x: u32, y: u32, width: u32, height: u32) -> Self {
        let (x, y) = (x.min(self.0.width() - 1), y.min(self.0.height() - 1));
        Self(image::imageops::crop_imm(&self.0, x, y, width.max(1), height.max(1)).to_image())
    }
}

impl Picture {
    /// Without colours, as Pillow's mode L has it: ITU-R 601-2's luma in all three channels.
    pub(super) fn grey(mut self) -> Self {
        self.0.pixels_mut().for_each(|pixel| pixel.0 = luma(pixel.0));
        self
    }
}

fn luma(colour: [u8; 3]) -> [u8; 3] {
    let [r, g, b] = colour.map(u32::from);
    [((19_595 * r + 38_470 * g + 7_471 * b + 0x8000) >> 16) as u8; 3]
}

impl Color {
    /// A colour as pictures with these channels have it.
    pub(super) fn shade(self, colour: [u8; 3]) -> [u8; 3] {
        if self == Self::Grey { luma(colour) } else { colour }
    }
}

impl TryFrom<RgbImage> for Picture {
    type Error = PictureError;

    fn try_from(picture: RgbImage) -> Result<Self, PictureError> {
        let (width, height) = picture.dimensions();
        Self::try_new(width, height, picture.into_raw())
    }
}

impl Deref for Picture {
    type Target = RgbImage;

    fn deref(&self) -> &RgbImage {
        &self.0
    }
}

/// Values that are not one picture's tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the tensor has {found} bytes; the network's input has {expected}")]
pub struct TensorLength {
    /// Bytes given.
    pub found: usize,
    /// Bytes of one picture's tensor in f32.
    pub expected: usize,
}

/// From RGB triples to the values of a network's channels, in the order that its layout says.
#[derive(Debug, Clone)]
pub(super) struct Channels {
    /// Of each channel: which of a triple's bytes it is made from, and its value for each byte.
    tables: Vec<(usize, Box<[f32; 256]>)>,
    layout: Layout,
}

impl Channels {
    /// The channels that checked `settings` ask for; `value` gives the value of a byte in a channel.
    pub(super) fn new(settings: &Preprocessing, value: impl Fn(u8, usize) -> f32) -> Self {
        let table = |channel: usize| {
            let source = if settings.color == Color::Bgr { 2 - channel } else { channel };
            let mut table = Box::new([0.0; 256]);
            (0..=255).for_each(|byte: u8| table[usize::from(byte)] = value(byte, channel));
            (source, table)
        };
        Self { tables: (0..settings.color.channels()).map(table).collect(), layout: settings.layout }
    }

    /// Appends the tensor of `pixels`, RGB triples row by row.
    pub(super) fn write(&self, pixels: &[[u8; 3]], out: &mut Vec<f32>) {
        let value = |pixel: &[u8; 3], (source, table): &(usize, Box<[f32; 256]>)| table[usize::from(pixel[*source])];
        match self.layout {
            Layout::Nchw => {
                for channel in &self.tables {
                    out.extend(pixels.iter().map(|pixel| value(pixel, channel)));
                }
            }
            Layout::Nhwc => {
                for pixel in pixels {
                    out.extend(self.tables.iter().map(|channel| value(pixel, channel)));
                }
            }
        }
    }
}

/// Pictures that are ready for the network: `[N, C, H, W]` or `[N, H, W, C]`, row-major, normalised.
///
/// It is used again for one batch after another, so it holds whole pictures only: what a picture adds is checked to be
/// exactly one tensor, and after [`TensorBatch::clear`] nothing of earlier pictures can be read.
#[derive(Debug)]
pub struct TensorBatch {
    shape: [usize; 3],
    /// A multiple of one picture's values.
    values: Vec<f32>,
}

impl TensorBatch {
    /// An empty batch of tensors of this shape, [`Preprocessing::shape`].
    pub fn new(shape: [usize; 3]) -> Self {
        Self { shape, values: Vec::new() }
    }

    /// The shape of one picture.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Pictures.
    pub fn len(&self) -> usize {
        self.values.len() / self.item().max(1)
    }

    /// Whether it holds no picture.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Takes all pictures out.
    pub fn clear(&mut self) {
        self.values.clear();
    }

    /// Takes all pictures out but the first `pictures`.
    pub fn truncate(&mut self, pictures: usize) {
        self.values.truncate(pictures * self.item());
    }

    /// Adds a picture that is in the network's own form already: f32 in little-endian bytes.
    ///
    /// # Errors
    /// When it is not exactly one tensor; then nothing is added.
    pub fn push_bytes(&mut self, bytes: &[u8]) -> Result<(), TensorLength> {
        let (values, rest) = bytes.as_chunks::<4>();
        if values.len() != self.item() || !rest.is_empty() {
            return Err(TensorLength { found: bytes.len(), expected: 4 * self.item() });
        }
        self.values.extend(values.iter().map(|value| f32::from_le_bytes(*value)));
        Ok(())
    }

    /// Adds a picture of RGB triples.
    ///
    /// # Errors
    /// When there are more or fewer of them than the shape has pixels; then nothing is added.
    pub(super) fn push(&mut self, pixels: &[u8], channels: &Channels) -> Result<(), TensorLength> {
        let (pixels, rest) = pixels.as_chunks::<3>();
        let found = channels.tables.len() * pixels.len();
        if found != self.item() || !rest.is_empty() {
            return Err(TensorLength { found: 4 * (found + rest.len()), expected: 4 * self.item() });
        }
        channels.write(pixels, &mut self.values);
        Ok(())
    }

    /// Copies the first picture's values to `place`.
    ///
    /// # Errors
    /// When `place` has more or fewer of them, or there is no picture; then nothing is copied.
    pub fn copy_first(&self, place: &mut [f32]) -> Result<(), TensorLength> {
        let wrong = TensorLength { found: 4 * self.values.len().min(self.item()), expected: 4 * place.len() };
        let first = self.values.get(..self.item()).filter(|first| first.len() == place.len()).ok_or(wrong)?;
        place.copy_from_slice(first);
        Ok(())
    }

    /// Holds as many blank pictures and nothing else: a batch to measure and to warm a network with.
    pub fn fill(&mut self, pictures: usize) {
        self.clear();
        self.values.resize(pictures * self.item(), 0.0);
    }

    /// The tensor of some of the pictures; none when there are not so many.
    pub fn view(&self, pictures: Range<usize>) -> Option<ArrayView4<'_, f32>> {
        let [a, b, c] = self.shape;
        let shape = (pictures.len(), a, b, c);
        let values = self.values.get(pictures.start * self.item()..pictures.end * self.item())?;
        ArrayView4::from_shape(shape, values).ok()
    }

    /// Values of one picture.
    fn item(&self) -> usize {
        self.shape.iter().product()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_pixels_and_exactly_as_many_as_its_size_says() {
        assert!(Picture::try_new(2, 1, vec![0; 6]).is_ok());
        for (width, height, bytes) in [(0, 0, 0), (0, 5, 0), (5, 0, 0), (2, 1, 5), (2, 1, 7), (u32::MAX, u32::MAX, 3)] {
            let error = Picture::try_new(width, height, vec![0; bytes]).unwrap_err();
            assert_eq!(error, PictureError { width, height, bytes });
        }
        assert!(Picture::try_from(RgbImage::new(0, 3)).is_err());
    }

    #[test]
    fn a_batch_shows_whole_pictures_and_nothing_after_it_was_cleared() {
        let mut batch = TensorBatch::new([3, 2, 2]);
        let secret: Vec<u8> = [7.0f32; 12].iter().flat_map(|v| v.to_le_bytes()).collect();
        batch.push_bytes(&secret).unwrap();
        for wrong in [&secret[..47], &secret[..44], &[]] {
            let error = batch.push_bytes(wrong).unwrap_err();
            assert_eq!(error, TensorLength { found: wrong.len(), expected: 48 });
        }
        assert_eq!(batch.len(), 1);
        assert!(batch.view(0..1).is_some() && batch.view(0..2).is_none() && batch.view(1..2).is_none());
        batch.clear();
        assert!(batch.is_empty() && batch.view(0..1).is_none());
        let channels = |settings: &Preprocessing| Channels::new(settings, |byte, n| f32::from(byte) + n as f32 * 100.0);
        let plain = Preprocessing::bilinear(2, 2);
        let rgb = channels(&plain);
        let pixels = [1, 2, 3].repeat(4);
        batch.push(&pixels, &rgb).unwrap();
        assert!(batch.push(&pixels[..9], &rgb).is_err() && batch.push(&pixels[..11], &rgb).is_err());
        let shown = |batch: &TensorBatch| batch.view(0..1).unwrap().iter().copied().collect::<Vec<_>>();
        assert_eq!(shown(&batch), [[1.0; 4], [102.0; 4], [203.0; 4]].concat());
        // Other orders, and one channel.
        let of = |color: Color, layout: Layout| {
            let settings = Preprocessing { color, layout, ..plain.clone() };
            let mut batch = TensorBatch::new(settings.shape());
            batch.push(&pixels, &channels(&settings)).unwrap();
            shown(&batch)
        };
        assert_eq!(of(Color::Bgr, Layout::Nchw), [[3.0; 4], [102.0; 4], [201.0; 4]].concat());
        assert_eq!(of(Color::Bgr, Layout::Nhwc), [3.0, 102.0, 201.0].repeat(4));
        assert_eq!(of(Color::Grey, Layout::Nhwc), [1.0; 4]);
    }
}
