//! Training pictures and held-out ones → what tells pictures like them from others. The formulas stand in `scores`'s
//! `familiarity`.

use nalgebra::{DMatrix, DVector, SymmetricEigen};

use crate::bundle::{
    Calibration, Class, Clouds, Familiarity, FamiliarityError, FamiliarityRecord, Group, Question, QuestionRecord,
    Ranking, sha256_hex,
};
use crate::data::Answers;
use crate::scores::{Calibrator, Evidence, Prior, Probabilities, excess};

/// Dimensions that are kept of features that have more.
const RANK: usize = 256;
/// Rounds of the search for them.
const ROUNDS: usize = 12;
/// What is added to each variance of features, as a share of their mean, so that directions with hardly any do not decide.
const FEATURE_RIDGE: f64 = 0.1;
/// The same of looks, whose values are scaled to variances of 1 first.
const LOOK_RIDGE: f64 = 0.01;
/// The least standard deviation of a value of the look: logarithms and normalised brightness differ by as much for no reason.
const LEAST_DEVIATION: f64 = 0.05;
/// Features at most: the squares of more take gigabytes.
pub const MOST_FEATURES: usize = 4096;
/// Training pictures at least, for looks and features.
pub const LEAST_TRAINING: u64 = 100;
/// Calibration pictures that a group needs for a ranking of its own: p goes down to a hundredth there.
const LEAST_RANKED: usize = 99;

/// Why familiarity was not fitted.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum FamiliarityFitError {
    /// The network gives values that are not finite.
    #[error(
        "what the network sees in {of} image {index}, or what it is given, is not finite in 32 bits: is the preprocessing right, \
         and the network whole?"
    )]
    NotFinite {
        /// `training` or `calibration`.
        of: &'static str,
        /// Its number in its set.
        index: usize,
    },
    /// It cannot be written.
    #[error(transparent)]
    Form(#[from] FamiliarityError),
}

/// Sums of one kind of values, over pictures of known classes.
#[derive(Debug, Clone)]
struct Sums {
    dimensions: usize,
    /// `[K, D]`.
    by_class: Vec<f64>,
    /// Σ w·x·xᵀ, of which the upper triangle is kept.
    second: DMatrix<f64>,
}

impl Sums {
    fn new(classes: usize, dimensions: usize) -> Self {
        Self { dimensions, by_class: vec![0.0; classes * dimensions], second: DMatrix::zeros(dimensions, dimensions) }
    }

    fn add(&mut self, class: usize, weight: f64, x: &[f32]) {
        let own = &mut self.by_class[class * self.dimensions..(class + 1) * self.dimensions];
        own.iter_mut().zip(x).for_each(|(sum, x)| *sum += f64::from(*x));
        if weight == 0.0 {
            return;
        }
        // By columns, as the matrix lies in memory.
        for (at, &value) in x.iter().enumerate() {
            let value = weight * f64::from(value);
            let mut column = self.second.column_mut(at);
            column.iter_mut().zip(&x[..=at]).for_each(|(sum, x)| *sum += value * f64::from(*x));
        }
    }

    fn symmetric(mut self) -> DMatrix<f64> {
        self.second.fill_lower_triangle_with_upper_triangle();
        self.second
    }

    fn mean_of(&self, class: usize, count: u64) -> DVector<f64> {
        let own = &self.by_class[class * self.dimensions..(class + 1) * self.dimensions];
        DVector::from_iterator(self.dimensions, own.iter().map(|sum| sum / count as f64))
    }
}

/// What is kept of the training pictures while they pass by.
#[derive(Debug, Clone)]
pub struct Training {
    /// Pictures of each class that will pass.
    counts: Vec<u64>,
    looks: Option<Sums>,
    features: Option<Sums>,
    passed: u64,
    wrong: Option<usize>,
}

impl Training {
    /// Before any of the pictures, of whose classes there are `counts`.
    pub fn new(counts: Vec<u64>) -> Self {
        Self { counts, looks: None, features: None, passed: 0, wrong: None }
    }

    /// Takes the picture with this number in, once.
    pub fn add(&mut self, index: usize, class: usize, look: Option<&[f32]>, features: Option<&[f32]>) {
        let finite = |x: Option<&[f32]>| x.is_none_or(|x| x.iter().all(|x| x.is_finite()));
        if !finite(look) || !finite(features) {
            self.wrong = Some(self.wrong.map_or(index, |earlier| earlier.min(index)));
            return;
        }
        self.passed += 1;
        let classes = self.counts.len();
        let several = self.counts.iter().filter(|n| **n > 1).count().max(1) as f64;
        let present = self.counts.iter().filter(|n| **n > 0).count().max(1) as f64;
        let n = self.counts[class] as f64;
        if let Some(look) = look {
            let sums = self.looks.get_or_insert_with(|| Sums::new(classes, look.len()));
            sums.add(class, 1.0 / (present * n), look);
        }
        if let Some(features) = features.filter(|features| features.len() <= MOST_FEATURES) {
            let sums = self.features.get_or_insert_with(|| Sums::new(classes, features.len()));
            // As the unbiased estimate has it, all classes counting the same.
            sums.add(class, if n > 1.0 { 1.0 / (several * (n - 1.0)) } else { 0.0 }, features);
        }
    }

    /// The first picture whose values are not finite.
    pub fn wrong(&self) -> Option<usize> {
        self.wrong
    }

    /// Pictures that were taken in.
    pub fn images(&self) -> u64 {
        self.passed
    }

    fn means(&self, sums: &Sums) -> Vec<DVector<f64>> {
        let present = (0..self.counts.len()).filter(|&k| self.counts[k] > 0);
        present.map(|k| sums.mean_of(k, self.counts[k])).collect()
    }

    /// One cloud of all looks.
    fn look(&mut self) -> Option<Clouds> {
        let sums = self.looks.take()?;
        let mean = average(&self.means(&sums));
        let covariance = sums.symmetric() - &mean * mean.transpose();
        let deviation = covariance.diagonal().map(|variance| variance.max(0.0).sqrt().max(LEAST_DEVIATION));
        let scaled =
            DMatrix::from_fn(mean.len(), mean.len(), |i, j| covariance[(i, j)] / (deviation[i] * deviation[j]));
        let (turned, variances) = eigen(scaled);
        let basis = DMatrix::from_fn(mean.len(), mean.len(), |i, j| turned[(j, i)] / deviation[j]);
        let spread = variances.map(|variance| (variance + LOOK_RIDGE).sqrt());
        Some(Clouds {
            centres: vec![0.0; mean.len()],
            mean: single(mean.iter()),
            basis: single(basis.transpose().iter()),
            spread: single(spread.iter()),
            residual: None,
        })
    }

    /// A cloud for each class's features, all of one shape, of at most `rank` dimensions; none where features do not vary.
    fn distance(&mut self, rank: usize) -> Option<Clouds> {
        let sums = self.features.take()?;
        let d = sums.dimensions;
        let centres = self.means(&sums);
        let mean = average(&centres);
        let several = self.counts.iter().filter(|n| **n > 1).count().max(1) as f64;
        let mut within = {
            let means: Vec<(u64, DVector<f64>)> = (0..self.counts.len())
                .filter(|&k| self.counts[k] > 1)
                .map(|k| (self.counts[k], sums.mean_of(k, self.counts[k])))
                .collect();
            let mut within = sums.symmetric();
            for (n, mean) in means {
                within -= (n as f64 / (several * (n as f64 - 1.0))) * &mean * mean.transpose();
            }
            within
        };
        within = (&within + within.transpose()) / 2.0;
        let trace = within.trace();
        if trace.is_nan() || trace <= 1e-12 * mean.norm_squared() {
            return None;
        }
        let ridge = FEATURE_RIDGE * trace / d as f64;
        let (basis, variances, residual) = if d <= rank {
            let (turned, variances) = eigen(within);
            (turned, variances, None)
        } else {
            let mut total = within.clone();
            for centre in &centres {
                let away = centre - &mean;
                total += &away * away.transpose() / centres.len() as f64;
            }
            let kept = largest(&total, rank);
            let inner = kept.transpose() * &within * &kept;
            let left = ((trace - inner.trace()) / (d - rank) as f64).max(0.0);
            let (turned, variances) = eigen((&inner + inner.transpose()) / 2.0);
            (kept * turned, variances, Some((left + ridge).sqrt() as f32))
        };
        let spread = variances.map(|variance| (variance + ridge).sqrt());
        let whitened = centres.iter().flat_map(|centre| {
            let along = basis.transpose() * (centre - &mean);
            single(along.component_div(&spread).iter())
        });
        Some(Clouds {
            centres: whitened.collect(),
            mean: single(mean.iter()),
            // Its columns are the rows of the file.
            basis: single(basis.iter()),
            spread: single(spread.iter()),
            residual,
        })
    }
}

fn single<'a>(values: impl Iterator<Item = &'a f64>) -> Vec<f32> {
    values.map(|value| *value as f32).collect()
}

fn average(means: &[DVector<f64>]) -> DVector<f64> {
    let zero = DVector::zeros(means.first().map_or(0, DVector::len));
    means.iter().fold(zero, |sum, mean| sum + mean) / means.len().max(1) as f64
}

/// Eigenvectors, by columns, and eigenvalues, none below 0, of a symmetric matrix.
fn eigen(matrix: DMatrix<f64>) -> (DMatrix<f64>, DVector<f64>) {
    let SymmetricEigen { eigenvectors, eigenvalues } = SymmetricEigen::new(matrix);
    (eigenvectors, eigenvalues.map(|value| value.max(0.0)))
}

/// An orthonormal basis, by columns, of nearly the `rank` dimensions in which the symmetric `matrix` is largest (subspace
/// iteration; Halko, Martinsson & Tropp 2011).
fn largest(matrix: &DMatrix<f64>, rank: usize) -> DMatrix<f64> {
    let mut random = fastrand::Rng::with_seed(0);
    let mut basis = DMatrix::from_fn(matrix.nrows(), rank, |_, _| random.f64() - 0.5);
    for _ in 0..ROUNDS {
        basis = (matrix * basis).qr().q();
    }
    basis
}

/// Fits what `calibration` lacks: its familiarity, from the `training` pictures that have passed, where there were any, and the
/// answers for the `held_out` pictures that it was fitted to. Gives the record for the calibration, and the content of the file
/// beside it.
///
/// # Errors
/// When the network gave values that are not finite.
pub fn familiarity(
    training: Option<Training>,
    held_out: &Answers,
    calibration: &Calibration,
    classes: &[Class],
) -> Result<(FamiliarityRecord, Vec<u8>), FamiliarityFitError> {
    if let Some(index) = training.as_ref().and_then(Training::wrong) {
        return Err(FamiliarityFitError::NotFinite { of: "training", index });
    }
    let mut training = training.filter(|training| training.images() >= LEAST_TRAINING);
    let mut content = Familiarity {
        look: training.as_mut().and_then(Training::look),
        distance: training.as_mut().and_then(|training| training.distance(RANK)),
        rankings: Vec::new(),
    };
    let calibrator = Calibrator::of(calibration);
    let uniform = calibrator.offsets(&Prior::Uniform);
    let labels = held_out.logits.labels();
    let mut rows: Vec<([f64; 3], usize)> = Vec::with_capacity(labels.len());
    for index in 0..labels.len() {
        let logits =
            held_out.logits.logits(index).map_err(|_| FamiliarityFitError::NotFinite { of: "calibration", index })?;
        let probabilities: Probabilities = calibrator.probabilities(&logits, &uniform);
        let best = probabilities.top(1).first().copied().unwrap_or((0, 0.0));
        let look = held_out.looks.get(index).map(Vec::as_slice);
        let features = held_out.features.as_ref().map(|features| features[index].as_slice());
        let values = Evidence { look, features, best }.values(&content);
        rows.push((values, best.0));
    }
    let asked = [content.look.is_some(), content.distance.is_some(), true];
    let mut questions = Vec::new();
    for (at, question) in Question::ALL.into_iter().enumerate().filter(|(at, _)| asked[*at]) {
        if let Some(index) = rows.iter().position(|(values, _)| !values[at].is_finite()) {
            return Err(FamiliarityFitError::NotFinite { of: "calibration", index });
        }
        let mean_of =
            |of: &dyn Fn(f64) -> f64| rows.iter().map(|(values, _)| of(values[at])).sum::<f64>() / rows.len() as f64;
        let mean = mean_of(&|value| value);
        let deviation = mean_of(&|value| (value - mean).powi(2)).sqrt();
        questions.push(QuestionRecord { question, mean, deviation: deviation.max(1e-6 * (1.0 + mean.abs())) });
    }
    let score = |values: &[f64; 3]| -> f64 {
        let asked = Question::ALL.into_iter().zip(values);
        asked.filter_map(|(q, value)| Some(excess(*value, questions.iter().find(|usual| usual.question == q)?))).sum()
    };
    for group in [None, Some(Group::Many), Some(Group::Medium), Some(Group::Few)] {
        let is_in = |best: usize| group.is_none() || classes.get(best).and_then(Class::group) == group;
        let own = rows.iter().filter(|(_, best)| is_in(*best));
        let mut scores: Vec<f64> = own.map(|(values, _)| score(values)).collect();
        if group.is_some() && scores.len() < LEAST_RANKED {
            continue;
        }
        scores.sort_by(f64::total_cmp);
        content.rankings.push(Ranking { group, scores });
    }
    let bytes = content.to_bytes()?;
    let training_images = training.as_ref().map_or(0, Training::images);
    Ok((FamiliarityRecord { sha256: sha256_hex(&bytes), training_images, questions }, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two classes whose features vary by 1 along the first axis, 0.1 along the second, and hardly beyond.
    fn training(pictures: usize) -> Training {
        let mut random = fastrand::Rng::with_seed(4);
        let mut training = Training::new(vec![pictures as u64, pictures as u64 / 2, 0]);
        let mut index = 0;
        for (class, count) in [pictures, pictures / 2].into_iter().enumerate() {
            for _ in 0..count {
                let mut wide = |by: f32| by * 12f32.sqrt() * (random.f32() - 0.5);
                let features = [10.0 * class as f32 + wide(1.0), wide(0.1), 3.0 + wide(1e-3), wide(1e-3)];
                let look = [wide(1.0), 2.0];
                training.add(index, class, Some(&look), Some(&features));
                index += 1;
            }
        }
        training
    }

    #[test]
    fn clouds_have_the_spread_of_what_they_are_made_from() {
        let mut training = training(20_000);
        let clouds = training.distance(RANK).unwrap();
        assert_eq!((clouds.dimensions(), clouds.rank(), clouds.residual), (4, 4, None));
        let ridge = FEATURE_RIDGE * (1.0 + 0.01) / 4.0;
        let away = |x: [f32; 4]| clouds.squared_distance(&x);
        assert!(away([0.0, 0.0, 3.0, 0.0]) < 0.01 && away([10.0, 0.0, 3.0, 0.0]) < 0.01);
        assert!((away([-3.0, 0.0, 3.0, 0.0]) - 9.0 / (1.0 + ridge)).abs() < 0.3);
        assert!((away([0.0, 1.0, 3.0, 0.0]) - 1.0 / (0.01 + ridge)).abs() < 1.0);
        assert!((away([0.0, 0.0, 3.0, 1.0]) - 1.0 / ridge).abs() < 1.0);
        let look = training.look().unwrap();
        // A value that never varies is taken to vary by the least.
        assert!((look.squared_distance(&[0.0, 2.0 + LEAST_DEVIATION as f32]) - 1.0 / LOOK_RIDGE).abs() < 1.0);
    }

    #[test]
    fn fewer_dimensions_say_nearly_the_same() {
        let training = training(2_000);
        let (whole, few) = (training.clone().distance(RANK).unwrap(), training.clone().distance(2).unwrap());
        assert_eq!((few.rank(), few.residual.is_some()), (2, true));
        for x in [[0.0, 0.0, 3.0, 0.0], [5.0, 0.1, 3.0, 0.0], [-2.0, 0.5, 3.0, 0.0], [0.0, 0.0, 4.0, 1.0]] {
            let (a, b) = (whole.squared_distance(&x), few.squared_distance(&x));
            assert!((a - b).abs() < 0.02 * (1.0 + a), "{a} {b}");
        }
    }

    #[test]
    fn features_that_do_not_vary_ask_nothing() {
        let mut training = Training::new(vec![3]);
        (0..3).for_each(|n| training.add(n, 0, None, Some(&[1.0, 2.0])));
        assert!(training.distance(RANK).is_none() && training.look().is_none());
        training.add(7, 0, None, Some(&[f32::NAN, 2.0]));
        training.add(5, 0, None, Some(&[f32::NAN, 2.0]));
        assert_eq!((training.wrong, training.images()), (Some(5), 3));
    }
}
