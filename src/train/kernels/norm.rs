//! BatchNorm of maps, by channel on all threads (Ioffe and Szegedy, arXiv 1502.03167; the gradient is that of its section 3),
//! and the ReLU that may follow it, in the same passes.

use rayon::prelude::*;

use super::written;

/// Values that are summed side by side, so that a sum can use the processor's lanes.
const LANES: usize = 16;

/// A batch of maps, [images, channels, values of a plane].
#[derive(Debug, Clone, Copy)]
pub(super) struct Planes {
    channels: usize,
    plane: usize,
}

impl Planes {
    /// Of the extents [N, C, …].
    pub(super) fn new(shape: &[usize]) -> Self {
        Self { channels: shape[1], plane: shape[2..].iter().product() }
    }

    /// `work` of every channel.
    fn by_channel<T: Send>(&self, work: impl Fn(usize) -> T + Send + Sync) -> Vec<T> {
        (0..self.channels).into_par_iter().map(work).collect()
    }

    fn of_channel<'a>(&self, values: &'a [f32], channel: usize) -> impl Iterator<Item = &'a [f32]> {
        values.chunks_exact(self.plane).skip(channel).step_by(self.channels)
    }

    /// Values per channel.
    fn count(&self, values: &[f32]) -> f64 {
        (values.len() / self.channels) as f64
    }

    /// Mean and biased variance of each channel.
    pub(super) fn statistics(&self, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let count = self.count(x);
        let statistics = self.by_channel(|channel| {
            let total: f64 = self.of_channel(x, channel).map(|plane| sums(plane, plane, |v, _| [v])[0]).sum();
            let mean = (total / count) as f32;
            let squares = |plane: &[f32]| sums(plane, plane, |v, _| [(v - mean) * (v - mean)])[0];
            let variance: f64 = self.of_channel(x, channel).map(squares).sum();
            (mean, (variance / count) as f32)
        });
        statistics.into_iter().unzip()
    }

    /// γ·(x − mean)/√(variance + ε) + β, or 0 where that is less and a ReLU follows.
    pub(super) fn normalize(&self, x: &[f32], norm: &Norm<'_>) -> Vec<f32> {
        self.map(x, x, norm, |line, x, _, y| {
            let values = y.iter_mut().zip(x);
            if norm.rectified {
                // What is not a number stays so.
                values.for_each(|(y, x)| *y = if line.at(*x) < 0.0 { 0.0 } else { line.at(*x) });
            } else {
                values.for_each(|(y, x)| *y = line.at(*x));
            }
        })
    }

    /// Gradients of γ and β: Σ g·x̂ and Σ g of each channel, of the g that a ReLU lets through.
    pub(super) fn affine_gradients(&self, x: &[f32], gradient: &[f32], norm: &Norm<'_>) -> (Vec<f32>, Vec<f32>) {
        let gradients = self.by_channel(|k| {
            let line = norm.line(k);
            let (mut products, mut plain) = (0.0, 0.0);
            for (x, g) in self.of_channel(x, k).zip(self.of_channel(gradient, k)) {
                let of_plane = if norm.rectified {
                    sums(x, g, |x, g| [(x - line.mean) * line.passed(x, g), line.passed(x, g)])
                } else {
                    sums(x, g, |x, g| [(x - line.mean) * g, g])
                };
                products += of_plane[0];
                plain += of_plane[1];
            }
            ((products * f64::from(norm.inverse_deviation(k))) as f32, plain as f32)
        });
        gradients.into_iter().unzip()
    }

    /// Gradient of x: γ/√(variance + ε)·(g − mean g − x̂·mean(g·x̂)), with the sums that [`Self::affine_gradients`] gave.
    pub(super) fn input_gradient(
        &self,
        x: &[f32],
        gradient: &[f32],
        (products, plain): (&[f32], &[f32]),
        norm: &Norm<'_>,
    ) -> Vec<f32> {
        let count = self.count(x) as f32;
        let means: Vec<(f32, f32)> =
            (0..self.channels).map(|k| (plain[k] / count, products[k] / count * norm.inverse_deviation(k))).collect();
        self.map(x, gradient, norm, |line, x, g, out| {
            let (shift, slope) = means[line.channel];
            let values = out.iter_mut().zip(x.iter().zip(g));
            let of = |x: f32, g: f32| line.scale * (g - shift - (x - line.mean) * slope);
            if norm.rectified {
                values.for_each(|(out, (x, g))| *out = of(*x, line.passed(*x, *g)));
            } else {
                values.for_each(|(out, (x, g))| *out = of(*x, *g));
            }
        })
    }

    /// Calls `work(the channel's line, plane of a, plane of b, plane of the output)` for every plane.
    fn map(
        &self,
        a: &[f32],
        b: &[f32],
        norm: &Norm<'_>,
        work: impl Fn(Line, &[f32], &[f32], &mut [f32]) + Send + Sync,
    ) -> Vec<f32> {
        let image = self.channels * self.plane;
        let lines = self.by_channel(|channel| norm.line(channel));
        let images = a.par_chunks_exact(image).zip(b.par_chunks_exact(image));
        written(
            (image, a.len()),
            images,
            || (),
            |(), (a, b), out| {
                let planes =
                    out.chunks_exact_mut(self.plane).zip(a.chunks_exact(self.plane)).zip(b.chunks_exact(self.plane));
                planes.zip(&lines).for_each(|(((out, a), b), line)| work(*line, a, b, out));
            },
        )
    }
}

/// What a BatchNorm does by the statistics of its batch.
pub(super) struct Norm<'a> {
    pub(super) gamma: &'a [f32],
    pub(super) beta: &'a [f32],
    pub(super) mean: &'a [f32],
    /// Biased.
    pub(super) variance: &'a [f32],
    pub(super) epsilon: f64,
    /// Whether a ReLU follows.
    pub(super) rectified: bool,
}

impl Norm<'_> {
    fn inverse_deviation(&self, channel: usize) -> f32 {
        (1.0 / (f64::from(self.variance[channel]) + self.epsilon).sqrt()) as f32
    }

    fn line(&self, channel: usize) -> Line {
        let scale = self.gamma[channel] * self.inverse_deviation(channel);
        Line { channel, mean: self.mean[channel], scale, shift: self.beta[channel] }
    }
}

/// What it does to one channel.
#[derive(Clone, Copy)]
struct Line {
    channel: usize,
    mean: f32,
    scale: f32,
    shift: f32,
}

impl Line {
    fn at(self, x: f32) -> f32 {
        (x - self.mean) * self.scale + self.shift
    }

    /// The gradient that a ReLU lets through, also where its input is not a number.
    fn passed(self, x: f32, gradient: f32) -> f32 {
        if self.at(x) <= 0.0 { 0.0 } else { gradient }
    }
}

/// Σ of each of `term(a, b)`, in lanes.
fn sums<const N: usize>(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> [f32; N]) -> [f64; N] {
    let mut lanes = [[0.0f32; LANES]; N];
    let (a, b) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.0.iter().zip(b.0) {
        for lane in 0..LANES {
            let terms = term(a[lane], b[lane]);
            for n in 0..N {
                lanes[n][lane] += terms[n];
            }
        }
    }
    let mut totals = lanes.map(|lanes| lanes.iter().map(|v| f64::from(*v)).sum::<f64>());
    for (a, b) in a.1.iter().zip(b.1) {
        totals.iter_mut().zip(term(*a, *b)).for_each(|(total, term)| *total += f64::from(term));
    }
    totals
}
