//! The rungs of prior-aware structured vector scaling, from the prior alone to a scale and a bias per class.
//!
//! ```text
//! u = (1 + v) ⊙ z / T + b + κ·log π_train
//! fit:   softmax(u + log(π_cal / π_train)), mean negative log-likelihood + (K/n)·(‖v‖² + ‖b‖²)
//! serve: softmax(u + log(π_deploy / π_train))
//! ```
//!
//! T and κ are fitted first, then v and b with both held. Every problem is convex in 1/T, κ, v, b.

use std::thread;

use super::optimize::{Bounds, minimize};
use crate::bundle::Rung;
use crate::data::LabelledLogits;
use crate::scores::softmax_in_place;

/// T must lie inside.
pub(super) const TEMPERATURE: [f64; 2] = [0.05, 20.0];
/// Bounds of κ.
const KAPPA: [f64; 2] = [-1.0, 2.0];
/// Bound of |b_k|.
const BIAS: f64 = 2.0;
/// Bounds of 1 + v_k.
const SCALE: [f64; 2] = [0.25, 4.0];
/// Exponentials below which a second thread costs more than it saves.
const WORTH_A_THREAD: usize = 200_000;

/// κ: how much of the training prior the network took out of its logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kappa {
    /// Known from the loss: 0 for cross-entropy, 1 for Balanced Softmax and logit adjustment.
    Fixed(f64),
    /// Found from the calibration images, as for a logit-rectification head or an unknown loss: 0 or 1 when they explain
    /// the images as well, else fitted.
    Learned,
}

/// One fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    /// 1/T.
    pub inverse_temperature: f64,
    /// κ.
    pub kappa: f64,
    /// v, one per class.
    pub scale: Vec<f64>,
    /// b, one per class.
    pub bias: Vec<f64>,
}

impl Parameters {
    fn start(classes: usize, kappa: Kappa) -> Self {
        let kappa = match kappa {
            Kappa::Fixed(kappa) => kappa,
            Kappa::Learned => 0.0,
        };
        Self { inverse_temperature: 1.0, kappa, scale: vec![0.0; classes], bias: vec![0.0; classes] }
    }

    /// a: (1 + v) / T.
    pub fn a(&self) -> Vec<f64> {
        self.scale.iter().map(|v| (1.0 + v) * self.inverse_temperature).collect()
    }

    /// c: b + κ·log π_train.
    pub fn c(&self, log_train: &[f64]) -> Vec<f64> {
        self.bias.iter().zip(log_train).map(|(b, prior)| b + self.kappa * prior).collect()
    }
}

/// The rows to fit on, and what is known of the classes.
pub struct Problem<'a> {
    /// The whole set.
    pub logits: &'a LabelledLogits,
    /// The rows that count.
    pub rows: Vec<u32>,
    /// log π_train.
    pub log_train: &'a [f64],
    /// log(π_cal / π_train); −∞ for a class without a row, which the fit leaves out.
    pub shift: &'a [f64],
    /// Known or learned.
    pub kappa: Kappa,
    /// Weight of ‖v‖² + ‖b‖².
    pub ridge: f64,
}

/// Mean negative log-likelihood, and its gradient in a and in c.
struct Evaluation {
    nll: f64,
    by_a: Vec<f64>,
    by_c: Vec<f64>,
}

impl Problem<'_> {
    /// Fits every rung up to `highest`, each on top of the one before.
    pub fn fit(&self, highest: Rung) -> Vec<Parameters> {
        let start = Parameters::start(self.logits.classes(), self.kappa);
        let mut fits = vec![self.fit_shared(start, [1.0, 1.0])];
        if highest >= Rung::Temperature {
            fits.push(self.fit_shared(fits[0].clone(), TEMPERATURE.map(f64::recip)));
        }
        if highest >= Rung::TemperatureBias {
            fits.push(self.fit_classes(fits[1].clone(), [0.0, 0.0]));
        }
        if highest >= Rung::StructuredVectorScaling {
            fits.push(self.fit_classes(fits[2].clone(), SCALE.map(|s| s - 1.0)));
        }
        fits
    }

    /// 1/T within the range of `inverse` (either order), and κ when it is learned.
    fn fit_shared(&self, start: Parameters, inverse: [f64; 2]) -> Parameters {
        let kappa = match self.kappa {
            Kappa::Fixed(kappa) => [kappa; 2],
            Kappa::Learned => KAPPA,
        };
        let lower = [inverse[0].min(inverse[1]), kappa[0]];
        let upper = [inverse[0].max(inverse[1]), kappa[1]];
        let found =
            minimize(vec![start.inverse_temperature, start.kappa], &Bounds { lower: &lower, upper: &upper }, |x| {
                let at = Parameters { inverse_temperature: x[0], kappa: x[1], ..start.clone() };
                let e = self.evaluate(&at.a(), &at.c(self.log_train));
                let by_inverse = e.by_a.iter().zip(&start.scale).map(|(g, v)| g * (1.0 + v)).sum();
                let by_kappa = e.by_c.iter().zip(self.log_train).map(|(g, prior)| g * prior).sum();
                (e.nll, vec![by_inverse, by_kappa])
            });
        Parameters { inverse_temperature: found[0], kappa: found[1], ..start }
    }

    /// b, and v within the range of `scale`.
    fn fit_classes(&self, start: Parameters, scale: [f64; 2]) -> Parameters {
        let classes = self.logits.classes();
        let joined = |first: f64, second: f64| [vec![first; classes], vec![second; classes]].concat();
        let (lower, upper) = (joined(scale[0], -BIAS), joined(scale[1], BIAS));
        let split =
            |x: &[f64]| Parameters { scale: x[..classes].to_vec(), bias: x[classes..].to_vec(), ..start.clone() };
        let begin = [start.scale.as_slice(), &start.bias].concat();
        let found = minimize(begin, &Bounds { lower: &lower, upper: &upper }, |x| {
            let at = split(x);
            let e = self.evaluate(&at.a(), &at.c(self.log_train));
            let by_scale = e.by_a.iter().map(|g| g * start.inverse_temperature);
            let gradient = by_scale.chain(e.by_c.iter().copied()).zip(x).map(|(g, x)| g + 2.0 * self.ridge * x);
            let penalty = self.ridge * x.iter().map(|x| x * x).sum::<f64>();
            (e.nll + penalty, gradient.collect())
        });
        split(&found)
    }

    fn evaluate(&self, a: &[f64], c: &[f64]) -> Evaluation {
        let offset: Vec<f64> = c.iter().zip(self.shift).map(|(c, shift)| c + shift).collect();
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let work = self.rows.len() * a.len();
        let threads = cores.min(work / WORTH_A_THREAD).max(1);
        let part = |rows: &[u32]| self.sum(rows, a, &offset);
        let parts: Vec<Evaluation> = if threads == 1 {
            vec![part(&self.rows)]
        } else {
            let part = &part;
            thread::scope(|scope| {
                let chunks = self.rows.chunks(self.rows.len().div_ceil(threads));
                let threads: Vec<_> = chunks.map(|rows| scope.spawn(move || part(rows))).collect();
                threads.into_iter().flat_map(thread::ScopedJoinHandle::join).collect()
            })
        };
        let n = self.rows.len() as f64;
        let total = |of: fn(&Evaluation) -> &[f64]| -> Vec<f64> {
            (0..a.len()).map(|k| parts.iter().map(|p| of(p)[k]).sum::<f64>() / n).collect()
        };
        Evaluation {
            nll: parts.iter().map(|p| p.nll).sum::<f64>() / n,
            by_a: total(|e| &e.by_a),
            by_c: total(|e| &e.by_c),
        }
    }

    fn sum(&self, rows: &[u32], a: &[f64], offset: &[f64]) -> Evaluation {
        let classes = a.len();
        let mut sum = Evaluation { nll: 0.0, by_a: vec![0.0; classes], by_c: vec![0.0; classes] };
        let mut p = vec![0.0; classes];
        for &row in rows {
            let z = self.logits.row(row as usize);
            let label = self.logits.labels()[row as usize] as usize;
            for ((p, z), (a, offset)) in p.iter_mut().zip(z).zip(a.iter().zip(offset)) {
                *p = a * f64::from(*z) + offset;
            }
            let own = p[label];
            sum.nll += softmax_in_place(&mut p) - own;
            p[label] -= 1.0;
            for (((p, z), by_a), by_c) in p.iter().zip(z).zip(&mut sum.by_a).zip(&mut sum.by_c) {
                *by_a += p * f64::from(*z);
                *by_c += p;
            }
        }
        sum
    }
}

/// The temperature of plain temperature scaling: softmax(z / T), no prior, no bias.
pub fn temperature_alone(logits: &LabelledLogits) -> f64 {
    let zero = vec![0.0; logits.classes()];
    let rows = (0..logits.len() as u32).collect();
    let problem = Problem { logits, rows, log_train: &zero, shift: &zero, kappa: Kappa::Fixed(0.0), ridge: 0.0 };
    problem.fit(Rung::Temperature)[1].inverse_temperature.recip()
}
