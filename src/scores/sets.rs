//! Prediction sets: the classes whose conformal score does not exceed a threshold fitted on calibration images.
//!
//! Split conformal prediction: with n calibration scores, the threshold at rank ⌈(n+1)(1−α)⌉ gives sets that hold the
//! true class with a probability of at least 1−α for images drawn like the calibration images.

use serde::{Deserialize, Serialize};

use super::Probabilities;
use crate::bundle::{Class, Group, MixThresholds, ScoreTable, SetTables, Thresholds};

/// What a prediction set's threshold is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum SetScore {
    /// −p under the prior of the answer, the default: the set holds the classes whose score in the answer is high enough.
    Posterior,
    /// −p/π_train of p under the training prior, adjusted by prevalence: rare classes get into sets more easily, which raises the mean coverage per
    /// class.
    #[default]
    Pas,
    /// −p under the training prior: small sets under the training mix, which often miss rare classes.
    Plain,
}

impl SetScore {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Posterior => "posterior",
            Self::Pas => "pas",
            Self::Plain => "plain",
        }
    }

    /// The score of every class, from probabilities under the prior that it is of.
    pub fn values(self, probabilities: &Probabilities, train_prior: &[f64]) -> Vec<f64> {
        let p = probabilities.values().iter();
        match self {
            Self::Pas => p.zip(train_prior).map(|(p, prior)| -p / prior).collect(),
            Self::Posterior | Self::Plain => p.map(|p| -p).collect(),
        }
    }
}

/// Images over which the coverage of prediction sets holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, clap::ValueEnum)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum SetRung {
    /// Over all images.
    #[default]
    Marginal,
    /// Over the images of each group of classes.
    Group,
    /// Over the images of each class.
    Class,
    /// Of each class, as far as it has images; else of its group, and of all.
    Shrunk,
}

impl SetRung {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Marginal => "marginal",
            Self::Group => "group",
            Self::Class => "class",
            Self::Shrunk => "shrunk",
        }
    }
}

/// The class mix that the coverage holds for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClassMix {
    /// That of the calibration images.
    Calibration,
    /// All classes equally often.
    Uniform,
    /// That of the training images.
    Train,
}

impl ClassMix {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Calibration => "calibration",
            Self::Uniform => "uniform",
            Self::Train => "train",
        }
    }

    fn of(self, thresholds: &MixThresholds) -> &Thresholds {
        match self {
            Self::Calibration => &thresholds.calibration,
            Self::Uniform => &thresholds.uniform,
            Self::Train => &thresholds.train,
        }
    }
}

/// What a caller asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SetRequest {
    /// Miscoverage level α: the set shall miss the true class at most this often.
    pub alpha: f64,
    /// Which score.
    pub score: SetScore,
    /// For whom it shall hold; where the samples do not allow it, the next coarser rung serves.
    pub rung: SetRung,
    /// For which class mix.
    pub mix: ClassMix,
}

/// Why there is no set.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum SetError {
    /// Not a level.
    #[error("alpha is {0}; it must lie between 0 and 1, e.g. 0.1 for sets that contain the true class 9 times in 10")]
    Alpha(f64),
    /// Finer than the calibration images allow.
    #[error(
        "alpha is {alpha}; the calibration images allow only {finest} and above: give a larger alpha, or calibrate \
         with more images"
    )]
    TooFine {
        /// The level asked for.
        alpha: f64,
        /// The finest that is possible.
        finest: f64,
    },
    /// Finer than any calibration is made for.
    #[error("alpha is {alpha}; the smallest level in this calibration is {finest}: give {finest} or more")]
    BeyondTable {
        /// The level asked for.
        alpha: f64,
        /// The finest of the table.
        finest: f64,
    },
    /// A score and a rung that do not go together.
    #[error("set_rung {} is not for set_score {}: {}", .1.name(), .0.name(), if *.0 == SetScore::Posterior {
        "its thresholds are always shrunk; leave set_rung out, or choose set_score pas or plain"
    } else {
        "choose marginal, group or class, or set_score posterior"
    })]
    Rung(SetScore, SetRung),
    /// Calibrated by an earlier version.
    #[error(
        "this model's calibration has no thresholds for set_score posterior: choose pas or plain, or run `nbn fold \
         calibrate` again"
    )]
    NoPosterior,
    /// No level at all.
    #[error("this bundle's calibration images are too few for prediction sets: calibrate with more images")]
    None,
}

/// One request's thresholds, resolved: one per class.
#[derive(Debug, Clone, PartialEq)]
pub struct SetRule {
    request: SetRequest,
    thresholds: Vec<(f64, SetRung)>,
}

/// The classes that the true one is among.
#[derive(Debug, Clone, PartialEq)]
pub struct PredictionSet {
    /// Class indices, the most probable under the score first, and the rung of each one's threshold.
    pub members: Vec<(usize, SetRung)>,
}

impl SetRequest {
    /// What is meant by a score and a rung of which either may be left open, where thresholds of the posterior are there or
    /// not.
    ///
    /// # Errors
    /// When they do not go together, or there are no such thresholds.
    pub fn meant(
        score: Option<SetScore>,
        rung: Option<SetRung>,
        has_posterior: bool,
    ) -> Result<(SetScore, SetRung), SetError> {
        let score = score.unwrap_or(match rung {
            Some(SetRung::Marginal | SetRung::Group | SetRung::Class) => SetScore::Pas,
            Some(SetRung::Shrunk) => SetScore::Posterior,
            None if has_posterior => SetScore::Posterior,
            None => SetScore::Pas,
        });
        match (score, rung) {
            (SetScore::Posterior, _) if !has_posterior => Err(SetError::NoPosterior),
            (SetScore::Posterior, None | Some(SetRung::Shrunk)) => Ok((score, SetRung::Shrunk)),
            (SetScore::Posterior, Some(rung)) | (_, Some(rung @ SetRung::Shrunk)) => Err(SetError::Rung(score, rung)),
            (_, rung) => Ok((score, rung.unwrap_or_default())),
        }
    }
}

impl SetRule {
    /// Looks up the thresholds for `request`. A level between two of the table's is served by the finer one.
    ///
    /// # Errors
    /// When α is no level, or finer than the samples allow.
    pub fn resolve(tables: &SetTables, classes: &[Class], request: SetRequest) -> Result<Self, SetError> {
        let SetRequest { alpha, score, rung, mix } = request;
        if !(alpha > 0.0 && alpha < 1.0) {
            return Err(SetError::Alpha(alpha));
        }
        let table: &ScoreTable = match score {
            SetScore::Posterior => return Self::shrunk(tables, request),
            SetScore::Pas => &tables.pas,
            SetScore::Plain => &tables.plain,
        };
        let at = |list: &Thresholds| {
            let level = tables.alphas.iter().rposition(|a| *a <= alpha)?;
            list.get(level).copied().flatten()
        };
        let marginal = mix.of(&table.marginal);
        if let (Some(&finest), Some(Some(_))) = (tables.alphas.first(), marginal.first())
            && alpha < finest
        {
            return Err(SetError::BeyondTable { alpha, finest });
        }
        let Some(coarsest) = at(marginal) else {
            let finest = tables.alphas.iter().zip(marginal).find_map(|(a, t)| t.map(|_| *a));
            return Err(finest.map_or(SetError::None, |finest| SetError::TooFine { alpha, finest }));
        };
        let in_group = |group: Group| {
            let found = table.groups.iter().find(|g| g.group == group)?;
            at(mix.of(&found.thresholds))
        };
        let of_class = |(k, class): (usize, &Class)| {
            let own = (rung == SetRung::Class).then(|| at(table.classes.get(k)?)).flatten();
            let group = || (rung >= SetRung::Group).then(|| in_group(class.group()?)).flatten();
            own.map(|t| (t, SetRung::Class))
                .or_else(|| group().map(|t| (t, SetRung::Group)))
                .unwrap_or((coarsest, SetRung::Marginal))
        };
        Ok(Self { request, thresholds: classes.iter().enumerate().map(of_class).collect() })
    }

    /// By a threshold for each class. A level is there when every class has it.
    fn shrunk(tables: &SetTables, request: SetRequest) -> Result<Self, SetError> {
        let posterior = tables.posterior.as_ref().ok_or(SetError::NoPosterior)?;
        let lists = match request.mix {
            ClassMix::Calibration => &posterior.calibration,
            ClassMix::Uniform => &posterior.uniform,
            ClassMix::Train => &posterior.train,
        };
        let alpha = request.alpha;
        let at = |level: usize| -> Option<Vec<(f64, SetRung)>> {
            lists.iter().map(|list| Some((list.get(level).copied()??, SetRung::Shrunk))).collect()
        };
        let finest = (0..tables.alphas.len()).find(|&level| at(level).is_some()).ok_or(SetError::None)?;
        let Some(level) = tables.alphas.iter().rposition(|a| *a <= alpha).filter(|level| *level >= finest) else {
            let is_first = finest == 0;
            let finest = tables.alphas[finest];
            return Err(if is_first {
                SetError::BeyondTable { alpha, finest }
            } else {
                SetError::TooFine { alpha, finest }
            });
        };
        let thresholds = at(level).ok_or(SetError::TooFine { alpha, finest: tables.alphas[finest] })?;
        Ok(Self { request, thresholds })
    }

    /// What was asked for.
    pub fn request(&self) -> &SetRequest {
        &self.request
    }

    /// The set of one image from its probabilities under the training prior, or for the posterior those of its mix. Never
    /// empty: the class with the least score is always in it, which can only raise coverage.
    pub fn apply(&self, probabilities: &Probabilities, train_prior: &[f64]) -> PredictionSet {
        let scores = self.request.score.values(probabilities, train_prior);
        let mut members: Vec<(usize, SetRung)> = scores
            .iter()
            .zip(&self.thresholds)
            .enumerate()
            .filter(|(_, (score, (threshold, _)))| *score <= threshold)
            .map(|(k, (_, (_, rung)))| (k, *rung))
            .collect();
        if members.is_empty()
            && let Some(best) = (0..scores.len()).min_by(|&a, &b| scores[a].total_cmp(&scores[b]))
        {
            members.push((best, self.thresholds[best].1));
        }
        members.sort_by(|a, b| scores[a.0].total_cmp(&scores[b.0]).then(a.0.cmp(&b.0)));
        PredictionSet { members }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::{GroupThresholds, PosteriorTable};

    fn classes() -> Vec<Class> {
        [500, 50, 5].iter().map(|n| Class { label: n.to_string(), count: Some(*n) }).collect()
    }

    fn tables() -> SetTables {
        let mix = |t: f64| MixThresholds {
            calibration: vec![None, Some(t), Some(t - 0.1)],
            uniform: vec![None, Some(t), Some(t - 0.1)],
            train: vec![None, Some(t), Some(t - 0.1)],
        };
        let table = ScoreTable {
            marginal: mix(-0.2),
            groups: vec![
                GroupThresholds { group: Group::Many, thresholds: mix(-0.4) },
                GroupThresholds {
                    group: Group::Few,
                    thresholds: MixThresholds {
                        calibration: vec![None; 3],
                        uniform: vec![None; 3],
                        train: vec![None; 3],
                    },
                },
            ],
            classes: vec![vec![None, Some(-0.6), Some(-0.7)], vec![None; 3], vec![None; 3]],
        };
        let of = |uniform: f64| {
            vec![
                vec![None, Some(uniform), Some(uniform)],
                vec![None, Some(-0.5), Some(-0.6)],
                vec![None, None, Some(-0.1)],
            ]
        };
        let posterior = PosteriorTable { calibration: of(-0.3), uniform: of(-0.2), train: of(-0.4) };
        SetTables { alphas: vec![0.01, 0.1, 0.2], pas: table.clone(), plain: table, posterior: Some(posterior) }
    }

    #[test]
    fn the_posteriors_thresholds_are_those_of_the_mix_and_every_class_has_the_level() {
        let request = |alpha, mix| SetRequest { alpha, score: SetScore::Posterior, rung: SetRung::Shrunk, mix };
        let resolve = |alpha, mix| SetRule::resolve(&tables(), &classes(), request(alpha, mix));
        let of = |mix| resolve(0.25, mix).unwrap().thresholds.iter().map(|t| t.0).collect::<Vec<_>>();
        assert_eq!(of(ClassMix::Uniform), [-0.2, -0.6, -0.1]);
        assert_eq!(of(ClassMix::Train), [-0.4, -0.6, -0.1]);
        assert_eq!(of(ClassMix::Calibration), [-0.3, -0.6, -0.1]);
        let fine = resolve(0.1, ClassMix::Uniform).unwrap_err();
        assert_eq!(fine, SetError::TooFine { alpha: 0.1, finest: 0.2 });
        let old = SetTables { posterior: None, ..tables() };
        assert_eq!(SetRule::resolve(&old, &classes(), request(0.2, ClassMix::Train)), Err(SetError::NoPosterior));
    }

    #[test]
    fn what_is_left_open_follows_from_what_is_said() {
        use SetRung::{Class, Group, Marginal, Shrunk};
        use SetScore::{Pas, Plain, Posterior};
        for (score, rung, meant) in [
            (None, None, Ok((Posterior, Shrunk))),
            (None, Some(Group), Ok((Pas, Group))),
            (None, Some(Shrunk), Ok((Posterior, Shrunk))),
            (Some(Plain), None, Ok((Plain, Marginal))),
            (Some(Posterior), Some(Class), Err(SetError::Rung(Posterior, Class))),
            (Some(Pas), Some(Shrunk), Err(SetError::Rung(Pas, Shrunk))),
        ] {
            assert_eq!(SetRequest::meant(score, rung, true), meant);
        }
        assert_eq!(SetRequest::meant(None, None, false), Ok((Pas, Marginal)));
        assert_eq!(SetRequest::meant(Some(Posterior), None, false), Err(SetError::NoPosterior));
    }

    fn rule(alpha: f64, rung: SetRung) -> Result<SetRule, SetError> {
        let request = SetRequest { alpha, score: SetScore::Plain, rung, mix: ClassMix::Calibration };
        SetRule::resolve(&tables(), &classes(), request)
    }

    #[test]
    fn a_rung_falls_back_from_class_to_group_to_marginal() {
        use SetRung::{Class, Group, Marginal};
        assert_eq!(rule(0.1, Marginal).unwrap().thresholds, [(-0.2, Marginal); 3]);
        assert_eq!(rule(0.1, Group).unwrap().thresholds, [(-0.4, Group), (-0.2, Marginal), (-0.2, Marginal)]);
        assert_eq!(rule(0.1, Class).unwrap().thresholds, [(-0.6, Class), (-0.2, Marginal), (-0.2, Marginal)]);
    }

    #[test]
    fn a_level_between_two_is_served_by_the_finer_and_too_fine_a_level_is_refused() {
        assert_eq!(rule(0.15, SetRung::Marginal).unwrap().thresholds[0].0, -0.2);
        assert_eq!(rule(0.5, SetRung::Marginal).unwrap().thresholds[0].0, -0.30000000000000004);
        let too_fine = SetError::TooFine { alpha: 0.05, finest: 0.1 };
        assert_eq!(rule(0.05, SetRung::Marginal).unwrap_err(), too_fine);
        assert_eq!(rule(0.001, SetRung::Marginal).unwrap_err(), SetError::TooFine { alpha: 0.001, finest: 0.1 });
        let mut full = tables();
        full.pas.marginal.uniform[0] = Some(-0.1);
        let request =
            SetRequest { alpha: 0.001, score: SetScore::Pas, rung: SetRung::Marginal, mix: ClassMix::Uniform };
        let beyond = SetRule::resolve(&full, &classes(), request).unwrap_err();
        assert_eq!(beyond, SetError::BeyondTable { alpha: 0.001, finest: 0.01 });
        assert_eq!(rule(0.0, SetRung::Marginal).unwrap_err(), SetError::Alpha(0.0));
        assert!(matches!(rule(f64::NAN, SetRung::Marginal), Err(SetError::Alpha(_))));
    }

    #[test]
    fn a_set_is_ordered_and_never_empty() {
        let rule = rule(0.1, SetRung::Marginal).unwrap();
        let p = |values: [f64; 3]| Probabilities::softmax(values.iter().map(|v| v.ln()).collect());
        let prior = [0.9, 0.09, 0.01];
        let members = |values| rule.apply(&p(values), &prior).members.iter().map(|m| m.0).collect::<Vec<_>>();
        assert_eq!(members([0.25, 0.7, 0.05]), [1, 0]);
        let strict = SetRule { request: rule.request, thresholds: vec![(-0.99, SetRung::Marginal); 3] };
        assert_eq!(strict.apply(&p([0.25, 0.7, 0.05]), &prior).members, [(1, SetRung::Marginal)]);
    }
}
