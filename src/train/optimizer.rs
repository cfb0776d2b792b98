//! Stochastic gradient descent with momentum, as PyTorch computes it, and the learning rate's schedule.
//!
//! v ← μ·v + (g + λ·w);  w ← w − η·v, or w − η·(g + λ·w + μ·v) with Nesterov's momentum. No dampening.

use std::f64::consts::PI;

use burn::tensor::Tensor;

use super::network::{Parameter, Role};
use super::recipe::{Decay, MagnitudeMode, Recipe, Schedule};

/// Added to the norm that gradients are clipped by, as in PyTorch.
const CLIP_EPSILON: f64 = 1e-6;

/// The velocities, in the order of the network's parameters; none before a parameter's first step.
#[derive(Debug, Clone)]
pub struct Optimizer {
    /// v.
    pub velocities: Vec<Option<Tensor<1>>>,
}

impl Optimizer {
    /// At rest, for as many parameters.
    pub fn new(parameters: usize) -> Self {
        Self { velocities: vec![None; parameters] }
    }

    /// One step: `values` by `gradients` at learning rate `rate`. Returns the norm of all gradients together before
    /// clipping; where that is not finite, nothing has changed.
    pub fn step(
        &mut self,
        recipe: &Recipe,
        parameters: &[Parameter],
        values: &mut [Tensor<1>],
        gradients: Vec<Option<Tensor<1>>>,
        rate: f64,
    ) -> f64 {
        let fixed = |p: &Parameter| p.role == Role::Magnitude && recipe.magnitude_mode == MagnitudeMode::Fixed;
        let learned = parameters.iter().zip(&gradients).filter(|(p, _)| !fixed(p)).filter_map(|(_, g)| g.as_ref());
        let squares = learned.map(|g| (g.clone() * g.clone()).sum()).reduce(|a, b| a + b);
        let norm = squares.map_or(0.0, |sum| f64::from(sum.into_scalar::<f32>()).sqrt());
        if !norm.is_finite() {
            return norm;
        }
        let factor = recipe.clip.map_or(1.0, |limit| (limit / (norm + CLIP_EPSILON)).min(1.0));
        for (index, gradient) in gradients.into_iter().enumerate() {
            let Some(mut gradient) = gradient else { continue };
            if fixed(&parameters[index]) {
                continue;
            }
            if factor < 1.0 {
                gradient = gradient * factor;
            }
            if recipe.weight_decay > 0.0 && decays(recipe.decay, parameters[index].role) {
                gradient = gradient + values[index].clone() * recipe.weight_decay;
            }
            let velocity = match self.velocities[index].take() {
                Some(velocity) => velocity * recipe.momentum + gradient.clone(),
                None => gradient.clone(),
            };
            self.velocities[index] = Some(velocity.clone());
            let direction = if recipe.nesterov { gradient + velocity * recipe.momentum } else { velocity };
            let of_magnitude = recipe.magnitude_rate.filter(|_| parameters[index].role == Role::Magnitude);
            values[index] = values[index].clone() - direction * (rate * of_magnitude.unwrap_or(1.0));
        }
        norm
    }
}

fn decays(decay: Decay, role: Role) -> bool {
    match role {
        Role::Weight => true,
        Role::Norm => decay != Decay::Weights,
        Role::Direction => matches!(decay, Decay::Directions | Decay::All),
        Role::Magnitude => decay == Decay::All,
    }
}

/// The learning rate of a step, counted from 0, with `per_epoch` steps an epoch.
pub fn learning_rate(recipe: &Recipe, step: usize, per_epoch: usize) -> f64 {
    let warm = recipe.warm_up * per_epoch;
    if step < warm {
        return recipe.learning_rate * (step + 1) as f64 / warm as f64;
    }
    let total = recipe.epochs * per_epoch;
    let factor = match recipe.schedule {
        Schedule::Constant => 1.0,
        Schedule::Cosine => 0.5 * (1.0 + (PI * (step - warm) as f64 / (total - warm).max(1) as f64).cos()),
        Schedule::Step => {
            let passed = recipe.milestones.iter().filter(|&&epoch| step >= epoch * per_epoch).count();
            recipe.decay_factor.powi(passed as i32)
        }
    };
    recipe.learning_rate * factor
}
