//! What a person sees of a run.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use nbn::tell;
use nbn::train::run::{EpochReport, Event, NewLength};

/// A bar on a terminal, a line per epoch everywhere.
pub(super) struct View {
    pub(super) bar: ProgressBar,
    epochs: usize,
    images: usize,
    batch: usize,
    /// Steps done in this process, and those that are left.
    steps: usize,
    left: usize,
}

/// Steps after which it is said how long the run will take.
const ESTIMATED_AFTER: usize = 10;

/// `1 epoch`, `2 epochs`.
pub(super) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Of seconds: to the minute, where it is minutes.
fn duration(seconds: f64) -> String {
    let seconds = if seconds < 120.0 { seconds.ceil() } else { (seconds / 60.0).round() * 60.0 };
    humantime::format_duration(std::time::Duration::from_secs(seconds as u64)).to_string()
}

impl View {
    pub(super) fn new(epochs: usize, images: usize, batch: usize) -> Self {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let bar = bar.with_message("starting");
        let style = ProgressStyle::with_template("{prefix} {bar:28} {pos}/{len} steps, {msg}, {eta} left");
        Self {
            bar: style.map_or_else(|_| bar.clone(), |style| bar.clone().with_style(style)),
            epochs,
            images,
            batch,
            steps: 0,
            left: 0,
        }
    }

    pub(super) fn show(&mut self, event: &Event<'_>) {
        match event {
            Event::Start { epoch, step, steps, length, parameters } => {
                tell!("learned     {parameters} values; {steps} steps per epoch");
                if *epoch >= self.epochs {
                    // Whoever has just given fewer does not want more.
                    let more = if length.is_some() { "" } else { ": give more --epochs to go on" };
                    tell!("resumed     after {}, which are all{more}", count(*epoch, "epoch"));
                } else if epoch + step > 0 {
                    tell!("resumed     after {} and {}", count(*epoch, "epoch"), count(*step, "step"));
                }
                self.left = (self.epochs - epoch.min(&self.epochs)) * steps - step;
                if let Some(length) = length {
                    self.tell_of(length, *epoch);
                }
                self.bar.set_length((self.epochs * steps) as u64);
                self.bar.set_position((epoch * steps + step) as u64);
                self.bar.reset_eta();
                self.bar.set_prefix(format!("epoch {}/{}", epoch + 1, self.epochs));
            }
            Event::Step { loss, images_per_second, .. } => {
                self.bar.inc(1);
                self.left = self.left.saturating_sub(1);
                self.steps += 1;
                // The first ones also start threads and fill caches.
                if self.steps == ESTIMATED_AFTER {
                    let left = self.left as f64 * self.batch as f64 / images_per_second.max(1e-9);
                    let line =
                        format!("estimate    {images_per_second:.0} images/s: about {} to the end", duration(left));
                    self.bar.suspend(|| tell!("{line}"));
                }
                self.bar.set_message(format!("loss {loss:.4}, {images_per_second:.0} images/s"));
            }
            Event::Epoch(report) => {
                let line = self.line(report);
                self.bar.suspend(|| tell!("{line}"));
                self.bar.set_prefix(format!("epoch {}/{}", (report.epoch + 1).min(self.epochs), self.epochs));
            }
        }
    }

    fn tell_of(&self, NewLength { before, rate, steps, kept }: &NewLength, epoch: usize) {
        let (longer, now) = (*before < self.epochs, count(self.epochs, "epoch"));
        let word = if longer { "longer" } else { "shorter" };
        tell!("{word:<11} {now} instead of {before}");
        if epoch < self.epochs {
            tell!("            the learning rate goes on at {rate:.3e}, as its schedule has it for the {word} run");
        }
        let never = steps.iter().filter(|step| **step >= self.epochs).count();
        if !longer && never > 0 {
            tell!("            {} of its schedule would come later, and never do", count(never, "step"));
        }
        if longer && steps.last().is_some_and(|last| *last <= epoch) {
            tell!(
                "            all steps of its schedule lie behind, so that it stays there: for steps over {now}, start again \
                 with --overwrite"
            );
        }
        if let Some(kept) = kept {
            tell!("kept        {}: the network of {}", kept.display(), count(*before, "epoch"));
        }
    }

    fn line(&self, report: &EpochReport) -> String {
        let left = (self.epochs - report.epoch) as f64 * self.images as f64 / report.images_per_second.max(1e-9);
        let mut line = format!(
            "epoch {:>3}/{}  loss {:.4}  training {:.1} %  {:.0} images/s",
            report.epoch,
            self.epochs,
            report.loss,
            100.0 * report.training_accuracy,
            report.images_per_second
        );
        if let Some(accuracy) = &report.evaluation {
            line += &format!("  top-1 {:.2} %", 100.0 * accuracy.overall);
            for (group, share) in &accuracy.groups {
                line += &format!("  {} {:.1}", group.name(), 100.0 * share);
            }
        }
        if report.epoch < self.epochs {
            line += &format!("  {} left", duration(left));
        }
        line
    }
}
