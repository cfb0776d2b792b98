//! The operations that training on the processor spends its time in, with their gradients, as operations of burn's own: its
//! convolution differentiates to convolutions with kernels as large as the image, and its BatchNorm is a dozen passes on one
//! thread. On other devices burn's are taken.

mod convolution;
mod norm;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, DispatchDevice, Flex, backend_extension};
use burn::tensor::{Device, Tensor, TensorData};

pub use self::convolution::Convolution;
use self::convolution::Extents;
use self::norm::Planes;

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

/// BatchNorm of `x` [N, C, H, W] by its own statistics: the output, and their mean [C] and biased variance [C], which are not
/// tracked.
pub fn normalize(x: Tensor<4>, gamma: Tensor<1>, beta: Tensor<1>, epsilon: f64) -> (Tensor<4>, Tensor<1>, Tensor<1>) {
    let (gamma, beta) = (gamma.into_dispatch(), beta.into_dispatch());
    let (y, mean, variance) = <Dispatch as Kernels>::normalize(x.into_dispatch(), gamma, beta, epsilon);
    (Tensor::from_dispatch(y), Tensor::from_dispatch(mean), Tensor::from_dispatch(variance))
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
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
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

    fn normalize(x: FlexTensor, gamma: FlexTensor, beta: FlexTensor, epsilon: f64) -> Normalized<Self> {
        let (x, gamma, beta) = (x.to_contiguous(), gamma.to_contiguous(), beta.to_contiguous());
        let shape = shape(&x);
        let planes = Planes::new(&shape);
        let (mean, variance) = planes.statistics(x.storage());
        let y = planes.normalize(x.storage(), gamma.storage(), beta.storage(), &mean, &variance, epsilon);
        (tensor(y, &shape), tensor(mean, &shape[1..2]), tensor(variance, &shape[1..2]))
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
    ) -> Normalized<Self> {
        let prepared = NormGradient.prepare::<C>([x.node(), gamma.node(), beta.node()]).compute_bound().stateful();
        let (y, mean, variance) = match prepared {
            OpsKind::Tracked(mut prepared) => {
                let kept = (prepared.checkpoint(&x), prepared.checkpoint(&gamma));
                let (x, gamma, beta) = (x.into_primitive(), gamma.into_primitive(), beta.into_primitive());
                let (y, mean, variance) = Flex::normalize(x, gamma, beta, epsilon);
                (prepared.finish((kept, mean.clone(), variance.clone(), epsilon), y), mean, variance)
            }
            OpsKind::UnTracked(prepared) => {
                let (x, gamma, beta) = (x.into_primitive(), gamma.into_primitive(), beta.into_primitive());
                let (y, mean, variance) = Flex::normalize(x, gamma, beta, epsilon);
                (prepared.finish(y), mean, variance)
            }
        };
        (y, Self::from_inner(mean), Self::from_inner(variance))
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
    type State = ((NodeId, NodeId), FlexTensor, FlexTensor, f64);

    fn backward(self, ops: Ops<Self::State, 3>, gradients: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, gamma_node, beta_node] = ops.parents;
        let gradient = gradients.consume::<Flex>(&ops.node).to_contiguous();
        let ((x, gamma), mean, variance, epsilon) = ops.state;
        let x = checkpointer.retrieve_node_output::<FlexTensor>(x).to_contiguous();
        let gamma = checkpointer.retrieve_node_output::<FlexTensor>(gamma).to_contiguous();
        let shape = shape(&x);
        let planes = Planes::new(&shape);
        let (mean, variance) = (mean.storage(), variance.storage());
        let (x, gradient) = (x.storage(), gradient.storage());
        let (gamma_gradient, beta_gradient) = planes.affine_gradients(x, gradient, mean, variance, epsilon);
        if let Some(node) = x_node {
            let sums = (gamma_gradient.as_slice(), beta_gradient.as_slice());
            let values = planes.input_gradient(x, gradient, gamma.storage(), sums, mean, variance, epsilon);
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
