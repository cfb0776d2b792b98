//! What a run did.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::source::Fault;
use crate::bundle::{Class, Group};
use crate::classify::Timings;

/// Counts, accuracy and times of a run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Summary {
    /// Rows with predictions.
    pub scored: u64,
    /// Rows with an error.
    pub failed: u64,
    /// Pictures that had a committed row already.
    pub resumed: u64,
    /// Pictures left out because the source had named them before.
    pub duplicates: u64,
    /// Whether it was stopped before the source's end.
    pub interrupted: bool,
    /// Sources that could not be read to their end, with the reason. Their rest has no rows.
    pub broken: Vec<String>,
    /// Rows with an error, by kind.
    pub errors: BTreeMap<&'static str, u64>,
    /// Scored pictures by the group of their best class.
    pub predicted: BTreeMap<&'static str, u64>,
    /// Scored pictures whose decision is withheld.
    pub abstained: u64,
    /// Scored pictures with a label that is no class of the model.
    pub unknown_labels: u64,
    /// How often the best class was the true one, where the source has labels.
    pub accuracy: Option<Accuracy>,
    /// Where the time went.
    pub seconds: Seconds,
    /// Rows per second of the whole run.
    pub images_per_second: f64,
}

impl Summary {
    /// Pictures that the source named, whatever became of them.
    pub fn images(&self) -> u64 {
        self.scored + self.failed + self.resumed + self.duplicates
    }
}

/// Accuracy of the scored pictures that have a label.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Accuracy {
    /// Pictures.
    pub images: u64,
    /// Share of pictures whose best class is the true one.
    pub top1: f64,
    /// Mean over the classes that occur of the share of their pictures.
    pub mean_recall: f64,
    /// The same over classes with more than 100 training images.
    pub many: Option<f64>,
    /// The same over classes with 20 to 100.
    pub medium: Option<f64>,
    /// The same over classes with fewer than 20.
    pub few: Option<f64>,
    /// Of these pictures, those whose decision is not withheld.
    pub accepted: u64,
    /// Share of those whose best class is the true one.
    pub accepted_top1: Option<f64>,
}

/// Seconds, summed over threads except for `total` and `write`.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Seconds {
    /// From the first picture to the last row.
    pub total: f64,
    /// Reading files.
    pub read: f64,
    /// Decoding.
    pub decode: f64,
    /// Resizing, cropping and normalising.
    pub preprocess: f64,
    /// The network.
    pub infer: f64,
    /// Scoring and writing rows.
    pub write: f64,
}

/// A [`Summary`] in the making.
pub(super) struct Tally<'a> {
    pub(super) summary: Summary,
    classes: &'a [Class],
    ids: BTreeMap<&'a str, usize>,
    /// Pictures and hits by true class.
    recall: Vec<(u64, u64)>,
    /// Pictures and hits of those that are accepted.
    accepted: (u64, u64),
}

impl<'a> Tally<'a> {
    pub(super) fn new(classes: &'a [Class]) -> Self {
        let ids = classes.iter().enumerate().map(|(id, class)| (class.label.as_str(), id)).collect();
        Self { summary: Summary::default(), classes, ids, recall: vec![(0, 0); classes.len()], accepted: (0, 0) }
    }

    pub(super) fn failed(&mut self, fault: &Fault) {
        self.summary.failed += 1;
        *self.summary.errors.entry(fault.kind).or_default() += 1;
    }

    pub(super) fn scored(&mut self, best: usize, label: Option<&str>, abstained: bool, timings: &Timings) {
        let Self { summary, classes, ids, recall, accepted } = self;
        summary.scored += 1;
        summary.abstained += u64::from(abstained);
        let group = classes.get(best).and_then(Class::group).map_or("unknown", Group::name);
        *summary.predicted.entry(group).or_default() += 1;
        summary.seconds.decode += timings.decode.as_secs_f64();
        summary.seconds.preprocess += timings.preprocess.as_secs_f64();
        if timings.leads_batch {
            summary.seconds.infer += timings.infer.as_secs_f64();
        }
        let Some(label) = label else { return };
        let index = || label.parse().ok().filter(|index| *index < classes.len());
        match ids.get(label).copied().or_else(index) {
            Some(class) => {
                recall[class].0 += 1;
                recall[class].1 += u64::from(class == best);
                if !abstained {
                    accepted.0 += 1;
                    accepted.1 += u64::from(class == best);
                }
            }
            None => summary.unknown_labels += 1,
        }
    }

    pub(super) fn wrote(&mut self, took: Duration) {
        self.summary.seconds.write += took.as_secs_f64();
    }

    pub(super) fn finish(mut self, total: Duration, read: Duration) -> Summary {
        let rows = self.summary.scored + self.summary.failed;
        self.summary.accuracy = self.accuracy();
        self.summary.seconds.total = total.as_secs_f64();
        self.summary.seconds.read = read.as_secs_f64();
        self.summary.images_per_second = rows as f64 / total.as_secs_f64().max(1e-9);
        self.summary
    }

    fn accuracy(&self) -> Option<Accuracy> {
        let (images, hits) = self.recall.iter().fold((0, 0), |(n, hits), class| (n + class.0, hits + class.1));
        let mean = |wanted: &dyn Fn(&Class) -> bool| {
            let seen = self.classes.iter().zip(&self.recall).filter(|(class, (n, _))| *n > 0 && wanted(class));
            let recalls: Vec<f64> = seen.map(|(_, (n, hits))| *hits as f64 / *n as f64).collect();
            (!recalls.is_empty()).then(|| recalls.iter().sum::<f64>() / recalls.len() as f64)
        };
        let of = |group| mean(&|class| class.group() == Some(group));
        (images > 0).then(|| Accuracy {
            images,
            top1: hits as f64 / images as f64,
            mean_recall: mean(&|_| true).unwrap_or(0.0),
            many: of(Group::Many),
            medium: of(Group::Medium),
            few: of(Group::Few),
            accepted: self.accepted.0,
            accepted_top1: (self.accepted.0 > 0).then(|| self.accepted.1 as f64 / self.accepted.0 as f64),
        })
    }
}
