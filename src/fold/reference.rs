//! Evaluates a graph, norms and all, straight from the formulas. Slow, plain, and independent of ONNX Runtime:
//! what a fold is compared with.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, LinalgScalar};

use super::graph::{BatchNorm, Op};
use super::onnx::NORM_EPSILON;
use super::{FoldError, Graph};

/// The least length that PyTorch's `normalize` divides by.
pub(super) const LEAST_LENGTH: f64 = 1e-12;

/// The precision of an evaluation.
pub trait Precision: LinalgScalar + PartialOrd + Send + Sync {
    /// Rounds to this precision.
    fn of(value: f64) -> Self;
    /// Widens.
    fn wide(self) -> f64;
    /// √.
    fn root(self) -> Self;
    /// eˣ.
    fn power(self) -> Self;
}

impl Precision for f64 {
    fn of(value: f64) -> Self {
        value
    }
    fn wide(self) -> f64 {
        self
    }
    fn root(self) -> Self {
        self.sqrt()
    }
    fn power(self) -> Self {
        self.exp()
    }
}

impl Precision for f32 {
    fn of(value: f64) -> Self {
        value as Self
    }
    fn wide(self) -> f64 {
        self.into()
    }
    fn root(self) -> Self {
        self.sqrt()
    }
    fn power(self) -> Self {
        self.exp()
    }
}

/// Runs one image (`3 × side × side` values) through `graph`. Returns the outputs in their order, flat.
///
/// # Errors
/// When the nodes do not fit together.
pub fn evaluate<T: Precision>(graph: &Graph, image: &[f32]) -> Result<Vec<Vec<f64>>, FoldError> {
    let shapes = graph.check("reference")?;
    let mut readers = graph.readers();
    let mut values: Vec<Vec<T>> = Vec::with_capacity(graph.nodes.len());
    for (id, node) in graph.nodes.iter().enumerate() {
        let input = |n: usize| &values[node.inputs[n]];
        let shape_of = |n: usize| &shapes[node.inputs[n]];
        let value = match &node.op {
            Op::Input { .. } => image.iter().map(|&v| T::of(v.into())).collect(),
            Op::Conv { weight, bias, stride, padding, groups } => {
                let geometry = Geometry {
                    input: [shape_of(0)[0], shape_of(0)[1], shape_of(0)[2]],
                    output: [shapes[id][0], shapes[id][1], shapes[id][2]],
                    kernel: [weight.dim().2, weight.dim().3],
                    stride: *stride,
                    padding: *padding,
                    groups: *groups,
                };
                let weight: Vec<T> = weight.iter().map(|&w| T::of(w.into())).collect();
                convolve(&geometry, input(0), &weight, bias.as_deref())
            }
            Op::BatchNorm(norm) => batch_norm(input(0), norm, &norm.weight, &norm.bias, graph.batch_norm_epsilon),
            Op::NormalizedBatchNorm { directions, alpha } => {
                let scale = |v: &[f64]| {
                    let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt() + NORM_EPSILON;
                    v.iter().map(|x| alpha * x / norm).collect::<Vec<_>>()
                };
                let (weight, bias) = (scale(&directions.weight), scale(&directions.bias));
                batch_norm(input(0), directions, &weight, &bias, graph.batch_norm_epsilon)
            }
            Op::Relu => input(0).iter().map(|&v| if v > T::zero() { v } else { T::zero() }).collect(),
            Op::LeakyRelu { slope } => {
                input(0).iter().map(|&v| if v > T::zero() { v } else { T::of(*slope) * v }).collect()
            }
            Op::Silu => input(0).iter().map(|&v| v / (T::one() + (T::zero() - v).power())).collect(),
            Op::Normalize { squashed } => {
                let length = input(0).iter().fold(T::zero(), |sum, &v| sum + v * v).root();
                let least = T::of(LEAST_LENGTH);
                let divisor = match squashed {
                    true => T::one() + length,
                    false if length < least => least,
                    false => length,
                };
                input(0).iter().map(|&v| v / divisor).collect()
            }
            Op::MaxPool => max_pool(input(0), shape_of(0), &shapes[id]),
            Op::Add => input(0).iter().zip(input(1)).map(|(&a, &b)| a + b).collect(),
            Op::SubsamplePad { stride, before, .. } => subsample(input(0), shape_of(0), &shapes[id], *stride, *before),
            Op::GlobalAveragePool => {
                let area = shape_of(0)[1] * shape_of(0)[2];
                input(0)
                    .chunks_exact(area)
                    .map(|plane| plane.iter().fold(T::zero(), |sum, &v| sum + v) / T::of(area as f64))
                    .collect()
            }
            Op::GlobalMaxPool => {
                let area = shape_of(0)[1] * shape_of(0)[2];
                let largest = |plane: &[T]| plane.iter().fold(plane[0], |most, &v| if v > most { v } else { most });
                input(0).chunks_exact(area).map(largest).collect()
            }
            Op::Gemm { weight, bias } => weight
                .rows()
                .into_iter()
                .zip(bias)
                .map(|(row, &b)| row.iter().zip(input(0)).fold(T::of(b), |sum, (&w, &x)| sum + T::of(w) * x))
                .collect(),
            Op::Concat | Op::Stack => node.inputs.iter().flat_map(|&i| values[i].iter().copied()).collect(),
            Op::Mean => {
                let count = T::of(node.inputs.len() as f64);
                (0..input(0).len())
                    .map(|k| node.inputs.iter().fold(T::zero(), |sum, &i| sum + values[i][k]) / count)
                    .collect()
            }
        };
        values.push(value);
        for &used in &node.inputs {
            readers[used] -= 1;
            if readers[used] == 0 {
                values[used] = Vec::new();
            }
        }
    }
    Ok(graph.outputs.iter().map(|(_, id)| values[*id].iter().map(|v| v.wide()).collect()).collect())
}

fn batch_norm<T: Precision>(x: &[T], norm: &BatchNorm, weight: &[f64], bias: &[f64], epsilon: f64) -> Vec<T> {
    let area = x.len() / weight.len();
    let mut out = Vec::with_capacity(x.len());
    for (c, plane) in x.chunks_exact(area).enumerate() {
        let deviation = (T::of(norm.variance[c]) + T::of(epsilon)).root();
        let (g, b, mean) = (T::of(weight[c]), T::of(bias[c]), T::of(norm.mean[c]));
        out.extend(plane.iter().map(|&v| g * ((v - mean) / deviation) + b));
    }
    out
}

struct Geometry {
    input: [usize; 3],
    output: [usize; 3],
    kernel: [usize; 2],
    stride: usize,
    padding: usize,
    groups: usize,
}

fn convolve<T: Precision>(g: &Geometry, x: &[T], weight: &[T], bias: Option<&[f64]>) -> Vec<T> {
    let area = g.output[1] * g.output[2];
    let (in_group, out_group) = (g.input[0] / g.groups, g.output[0] / g.groups);
    let depth = in_group * g.kernel[0] * g.kernel[1];
    let mut out = Vec::with_capacity(g.output[0] * area);
    for c in 0..g.output[0] {
        let b = bias.map_or(T::zero(), |b| T::of(b[c]));
        out.extend(std::iter::repeat_n(b, area));
    }
    let direct = g.kernel == [1, 1] && g.stride == 1 && g.padding == 0;
    let plane = g.input[1] * g.input[2];
    let mut columns = Array2::<T>::zeros(if direct { (0, 0) } else { (depth, area) });
    for group in 0..g.groups {
        let channels = &x[group * in_group * plane..][..in_group * plane];
        let kernels = view(&weight[group * out_group * depth..][..out_group * depth], out_group, depth);
        if !direct {
            unroll(g, channels, columns.view_mut());
        }
        let patches = if direct { view(channels, depth, area) } else { columns.view() };
        let target = &mut out[group * out_group * area..][..out_group * area];
        // The two shapes are the slices' own lengths.
        if let Ok(mut target) = ArrayViewMut2::from_shape((out_group, area), target) {
            general_mat_mul(T::one(), &kernels, &patches, T::one(), &mut target);
        }
    }
    out
}

fn view<T>(values: &[T], rows: usize, columns: usize) -> ArrayView2<'_, T> {
    #[allow(clippy::expect_used)] // The callers cut the slice to rows × columns.
    ArrayView2::from_shape((rows, columns), values).expect("a slice of rows × columns values")
}

fn unroll<T: Precision>(g: &Geometry, channels: &[T], mut columns: ArrayViewMut2<'_, T>) {
    let [_, height, width] = g.input;
    let taps = g.kernel[0] * g.kernel[1];
    for (row, mut line) in columns.rows_mut().into_iter().enumerate() {
        let plane = &channels[row / taps * height * width..][..height * width];
        let (dy, dx) = (row % taps / g.kernel[1], row % g.kernel[1]);
        for (at, value) in line.iter_mut().enumerate() {
            let y = (at / g.output[2] * g.stride + dy).wrapping_sub(g.padding);
            let x = (at % g.output[2] * g.stride + dx).wrapping_sub(g.padding);
            *value = if y < height && x < width { plane[y * width + x] } else { T::zero() };
        }
    }
}

fn max_pool<T: Precision>(x: &[T], from: &[usize], to: &[usize]) -> Vec<T> {
    let (height, width) = (from[1], from[2]);
    let mut out = Vec::with_capacity(to.iter().product());
    for plane in x.chunks_exact(height * width) {
        for oy in 0..to[1] {
            for ox in 0..to[2] {
                let rows = (oy * 2).saturating_sub(1)..(oy * 2 + 2).min(height);
                let columns = (ox * 2).saturating_sub(1)..(ox * 2 + 2).min(width);
                let mut best = plane[rows.start * width + columns.start];
                for value in rows.flat_map(|y| plane[y * width..][columns.clone()].iter().copied()) {
                    if value > best {
                        best = value;
                    }
                }
                out.push(best);
            }
        }
    }
    out
}

fn subsample<T: Precision>(x: &[T], from: &[usize], to: &[usize], stride: usize, before: usize) -> Vec<T> {
    let (area, plane) = (to[1] * to[2], from[1] * from[2]);
    let mut out = vec![T::zero(); to[0] * area];
    for (target, source) in out[before * area..].chunks_exact_mut(area).zip(x.chunks_exact(plane)) {
        for (at, value) in target.iter_mut().enumerate() {
            *value = source[at / to[2] * stride * from[2] + at % to[2] * stride];
        }
    }
    out
}
