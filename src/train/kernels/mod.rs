//! The operations that training on the processor spends its time in, with their gradients, as operations of burn's own: its
//! convolution differentiates to convolutions with kernels as large as the image, its BatchNorm is a dozen passes, and what
//! works on values one by one does so on one thread. On other devices burn's are taken.

mod convolution;
mod direct;
mod norm;

use std::mem::MaybeUninit;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, DispatchDevice, Flex, backend_extension};
use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

pub use self::convolution::Convolution;
use self::convolution::Extents;
use self::norm::{Norm, Planes};

/// A tensor on the processor.
type FlexTensor = FloatTensor<Flex>;

/// Whether `device` is the processor, for which the operations here are.
pub fn on_processor(device: &Device) -> bool {
    matches!(device.clone().without_autodiff().as_dispatch(), DispatchDevice::Flex(_))
}

/// `x` [N, C, H, W] convolved with `weight` [F, C ÷ groups, KH, KW]: [N, F, H', W'].
///
/// # Panics
/// When these do not fit each other.
pub fn convolve(x: Tensor<4>, weight: Tensor<4>, options: Convolution) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as Kernels>::convolve(x.into_dispatch(), weight.into_dispatch(), options))
}

/// BatchNorm of `x` [N, C, H, W] by its own statistics, and a ReLU of it where it is to be `rectified`: the output, and the
/// statistics' mean [C] and biased variance [C], which are not tracked.
pub fn normalize(
    x: Tensor<4>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    epsilon: f64,
    rectified: bool,
) -> (Tensor<4>, Tensor<1>, Tensor<1>) {
    let (gamma, beta) = (gamma.into_dispatch(), beta.into_dispatch());
    let (y, mean, variance) = <Dispatch as Kernels>::normalize(x.into_dispatch(), gamma, beta, epsilon, rectified);
    (Tensor::from_dispatch(y), Tensor::from_dispatch(mean), Tensor::from_dispatch(variance))
}

/// max(a + b, 0).
///
/// # Panics
/// When the tensors differ in shape.
pub fn add_rectified(a: Tensor<4>, b: Tensor<4>) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as Kernels>::add_rectified(a.into_dispatch(), b.into_dispatch()))
}

type Normalized<B> = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

#[backend_extension(Autodiff, Flex)]
trait Kernels: Backend {
    fn convolve(x: FloatTensor<Self>, weight: FloatTensor<Self>, options: Convolution) -> FloatTensor<Self>;
    fn normalize(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
        rectified: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    fn add_rectified(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;
}

fn shape(tensor: &FlexTensor) -> Vec<usize> {
    tensor.layout().shape().to_vec()
}

fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
}

impl Kernels for Flex {
    fn convolve(x: FlexTensor, weight: FlexTensor, options: Convolution) -> FlexTensor {
        let extents = Extents::new(&shape(&x), &shape(&weight), options);
        let (x, weight) = (x.to_contiguous(), weight.to_contiguous());
        tensor(extents.output(x.storage(), weight.storage()), &extents.output_shape())
    }

    fn normalize(
        x: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        epsilon: f64,
        rectified: bool,
    ) -> Normalized<Self> {
        let (x, gamma, beta) = (x.to_contiguous(), gamma.to_contiguous(), beta.to_contiguous());
        let shape = shape(&x);
        let planes = Planes::new(&shape);
        let (mean, variance) = planes.statistics(x.storage());
        let (gamma, beta) = (gamma.storage(), beta.storage());
        let norm = Norm { gamma, beta, mean: &mean, variance: &variance, epsilon, rectified };
        let y = planes.normalize(x.storage(), &norm);
        (tensor(y, &shape), tensor(mean, &shape[1..2]), tensor(variance, &shape[1..2]))
    }

    fn add_rectified(a: FlexTensor, b: FlexTensor) -> FlexTensor {
        assert_eq!(shape(&a), shape(&b), "only tensors of one shape are added here");
        let (a, b) = (a.to_contiguous(), b.to_contiguous());
        // What is not a number stays so.
        let sum = |a: f32, b: f32| if a + b < 0.0 { 0.0 } else { a + b };
        tensor(combined(a.storage(), b.storage(), sum), &shape(&a))
    }
}

impl<C: CheckpointStrategy> Kernels for Autodiff<Flex, C> {
    fn convolve(x: FloatTensor<Self>, weight: FloatTensor<Self>, options: Convolution) -> FloatTensor<Self> {
        match ConvolutionGradient.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prepared) => {
                let state = (prepared.checkpoint(&x), prepared.checkpoint(&weight), options);
                prepared.finish(state, Flex::convolve(x.into_primitive(), weight.into_primitive(), options))
            }
            OpsKind::UnTracked(prepared) => {
                prepared.finish(Flex::convolve(x.into_primitive(), weight.into_primitive(), options))
            }
        }
    }

    fn normalize(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
        rectified: bool,
    ) -> Normalized<Self> {
        let prepared = NormGradient.prepare::<C>([x.node(), gamma.node(), beta.node()]).compute_bound().stateful();
        let (y, mean, variance) = match prepared {
            OpsKind::Tracked(mut prepared) => {
                let kept = [prepared.checkpoint(&x), prepared.checkpoint(&gamma), prepared.checkpoint(&beta)];
                let (x, gamma, beta) = (x.into_primitive(), gamma.into_primitive(), beta.into_primitive());
                let (y, mean, variance) = Flex::normalize(x, gamma, beta, epsilon, rectified);
                (prepared.finish((kept, mean.clone(), variance.clone(), (epsilon, rectified)), y), mean, variance)
            }
            OpsKind::UnTracked(prepared) => {
                let (x, gamma, beta) = (x.into_primitive(), gamma.into_primitive(), beta.into_primitive());
                let (y, mean, variance) = Flex::normalize(x, gamma, beta, epsilon, rectified);
                (prepared.finish(y), mean, variance)
            }
        };
        (y, Self::from_inner(mean), Self::from_inner(variance))
    }

    fn add_rectified(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        match SumGradient.prepare::<C>([a.node(), b.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => {
                let sum = Flex::add_rectified(a.into_primitive(), b.into_primitive());
                prepared.finish(sum.clone(), sum)
            }
            OpsKind::UnTracked(prepared) => {
                prepared.finish(Flex::add_rectified(a.into_primitive(), b.into_primitive()))
            }
        }
    }
}

#[derive(Debug)]
struct ConvolutionGradient;

impl Backward<Flex, 2> for ConvolutionGradient {
    type State = (NodeId, NodeId, Convolution);

    fn backward(self, ops: Ops<Self::State, 2>, gradients: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, weight_node] = ops.parents;
        let gradient = gradients.consume::<Flex>(&ops.node).to_contiguous();
        let (x, weight, options) = ops.state;
        let x = checkpointer.retrieve_node_output::<FlexTensor>(x).to_contiguous();
        let weight = checkpointer.retrieve_node_output::<FlexTensor>(weight).to_contiguous();
        let extents = Extents::new(&shape(&x), &shape(&weight), options);
        if let Some(node) = x_node {
            let values = extents.input_gradient(weight.storage(), gradient.storage());
            gradients.register::<Flex>(node.id, tensor(values, &shape(&x)));
        }
        if let Some(node) = weight_node {
            let values = extents.weight_gradient(x.storage(), gradient.storage());
            gradients.register::<Flex>(node.id, tensor(values, &shape(&weight)));
        }
    }
}

#[derive(Debug)]
struct NormGradient;

impl Backward<Flex, 3> for NormGradient {
    /// x, γ and β; mean and variance; ε and whether a ReLU follows.
    type State = ([NodeId; 3], FlexTensor, FlexTensor, (f64, bool));

    fn backward(self, ops: Ops<Self::State, 3>, gradients: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, gamma_node, beta_node] = ops.parents;
        let gradient = gradients.consume::<Flex>(&ops.node).to_contiguous();
        let (kept, mean, variance, (epsilon, rectified)) = ops.state;
        let [x, gamma, beta] = kept.map(|node| checkpointer.retrieve_node_output::<FlexTensor>(node).to_contiguous());
        let shape = shape(&x);
        let planes = Planes::new(&shape);
        let (gamma, beta, mean, variance) = (gamma.storage(), beta.storage(), mean.storage(), variance.storage());
        let norm = Norm { gamma, beta, mean, variance, epsilon, rectified };
        let (x, gradient) = (x.storage(), gradient.storage());
        let (gamma_gradient, beta_gradient) = planes.affine_gradients(x, gradient, &norm);
        if let Some(node) = x_node {
            let sums = (gamma_gradient.as_slice(), beta_gradient.as_slice());
            let values = planes.input_gradient(x, gradient, sums, &norm);
            gradients.register::<Flex>(node.id, tensor(values, &shape));
        }
        if let Some(node) = gamma_node {
            gradients.register::<Flex>(node.id, tensor(gamma_gradient, &shape[1..2]));
        }
        if let Some(node) = beta_node {
            gradients.register::<Flex>(node.id, tensor(beta_gradient, &shape[1..2]));
        }
    }
}

#[derive(Debug)]
struct SumGradient;

impl Backward<Flex, 2> for SumGradient {
    /// The sum, rectified.
    type State = FlexTensor;

    fn backward(self, ops: Ops<Self::State, 2>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Flex>(&ops.node).to_contiguous();
        let sum = ops.state.to_contiguous();
        // Also where the sum is not a number.
        let passed = |sum: f32, gradient: f32| if sum <= 0.0 { 0.0 } else { gradient };
        let values = tensor(combined(sum.storage(), gradient.storage(), passed), &shape(&sum));
        for node in ops.parents.into_iter().flatten() {
            gradients.register::<Flex>(node.id, values.clone());
        }
    }
}

/// `work` of each pair of values of two slices of one length.
fn combined(a: &[f32], b: &[f32], work: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    const PART: usize = 16 << 10;
    let pairs = a.par_chunks(PART).zip(b.par_chunks(PART));
    written(
        (PART, a.len()),
        pairs,
        || (),
        |(), (a, b), to| {
            to.iter_mut().zip(a.iter().zip(b)).for_each(|(to, (a, b))| *to = work(*a, *b));
        },
    )
}

/// `length` values that `work(scratch, item, part)` writes part by part, on all threads. Parts are of `part` values, the last may
/// have fewer, and there is an item for each; before they are written, they are 0.
///
/// A part is set to 0 by the thread that is about to write it, so that it is in its cache, and not all at once by one.
///
/// # Panics
/// When there are more or fewer items than parts.
fn written<I: IndexedParallelIterator, S>(
    (part, length): (usize, usize),
    items: I,
    scratch: impl Fn() -> S + Send + Sync,
    work: impl Fn(&mut S, I::Item, &mut [f32]) + Send + Sync,
) -> Vec<f32> {
    let mut values = Vec::with_capacity(length);
    let parts = values.spare_capacity_mut()[..length].par_chunks_mut(part.max(1));
    assert_eq!(parts.len(), items.len(), "parts and items");
    parts.zip(items).for_each_init(scratch, |scratch, (to, item)| work(scratch, item, zeroed(to)));
    // SAFETY: the parts are all of `length`, and each was set to 0 before it was written: the iterators are rayon's own, of slices,
    // which give as many items as they say.
    #[allow(unsafe_code)]
    unsafe {
        values.set_len(length);
    }
    values
}

/// All of `values`, set to 0.
fn zeroed(values: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    values.fill(MaybeUninit::new(0.0));
    // SAFETY: each of them was just written.
    #[allow(unsafe_code)]
    unsafe {
        values.assume_init_mut()
    }
}
