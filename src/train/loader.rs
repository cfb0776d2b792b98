//! Batches of varied pictures, made ahead on threads of their own, in an order that only the seed decides.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use fastrand::Rng;

use super::TrainError;
use super::augment::vary;
use super::recipe::Recipe;
use crate::bundle::{Preprocessing, Resize};
use crate::data::LabelledImages;
use crate::pixels::{DecodeLimits, Picture, Preprocessor};

/// Batches that each thread makes ahead.
const AHEAD: usize = 2;

/// One step's input.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// [N, 3, side, side], normalised.
    pub images: Vec<f32>,
    /// [N, K]; each row sums to 1.
    pub targets: Vec<f32>,
    /// N.
    pub size: usize,
}

/// The batches of one epoch, from `first` on.
pub struct Loader {
    threads: Vec<Receiver<Result<Batch, TrainError>>>,
    next: usize,
    steps: usize,
    stop: Arc<AtomicBool>,
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Steps of an epoch over `images`: the last batch may be smaller, but not of one image, of which there is no variance.
pub fn steps(images: usize, batch: usize) -> usize {
    let whole = images / batch;
    if images % batch > 1 || whole == 0 { whole + 1 } else { whole }
}

impl Loader {
    /// Starts `threads` threads on the batches of `epoch`.
    pub fn start(
        images: &Arc<LabelledImages>,
        classes: usize,
        recipe: &Arc<Recipe>,
        epoch: usize,
        first: usize,
        threads: usize,
    ) -> Self {
        let mut order: Vec<usize> = (0..images.len()).collect();
        seeded(recipe.seed, epoch, usize::MAX).shuffle(&mut order);
        let order = Arc::new(order);
        let steps = steps(images.len(), recipe.batch);
        let stop = Arc::new(AtomicBool::new(false));
        let receivers = (0..threads)
            .map(|thread| {
                let (sender, receiver) = sync_channel(AHEAD);
                let (images, recipe, order, stop) = (images.clone(), recipe.clone(), order.clone(), stop.clone());
                let mine = (first..steps).filter(move |step| (step - first) % threads == thread);
                thread::spawn(move || work(&images, classes, &recipe, &order, epoch, mine, &stop, &sender));
                receiver
            })
            .collect();
        Self { threads: receivers, next: 0, steps: steps - first, stop }
    }
}

impl Iterator for Loader {
    type Item = Result<Batch, TrainError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.steps {
            return None;
        }
        let receiver = &self.threads[self.next % self.threads.len()];
        self.next += 1;
        Some(
            receiver
                .recv()
                .unwrap_or_else(|_| Err(TrainError::Input("a thread that prepares images ended unexpectedly".into()))),
        )
    }
}

/// A generator for one image of one epoch, whatever thread draws from it.
fn seeded(seed: u64, epoch: usize, index: usize) -> Rng {
    let mut mixed = 0x2545_f491_4f6c_dd1d;
    // Each is mixed before the next comes in, so that no seed's epochs are another's in another order.
    for part in [seed, epoch as u64, index as u64] {
        // SplitMix64's finaliser.
        mixed = (mixed ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
    }
    Rng::with_seed(mixed)
}

#[expect(clippy::too_many_arguments, reason = "what a thread needs; one caller")]
fn work(
    images: &LabelledImages,
    classes: usize,
    recipe: &Recipe,
    order: &[usize],
    epoch: usize,
    steps: impl Iterator<Item = usize>,
    stop: &AtomicBool,
    sender: &SyncSender<Result<Batch, TrainError>>,
) {
    let limits = DecodeLimits::OFFLINE;
    let (shorter_side, side) = match recipe.sides() {
        Ok(sides) => sides,
        Err(error) => {
            // The receiver may have gone.
            let _ = sender.send(Err(error));
            return;
        }
    };
    let exif = recipe.preprocessing.exif;
    // What is varied has the crop's size already.
    let exact = Preprocessing { resize: Resize::ShorterSide(side as u32), ..recipe.preprocessing.clone() };
    let preprocessor = Preprocessor::new(exact, limits);
    for step in steps {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let records = &order[step * recipe.batch..((step + 1) * recipe.batch).min(order.len())];
        let mut batch = Batch {
            images: vec![0.0; records.len() * 3 * side * side],
            targets: vec![0.0; records.len() * classes],
            size: records.len(),
        };
        let mut failed = None;
        for (at, &record) in records.iter().enumerate() {
            let picture = match images.picture(record, exif, &limits) {
                Ok(picture) => picture,
                Err(reason) => {
                    failed = Some(TrainError::Image { name: images.name(record), reason });
                    break;
                }
            };
            let mut rng = seeded(recipe.seed, epoch, record);
            let (varied, hole) = vary(&picture, shorter_side, side as u32, &recipe.augment, &mut rng);
            let varied = match Picture::try_from(varied) {
                Ok(varied) => varied,
                Err(error) => {
                    failed = Some(TrainError::Image { name: images.name(record), reason: error.to_string() });
                    break;
                }
            };
            let out = &mut batch.images[at * 3 * side * side..(at + 1) * 3 * side * side];
            out.copy_from_slice(&preprocessor.normalize(&varied));
            if let Some([left, top, right, bottom]) = hole {
                for plane in out.chunks_exact_mut(side * side) {
                    (top..bottom).for_each(|y| plane[y * side + left..y * side + right].fill(0.0));
                }
            }
            batch.targets[at * classes + images.labels()[record] as usize] = 1.0;
        }
        if let (None, Some(alpha)) = (&failed, recipe.mixup) {
            mix(&mut batch, alpha, &mut seeded(recipe.seed, epoch, usize::MAX - 1 - step));
        }
        let last = failed.is_some();
        if sender.send(failed.map_or(Ok(batch), Err)).is_err() || last {
            return;
        }
    }
}

/// Blends every image and its target with another's, by one share for the batch, drawn from Beta(α, α).
fn mix(batch: &mut Batch, alpha: f64, rng: &mut Rng) {
    // Jöhnk's method, for α up to 1.
    let share = loop {
        let (x, y) = (rng.f64().powf(1.0 / alpha), rng.f64().powf(1.0 / alpha));
        if x + y > 0.0 && x + y <= 1.0 {
            break (x / (x + y)) as f32;
        }
    };
    let mut partners: Vec<usize> = (0..batch.size).collect();
    rng.shuffle(&mut partners);
    for values in [&mut batch.images, &mut batch.targets] {
        let width = values.len() / batch.size;
        let source = values.clone();
        for (own, &partner) in values.chunks_exact_mut(width).zip(&partners) {
            let other = &source[partner * width..(partner + 1) * width];
            own.iter_mut().zip(other).for_each(|(a, b)| *a = share * *a + (1.0 - share) * b);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_of_neighbouring_seeds_epochs_and_images_draw_alike() {
        let seen: HashSet<u64> = (0..8)
            .flat_map(|seed| (0..8).flat_map(move |epoch| (0..8).map(move |index| (seed, epoch, index))))
            .map(|(seed, epoch, index)| seeded(seed, epoch, index).u64(..))
            .collect();
        assert_eq!(seen.len(), 8 * 8 * 8);
    }
}
