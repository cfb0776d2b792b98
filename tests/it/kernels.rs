//! The processor's own convolution and BatchNorm beside burn's, with their gradients.

use burn::tensor::module::{batch_norm_train, conv2d};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Tensor, TensorData, activation};
use nbn::train::kernels::{Convolution, add_rectified, convolve, normalize};

struct Random(fastrand::Rng);

impl Random {
    fn tensor<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.0.f32() * 2.0 - 1.0).collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

fn assert_close(found: Vec<f32>, expected: Vec<f32>, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let norm = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let differences: Vec<f32> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
    let (difference, of) = (norm(&differences), norm(&expected));
    assert!(difference <= 1e-5 * of, "{what}: {difference} of {of}");
}

#[test]
fn convolutions_and_their_gradients_equal_burns() {
    let mut random = Random(fastrand::Rng::with_seed(3));
    // Images, channels, height, width, filters, kernel, stride, padding, groups.
    let cases = [
        (5, 3, 9, 7, 4, 3, 1, 1, 1),
        (2, 4, 8, 6, 5, 3, 2, 1, 1),
        (2, 4, 7, 7, 6, 1, 2, 0, 1),
        (6, 8, 5, 4, 3, 1, 1, 0, 1),
        (1, 3, 23, 19, 4, 7, 2, 3, 1),
        (2, 3, 11, 9, 5, 5, 3, 1, 1),
        (2, 3, 4, 40, 9, 3, 1, 1, 1),
        (1, 3, 200, 1, 7, 5, 5, 6, 1),
        (3, 5, 16, 12, 7, 3, 2, 1, 1),
        (2, 6, 32, 32, 10, 5, 1, 2, 2),
        (1, 3, 40, 40, 5, 7, 2, 3, 1),
        (2, 3, 2, 300, 4, 3, 1, 1, 1),
        // Filters too large to be read again for every few pixels.
        (2, 512, 3, 2, 256, 3, 1, 1, 1),
        (2, 8, 6, 6, 12, 3, 1, 1, 4),
        (2, 8, 6, 5, 4, 3, 2, 1, 2),
        (2, 4, 6, 6, 4, 1, 1, 0, 2),
        (2, 3, 6, 6, 2, 3, 1, 0, 1),
        (2, 2, 2, 2, 2, 5, 1, 2, 1),
        (2, 2, 4, 5, 3, 3, 1, 2, 1),
        (1, 3, 2, 2, 4, 7, 2, 3, 1),
        // Several bands of rows.
        (3, 16, 32, 32, 16, 3, 1, 1, 1),
        (2, 16, 64, 48, 8, 3, 2, 1, 1),
        (2, 32, 40, 40, 32, 3, 1, 1, 2),
    ];
    for case in cases {
        let (images, channels, height, width, filters, kernel, stride, padding, groups) = case;
        let x = random.tensor([images, channels, height, width]);
        let weight = random.tensor([filters, channels / groups, kernel, kernel]);
        let run = |ours: bool| {
            let x = Tensor::from_inner(x.clone()).require_grad();
            let weight = Tensor::from_inner(weight.clone()).require_grad();
            let y = if ours {
                convolve(x.clone(), weight.clone(), Convolution { stride, padding, groups })
            } else {
                let options = ConvOptions::new([stride; 2], [padding; 2], [1; 2], groups);
                conv2d(x.clone(), weight.clone(), None, options)
            };
            // A gradient that differs from place to place.
            let loss = (y.clone() * y.clone()).sum();
            let mut gradients = loss.backward();
            let of_x = values(x.grad_remove(&mut gradients).unwrap());
            (values(y.inner()), of_x, values(weight.grad_remove(&mut gradients).unwrap()))
        };
        let (ours, burns) = (run(true), run(false));
        assert_close(ours.0, burns.0, &format!("output of {case:?}"));
        assert_close(ours.1, burns.1, &format!("gradient of x of {case:?}"));
        assert_close(ours.2, burns.2, &format!("gradient of the weight of {case:?}"));
    }
}

#[test]
fn batch_norms_and_their_gradients_equal_burns() {
    let mut random = Random(fastrand::Rng::with_seed(4));
    let shapes = [[4, 3, 8, 8], [3, 5, 3, 3], [2, 2, 2, 2], [1, 4, 5, 7]];
    for (shape, rectified) in shapes.into_iter().flat_map(|shape| [(shape, false), (shape, true)]) {
        let x = random.tensor(shape) + 0.5;
        let (gamma, beta) = (random.tensor([shape[1]]), random.tensor([shape[1]]));
        let run = |ours: bool| {
            let track = |t: &Tensor<1>| Tensor::from_inner(t.clone()).require_grad();
            let x = Tensor::from_inner(x.clone()).require_grad();
            let (gamma, beta) = (track(&gamma), track(&beta));
            let (y, mean, variance) = if ours {
                normalize(x.clone(), gamma.clone(), beta.clone(), 1e-5, rectified)
            } else {
                let result = batch_norm_train(x.clone(), gamma.clone(), beta.clone(), 1e-5);
                let y = if rectified { activation::relu(result.output) } else { result.output };
                (y, result.mean, result.variance)
            };
            let loss = (y.clone() * y.clone() * y.clone()).sum();
            let mut gradients = loss.backward();
            let mut parts = vec![values(y.inner()), values(mean.inner()), values(variance.inner())];
            parts.push(values(x.grad_remove(&mut gradients).unwrap()));
            parts.push(values(gamma.grad_remove(&mut gradients).unwrap()));
            parts.push(values(beta.grad_remove(&mut gradients).unwrap()));
            parts
        };
        let names = ["output", "mean", "variance", "gradient of x", "gradient of γ", "gradient of β"];
        for ((ours, burns), name) in run(true).into_iter().zip(run(false)).zip(names) {
            assert_close(ours, burns, &format!("{name} of {shape:?}, rectified {rectified}"));
        }
    }
}

#[test]
fn rectified_sums_and_their_gradients_equal_burns() {
    let mut random = Random(fastrand::Rng::with_seed(6));
    // One of less than a part, one of several and a rest.
    for shape in [[2, 3, 4, 5], [3, 5, 41, 37]] {
        let (a, b) = (random.tensor(shape), random.tensor(shape));
        let run = |ours: bool| {
            let [a, b] = [&a, &b].map(|t| Tensor::<4>::from_inner(t.clone()).require_grad());
            // The first is read again, so that its gradient has two parts.
            let sum = if ours { add_rectified(a.clone(), b.clone()) } else { activation::relu(a.clone() + b.clone()) };
            let mut gradients = (sum.clone() * sum.clone() * a.clone()).sum().backward();
            [
                values(sum.inner()),
                values(a.grad_remove(&mut gradients).unwrap()),
                values(b.grad_remove(&mut gradients).unwrap()),
            ]
        };
        for ((ours, burns), name) in
            run(true).into_iter().zip(run(false)).zip(["sum", "gradient of a", "gradient of b"])
        {
            assert_close(ours, burns, &format!("{name} of {shape:?}"));
        }
    }
}

#[test]
fn what_is_not_a_number_is_not_rectified_away() {
    let nan = || Tensor::<4>::from_data(TensorData::new(vec![f32::NAN, 1.0], [1, 1, 1, 2]), &Device::flex());
    assert!(values(add_rectified(nan(), nan()))[0].is_nan());
    let one = || Tensor::<1>::from_data(TensorData::new(vec![1.0f32], [1]), &Device::flex());
    assert!(values(normalize(nan(), one(), one(), 1e-5, true).0).iter().all(|v| v.is_nan()));
    // PyTorch lets a gradient pass there, too.
    let a = Tensor::<4>::from_inner(nan()).require_grad();
    let mut gradients = add_rectified(a.clone(), Tensor::from_inner(nan())).sum().backward();
    assert_eq!(values(a.grad_remove(&mut gradients).unwrap()), [1.0, 1.0]);
}

#[test]
fn a_gradient_does_not_hang_on_the_number_of_threads() {
    let mut random = Random(fastrand::Rng::with_seed(5));
    let (x, weight) = (random.tensor([11, 6, 13, 13]), random.tensor([5, 6, 3, 3]));
    let gradient = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let weight = Tensor::from_inner(weight.clone()).require_grad();
            let options = Convolution { stride: 1, padding: 1, groups: 1 };
            let y = convolve(Tensor::from_inner(x.clone()), weight.clone(), options);
            let mut gradients = (y.clone() * y).sum().backward();
            values(weight.grad_remove(&mut gradients).unwrap())
        })
    };
    assert_eq!(gradient(1), gradient(3));
}
