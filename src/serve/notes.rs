//! What handlers tell [`super::envelope`] of a request.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::HeaderValue;

use crate::classify::Timings;

/// What handlers tell of a request for its metrics and headers.
#[derive(Clone, Default)]
pub(crate) struct Notes(Arc<Mutex<Noted>>);

#[derive(Default)]
struct Noted {
    model: String,
    slowest: Timings,
    calibrate: Duration,
    inferred: bool,
}

impl Notes {
    fn with<T>(&self, look: impl FnOnce(&mut Noted) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The loaded model that answers.
    pub(crate) fn model(&self, name: &str) {
        self.with(|noted| name.clone_into(&mut noted.model));
    }

    /// An image's way. Of several images, the slowest of each stage is told.
    pub(crate) fn image(&self, timings: &Timings, calibrate: Duration) {
        self.with(|noted| {
            noted.inferred = true;
            let slowest = &mut noted.slowest;
            slowest.queue = slowest.queue.max(timings.queue);
            slowest.decode = slowest.decode.max(timings.decode);
            slowest.preprocess = slowest.preprocess.max(timings.preprocess);
            slowest.infer = slowest.infer.max(timings.infer);
            noted.calibrate = noted.calibrate.max(calibrate);
        });
    }

    /// The name of the loaded model that answered; empty when none did.
    pub(super) fn model_name(&self) -> String {
        self.with(|noted| noted.model.clone())
    }

    /// The stages, as the header `server-timing` lists them.
    pub(super) fn server_timing(&self) -> Option<HeaderValue> {
        self.with(|noted| {
            let Timings { queue, decode, preprocess, infer, .. } = noted.slowest;
            let calibrate = noted.calibrate;
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            let text = format!(
                "queue;dur={:.3}, decode;dur={:.3}, preprocess;dur={:.3}, infer;dur={:.3}, calibrate;dur={:.3}",
                ms(queue),
                ms(decode),
                ms(preprocess),
                ms(infer),
                ms(calibrate)
            );
            noted.inferred.then(|| HeaderValue::from_str(&text).ok()).flatten()
        })
    }
}
