//! BatchNorm of maps, by channel on all threads (Ioffe and Szegedy, arXiv 1502.03167; the gradient is that of its section 3).

use rayon::prelude::*;

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
            let total: f64 = self.of_channel(x, channel).map(|plane| sum(plane, plane, |v, _| v)).sum();
            let mean = (total / count) as f32;
            let squares = |plane: &[f32]| sum(plane, plane, |v, _| (v - mean) * (v - mean));
            let variance: f64 = self.of_channel(x, channel).map(squares).sum();
            (mean, (variance / count) as f32)
        });
        statistics.into_iter().unzip()
    }

    /// γ·(x − mean)/√(variance + ε) + β.
    pub(super) fn normalize(
        &self,
        x: &[f32],
        gamma: &[f32],
        beta: &[f32],
        mean: &[f32],
        variance: &[f32],
        epsilon: f64,
    ) -> Vec<f32> {
        let terms = self.by_channel(|k| {
            let scale = gamma[k] * inverse_deviation(variance[k], epsilon);
            (mean[k], scale, beta[k])
        });
        self.map(x, x, |k, x, _, y| {
            let (mean, scale, beta) = terms[k];
            y.iter_mut().zip(x).for_each(|(y, x)| *y = (x - mean) * scale + beta);
        })
    }

    /// Gradients of γ and β: Σ g·x̂ and Σ g of each channel.
    pub(super) fn affine_gradients(
        &self,
        x: &[f32],
        gradient: &[f32],
        mean: &[f32],
        variance: &[f32],
        epsilon: f64,
    ) -> (Vec<f32>, Vec<f32>) {
        let sums = self.by_channel(|k| {
            let mean = mean[k];
            let planes = || self.of_channel(x, k).zip(self.of_channel(gradient, k));
            let products: f64 = planes().map(|(x, g)| sum(x, g, |x, g| (x - mean) * g)).sum();
            let plain: f64 = planes().map(|(_, g)| sum(g, g, |g, _| g)).sum();
            ((products * f64::from(inverse_deviation(variance[k], epsilon))) as f32, plain as f32)
        });
        sums.into_iter().unzip()
    }

    /// Gradient of x: γ/√(variance + ε)·(g − mean g − x̂·mean(g·x̂)), with the sums that [`Self::affine_gradients`] gave.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn input_gradient(
        &self,
        x: &[f32],
        gradient: &[f32],
        gamma: &[f32],
        (products, sums): (&[f32], &[f32]),
        mean: &[f32],
        variance: &[f32],
        epsilon: f64,
    ) -> Vec<f32> {
        let count = self.count(x) as f32;
        let terms = self.by_channel(|k| {
            let inverse = inverse_deviation(variance[k], epsilon);
            (mean[k], gamma[k] * inverse, sums[k] / count, products[k] / count * inverse)
        });
        self.map(x, gradient, |k, x, g, out| {
            let (mean, scale, shift, slope) = terms[k];
            let values = x.iter().zip(g).map(|(x, g)| scale * (g - shift - (x - mean) * slope));
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value);
        })
    }

    /// Calls `work(channel, plane of a, plane of b, plane of the output)` for every plane.
    fn map(&self, a: &[f32], b: &[f32], work: impl Fn(usize, &[f32], &[f32], &mut [f32]) + Send + Sync) -> Vec<f32> {
        let image = self.channels * self.plane;
        let mut out = vec![0.0; a.len()];
        out.par_chunks_mut(image).zip(a.par_chunks(image)).zip(b.par_chunks(image)).for_each(|((out, a), b)| {
            let planes =
                out.chunks_exact_mut(self.plane).zip(a.chunks_exact(self.plane)).zip(b.chunks_exact(self.plane));
            planes.enumerate().for_each(|(channel, ((out, a), b))| work(channel, a, b, out));
        });
        out
    }
}

fn inverse_deviation(variance: f32, epsilon: f64) -> f32 {
    (1.0 / (f64::from(variance) + epsilon).sqrt()) as f32
}

/// Σ term(a, b), in lanes.
fn sum(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f64 {
    let mut lanes = [0.0f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| term(*a, *b)).sum();
    for (a, b) in a.zip(b) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane]);
        }
    }
    lanes.iter().map(|v| f64::from(*v)).sum::<f64>() + f64::from(rest)
}
