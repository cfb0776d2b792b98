//! A network with what its answers must be: batches in, checked answers out.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ndarray::{ArrayView4, s};

use super::{ClassifyError, panic_text};
use crate::bundle::{Familiarity, Manifest};
use crate::pixels::look;
use crate::runtime::{HostMemory, Outputs, Runner, RuntimeError};
use crate::scores::Logits;
use crate::stop::Stop;

/// A batch that takes longer than this alone is not worth measuring.
const LONGEST_BATCH: Duration = Duration::from_millis(250);
/// Rounds over all sizes: at least, and at most.
const MEASURED_ROUNDS: (usize, usize) = (3, 9);
/// Time after which no further round begins.
const MEASURED_TIME: Duration = Duration::from_millis(500);

/// Of a batch that is filled up, one in so many places of the largest may be blank.
const BLANK_AT_MOST: usize = 8;

/// The logits of a picture, its features where the network gives them, and its look where it is asked for.
pub(super) type Answer = (Logits, Option<Vec<f32>>, Option<Vec<f32>>);

/// What became of a picture in a batch.
pub(super) struct Ran {
    pub(super) answer: Result<Answer, ClassifyError>,
    /// The run that it was in.
    pub(super) infer: Duration,
    /// Pictures in that run.
    pub(super) batch: usize,
    /// Whether it stands for its run where runs are counted.
    pub(super) leads: bool,
}

/// One thread's own network.
pub struct Network {
    pub(super) manifest: Arc<Manifest>,
    runner: Box<dyn Runner>,
    /// Batch sizes that the network is run with, ascending from 1.
    sizes: Vec<usize>,
    /// Whether a batch between two sizes is filled up to the larger with blank pictures, rather than run in parts.
    fills_up: bool,
    looks: bool,
}

impl Network {
    /// A network over any runner, one picture a batch.
    pub fn new(manifest: Arc<Manifest>, runner: Box<dyn Runner>) -> Self {
        Self { manifest, runner, sizes: vec![1], fills_up: false, looks: false }
    }

    /// Lets up to `max_batch` pictures into one run: 1, 2, 4 … and `max_batch` itself.
    #[must_use]
    pub fn with_max_batch(mut self, max_batch: usize) -> Self {
        self.sizes = self.batch_sizes(max_batch);
        self
    }

    /// Has batches between two sizes filled up to the larger, where a run costs much whatever is in it; and has more sizes, so that
    /// no more than an eighth of the largest batch is blank.
    #[must_use]
    pub fn filling_up(mut self) -> Self {
        let largest = self.max_batch();
        let step = largest.div_ceil(BLANK_AT_MOST).max(1);
        self.sizes.retain(|size| *size < step);
        self.sizes.extend((step..largest).step_by(step));
        self.sizes.push(largest);
        self.fills_up = true;
        self
    }

    /// Sizes up to `limit`, and up to what the network itself takes.
    fn batch_sizes(&self, limit: usize) -> Vec<usize> {
        let max_batch = limit.min(self.manifest.max_batch().unwrap_or(usize::MAX));
        let mut sizes: Vec<usize> =
            std::iter::successors(Some(1), |size| Some(size * 2)).take_while(|&size| size < max_batch).collect();
        sizes.push(max_batch.max(1));
        sizes
    }

    /// Has answers hold what the classifier of the network sees, if the network gives it.
    #[must_use]
    pub fn with_features(mut self) -> Self {
        self.runner.give_features();
        self
    }

    /// Has answers hold what the picture looks like.
    #[must_use]
    pub fn with_looks(mut self) -> Self {
        self.looks = true;
        self
    }

    /// Has answers hold what `familiarity` asks for.
    #[must_use]
    pub fn with_what_it_asks(self, familiarity: &Familiarity) -> Self {
        let network = if familiarity.distance.is_some() { self.with_features() } else { self };
        if familiarity.look.is_some() { network.with_looks() } else { network }
    }

    /// The most pictures in one run.
    pub fn max_batch(&self) -> usize {
        self.sizes.last().copied().unwrap_or(1)
    }

    /// The shape of one picture.
    pub fn shape(&self) -> [usize; 3] {
        self.manifest.preprocessing.shape()
    }

    /// Memory for a batch that its device copies with the least effort.
    pub(super) fn host_memory(&self, values: usize) -> HostMemory {
        self.runner.host_memory(values)
    }

    /// Runs the network once with each of its batch sizes.
    ///
    /// # Errors
    /// When it fails, or gives another number of logits than the manifest's classes.
    pub fn warm(&mut self) -> Result<(), ClassifyError> {
        let mut blank = self.blank(self.max_batch());
        // From the largest on: what the runtime keeps for that holds what the others need, too.
        for size in self.sizes.clone().into_iter().rev() {
            self.time(size, &mut blank)?;
        }
        Ok(())
    }

    /// Measures how long batches of 1, 2, 4 … up to `limit` pictures take, each as the shortest of a few runs; without the
    /// sizes that take longer than a quarter of a second.
    ///
    /// # Errors
    /// As [`Self::warm`].
    pub fn measure(&mut self, limit: usize) -> Result<Vec<(usize, Duration)>, ClassifyError> {
        let mut found = Vec::new();
        let mut blank = Vec::new();
        for size in self.batch_sizes(limit) {
            let first = self.time(size, &mut blank)?;
            if first > LONGEST_BATCH && !found.is_empty() {
                break;
            }
            found.push((size, first));
        }
        // The sizes take turns: whatever else the machine does falls on all of them.
        let began = Instant::now();
        for round in 0..MEASURED_ROUNDS.1 {
            if round >= MEASURED_ROUNDS.0 && began.elapsed() > MEASURED_TIME {
                break;
            }
            for (size, shortest) in &mut found {
                *shortest = self.time(*size, &mut blank)?.min(*shortest);
            }
        }
        // What the largest took is not needed again, unless it is chosen.
        self.runner.give_back();
        if let Err(error) = self.time(1, &mut blank) {
            tracing::debug!(%error, "memory of the largest batch could not be given back");
        }
        Ok(found)
    }

    /// Values of `pictures` blank pictures.
    fn blank(&self, pictures: usize) -> Vec<f32> {
        vec![0.0; pictures * self.shape().iter().product::<usize>()]
    }

    /// One run over `size` blank pictures, whose values `blank` grows to hold.
    fn time(&mut self, size: usize, blank: &mut Vec<f32>) -> Result<Duration, ClassifyError> {
        let [a, b, c] = self.shape();
        let needed = size * a * b * c;
        blank.resize(needed.max(blank.len()), 0.0);
        let view = ArrayView4::from_shape((size, a, b, c), &blank[..needed]);
        let view = view.map_err(|error| RuntimeError::Run(error.to_string()))?;
        let began = Instant::now();
        let rows = self.run(view, size, &Stop::default())?;
        let took = began.elapsed();
        rows.into_iter().try_for_each(|row| row.map(|_| ()))?;
        Ok(took)
    }

    /// How many pictures a run over the next of `left` pictures takes: more than there are where batches are filled up.
    pub(super) fn next_run(&self, left: usize) -> usize {
        let fills_up = || self.sizes.iter().copied().find(|&size| size >= left);
        let fits = || self.sizes.iter().copied().rfind(|&size| size <= left);
        if self.fills_up { fills_up().unwrap_or_else(|| self.max_batch()) } else { fits().unwrap_or(1) }
    }

    /// Pictures, filled up, of all runs over `pictures` pictures.
    pub(super) fn filled_up(&self, pictures: usize) -> usize {
        let whole = pictures - pictures % self.max_batch();
        let rest = pictures - whole;
        whole + if self.fills_up && rest > 0 { self.next_run(rest) } else { rest }
    }

    /// Runs the network on the first `pictures` of `batch` until `stop` is asked for; what follows them, up to
    /// [`Self::filled_up`], is blank. A picture's fault is not its neighbours'. What became of the pictures, in their order: of those
    /// that were not run any more, nothing. The error says that the device was lost meanwhile.
    pub(super) fn run_all(
        &mut self,
        batch: ArrayView4<'_, f32>,
        pictures: usize,
        stop: &Stop,
    ) -> (Vec<Ran>, Option<RuntimeError>) {
        let mut all: Vec<Ran> = Vec::with_capacity(pictures);
        // Up to here, pictures are tried one by one, because together they failed.
        let mut alone = 0;
        while all.len() < pictures && !stop.asked() {
            let (done, left) = (all.len(), pictures - all.len());
            let size = if done < alone { 1 } else { self.next_run(left) };
            let held = size.min(left);
            let began = Instant::now();
            let rows = match self.run(rows_of(batch, done..done + size), held, stop) {
                Err(ClassifyError::Runtime(lost @ RuntimeError::Lost { .. })) => return (all, Some(lost)),
                Err(_) if stop.asked() => break,
                // One picture's fault must not be its neighbours'.
                Err(error) if held > 1 => {
                    tracing::warn!(%error, size, "a batch failed; its images are tried one by one");
                    alone = done + held;
                    continue;
                }
                Err(error) => vec![Err(error)],
                Ok(rows) => rows,
            };
            let infer = self.runner.last_run().unwrap_or_else(|| began.elapsed());
            let mut leads = true;
            for answer in rows {
                let is_first = leads && answer.is_ok();
                leads &= answer.is_err();
                all.push(Ran { answer, infer, batch: held, leads: is_first });
            }
        }
        (all, None)
    }

    /// The answer to one picture.
    ///
    /// # Errors
    /// When the network fails on it.
    pub(super) fn answer(&mut self, picture: ArrayView4<'_, f32>) -> Result<Answer, ClassifyError> {
        self.run(picture, 1, &Stop::default())?.remove(0)
    }

    /// Runs the network on `view`, of which the first `pictures` are pictures and the others blank.
    fn run(
        &mut self,
        view: ArrayView4<'_, f32>,
        pictures: usize,
        stop: &Stop,
    ) -> Result<Vec<Result<Answer, ClassifyError>>, ClassifyError> {
        let n = view.shape()[0];
        let runner = &mut self.runner;
        let outputs: Outputs = catch_unwind(AssertUnwindSafe(|| runner.run(view, stop)))
            .unwrap_or_else(|panic| Err(RuntimeError::Run(format!("panicked: {}", panic_text(&*panic)))))?;
        let Outputs { logits, features } = outputs;
        for found in [Some(logits.nrows()), features.as_ref().map(|f| f.nrows())].into_iter().flatten() {
            if found != n {
                return Err(ClassifyError::Rows { found, pictures: n });
            }
        }
        let classes = self.manifest.classes.len();
        let looks =
            self.looks.then(|| view.outer_iter().map(|picture| look(picture, self.manifest.preprocessing.layout)));
        let mut looks = looks.into_iter().flatten();
        let answer = |(at, row): (usize, ndarray::ArrayView1<'_, f32>)| {
            let look = looks.next();
            Ok((Logits::try_new(row.to_vec(), classes)?, features.as_ref().map(|f| f.row(at).to_vec()), look))
        };
        Ok(logits.rows().into_iter().take(pictures).enumerate().map(answer).collect())
    }
}

/// Some of a batch's pictures.
fn rows_of(batch: ArrayView4<'_, f32>, pictures: Range<usize>) -> ArrayView4<'_, f32> {
    batch.slice_move(s![pictures, .., .., ..])
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl Runner for Nothing {
        fn run(&mut self, _: ArrayView4<'_, f32>, _: &Stop) -> Result<Outputs, RuntimeError> {
            Err(RuntimeError::Stopped)
        }
    }

    #[test]
    fn batches_are_filled_up_by_little_and_otherwise_run_in_parts() {
        let manifest: Manifest = serde_json::from_str(include_str!("../../models/cifar10-lt/1/manifest.json")).unwrap();
        let network = |max| Network::new(Arc::new(manifest.clone()), Box::new(Nothing)).with_max_batch(max);
        assert_eq!(network(12).sizes, [1, 2, 4, 8, 12]);
        assert_eq!([1, 3, 7, 13].map(|left| network(12).next_run(left)), [1, 2, 4, 12]);
        assert_eq!([1, 3, 12].map(|pictures| network(12).filled_up(pictures)), [1, 3, 12]);
        for (largest, sizes) in [
            (1, vec![1]),
            (2, vec![1, 2]),
            (6, vec![1, 2, 3, 4, 5, 6]),
            (16, vec![1, 2, 4, 6, 8, 10, 12, 14, 16]),
            (64, vec![1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]),
            (100, vec![1, 2, 4, 8, 13, 26, 39, 52, 65, 78, 91, 100]),
        ] {
            let network = network(largest).filling_up();
            assert_eq!(network.sizes, sizes);
            assert_eq!(network.filling_up().sizes, sizes);
        }
        let network = network(64).filling_up();
        assert_eq!([1, 3, 33, 64, 65, 130].map(|pictures| network.filled_up(pictures)), [1, 4, 40, 64, 65, 130]);
        assert_eq!([1, 3, 33, 64, 200].map(|left| network.next_run(left)), [1, 4, 40, 64, 64]);
    }
}
