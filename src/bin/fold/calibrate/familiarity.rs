//! What `nbn fold calibrate` learns of pictures that are like the training pictures.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail};
use nbn::bundle::{Bundle, Calibration, Familiarity, FamiliarityRecord, Question, familiarity_file};
use nbn::calibrate::{FamiliarityFitError, LEAST_TRAINING, MOST_FEATURES, Training, familiarity};
use nbn::data::{Answers, LabelledImages, each_answer, in_turn};
use nbn::tell;

use super::super::dataset::{RuntimeArgs, bar};
use super::replace;

/// Largest file, in bytes, that is looked into before it is replaced: 8,142 classes and a million calibration images fit.
const MOST_BYTES: u64 = 1 << 30;

/// What there is to learn from.
pub(super) struct Source<'a> {
    pub(super) bundle: &'a Bundle,
    /// Of the calibration images; none for a file of logits.
    pub(super) answers: Option<&'a Answers>,
    pub(super) training: Option<LabelledImages>,
    /// Training images at most.
    pub(super) most: usize,
}

/// The calibration's record and the bytes of the file beside it; none where nothing can be learned, which is told.
pub(super) fn fit(
    source: Source<'_>,
    calibration: &Calibration,
    runtime: &RuntimeArgs,
) -> anyhow::Result<Option<(FamiliarityRecord, Vec<u8>)>> {
    let Source { bundle, answers, training, most } = source;
    if most == 0 {
        return Ok(None);
    }
    let Some(answers) = answers else {
        tell!("familiarity not learned: a file of logits says nothing of what images look like");
        return Ok(None);
    };
    let passed = match training {
        None => {
            tell!("familiarity from confidence alone: with --training-data, it learns what images look like, too");
            None
        }
        Some(images) => {
            let images = images.select(&in_turn(images.labels(), most))?;
            let mut counts = vec![0; bundle.manifest.classes.len()];
            images.labels().iter().for_each(|&label| counts[label as usize] += 1);
            let passed = Mutex::new(Training::new(counts));
            let bar = bar(images.len(), "familiarity");
            each_answer(
                bundle,
                runtime.library()?,
                &runtime.place(),
                &images,
                runtime.pixels,
                &|| bar.inc(1),
                &|index, answer, _| {
                    let class = images.labels()[index] as usize;
                    let mut passed = passed.lock().unwrap_or_else(PoisonError::into_inner);
                    passed.add(index, class, answer.look.as_deref(), answer.features.as_deref());
                },
            )?;
            bar.finish_and_clear();
            let passed = passed.into_inner().unwrap_or_else(PoisonError::into_inner);
            if let Some(index) = passed.wrong() {
                bail!("{}: {}", images.name(index), FamiliarityFitError::NotFinite { of: "training", index });
            }
            Some(passed)
        }
    };
    let learned = passed.is_some();
    let found = familiarity(passed, answers, calibration, &bundle.manifest.classes)?;
    let asks = |question| found.0.questions.iter().any(|asked| asked.question == question);
    if learned && !asks(Question::Look) {
        tell!("familiarity from confidence alone: there are fewer than {LEAST_TRAINING} training images to learn from");
    } else if learned && !asks(Question::Distance) {
        let reason = match answers.features.as_ref().and_then(|features| features.first()).map(Vec::len) {
            None => "this network does not give its features; export it again, without --no-features".to_owned(),
            Some(n) if n > MOST_FEATURES => {
                format!("this network gives {n} features, and at most {MOST_FEATURES} are used")
            }
            Some(_) => "its features do not vary within any class of the training images".to_owned(),
        };
        tell!("familiarity without distance: {reason}");
    }
    Ok(Some(found))
}

/// Writes `calibration` to `out`, and what its familiarity names beside it. Killed between any two steps, there is a calibration
/// that loads: the old one, the new one, or the new one without familiarity.
pub(super) fn write(out: &Path, mut calibration: Calibration, beside: Option<&[u8]>) -> anyhow::Result<()> {
    let text = |calibration: &Calibration| anyhow::Ok(serde_json::to_string_pretty(calibration)? + "\n");
    let whole = text(&calibration)?;
    let file = familiarity_file(out);
    let Some(bytes) = beside else {
        replace(out, whole.as_bytes())?;
        if file.exists() && is_own(&file) {
            // The calibration that named it is gone.
            std::fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
        }
        return Ok(());
    };
    if out.exists() {
        calibration.familiarity = None;
        replace(out, text(&calibration)?.as_bytes())?;
    }
    replace(&file, bytes)?;
    replace(out, whole.as_bytes())
}

/// Whether `path` is a file that [`write`] has written beside a calibration.
pub(super) fn is_own(path: &Path) -> bool {
    let read = || {
        let found = std::fs::metadata(path).ok().filter(|found| found.is_file() && found.len() <= MOST_BYTES)?;
        let bytes = std::fs::read(path).ok().filter(|_| found.len() > 0)?;
        Some(Familiarity::from_bytes(&bytes).is_ok())
    };
    read().unwrap_or(false)
}
