//! The labelled set on a command line, and its logits.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use nbn::bundle::{Bundle, Class, Pixels};
use nbn::data::{Answers, Form, LabelledImages, LabelledLogits, Purpose, Records, answers_of};
use nbn::runtime::{Library, Place, SessionOptions, Wanted};
use nbn::tell;

use super::calibrate::target::given;
use nbn::files::Named;

#[derive(Args)]
pub(crate) struct Dataset {
    /// Labelled images: class folders, a list file, a CSV table, the files of CIFAR or Fashion-MNIST, or a file of logits
    #[arg(long, value_name = "SET")]
    pub(crate) data: PathBuf,
    /// Format of the set, if it is not recognised correctly
    #[arg(long = "data-format", alias = "form", value_name = "FORMAT")]
    pub(crate) form: Option<Form>,
    /// JSON file that lists the images to use, as `nbn fold train` writes it, or with their numbers, counted from 0:
    /// {"records": [0, 1, ...]}
    #[arg(long, value_name = "FILE")]
    pub(crate) records: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct RuntimeArgs {
    /// Device that runs the network; auto uses CUDA if it works, otherwise the processor
    #[arg(long, default_value = "cpu")]
    device: Wanted,
    /// Path of ONNX Runtime's shared library, if it is not found automatically
    #[arg(long)]
    onnxruntime: Option<PathBuf>,
    /// Pixels of JPEGs that are decoded: exact, or fast, as `nbn serve --pixels fast` does
    #[arg(long, value_name = "MODE", default_value = "exact")]
    pub(crate) pixels: Pixels,
}

/// Opens the images of `path`: all, or those of a list, which must not be one for another purpose. `records` are the list's
/// path, its flag, and that purpose.
pub(crate) fn images(
    path: &Path,
    form: Option<Form>,
    records: Option<(&Path, &str, Purpose)>,
    classes: &[Class],
) -> anyhow::Result<(LabelledImages, Option<Records>)> {
    let form = form.map_or_else(|| Form::guess(path, classes.len()), Ok)?;
    let labels: Vec<String> = classes.iter().map(|c| c.label.clone()).collect();
    let images = LabelledImages::open(path, form, &labels)?;
    let Some((list, flag, other)) = records else { return Ok((images, None)) };
    let records = Records::load(list)?;
    if records.purpose() == Some(other) {
        let (is, wanted) = match other {
            Purpose::Training => ("that were trained on", "NAME.calibration.json"),
            Purpose::HeldOut => ("that were held out", "NAME.training.json"),
        };
        anyhow::bail!("{flag}: {} lists the images {is}: give {wanted} of the run", list.display());
    }
    Ok((records.select(&images)?, Some(records)))
}

impl Dataset {
    /// The files that are read.
    pub(crate) fn files(&self) -> Vec<Named> {
        [Some(&self.data), self.records.as_ref()]
            .into_iter()
            .zip(["--data", "--records"])
            .filter_map(|(path, flag)| given(flag, path))
            .collect()
    }

    /// As it was given, or as the set looks.
    pub(crate) fn form(&self, bundle: &Bundle) -> anyhow::Result<Form> {
        Ok(self.form.map_or_else(|| Form::guess(&self.data, bundle.manifest.classes.len()), Ok)?)
    }

    /// The bundle's logits of the set, its images with all of the answers where it has images, and the list that they were chosen
    /// by.
    pub(crate) fn logits(
        &self,
        bundle: &Bundle,
        runtime: &RuntimeArgs,
    ) -> anyhow::Result<(LabelledLogits, Option<Answered>, Option<Records>)> {
        let classes = &bundle.manifest.classes;
        let form = self.form(bundle)?;
        if form == Form::Logits {
            anyhow::ensure!(self.records.is_none(), "--records is for images; {} holds logits", self.data.display());
            return Ok((LabelledLogits::load(&self.data, classes.len())?, None, None));
        }
        let records = self.records.as_deref().map(|path| (path, "--records", Purpose::Training));
        let (images, records) = images(&self.data, Some(form), records, classes)?;
        let bar = bar(images.len(), "network");
        let answers =
            answers_of(bundle, runtime.library()?, &runtime.place(), &images, runtime.pixels, &|| bar.inc(1))?;
        bar.finish_and_clear();
        Ok((answers.logits.clone(), Some((images, answers)), records))
    }
}

impl RuntimeArgs {
    pub(crate) fn library(&self) -> anyhow::Result<&'static Library> {
        Ok(Library::load(self.onnxruntime.as_deref())?)
    }

    pub(crate) fn place(&self) -> Place {
        Place { wanted: self.device.clone(), session: SessionOptions::on_processor(1) }
    }
}

/// Images, with what a network says of each.
pub(crate) type Answered = (LabelledImages, Answers);

/// A progress bar on a terminal, nothing elsewhere.
pub(crate) fn bar(total: usize, what: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:32} {pos}/{len} images, {per_sec}, {eta} left");
    let bar = ProgressBar::new(total as u64).with_message(what);
    style.map_or_else(|_| bar.clone(), |style| bar.clone().with_style(style))
}

/// Says on stderr what is being done.
pub(crate) fn say(what: &str) {
    if std::io::stderr().is_terminal() {
        tell!("{what} …");
    }
}
