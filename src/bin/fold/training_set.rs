//! The images that a network was trained on, as a command line names them: none of them may be among those that its scores are
//! fitted to or measured on.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use nbn::bundle::Bundle;
use nbn::data::{Answers, Form, LabelledImages, LabelledLogits, PixelHash, Purpose, pixel_hashes};
use nbn::files::Named;
use nbn::tell;

use super::calibrate::target::given;
use super::dataset::{Answered, bar, images};

#[derive(Args)]
pub(crate) struct TrainingSet {
    /// Images that the network was trained on; none of them may be among those of --data
    #[arg(long, value_name = "SET")]
    training_data: Option<PathBuf>,
    /// Format of the training images, if it is not recognised correctly
    #[arg(long = "training-data-format", alias = "training-form", value_name = "FORMAT", requires = "training_data")]
    training_form: Option<Form>,
    /// JSON file that lists the images that were trained on, if that is not all of them
    #[arg(long, value_name = "FILE", requires = "training_data")]
    training_records: Option<PathBuf>,
    /// Leave out images that were trained on, instead of refusing the set
    #[arg(long, requires = "training_data")]
    drop_shared: bool,
}

/// The images of --data that were not trained on, and what is known of each.
pub(crate) struct Unseen {
    pub(crate) logits: LabelledLogits,
    pub(crate) groups: Option<Vec<usize>>,
    /// Numbers of the images that are left; all, if nothing.
    pub(crate) kept: Option<Vec<usize>>,
    /// All that the network says of them; none for a file of logits.
    pub(crate) answers: Option<Answers>,
    /// The training images, where they were compared with them.
    pub(crate) training: Option<LabelledImages>,
}

impl TrainingSet {
    /// Whether it is named.
    pub(crate) fn is_given(&self) -> bool {
        self.training_data.is_some()
    }

    /// The files that are read.
    pub(crate) fn files(&self) -> Vec<Named> {
        let flags = [("--training-data", &self.training_data), ("--training-records", &self.training_records)];
        flags.into_iter().filter_map(|(flag, path)| given(flag, path.as_ref())).collect()
    }

    /// Leaves out, or refuses, what was trained on. `images` are those of the `logits`; a file of logits has none.
    pub(crate) fn without(
        &self,
        bundle: &Bundle,
        logits: LabelledLogits,
        groups: Option<Vec<usize>>,
        images: Option<Answered>,
    ) -> anyhow::Result<Unseen> {
        let Some(path) = &self.training_data else {
            let answers = images.map(|(_, answers)| answers);
            return Ok(Unseen { logits, groups, kept: None, answers, training: None });
        };
        let Some((own, answers)) = images else {
            bail!("--training-data cannot be compared with a file of logits: give --data the images themselves")
        };
        let manifest = &bundle.manifest;
        let records = self.training_records.as_deref().map(|path| (path, "--training-records", Purpose::HeldOut));
        let training = self::images(path, self.training_form, records, &manifest.classes)?.0;
        let bar = bar(training.len(), "training images");
        let seen = pixel_hashes(&training, manifest.preprocessing.exif, &|| bar.inc(1))?;
        bar.finish_and_clear();
        let hashes = &answers.hashes;
        let shared: Vec<usize> = (0..hashes.len()).filter(|&n| seen.contains_key(&hashes[n])).collect();
        if shared.is_empty() {
            return Ok(Unseen { logits, groups, kept: None, answers: Some(answers), training: Some(training) });
        }
        if !self.drop_shared {
            bail!(refusal(&shared, &own, hashes, &training, &seen));
        }
        tell!("left out    {} of {} images, which were trained on", shared.len(), hashes.len());
        let kept: Vec<usize> = (0..hashes.len()).filter(|&n| !seen.contains_key(&hashes[n])).collect();
        anyhow::ensure!(!kept.is_empty(), "no image is left: all were trained on");
        let groups = groups.map(|groups| kept.iter().map(|&n| groups[n]).collect());
        let (logits, answers) = (logits.select(&kept), Some(answers.select(&kept)));
        Ok(Unseen { logits, groups, kept: Some(kept), answers, training: Some(training) })
    }
}

fn refusal(
    shared: &[usize],
    images: &LabelledImages,
    hashes: &[PixelHash],
    training: &LabelledImages,
    seen: &HashMap<PixelHash, usize>,
) -> String {
    let first = shared[0];
    let same = seen.get(&hashes[first]).map(|&same| training.name(same)).unwrap_or_default();
    format!(
        "{} of {} images were trained on (the first is {}, which has the pixels of {same}): what is fitted to them, or measured \
         on them, is overconfident. Hold such images, and copies of them, out of training, or pass --drop-shared to leave them \
         out here",
        shared.len(),
        hashes.len(),
        images.name(first)
    )
}
