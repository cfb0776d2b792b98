//! Convolution, image by image on all threads: by [`super::direct`] where that is faster, otherwise as matrix products of the
//! filters with the patches that they see.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

use super::direct::{Direct, Scratch};
use super::written;

/// A weight gradient is summed in at most so many parts of at least so many images, whatever the threads, so that a result
/// does not hang on their number, nor memory on the batch.
const MOST_SUMS: usize = 16;
const IMAGES_PER_SUM: usize = 4;
/// Bytes of patches that are worked on at once: they should stay in a core's own cache.
const PATCH_BYTES: usize = 256 << 10;
/// Fewer columns than these make poor matrix products.
const MIN_COLUMNS: usize = 64;
/// Bytes of a group's filters up to which they can be read again for every few pixels.
const DIRECT_BYTES: usize = 2 << 20;
/// Fewer outputs of a filter than these leave too much of vectors unused.
const DIRECT_OUTPUTS: usize = 32;

/// Extents of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Convolution {
    /// Step between patches, in both directions.
    pub stride: usize,
    /// Zeros around the image, on every side.
    pub padding: usize,
    /// Groups of channels that see only each other.
    pub groups: usize,
}

/// All extents. A patch is what one output value of a group sees: [C ÷ groups, KH, KW].
#[derive(Debug, Clone, Copy)]
pub(super) struct Extents {
    images: usize,
    channels: usize,
    height: usize,
    width: usize,
    filters: usize,
    kernel: [usize; 2],
    /// Output rows.
    rows: usize,
    /// Output columns.
    columns: usize,
    options: Convolution,
}

impl Extents {
    /// Of images [N, C, H, W] and filters [F, C ÷ groups, KH, KW].
    ///
    /// # Panics
    /// When these do not fit each other; a checked graph has none such.
    pub(super) fn new(x: &[usize], weight: &[usize], options: Convolution) -> Self {
        let fits = options.stride > 0
            && options.groups > 0
            && weight[1] * options.groups == x[1]
            && weight[0].is_multiple_of(options.groups)
            && x[1..].iter().chain(weight).all(|extent| *extent > 0)
            && (2..4).all(|axis| weight[axis] <= x[axis] + 2 * options.padding);
        assert!(fits, "filters {weight:?} do not fit images {x:?} with {options:?}");
        let along =
            |extent: usize, kernel: usize| (extent + 2 * options.padding).saturating_sub(kernel) / options.stride + 1;
        Self {
            images: x[0],
            channels: x[1],
            height: x[2],
            width: x[3],
            filters: weight[0],
            kernel: [weight[2], weight[3]],
            rows: along(x[2], weight[2]),
            columns: along(x[3], weight[3]),
            options,
        }
    }

    pub(super) fn output_shape(&self) -> [usize; 4] {
        [self.images, self.filters, self.rows, self.columns]
    }

    /// Values of a patch.
    fn patch(&self) -> usize {
        self.channels / self.options.groups * self.kernel[0] * self.kernel[1]
    }

    fn group_filters(&self) -> usize {
        self.filters / self.options.groups
    }

    /// Values of one image, of one of its groups, and of one group's output.
    fn extents(&self) -> (usize, usize, usize) {
        let image = self.channels * self.height * self.width;
        (image, image / self.options.groups, self.group_filters() * self.rows * self.columns)
    }

    /// Whether patches are the image itself.
    fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.options.stride == 1 && self.options.padding == 0
    }

    /// Output rows that are worked on at once.
    fn band(&self) -> usize {
        if self.is_pointwise() {
            return self.rows;
        }
        let fitting = PATCH_BYTES / (size_of::<f32>() * self.patch() * self.columns).max(1);
        fitting.max(MIN_COLUMNS.div_ceil(self.columns)).clamp(1, self.rows)
    }

    /// Calls `work` with the first output row and the number of rows of each band.
    fn bands(&self) -> impl Iterator<Item = (usize, usize)> {
        let (rows, band) = (self.rows, self.band());
        (0..rows).step_by(band).map(move |first| (first, band.min(rows - first)))
    }

    /// The part of a row of patches, offset by `offset` in the kernel, that lies in an image row of `width`: the first
    /// column, the one after the last, and the image's column of the first.
    fn inside(&self, offset: usize) -> (usize, usize, usize) {
        let Convolution { stride, padding, .. } = self.options;
        let first = padding.saturating_sub(offset).div_ceil(stride).min(self.columns);
        let end = (self.width + padding).saturating_sub(offset).div_ceil(stride).clamp(first, self.columns);
        (first, end, (first * stride + offset).saturating_sub(padding).min(self.width))
    }

    /// Calls `line(row of patches' values, image row if there is one, kernel column)` for all of a band.
    fn lines(&self, (first, count): (usize, usize), mut line: impl FnMut(Range<usize>, Option<Range<usize>>, usize)) {
        let Convolution { stride, padding, groups } = self.options;
        let mut at = 0;
        for channel in 0..self.channels / groups {
            for ky in 0..self.kernel[0] {
                for kx in 0..self.kernel[1] {
                    for row in first..first + count {
                        let source = (row * stride + ky).checked_sub(padding).filter(|y| *y < self.height);
                        let source = source.map(|y| {
                            let begin = (channel * self.height + y) * self.width;
                            begin..begin + self.width
                        });
                        line(at..at + self.columns, source, kx);
                        at += self.columns;
                    }
                }
            }
        }
    }

    /// The convolution of one group without patches, where that is faster: filters that are small, but more than one value, of
    /// enough outputs.
    fn direct(&self) -> Option<Direct> {
        let Convolution { stride, padding, groups } = self.options;
        let filters = size_of::<f32>() * self.group_filters() * self.patch();
        let [kernel, wide] = self.kernel;
        let faster = filters <= DIRECT_BYTES && kernel > 1 && self.rows * self.columns >= DIRECT_OUTPUTS;
        (kernel == wide && faster).then_some(Direct {
            channels: self.channels / groups,
            height: self.height,
            width: self.width,
            filters: self.group_filters(),
            kernel,
            stride,
            padding,
            rows: self.rows,
            columns: self.columns,
        })
    }

    /// The patches of a band of a group's `image`, [patch, rows × columns].
    fn gather(&self, image: &[f32], band: (usize, usize), patches: &mut [f32]) {
        let stride = self.options.stride;
        self.lines(band, |to, from, kx| {
            let out = &mut patches[to];
            let Some(from) = from else { return out.fill(0.0) };
            let (first, end, begin) = self.inside(kx);
            out[..first].fill(0.0);
            out[end..].fill(0.0);
            let out = &mut out[first..end];
            let source = &image[from][begin..];
            match stride {
                1 => out.copy_from_slice(&source[..out.len()]),
                _ => out.iter_mut().zip(source.iter().step_by(stride)).for_each(|(o, s)| *o = *s),
            }
        });
    }

    /// Adds what [`Self::gather`] took to where it came from.
    fn scatter(&self, patches: &[f32], band: (usize, usize), image: &mut [f32]) {
        let stride = self.options.stride;
        self.lines(band, |from, to, kx| {
            let Some(to) = to else { return };
            let (first, end, begin) = self.inside(kx);
            let source = &patches[from][first..end];
            let out = &mut image[to][begin..];
            match stride {
                1 => out.iter_mut().zip(source).for_each(|(o, s)| *o += *s),
                _ => out.iter_mut().step_by(stride).zip(source).for_each(|(o, s)| *o += *s),
            }
        });
    }

    /// One band of a group's output or its gradient, [filters of the group, rows × columns], in place.
    fn band_of<'a>(&self, group: &'a [f32], (first, count): (usize, usize)) -> ArrayView2<'a, f32> {
        let plane = self.rows * self.columns;
        matrix(group, self.group_filters(), plane)
            .slice_move(ndarray::s![.., first * self.columns..(first + count) * self.columns])
    }

    fn scratch(&self) -> Vec<f32> {
        let values = if self.is_pointwise() { 0 } else { self.patch() * self.band() * self.columns };
        vec![0.0; values]
    }

    pub(super) fn output(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let (image, group_image, group_output) = self.extents();
        let output = group_output * self.options.groups;
        let images = x.par_chunks_exact(image);
        let filters = weight.chunks_exact(self.group_filters() * self.patch());
        if let Some(direct) = self.direct() {
            let ready: Vec<_> = filters.map(|filters| direct.ready(filters)).collect();
            return written((output, self.images * output), images, Scratch::default, |scratch, x, output| {
                let groups = output.chunks_exact_mut(group_output).zip(x.chunks_exact(group_image));
                groups.zip(&ready).for_each(|((output, x), filters)| filters.output(x, scratch, output));
            });
        }
        written(
            (output, self.images * output),
            images,
            || self.scratch(),
            |scratch, x, output| {
                let groups = output.chunks_exact_mut(group_output).zip(x.chunks_exact(group_image));
                for ((output, x), filters) in groups.zip(filters.clone()) {
                    let filters = matrix(filters, self.group_filters(), self.patch());
                    for band in self.bands() {
                        let patches = self.patches(x, band, scratch);
                        let plane = self.rows * self.columns;
                        let columns = band.0 * self.columns..(band.0 + band.1) * self.columns;
                        let mut out =
                            matrix_mut(output, self.group_filters(), plane).slice_move(ndarray::s![.., columns]);
                        product(filters, patches, &mut out, Target::Fresh);
                    }
                }
            },
        )
    }

    /// The band's patches, in `scratch` or as they lie in `x`.
    fn patches<'a>(&self, x: &'a [f32], band: (usize, usize), scratch: &'a mut [f32]) -> ArrayView2<'a, f32> {
        let columns = band.1 * self.columns;
        if self.is_pointwise() {
            return matrix(x, self.patch(), columns);
        }
        let scratch = &mut scratch[..self.patch() * columns];
        self.gather(x, band, scratch);
        matrix(scratch, self.patch(), columns)
    }

    /// The convolution of a gradient with the turned filters that gives the gradient of the image, where that is one: the steps are
    /// of one pixel.
    fn turned(&self) -> Option<Self> {
        let Convolution { stride, padding, groups } = self.options;
        // The same on both axes.
        let around = self.kernel[0].checked_sub(1 + padding).filter(|_| self.kernel[0] == self.kernel[1])?;
        (stride == 1 && !self.is_pointwise()).then_some(Self {
            channels: self.filters,
            height: self.rows,
            width: self.columns,
            filters: self.channels,
            rows: self.height,
            columns: self.width,
            options: Convolution { stride, padding: around, groups },
            ..*self
        })
    }

    /// The filters [F, C ÷ groups, KH, KW] as [`Self::turned`] takes them: [C, F ÷ groups, KH, KW], each turned by half a turn.
    fn turned_filters(&self, weight: &[f32]) -> Vec<f32> {
        let (area, channels, filters) =
            (self.kernel[0] * self.kernel[1], self.channels / self.options.groups, self.group_filters());
        let mut turned = vec![0.0; weight.len()];
        for (at, filter) in weight.chunks_exact(area).enumerate() {
            let (of_all, channel) = (at / channels, at % channels);
            let (group, filter_of_group) = (of_all / filters, of_all % filters);
            let to = ((group * channels + channel) * filters + filter_of_group) * area;
            turned[to..to + area].iter_mut().zip(filter.iter().rev()).for_each(|(to, from)| *to = *from);
        }
        turned
    }

    pub(super) fn input_gradient(&self, weight: &[f32], gradient: &[f32]) -> Vec<f32> {
        if let Some(turned) = self.turned() {
            return turned.output(gradient, &self.turned_filters(weight));
        }
        let (image, group_image, group_output) = self.extents();
        written(
            (image, self.images * image),
            gradient.par_chunks_exact(group_output * self.options.groups),
            || self.scratch(),
            |scratch, gradient, result| {
                let filters = weight.chunks_exact(self.group_filters() * self.patch());
                let groups = result.chunks_exact_mut(group_image).zip(gradient.chunks_exact(group_output));
                for ((result, gradient), filters) in groups.zip(filters) {
                    let filters = matrix(filters, self.group_filters(), self.patch());
                    for band in self.bands() {
                        let columns = band.1 * self.columns;
                        let gradient = self.band_of(gradient, band);
                        let pointwise = self.is_pointwise();
                        let to = if pointwise { &mut *result } else { &mut scratch[..self.patch() * columns] };
                        let mut patches = matrix_mut(to, self.patch(), columns);
                        product(filters.t(), gradient, &mut patches, Target::Fresh);
                        if !pointwise {
                            self.scatter(&scratch[..self.patch() * columns], band, result);
                        }
                    }
                }
            },
        )
    }

    pub(super) fn weight_gradient(&self, x: &[f32], gradient: &[f32]) -> Vec<f32> {
        let (image, group_image, group_output) = self.extents();
        let of_group = self.group_filters() * self.patch();
        let output = group_output * self.options.groups;
        let each = IMAGES_PER_SUM.max(self.images.div_ceil(MOST_SUMS));
        let parts = x.par_chunks(image * each).zip(gradient.par_chunks(output * each));
        let zeros = || vec![0.0; of_group * self.options.groups];
        let sums: Vec<Vec<f32>> = if let Some(direct) = self.direct() {
            let distances = direct.distances();
            let part = |scratch: &mut Scratch, (x, gradient): (&[f32], &[f32])| {
                let mut sum = zeros();
                for (group, sum) in sum.chunks_exact_mut(of_group).enumerate() {
                    let (of_image, of_output) = (group * group_image, group * group_output);
                    let images = x.chunks_exact(image).map(|x| &x[of_image..of_image + group_image]);
                    let outputs = gradient.chunks_exact(output).map(|g| &g[of_output..of_output + group_output]);
                    direct.add_weight_gradient(&distances, images.zip(outputs), scratch, sum);
                }
                sum
            };
            parts.map_init(Scratch::default, part).collect()
        } else {
            let part = |scratch: &mut Vec<f32>, (x, gradient): (&[f32], &[f32])| {
                let mut sum = zeros();
                let groups = x.chunks_exact(group_image).zip(gradient.chunks_exact(group_output));
                for (at, (x, gradient)) in groups.enumerate() {
                    let group = at % self.options.groups;
                    let sum = &mut sum[group * of_group..(group + 1) * of_group];
                    let mut sum = matrix_mut(sum, self.group_filters(), self.patch());
                    for band in self.bands() {
                        let patches = self.patches(x, band, scratch);
                        product(self.band_of(gradient, band), patches.t(), &mut sum, Target::Sum);
                    }
                }
                sum
            };
            parts.map_init(|| self.scratch(), part).collect()
        };
        let mut sums = sums.into_iter();
        let mut result = sums.next().unwrap_or_else(zeros);
        for sum in sums {
            result.iter_mut().zip(sum).for_each(|(r, s)| *r += s);
        }
        result
    }
}

/// What becomes of what a product is written to.
#[derive(Clone, Copy, PartialEq)]
enum Target {
    /// It is overwritten.
    Fresh,
    /// It is added to.
    Sum,
}

/// The matrix product of `a` and `b`, written to `c`, on this thread.
///
/// # Panics
/// When their extents do not fit each other.
fn product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, c: &mut ArrayViewMut2<'_, f32>, into: Target) {
    let ((m, k), n) = (a.dim(), b.ncols());
    assert!(b.nrows() == k && c.dim() == (m, n), "[{m}, {k}] × {:?} into {:?}", b.dim(), c.dim());
    let [a_strides, b_strides, c_strides] = [a.strides(), b.strides(), c.strides()].map(|s| [s[0], s[1]]);
    let kept = if into == Target::Sum { 1.0 } else { 0.0 };
    // SAFETY: the views' own extents and strides, which ndarray has checked, say what is read and written; `c` is borrowed
    // mutably, so it overlaps neither `a` nor `b`.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            c_strides[1],
            c_strides[0],
            into == Target::Sum,
            a.as_ptr(),
            a_strides[1],
            a_strides[0],
            b.as_ptr(),
            b_strides[1],
            b_strides[0],
            kept,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

fn matrix(values: &[f32], rows: usize, columns: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((rows, columns), values).unwrap_or_else(|_| unreachable!("extents come from the shape"))
}

fn matrix_mut(values: &mut [f32], rows: usize, columns: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((rows, columns), values).unwrap_or_else(|_| unreachable!("extents come from the shape"))
}
