//! The rungs of prior-aware structured vector scaling, from the prior alone to a scale and a bias per class.
//!
//! ```text
//! a = exp(t·x + s) / T,  x = log π_train, standardised over the classes
//! u = a ⊙ z + b + κ·log π_train
//! fit:   softmax(u + log(π_cal / π_train)), weighted mean negative log-likelihood
//!        + λ·(K/n)·(4·‖s‖² + 4·‖b‖² + 30·t²) + (K/n)·(κ − κ₀)² + (1/n)·(log T)²
//! serve: softmax(u + log(π_deploy / π_train))
//! ```
//!
//! All are fitted at once. An image of class k has the weight (1 / (K·π_cal(k)))^0.1: the fit leans a little towards classes that
//! are equally frequent, which is what is asked of scores by default. What a class's images do not say is shrunk: its scale to
//! the trend over the classes' frequencies, that trend and its bias to none, κ to what the loss implies, and T, as by one image,
//! to 1. z are logits less their median. The constants
//! were chosen on CIFAR-10-LT and Fashion-MNIST (docs/calibration.md, "Does it help?").

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
/// Bound of exp|s_k|.
const SCALE: f64 = 4.0;
/// Bound of |t|.
const TREND: f64 = 1.5;
/// Weights of the penalties, in units of K/n.
const SCALE_PENALTY: f64 = 4.0;
const BIAS_PENALTY: f64 = 4.0;
const TREND_PENALTY: f64 = 30.0;
const KAPPA_PENALTY: f64 = 1.0;
/// Weight of the penalty on log T, in units of 1/n: without it, nothing keeps T from its bound where nearly all images are
/// classified right.
const TEMPERATURE_PENALTY: f64 = 1.0;
/// Exponent of the weights that lean the fit from the calibration set's class mix, 0, to the uniform one, 1.
pub const TOWARDS_UNIFORM: f64 = 0.1;
/// Exponentials below which a second thread costs more than it saves.
const WORTH_A_THREAD: usize = 200_000;

/// κ: how much of the training prior the network took out of its logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kappa {
    /// Known from the loss: 0 for cross-entropy, 1 for Balanced Softmax and logit adjustment.
    Fixed(f64),
    /// What the loss implies, which the images may move.
    Around(f64),
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
    /// t: how the scale changes with the classes' frequencies.
    pub trend: f64,
    /// t·x + s, one per class: the logarithm of its scale.
    pub log_scale: Vec<f64>,
    /// b, one per class.
    pub bias: Vec<f64>,
}

impl Parameters {
    fn start(classes: usize, kappa: Kappa) -> Self {
        let kappa = match kappa {
            Kappa::Fixed(kappa) | Kappa::Around(kappa) => kappa,
            Kappa::Learned => 0.0,
        };
        Self { inverse_temperature: 1.0, kappa, trend: 0.0, log_scale: vec![0.0; classes], bias: vec![0.0; classes] }
    }

    /// a: exp(t·x + s) / T.
    pub fn a(&self) -> Vec<f64> {
        self.log_scale.iter().map(|s| s.exp() * self.inverse_temperature).collect()
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
    /// K/n: the unit of the penalties; 0 for none.
    pub ridge: f64,
    /// How far the fit of classes leans from the calibration set's class mix, 0, to the uniform one, 1; as a rule
    /// [`TOWARDS_UNIFORM`].
    pub towards_uniform: f64,
}

/// Mean negative log-likelihood, and its gradient in a and in c.
struct Evaluation {
    nll: f64,
    by_a: Vec<f64>,
    by_c: Vec<f64>,
}

impl Problem<'_> {
    /// Fits `rung`, with penalties of the strength λ, from `start`: the fit of a lower rung or of another strength.
    pub fn fit(&self, rung: Rung, strength: f64, start: Option<&Parameters>) -> Parameters {
        let first = || Parameters::start(self.logits.classes(), self.kappa);
        let shared = |inverse| self.fit_shared(first(), inverse);
        match rung {
            Rung::PriorShift => shared([1.0, 1.0]),
            Rung::Temperature => shared(TEMPERATURE.map(f64::recip)),
            Rung::TemperatureBias | Rung::StructuredVectorScaling => {
                let start = start.cloned().unwrap_or_else(|| self.fit(Rung::Temperature, strength, None));
                self.fit_classes(start, strength, rung == Rung::StructuredVectorScaling)
            }
        }
    }

    fn kappa_bounds(&self) -> [f64; 2] {
        match self.kappa {
            Kappa::Fixed(kappa) => [kappa; 2],
            Kappa::Around(_) | Kappa::Learned => KAPPA,
        }
    }

    /// The penalty on κ, and its derivative.
    fn kappa_penalty(&self, kappa: f64) -> (f64, f64) {
        let Kappa::Around(centre) = self.kappa else { return (0.0, 0.0) };
        let (weight, away) = (KAPPA_PENALTY * self.ridge, kappa - centre);
        (weight * away * away, 2.0 * weight * away)
    }

    /// The penalty on log T, and its derivative in log(1/T).
    fn temperature_penalty(&self, log_inverse: f64) -> (f64, f64) {
        let weight = TEMPERATURE_PENALTY * self.ridge / self.log_train.len() as f64;
        (weight * log_inverse * log_inverse, 2.0 * weight * log_inverse)
    }

    /// 1/T within the range of `inverse` (either order), and κ when it is learned.
    fn fit_shared(&self, start: Parameters, inverse: [f64; 2]) -> Parameters {
        let kappa = match self.kappa {
            // Nothing else is fitted then.
            Kappa::Around(kappa) if inverse[0] == inverse[1] => [kappa; 2],
            _ => self.kappa_bounds(),
        };
        let lower = [inverse[0].min(inverse[1]), kappa[0]];
        let upper = [inverse[0].max(inverse[1]), kappa[1]];
        let even = vec![1.0; self.logits.classes()];
        let found =
            minimize(vec![start.inverse_temperature, start.kappa], &Bounds { lower: &lower, upper: &upper }, |x| {
                let at = Parameters { inverse_temperature: x[0], kappa: x[1], ..start.clone() };
                let e = self.evaluate(&at.a(), &at.c(self.log_train), &even);
                let (penalty, slope) = self.kappa_penalty(x[1]);
                let (cool, cooling) = self.temperature_penalty(x[0].ln());
                let by_inverse = e.by_a.iter().sum::<f64>() + cooling / x[0];
                let by_kappa = e.by_c.iter().zip(self.log_train).map(|(g, prior)| g * prior).sum::<f64>();
                (e.nll + penalty + cool, vec![by_inverse, by_kappa + slope])
            });
        Parameters { inverse_temperature: found[0], kappa: found[1], ..start }
    }

    /// log π_train, standardised over the classes; zeros where all are equally frequent.
    pub fn frequencies(&self) -> Vec<f64> {
        let k = self.log_train.len() as f64;
        let mean = self.log_train.iter().sum::<f64>() / k;
        let spread = (self.log_train.iter().map(|prior| (prior - mean).powi(2)).sum::<f64>() / k).sqrt();
        self.log_train.iter().map(|prior| if spread > 1e-9 { (prior - mean) / spread } else { 0.0 }).collect()
    }

    /// The weight of an image by its class: of mean 1 over the rows.
    pub fn class_weights(&self) -> Vec<f64> {
        let mut counts = vec![0.0f64; self.logits.classes()];
        self.rows.iter().for_each(|&row| counts[self.logits.labels()[row as usize] as usize] += 1.0);
        let n = self.rows.len() as f64;
        let of = |count: &f64| if *count > 0.0 { (n / count).powf(self.towards_uniform) } else { 0.0 };
        let total: f64 = counts.iter().map(|count| count * of(count)).sum();
        counts.iter().map(|count| of(count) * n / total).collect()
    }

    /// T, κ and b, and with `scales` the trend and s, all at once.
    fn fit_classes(&self, start: Parameters, strength: f64, scales: bool) -> Parameters {
        let k = self.logits.classes();
        let (x, weights) = (self.frequencies(), self.class_weights());
        let has_trend = scales && x.iter().any(|x| *x != 0.0);
        let log = TEMPERATURE.map(|t| -t.ln());
        let kappa = self.kappa_bounds();
        let (trend, scale) = (if has_trend { TREND } else { 0.0 }, if scales { SCALE.ln() } else { 0.0 });
        let bounds = |sign: f64| [vec![sign * trend], vec![sign * scale; k], vec![sign * BIAS; k]].concat();
        let lower = [vec![log[1], kappa[0]], bounds(-1.0)].concat();
        let upper = [vec![log[0], kappa[1]], bounds(1.0)].concat();
        let split = |v: &[f64]| {
            let (shared, classes) = v.split_at(3);
            let (scale, bias) = classes.split_at(k);
            Parameters {
                inverse_temperature: shared[0].exp(),
                kappa: shared[1],
                trend: shared[2],
                log_scale: scale.iter().zip(&x).map(|(s, x)| shared[2] * x + s).collect(),
                bias: bias.to_vec(),
            }
        };
        let own = start.log_scale.iter().zip(&x).map(|(all, x)| all - start.trend * x);
        let begin = [start.inverse_temperature.ln(), start.kappa, start.trend].into_iter().chain(own);
        let begin: Vec<f64> = begin.chain(start.bias.iter().copied()).collect();
        let unit = strength * self.ridge;
        let found = minimize(begin, &Bounds { lower: &lower, upper: &upper }, |v| {
            let at = split(v);
            let a = at.a();
            let e = self.evaluate(&a, &at.c(self.log_train), &weights);
            let by_log: Vec<f64> = e.by_a.iter().zip(&a).map(|(g, a)| g * a).collect();
            let (kappa_penalty, kappa_slope) = self.kappa_penalty(v[1]);
            let by_kappa = e.by_c.iter().zip(self.log_train).map(|(g, prior)| g * prior).sum::<f64>() + kappa_slope;
            let by_trend = by_log.iter().zip(&x).map(|(g, x)| g * x).sum::<f64>() + 2.0 * unit * TREND_PENALTY * v[2];
            let (temperature_penalty, temperature_slope) = self.temperature_penalty(v[0]);
            let mut penalty = temperature_penalty + kappa_penalty + unit * TREND_PENALTY * v[2] * v[2];
            let mut gradient = vec![by_log.iter().sum::<f64>() + temperature_slope, by_kappa, by_trend];
            for (n, (g, x)) in by_log.iter().chain(&e.by_c).zip(&v[3..]).enumerate() {
                let weight = unit * if n < k { SCALE_PENALTY } else { BIAS_PENALTY };
                penalty += weight * x * x;
                gradient.push(g + 2.0 * weight * x);
            }
            (e.nll + penalty, gradient)
        });
        split(&found)
    }

    /// Of each class, what its own images say of its scale, as a share of that and of what the penalty says: I / (I + 2·4·λ·K),
    /// where I = Σ w·p·(1 − p)·(a·z)² over them is Fisher's information on s.
    pub fn own_shares(&self, fit: &Parameters, strength: f64) -> Vec<f64> {
        let (a, weights) = (fit.a(), self.class_weights());
        let offset: Vec<f64> = fit.c(self.log_train).iter().zip(self.shift).map(|(c, shift)| c + shift).collect();
        let mut information = vec![0.0; a.len()];
        let mut p = vec![0.0; a.len()];
        for &row in &self.rows {
            let z = self.logits.row(row as usize);
            let label = self.logits.labels()[row as usize] as usize;
            for ((p, z), (a, offset)) in p.iter_mut().zip(z).zip(a.iter().zip(&offset)) {
                *p = a * f64::from(*z) + offset;
            }
            softmax_in_place(&mut p);
            let scaled = a[label] * f64::from(z[label]);
            information[label] += weights[label] * p[label] * (1.0 - p[label]) * scaled * scaled;
        }
        let prior = 2.0 * SCALE_PENALTY * strength * self.ridge * self.rows.len() as f64;
        information.into_iter().map(|own| own / (own + prior)).collect()
    }

    /// With the weight of an image by its class.
    fn evaluate(&self, a: &[f64], c: &[f64], weights: &[f64]) -> Evaluation {
        let offset: Vec<f64> = c.iter().zip(self.shift).map(|(c, shift)| c + shift).collect();
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let work = self.rows.len() * a.len();
        let threads = cores.min(work / WORTH_A_THREAD).max(1);
        let part = |rows: &[u32]| self.sum(rows, a, &offset, weights);
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

    fn sum(&self, rows: &[u32], a: &[f64], offset: &[f64], weights: &[f64]) -> Evaluation {
        let classes = a.len();
        let mut sum = Evaluation { nll: 0.0, by_a: vec![0.0; classes], by_c: vec![0.0; classes] };
        let mut p = vec![0.0; classes];
        for &row in rows {
            let z = self.logits.row(row as usize);
            let label = self.logits.labels()[row as usize] as usize;
            for ((p, z), (a, offset)) in p.iter_mut().zip(z).zip(a.iter().zip(offset)) {
                *p = a * f64::from(*z) + offset;
            }
            let (own, weight) = (p[label], weights[label]);
            sum.nll += weight * (softmax_in_place(&mut p) - own);
            p[label] -= 1.0;
            for (((p, z), by_a), by_c) in p.iter().zip(z).zip(&mut sum.by_a).zip(&mut sum.by_c) {
                let p = weight * p;
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
    let problem = Problem {
        logits,
        rows,
        log_train: &zero,
        shift: &zero,
        kappa: Kappa::Fixed(0.0),
        ridge: 0.0,
        towards_uniform: 0.0,
    };
    problem.fit(Rung::Temperature, 0.0, None).inverse_temperature.recip()
}
