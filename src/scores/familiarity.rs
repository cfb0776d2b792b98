//! How like the training pictures a picture is: a conformal p-value.
//!
//! Three questions have a value each: the squared Mahalanobis distance of the picture's look, that of its features from the
//! nearest class (Lee et al. 2018, arXiv 1807.03888, with classes counting the same), and the log-odds against its best class
//! under the uniform prior. The score is the sum of the values, each in standard deviations above its mean over the calibration
//! pictures, and at least 0. With n calibration pictures, p = (1 + those that score as high or higher) / (n + 1) (Vovk,
//! Gammerman & Shafer 2005).

use std::sync::Arc;

use super::SetRung;
use crate::bundle::{Class, Clouds, Familiarity, FamiliarityRecord, Group, Question, QuestionRecord};

/// The least that a question adds: that a picture is more ordinary than most in one way makes up for nothing of another.
const LEAST: f64 = 0.0;
/// The log-odds that a best class has at most, for it or against it: what f32 leaves of certainty.
const MOST_CERTAIN: f64 = 1e-9;

impl Clouds {
    /// d² of `x`, of D values; not a number when `x` has another length, or values that are not finite.
    pub fn squared_distance(&self, x: &[f32]) -> f64 {
        if x.len() != self.dimensions() {
            return f64::NAN;
        }
        let away: Vec<f32> = x.iter().zip(&self.mean).map(|(x, mean)| x - mean).collect();
        let along: Vec<f32> = self.basis.chunks_exact(self.dimensions()).map(|row| dot(row, &away)).collect();
        let residual = self.residual.map_or(0.0, |residual| {
            // Squares of large values are beyond f32.
            let square = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            let left = square(&away) - square(&along);
            // A NaN stays one.
            if left < 0.0 { 0.0 } else { left / f64::from(residual).powi(2) }
        });
        let whitened: Vec<f32> = along.iter().zip(&self.spread).map(|(along, spread)| along / spread).collect();
        let squares = self.centres.chunks_exact(self.rank()).map(|centre| square_between(&whitened, centre));
        // A NaN is no minimum: it must not be lost.
        let nearest = squares.fold(f32::INFINITY, |least, d| if d < least || d.is_nan() { d } else { least });
        f64::from(nearest) + residual
    }
}

/// Sums in eight lanes, which the compiler makes one instruction of.
fn sum_of(a: &[f32], b: &[f32], of: impl Fn(f32, f32) -> f32) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut lanes = [0.0f32; 8];
    for (a, b) in a.iter().zip(b) {
        lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (a, b))| *lane += of(*a, *b));
    }
    lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| of(*a, *b)).sum::<f32>()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |a, b| a * b)
}

fn square_between(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |a, b| (a - b) * (a - b))
}

/// The log-odds against a class of probability `p`.
pub fn doubt(p: f64) -> f64 {
    let p = p.clamp(MOST_CERTAIN, 1.0 - MOST_CERTAIN);
    ((1.0 - p) / p).ln()
}

/// How far `value` is from what is usual, in standard deviations, at least 0; what is not a number is as far as can be.
pub fn excess(value: f64, usual: &QuestionRecord) -> f64 {
    let excess = (value - usual.mean) / usual.deviation;
    if excess.is_nan() { f64::INFINITY } else { excess.max(LEAST) }
}

/// What is known of a picture.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// Its look, as `pixels` describes it.
    pub look: Option<&'a [f32]>,
    /// What the network's classifier sees.
    pub features: Option<&'a [f32]>,
    /// Its best class under the uniform prior, and the probability of that.
    pub best: (usize, f64),
}

impl Evidence<'_> {
    /// The value of each of the questions that `of` asks, in the order of [`Question::ALL`]; not a number where the picture has
    /// not what it asks for.
    pub fn values(&self, of: &Familiarity) -> [f64; 3] {
        let distance = |clouds: &Option<Clouds>, x: Option<&[f32]>| match (clouds, x) {
            (Some(clouds), Some(x)) => clouds.squared_distance(x),
            _ => f64::NAN,
        };
        [distance(&of.look, self.look), distance(&of.distance, self.features), doubt(self.best.1)]
    }
}

/// How like the training pictures a picture is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Familiar {
    /// Of pictures like the training pictures, as large a share scores as high or higher: small for what is unlike them.
    pub p: f64,
    /// The calibration pictures that it was ranked among: those of all classes, or of the group of its best class.
    pub rung: SetRung,
    /// The question by which it stands out most.
    pub question: Question,
}

/// A calibration's familiarity, ready to rank pictures.
#[derive(Debug, Clone)]
pub struct Familiarities {
    content: Arc<Familiarity>,
    questions: Vec<QuestionRecord>,
    groups: Vec<Option<Group>>,
}

impl Familiarities {
    /// Of what was read and checked.
    pub fn new(content: Arc<Familiarity>, record: &FamiliarityRecord, classes: &[Class]) -> Self {
        let groups = classes.iter().map(Class::group).collect();
        Self { questions: record.questions.clone(), groups, content }
    }

    /// The smallest p that every picture can have, whatever its best class.
    pub fn least(&self) -> f64 {
        let fewest = self.content.rankings.iter().map(|ranking| ranking.scores.len()).min();
        fewest.map_or(1.0, |fewest| 1.0 / (fewest + 1) as f64)
    }

    /// Ranks a picture.
    pub fn rank(&self, evidence: &Evidence<'_>) -> Familiar {
        let values = evidence.values(&self.content);
        let mut score = 0.0;
        let mut most = (f64::NEG_INFINITY, Question::Confidence);
        for (question, value) in Question::ALL.into_iter().zip(values) {
            let Some(usual) = self.questions.iter().find(|usual| usual.question == question) else { continue };
            let excess = excess(value, usual);
            score += excess;
            if excess > most.0 {
                most = (excess, question);
            }
        }
        let group = self.groups.get(evidence.best.0).copied().flatten();
        let rankings = &self.content.rankings;
        let own = rankings.iter().position(|ranking| ranking.group.is_some() && ranking.group == group);
        let at = own.unwrap_or(0);
        let rung = if own.is_some() { SetRung::Group } else { SetRung::Marginal };
        let p = rankings.get(at).map_or(1.0, |ranking| {
            let below = ranking.scores.partition_point(|other| *other < score);
            (1 + ranking.scores.len() - below) as f64 / (1 + ranking.scores.len()) as f64
        });
        Familiar { p, rung, question: most.1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Ranking;

    fn clouds() -> Clouds {
        // Two dimensions of three are kept, turned by a right angle.
        Clouds {
            mean: vec![1.0, 1.0, 1.0],
            basis: vec![0.0, 1.0, 0.0, -1.0, 0.0, 0.0],
            spread: vec![2.0, 0.5],
            centres: vec![0.0, 0.0, 10.0, 0.0],
            residual: Some(3.0),
        }
    }

    #[test]
    fn distances_are_as_the_formula_says() {
        let clouds = clouds();
        assert_eq!(clouds.squared_distance(&[1.0, 1.0, 1.0]), 0.0);
        // Along the first row 4, in units of 2; along the second −1, in units of 0.5; 6 in what is left out.
        assert_eq!(clouds.squared_distance(&[2.0, 5.0, 7.0]), 4.0 + 4.0 + 4.0);
        // The second centre is nearer.
        assert_eq!(clouds.squared_distance(&[1.0, 21.0, 1.0]), 0.0);
        assert!(clouds.squared_distance(&[1.0, 1.0]).is_nan());
        assert!(!clouds.squared_distance(&[f32::NAN, 1.0, 1.0]).is_finite());
        assert!(!clouds.squared_distance(&[f32::INFINITY, 1.0, 1.0]).is_finite());
    }

    fn familiarities(scores: Vec<f64>) -> Familiarities {
        let few = Ranking { group: Some(Group::Few), scores: vec![5.0; scores.len()] };
        let rankings = vec![Ranking { group: None, scores }, few];
        let content = Familiarity { look: None, distance: Some(clouds()), rankings };
        let usual = |question| QuestionRecord { question, mean: 0.0, deviation: 1.0 };
        let questions = vec![usual(Question::Distance), usual(Question::Confidence)];
        let record = FamiliarityRecord { sha256: String::new(), training_images: 9, questions };
        let classes: Vec<Class> = [500, 3].map(|n| Class { label: n.to_string(), count: Some(n) }).into();
        Familiarities::new(Arc::new(content), &record, &classes)
    }

    #[test]
    fn p_counts_the_pictures_that_are_at_least_as_strange() {
        let of = familiarities(vec![0.0, 1.0, 4.0, 9.0]);
        // Its log-odds are 0, its distance 4.
        let features = [1.0, 5.0, 1.0];
        let picture = |best| Evidence { look: None, features: Some(&features), best: (best, 0.5) };
        let found = of.rank(&picture(0));
        assert_eq!(found.p, 3.0 / 5.0, "{found:?}");
        assert_eq!((found.rung, found.question), (SetRung::Marginal, Question::Distance));
        // A picture of a group that has a ranking is held to that.
        assert_eq!(of.rank(&picture(1)), Familiar { p: 1.0, rung: SetRung::Group, question: Question::Distance });
        assert_eq!(of.least(), 0.2);
    }

    #[test]
    fn what_cannot_be_measured_is_as_strange_as_can_be() {
        let of = familiarities(vec![0.0, 1.0]);
        let nothing = Evidence { look: None, features: None, best: (0, 0.9) };
        let wild = [f32::NAN; 3];
        for evidence in [nothing, Evidence { features: Some(&wild), ..nothing }] {
            assert_eq!(of.rank(&evidence).p, of.least());
        }
    }

    #[test]
    fn certainty_is_bounded() {
        assert!(doubt(1.0).is_finite() && doubt(0.0).is_finite());
        assert_eq!(doubt(0.5), 0.0);
        assert!(doubt(0.9) < doubt(0.4));
    }
}
