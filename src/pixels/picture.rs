//! What comes out of this room: pictures and tensors that are whole.

use std::ops::{Deref, Range};

use image::RgbImage;
use ndarray::ArrayView4;

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
    /// Bytes of `[3, side, side]` in f32.
    pub expected: usize,
}

/// Pictures that are ready for the network: `[N, 3, side, side]`, row-major, normalised.
///
/// It is used again for one batch after another, so it holds whole pictures only: what a picture adds is checked to be
/// exactly one tensor, and after [`TensorBatch::clear`] nothing of earlier pictures can be read.
#[derive(Debug)]
pub struct TensorBatch {
    side: usize,
    /// A multiple of 3 × side × side.
    values: Vec<f32>,
}

impl TensorBatch {
    /// An empty batch of tensors of this height and width, in pixels.
    pub fn new(side: usize) -> Self {
        Self { side, values: Vec::new() }
    }

    /// Height and width in pixels.
    pub fn side(&self) -> usize {
        self.side
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

    /// Adds a picture of side × side RGB triples, with each byte looked up in its channel's table.
    ///
    /// # Errors
    /// When there are more or fewer of them; then nothing is added.
    pub(super) fn push(&mut self, pixels: &[u8], tables: &[[f32; 256]; 3]) -> Result<(), TensorLength> {
        let (pixels, rest) = pixels.as_chunks::<3>();
        if 3 * pixels.len() != self.item() || !rest.is_empty() {
            return Err(TensorLength { found: 12 * pixels.len() + 4 * rest.len(), expected: 4 * self.item() });
        }
        for (channel, table) in tables.iter().enumerate() {
            self.values.extend(pixels.iter().map(|pixel| table[usize::from(pixel[channel])]));
        }
        Ok(())
    }

    /// Holds as many blank pictures and nothing else: a batch to measure and to warm a network with.
    pub fn fill(&mut self, pictures: usize) {
        self.clear();
        self.values.resize(pictures * self.item(), 0.0);
    }

    /// The tensor `[pictures, 3, side, side]` of some of the pictures; none when there are not so many.
    pub fn view(&self, pictures: Range<usize>) -> Option<ArrayView4<'_, f32>> {
        let shape = (pictures.len(), 3, self.side, self.side);
        let values = self.values.get(pictures.start * self.item()..pictures.end * self.item())?;
        ArrayView4::from_shape(shape, values).ok()
    }

    /// Values of one picture.
    fn item(&self) -> usize {
        3 * self.side * self.side
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
        let mut batch = TensorBatch::new(2);
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
        let tables = Box::new([[0.0; 256], [1.0; 256], [2.0; 256]]);
        batch.push(&[9; 12], &tables).unwrap();
        assert!(batch.push(&[9; 9], &tables).is_err() && batch.push(&[9; 11], &tables).is_err());
        let expected = [[0.0; 4], [1.0; 4], [2.0; 4]].concat();
        assert_eq!(batch.view(0..1).unwrap().iter().copied().collect::<Vec<_>>(), expected);
    }
}
