//! Convolution without patches: the filters run over the image between zeros, a few filters and a few vectors of outputs at a
//! time, which stay in the processor's registers.
//!
//! Before that, an image is laid out so that each of a filter's values lies at one distance from where the output is, for all
//! outputs: row by row between zeros, and where steps are of several pixels, in as many phases, the first of all pixels
//! `stride` apart, then their neighbours, and so on. What is computed between the rows is dropped, or multiplied by zeros, for
//! which an image must be finite.

use pulp::{Arch, Simd, WithSimd};

/// Filters that are computed at once.
const FILTERS: usize = 4;
/// Vectors of outputs that are computed at once: with [`FILTERS`], as many sums as two units that multiply and add within four
/// cycles can work on. With three, compilers spill one of 16 registers, which halves the speed.
const VECTORS: usize = 2;
/// The widest vector of any processor, in values.
const LANES: usize = 16;
/// Bytes of images whose gradients are summed before the lanes of a vector are: they should stay in a core's own cache.
const GROUP_BYTES: usize = 256 << 10;

/// Extents of one group of channels of an image, of the filters that see it, and of their output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Direct {
    pub(super) channels: usize,
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) filters: usize,
    /// Of both sides of a filter.
    pub(super) kernel: usize,
    pub(super) stride: usize,
    /// Zeros on every side.
    pub(super) padding: usize,
    /// Output rows.
    pub(super) rows: usize,
    /// Output columns.
    pub(super) columns: usize,
}

/// Memory that is used again from image to image, of one [`Direct`]: the zeros around images stay there.
#[derive(Default)]
pub(super) struct Scratch {
    images: Vec<f32>,
    outputs: Vec<f32>,
}

impl Direct {
    /// Values of a filter.
    fn patch(&self) -> usize {
        self.channels * self.kernel * self.kernel
    }

    /// Whether the zeros after a row can be those before the next.
    fn shares_zeros(&self) -> bool {
        self.stride == 1 && self.kernel == 2 * self.padding + 1
    }

    /// Rows and columns of a phase beyond the output's.
    fn overhang(&self) -> usize {
        (self.kernel - 1) / self.stride
    }

    /// From a row of a phase to the next, and of the output.
    fn row(&self) -> usize {
        self.columns + if self.shares_zeros() { self.padding } else { self.overhang() }
    }

    /// Phases that a filter sees, in each direction.
    fn phases(&self) -> usize {
        self.kernel.min(self.stride)
    }

    /// From a phase of the image to the next.
    fn phase(&self) -> usize {
        (self.rows + self.overhang()) * self.row() + if self.shares_zeros() { self.padding } else { 0 }
    }

    /// From a channel of the image to the next.
    fn channel(&self) -> usize {
        self.phases() * self.phases() * self.phase()
    }

    /// Outputs, with what is between rows.
    fn outputs(&self) -> usize {
        self.rows * self.row()
    }

    /// From a channel of the output to the next: whole vectors.
    fn output_channel(&self) -> usize {
        self.outputs().next_multiple_of(VECTORS * LANES)
    }

    /// Values of an image as it is laid out, and of what is read beyond.
    fn image(&self) -> usize {
        self.channels * self.channel() + self.row() + VECTORS * LANES
    }

    /// Lays the image out in `to`, whose zeros are there.
    fn lay_out(&self, image: &[f32], to: &mut [f32]) {
        let (phases, stride, padding) = (self.phases(), self.stride, self.padding);
        let wide = self.columns + self.overhang();
        // What lies `phase` beyond steps from the edge: the first of a phase that is in the image, and the one after the last.
        let inside = |phase: usize, extent: usize, most: usize| {
            let step = |edge: usize| edge.saturating_sub(phase).div_ceil(stride).min(most);
            step(padding)..step(extent + padding)
        };
        for (image, to) in image.chunks_exact(self.height * self.width).zip(to.chunks_exact_mut(self.channel())) {
            for (at, to) in to.chunks_exact_mut(self.phase()).enumerate() {
                let (down, right) = (at / phases, at % phases);
                let columns = inside(right, self.width, wide);
                let first = (columns.start * stride + right).saturating_sub(padding).min(self.width);
                for row in inside(down, self.height, self.rows + self.overhang()) {
                    let image = &image[(row * stride + down - padding) * self.width..][..self.width];
                    let to = &mut to[row * self.row()..][columns.clone()];
                    match stride {
                        1 => copy(&image[first..], to),
                        _ => {
                            to.iter_mut().zip(image[first..].iter().step_by(stride)).for_each(|(to, from)| *to = *from)
                        }
                    }
                }
            }
        }
    }

    /// How far from an output each of a filter's values acts.
    pub(super) fn distances(&self) -> Vec<usize> {
        let (kernel, stride) = (self.kernel, self.stride);
        let of = |channel, y, x| {
            let phase = y % stride * self.phases() + x % stride;
            channel * self.channel() + phase * self.phase() + y / stride * self.row() + x / stride
        };
        let of_channel = |channel| (0..kernel).flat_map(move |y| (0..kernel).map(move |x| (channel, y, x)));
        (0..self.channels).flat_map(of_channel).map(|(channel, y, x)| of(channel, y, x)).collect()
    }

    /// The filters [F, C, KH, KW] as they are read: [F ÷ FILTERS, patch, FILTERS], with zeros for filters that are not there.
    fn packed(&self, filters: &[f32]) -> Vec<f32> {
        let patch = self.patch();
        let mut packed = vec![0.0; self.filters.next_multiple_of(FILTERS) * patch];
        for (at, filter) in filters.chunks_exact(patch).enumerate() {
            let to = packed[at / FILTERS * FILTERS * patch..].iter_mut().skip(at % FILTERS).step_by(FILTERS);
            to.zip(filter).for_each(|(to, value)| *to = *value);
        }
        packed
    }

    /// The filters, ready for [`Self::output`] of many images.
    pub(super) fn ready(self, filters: &[f32]) -> Ready {
        Ready { direct: self, packed: self.packed(filters), distances: self.distances(), arch: Arch::new() }
    }

    /// Adds the gradients of the filters, [F, C, KH, KW], that `images` and the gradients of their outputs give. Each of both
    /// is one group's channels of an image; `distances` are [`Self::distances`].
    pub(super) fn add_weight_gradient<'a>(
        &self,
        distances: &[usize],
        mut images: impl ExactSizeIterator<Item = (&'a [f32], &'a [f32])>,
        scratch: &mut Scratch,
        sum: &mut [f32],
    ) {
        let arch = Arch::new();
        let outputs = self.output_channel() * self.filters.next_multiple_of(FILTERS);
        let group = (GROUP_BYTES / size_of::<f32>() / (self.image() + outputs)).clamp(1, images.len().max(1));
        scratch.images.resize(group * self.image(), 0.0);
        scratch.outputs.resize(group * outputs, 0.0);
        loop {
            let mut count = 0;
            let of_images = scratch.images.chunks_exact_mut(self.image());
            let of_outputs = scratch.outputs.chunks_exact_mut(outputs);
            for ((to_image, to_output), (image, output)) in of_images.zip(of_outputs).zip(images.by_ref().take(group)) {
                self.lay_out(image, to_image);
                let channels = output.chunks_exact(self.rows * self.columns);
                for (channel, to) in channels.zip(to_output.chunks_exact_mut(self.output_channel())) {
                    let rows = channel.chunks_exact(self.columns).zip(to.chunks_mut(self.row()));
                    rows.for_each(|(row, to)| copy(row, &mut to[..self.columns]));
                }
                count += 1;
            }
            if count == 0 {
                return;
            }
            arch.dispatch(WeightGradient {
                direct: self,
                distances,
                images: &scratch.images[..count * self.image()],
                outputs: &scratch.outputs[..count * outputs],
                sum: &mut *sum,
            });
        }
    }
}

/// Copies as many values as `to` takes. Rows are short: a call for each would take longer than the copy.
#[inline(always)]
fn copy(from: &[f32], to: &mut [f32]) {
    const STEP: usize = 8;
    let from = &from[..to.len()];
    let (from, to) = (from.as_chunks::<STEP>(), to.as_chunks_mut::<STEP>());
    to.0.iter_mut().zip(from.0).for_each(|(to, from)| *to = *from);
    to.1.iter_mut().zip(from.1).for_each(|(to, from)| *to = *from);
}

/// Filters that are packed.
pub(super) struct Ready {
    direct: Direct,
    packed: Vec<f32>,
    distances: Vec<usize>,
    arch: Arch,
}

impl Ready {
    /// The output [F, H, W] of one group's channels of an image [C, H, W].
    pub(super) fn output(&self, image: &[f32], scratch: &mut Scratch, output: &mut [f32]) {
        let Direct { rows, columns, filters, .. } = self.direct;
        let channel = self.direct.output_channel();
        scratch.images.resize(self.direct.image(), 0.0);
        scratch.outputs.resize(filters.next_multiple_of(FILTERS) * channel, 0.0);
        self.direct.lay_out(image, &mut scratch.images);
        self.arch.dispatch(Output { ready: self, image: &scratch.images, output: &mut scratch.outputs });
        for (to, from) in output.chunks_exact_mut(rows * columns).zip(scratch.outputs.chunks_exact(channel)) {
            let rows = to.chunks_exact_mut(columns).zip(from.chunks(self.direct.row()));
            rows.for_each(|(to, from)| copy(from, to));
        }
    }
}

struct Output<'a> {
    ready: &'a Ready,
    image: &'a [f32],
    output: &'a mut [f32],
}

impl WithSimd for Output<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let direct = &self.ready.direct;
        let patch = direct.patch();
        let mut at = 0;
        while at < direct.outputs() {
            let left = (direct.outputs() - at).div_ceil(S::F32_LANES);
            let tiles = self.ready.packed.chunks_exact(FILTERS * patch);
            let outputs = self.output.chunks_exact_mut(FILTERS * direct.output_channel());
            for (filters, output) in tiles.zip(outputs) {
                match left {
                    1 => tile::<S, 1>(simd, self.image, at, filters, &self.ready.distances, output),
                    _ => tile::<S, VECTORS>(simd, self.image, at, filters, &self.ready.distances, output),
                }
            }
            at += left.min(VECTORS) * S::F32_LANES;
        }
    }
}

/// Of [`FILTERS`] filters, the `N` vectors of outputs from `at` on.
#[inline(always)]
fn tile<S: Simd, const N: usize>(
    simd: S,
    image: &[f32],
    at: usize,
    filters: &[f32],
    distances: &[usize],
    output: &mut [f32],
) {
    let values = N * S::F32_LANES;
    let image = &image[at..];
    let mut sums = [[simd.splat_f32s(0.0); N]; FILTERS];
    for (filters, distance) in filters.chunks_exact(FILTERS).zip(distances) {
        let pixels: [S::f32s; N] = vectors::<S, N>(&image[*distance..*distance + values]);
        for (sums, filter) in sums.iter_mut().zip(filters) {
            let filter = simd.splat_f32s(*filter);
            for (sum, pixels) in sums.iter_mut().zip(&pixels) {
                *sum = simd.mul_add_e_f32s(filter, *pixels, *sum);
            }
        }
    }
    let channel = output.len() / FILTERS;
    for (sums, output) in sums.iter().zip(output.chunks_exact_mut(channel)) {
        S::as_mut_simd_f32s(&mut output[at..at + values]).0.copy_from_slice(sums);
    }
}

#[inline(always)]
fn vectors<S: Simd, const N: usize>(values: &[f32]) -> [S::f32s; N] {
    let vectors = S::as_simd_f32s(values).0;
    core::array::from_fn(|at| vectors[at])
}

struct WeightGradient<'a> {
    direct: &'a Direct,
    distances: &'a [usize],
    images: &'a [f32],
    outputs: &'a [f32],
    sum: &'a mut [f32],
}

impl WithSimd for WeightGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { direct, distances, images, outputs, sum } = self;
        let (patch, kernel) = (direct.patch(), direct.kernel);
        for (tile, sums) in sum.chunks_mut(FILTERS * patch).enumerate() {
            for first in (0..patch).step_by(kernel) {
                let mut at = first;
                while at < first + kernel {
                    // A kernel's row, three of its values at a time.
                    let here = &distances[at..first + kernel];
                    at += match here.len() {
                        1 | 2 => gradients::<S, 1>(simd, direct, (images, outputs), here, (tile, at), sums),
                        _ => gradients::<S, 3>(simd, direct, (images, outputs), here, (tile, at), sums),
                    };
                }
            }
        }
    }
}

/// Adds the gradients of [`FILTERS`] filters' `N` values from `at` on. Returns `N`.
#[inline(always)]
fn gradients<S: Simd, const N: usize>(
    simd: S,
    direct: &Direct,
    (images, outputs): (&[f32], &[f32]),
    distances: &[usize],
    (tile, at): (usize, usize),
    filters: &mut [f32],
) -> usize {
    let (image, channel) = (direct.image(), direct.output_channel());
    let output = channel * direct.filters.next_multiple_of(FILTERS);
    let values = direct.outputs().next_multiple_of(S::F32_LANES);
    let mut sums = [[simd.splat_f32s(0.0); N]; FILTERS];
    for (image, output) in images.chunks_exact(image).zip(outputs.chunks_exact(output)) {
        let output = &output[tile * FILTERS * channel..(tile + 1) * FILTERS * channel];
        let outputs: [&[S::f32s]; FILTERS] =
            core::array::from_fn(|f| S::as_simd_f32s(&output[f * channel..f * channel + values]).0);
        let images: [&[S::f32s]; N] = core::array::from_fn(|n| {
            let from = distances[n];
            S::as_simd_f32s(&image[from..from + values]).0
        });
        let count = values / S::F32_LANES;
        let (outputs, images) = (outputs.map(|o| &o[..count]), images.map(|i| &i[..count]));
        for v in 0..count {
            let pixels: [S::f32s; N] = core::array::from_fn(|n| images[n][v]);
            for (sums, output) in sums.iter_mut().zip(&outputs) {
                for (sum, pixels) in sums.iter_mut().zip(&pixels) {
                    *sum = simd.mul_add_e_f32s(output[v], *pixels, *sum);
                }
            }
        }
    }
    let patch = direct.patch();
    for (sums, filter) in sums.iter().zip(filters.chunks_exact_mut(patch)) {
        filter[at..at + N].iter_mut().zip(sums).for_each(|(to, sum)| *to += simd.reduce_sum_f32s(*sum));
    }
    N
}
