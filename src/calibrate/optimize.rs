//! L-BFGS for a smooth convex function in a box, in f64.
//!
//! The optimisation crates have L-BFGS without bounds; the safeguards on biases and scales are bounds. Directions come from
//! the two-loop recursion (Nocedal 1980) over the coordinates that are free to move, steps are projected onto the box
//! (Bertsekas 1982) and halved until they descend.

const MEMORY: usize = 10;
const MAX_STEPS: usize = 500;
const MAX_HALVINGS: usize = 40;
/// Largest movement that a projected gradient step may still want at the end.
const TOLERANCE: f64 = 1e-8;
/// Relative decrease below which a step counts as none.
const NEGLIGIBLE: f64 = 1e-13;

/// The box.
pub(super) struct Bounds<'a> {
    pub(super) lower: &'a [f64],
    pub(super) upper: &'a [f64],
}

impl Bounds<'_> {
    fn clamp(&self, x: &mut [f64]) {
        for ((x, lower), upper) in x.iter_mut().zip(self.lower).zip(self.upper) {
            *x = x.clamp(*lower, *upper);
        }
    }

    fn is_free(&self, k: usize, x: &[f64], gradient: &[f64]) -> bool {
        !((x[k] <= self.lower[k] && gradient[k] > 0.0) || (x[k] >= self.upper[k] && gradient[k] < 0.0))
    }
}

/// Minimises `function` (value and gradient) from `start`.
pub(super) fn minimize(
    start: Vec<f64>,
    bounds: &Bounds<'_>,
    mut function: impl FnMut(&[f64]) -> (f64, Vec<f64>),
) -> Vec<f64> {
    let mut x = start;
    bounds.clamp(&mut x);
    let (mut value, mut gradient) = function(&x);
    let mut history: Vec<(Vec<f64>, Vec<f64>)> = Vec::new();
    let mut idle = 0;
    for _ in 0..MAX_STEPS {
        let free: Vec<bool> = (0..x.len()).map(|k| bounds.is_free(k, &x, &gradient)).collect();
        let wanted = |k: usize| (x[k] - gradient[k]).clamp(bounds.lower[k], bounds.upper[k]) - x[k];
        if (0..x.len()).map(|k| wanted(k).abs()).fold(0.0, f64::max) < TOLERANCE || idle > 2 {
            break;
        }
        let mut direction = two_loop(&gradient, &history, &free);
        if dot(&direction, &gradient) >= 0.0 {
            history.clear();
            direction = two_loop(&gradient, &history, &free);
        }
        let Some((next, next_value, next_gradient)) = descend(&x, value, &gradient, &direction, bounds, &mut function)
        else {
            if history.is_empty() {
                break;
            }
            history.clear();
            continue;
        };
        let step: Vec<f64> = next.iter().zip(&x).map(|(a, b)| a - b).collect();
        let change: Vec<f64> = next_gradient.iter().zip(&gradient).map(|(a, b)| a - b).collect();
        if dot(&step, &change) > 0.0 {
            if history.len() == MEMORY {
                history.remove(0);
            }
            history.push((step, change));
        }
        idle = if value - next_value <= NEGLIGIBLE * (1.0 + value.abs()) { idle + 1 } else { 0 };
        (x, value, gradient) = (next, next_value, next_gradient);
    }
    x
}

/// Halves the step until it descends enough (Armijo).
fn descend(
    x: &[f64],
    value: f64,
    gradient: &[f64],
    direction: &[f64],
    bounds: &Bounds<'_>,
    function: &mut impl FnMut(&[f64]) -> (f64, Vec<f64>),
) -> Option<(Vec<f64>, f64, Vec<f64>)> {
    let mut length = 1.0;
    for _ in 0..MAX_HALVINGS {
        let mut next: Vec<f64> = x.iter().zip(direction).map(|(x, d)| x + length * d).collect();
        bounds.clamp(&mut next);
        let promised: f64 = next.iter().zip(x).zip(gradient).map(|((a, b), g)| (a - b) * g).sum();
        let (next_value, next_gradient) = function(&next);
        if next_value <= value + 1e-4 * promised {
            return Some((next, next_value, next_gradient));
        }
        length *= 0.5;
    }
    None
}

/// −H·gradient on the free coordinates, 0 elsewhere.
fn two_loop(gradient: &[f64], history: &[(Vec<f64>, Vec<f64>)], free: &[bool]) -> Vec<f64> {
    let mask = |v: &[f64]| -> Vec<f64> { v.iter().zip(free).map(|(v, f)| if *f { *v } else { 0.0 }).collect() };
    let pairs: Vec<(Vec<f64>, Vec<f64>, f64)> = history
        .iter()
        .map(|(s, y)| (mask(s), mask(y)))
        .map(|(s, y)| {
            let curvature = dot(&s, &y);
            (s, y, curvature)
        })
        .filter(|(_, _, curvature)| *curvature > 0.0)
        .collect();
    let mut q = mask(gradient);
    let mut weights = Vec::new();
    for (s, y, curvature) in pairs.iter().rev() {
        let weight = dot(s, &q) / curvature;
        q.iter_mut().zip(y).for_each(|(q, y)| *q -= weight * y);
        weights.push(weight);
    }
    if let Some((_, y, curvature)) = pairs.last() {
        let scale = curvature / dot(y, y);
        q.iter_mut().for_each(|q| *q *= scale);
    }
    for ((s, y, curvature), weight) in pairs.iter().zip(weights.iter().rev()) {
        let correction = weight - dot(y, &q) / curvature;
        q.iter_mut().zip(s).for_each(|(q, s)| *q += correction * s);
    }
    q.iter_mut().for_each(|q| *q = -*q);
    q
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Σ wₖ(xₖ − tₖ)² with weights of very different size, coupled by (Σ xₖ)².
    fn bowl(x: &[f64]) -> (f64, Vec<f64>) {
        let (weights, targets) = ([1.0, 100.0, 0.01], [3.0, -1.0, 0.5]);
        let sum: f64 = x.iter().sum();
        let value = (0..3).map(|k| weights[k] * (x[k] - targets[k]).powi(2)).sum::<f64>() + sum * sum;
        (value, (0..3).map(|k| 2.0 * weights[k] * (x[k] - targets[k]) + 2.0 * sum).collect())
    }

    #[test]
    fn the_gradient_vanishes_at_the_free_minimum() {
        let x = minimize(vec![0.0; 3], &Bounds { lower: &[-50.0; 3], upper: &[50.0; 3] }, bowl);
        assert!(bowl(&x).1.iter().all(|g| g.abs() < 1e-6), "{x:?}");
    }

    #[test]
    fn at_a_bound_the_gradient_points_outward_and_elsewhere_it_vanishes() {
        let x = minimize(vec![0.0; 3], &Bounds { lower: &[-0.5; 3], upper: &[1.0; 3] }, bowl);
        let gradient = bowl(&x).1;
        for k in 0..3 {
            let bound = (x[k] == -0.5 && gradient[k] > 0.0) || (x[k] == 1.0 && gradient[k] < 0.0);
            assert!(bound || gradient[k].abs() < 1e-6, "{x:?} {gradient:?}");
        }
        assert_eq!((x[0], x[1]), (1.0, -0.5));
    }
}
