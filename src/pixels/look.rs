//! What a picture looks like, in a few numbers that no network has to be asked for: how bright, how colourful, and how much
//! detail of each size.

use ndarray::{ArrayView2, ArrayView3, Axis};

use crate::bundle::Layout;

/// Halvings of the picture at most.
const LEVELS: usize = 6;
/// What is added before a logarithm is taken, in units of the tensor, whose standard deviation is about 1.
const FLOOR: f64 = 1e-3;

/// The look of a picture, from its tensor `[C, H, W]` or `[H, W, C]`: of each channel the mean, and the logarithm of the
/// standard deviation; of the colours, the logarithm of their root mean square about the mean of the channels; and for each
/// halving of the picture, of Haar's wavelets of that mean (along rows, along columns, across both) and of the colours the
/// logarithm of the root mean square. As many numbers for every picture of one shape.
pub fn look(picture: ArrayView3<'_, f32>, layout: Layout) -> Vec<f32> {
    let channel_axis = match layout {
        Layout::Nchw => Axis(0),
        Layout::Nhwc => Axis(2),
    };
    let mut planes: Vec<Plane> = picture.axis_iter(channel_axis).map(Plane::of).collect();
    let channels = planes.len() as f64;
    let mut look = Vec::with_capacity(2 * planes.len() + 1 + 4 * LEVELS);
    let moments: Vec<[f64; 2]> = planes.iter().map(Plane::moments).collect();
    look.extend(moments.iter().map(|[mean, _]| *mean));
    look.extend(moments.iter().map(|[mean, square]| log_root(square - mean * mean)));
    let mut grey = Plane::mean_of(&planes);
    let of_colours = |channels_square: f64, grey_square: f64| log_root(channels_square / channels - grey_square);
    look.push(of_colours(moments.iter().map(|[_, square]| square).sum(), grey.moments()[1]));
    for _ in 0..LEVELS {
        if grey.width < 2 || grey.height < 2 {
            break;
        }
        let bands = grey.halve();
        look.extend(bands.map(log_root));
        let all: f64 = planes.iter_mut().map(|plane| plane.halve()[..2].iter().sum::<f64>()).sum();
        look.push(of_colours(all, bands[0] + bands[1]));
    }
    look.into_iter().map(|value| value as f32).collect()
}

/// log(√x + floor), of what rounding may have made negative.
fn log_root(mean_square: f64) -> f64 {
    // A NaN stays one: such a picture is unlike every other.
    let root = if mean_square < 0.0 { 0.0 } else { mean_square.sqrt() };
    (root + FLOOR).ln()
}

struct Plane {
    height: usize,
    width: usize,
    values: Vec<f32>,
}

impl Plane {
    fn of(view: ArrayView2<'_, f32>) -> Self {
        let (height, width) = view.dim();
        let values = view.as_slice().map_or_else(|| view.iter().copied().collect(), <[f32]>::to_vec);
        Self { height, width, values }
    }

    fn mean_of(planes: &[Self]) -> Self {
        let Some((first, rest)) = planes.split_first() else { return Self { height: 0, width: 0, values: Vec::new() } };
        let mut values = first.values.clone();
        for plane in rest {
            values.iter_mut().zip(&plane.values).for_each(|(sum, value)| *sum += value);
        }
        let share = 1.0 / planes.len() as f32;
        values.iter_mut().for_each(|value| *value *= share);
        Self { values, ..*first }
    }

    /// The means of the values and of their squares.
    fn moments(&self) -> [f64; 2] {
        let mut sums = [0.0f64; 2];
        for row in self.values.chunks(self.width.max(1)) {
            // Rows are short enough for f32, and picture-sized sums are not. Lanes become one instruction.
            let (lanes, rest) = row.as_chunks::<8>();
            let (mut sum, mut square) = ([0.0f32; 8], [0.0f32; 8]);
            for values in lanes {
                for n in 0..8 {
                    sum[n] += values[n];
                    square[n] += values[n] * values[n];
                }
            }
            sums[0] += f64::from(sum.iter().chain(rest).sum::<f32>());
            sums[1] += f64::from(square.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>());
        }
        sums.map(|sum| sum / self.values.len() as f64)
    }

    /// One step of Haar's transform: leaves half as many rows and columns, of sums of four, halved, and gives the mean squares
    /// of the three kinds of differences. An odd row or column is left out.
    fn halve(&mut self) -> [f64; 3] {
        let (height, width) = (self.height / 2, self.width / 2);
        let mut squares = [0.0f64; 3];
        let mut sums = vec![0.0f32; width];
        for y in 0..height {
            let (above, below) = self.values[2 * y * self.width..].split_at(self.width);
            let (above, below) = (&above[..2 * width], &below[..2 * width]);
            let mut of_row = [[0.0f32; 8]; 3];
            let mut add = |n: usize, [a, b]: [f32; 2], [c, d]: [f32; 2]| {
                let differences = [(a + c - b - d) / 2.0, (a + b - c - d) / 2.0, (a + d - b - c) / 2.0];
                of_row.iter_mut().zip(differences).for_each(|(lanes, value)| lanes[n] += value * value);
                (a + b + c + d) / 2.0
            };
            let pairs = above.as_chunks::<2>().0.chunks(8).zip(below.as_chunks::<2>().0.chunks(8));
            for (out, (above, below)) in sums.chunks_mut(8).zip(pairs) {
                for (n, (out, (above, below))) in out.iter_mut().zip(above.iter().zip(below)).enumerate() {
                    *out = add(n, *above, *below);
                }
            }
            squares.iter_mut().zip(of_row).for_each(|(sum, lanes)| *sum += f64::from(lanes.iter().sum::<f32>()));
            // What is overwritten was read.
            self.values[y * width..(y + 1) * width].copy_from_slice(&sums);
        }
        self.values.truncate(height * width);
        (self.height, self.width) = (height, width);
        squares.map(|sum| sum / (height * width) as f64)
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;

    use super::*;

    fn picture(of: impl Fn(usize, usize, usize) -> f32) -> Array3<f32> {
        Array3::from_shape_fn((3, 12, 10), |(c, y, x)| of(c, y, x))
    }

    #[test]
    fn both_layouts_say_the_same() {
        let planes = picture(|c, y, x| ((c * 31 + y * 7 + x * 13) % 17) as f32 / 5.0 - 1.5);
        let pixels = planes.view().permuted_axes([1, 2, 0]).as_standard_layout().into_owned();
        let (a, b) = (look(planes.view(), Layout::Nchw), look(pixels.view(), Layout::Nhwc));
        assert_eq!(a, b);
        // 3 means, 3 deviations, colours, and three halvings: 12×10, 6×5, 3×2.
        assert_eq!(a.len(), 7 + 3 * 4);
    }

    #[test]
    fn details_are_found_at_their_size() {
        let log = |x: f64| (x + FLOOR).ln() as f32;
        let stripes = look(picture(|_, _, x| if x % 2 == 0 { 1.0 } else { -1.0 }).view(), Layout::Nchw);
        // Along rows: (1 + 1 + 1 + 1) / 2.
        assert_eq!(stripes[7..11], [log(2.0), log(0.0), log(0.0), log(0.0)]);
        let flat = look(picture(|c, _, _| c as f32).view(), Layout::Nchw);
        assert_eq!(flat[..6], [0.0, 1.0, 2.0, log(0.0), log(0.0), log(0.0)]);
        assert!((flat[6] - log((2.0f64 / 3.0).sqrt())).abs() < 1e-5);
        assert!(flat[7..].iter().all(|value| *value == log(0.0)));
    }

    #[test]
    fn what_is_not_finite_stays_so_and_one_pixel_is_enough() {
        let wild = look(picture(|_, y, _| if y == 3 { f32::NAN } else { 0.0 }).view(), Layout::Nchw);
        assert!(wild.iter().any(|value| !value.is_finite()));
        assert_eq!(look(Array3::zeros((1, 1, 1)).view(), Layout::Nchw).len(), 3);
    }
}
