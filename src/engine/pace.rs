//! How long pictures take, from the last ones.

use std::time::Duration;

/// Runs that are remembered.
const REMEMBERED: usize = 32;
/// With fewer runs nothing is said: the first may have met a cold cache, or one unusual picture.
const ENOUGH: usize = 8;
/// Longer than this many medians, a run counts as so many: one slow picture does not set the pace of all.
const OUTLIER: f64 = 4.0;

/// The time that one worker spends on a picture.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Seconds per picture of the last runs, the oldest to be overwritten next.
    runs: Vec<f64>,
    next: usize,
    estimate: f64,
}

impl Pace {
    /// Notes a run over `pictures`.
    pub(super) fn note(&mut self, took: Duration, pictures: usize) {
        let seconds = took.as_secs_f64() / pictures.max(1) as f64;
        match self.runs.get_mut(self.next) {
            Some(oldest) => *oldest = seconds,
            None => self.runs.push(seconds),
        }
        self.next = (self.next + 1) % REMEMBERED;
        let mut sorted = self.runs.clone();
        sorted.sort_by(f64::total_cmp);
        let longest = OUTLIER * sorted[sorted.len() / 2];
        self.estimate = sorted.iter().map(|seconds| seconds.min(longest)).sum::<f64>() / sorted.len() as f64;
    }

    /// Seconds that one worker spends on one picture; 0 as long as too few were seen.
    pub(super) fn seconds(&self) -> f64 {
        if self.runs.len() < ENOUGH { 0.0 } else { self.estimate }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_picture_does_not_set_the_pace() {
        let mut pace = Pace::default();
        pace.note(Duration::from_secs(60), 1);
        assert_eq!(pace.seconds(), 0.0, "the first picture alone says nothing");
        for _ in 0..31 {
            pace.note(Duration::from_millis(20), 2);
        }
        assert!((0.010..0.012).contains(&pace.seconds()), "{}", pace.seconds());
    }

    #[test]
    fn a_pace_that_has_changed_is_followed() {
        let mut pace = Pace::default();
        for _ in 0..32 {
            pace.note(Duration::from_millis(10), 1);
        }
        for _ in 0..32 {
            pace.note(Duration::from_millis(80), 4);
        }
        assert!((pace.seconds() - 0.020).abs() < 1e-9);
        // Of two kinds of pictures, both count.
        for n in 0..32 {
            pace.note(Duration::from_millis(if n % 2 == 0 { 10 } else { 30 }), 1);
        }
        assert!((pace.seconds() - 0.020).abs() < 1e-9);
    }
}
