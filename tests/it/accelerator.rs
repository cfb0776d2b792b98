//! A device that keeps time as an accelerator does, and says of each picture what its first value was.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nbn::runtime::{Device, Outputs, Runner, RuntimeError};
use nbn::stop::Stop;
use ndarray::{Array2, ArrayView4};

/// A device that takes `launch` + n × `per_picture` for a batch of n pictures, one batch after another, and holds up to `depth` of
/// them. Its handles are used by several threads at once, as streams are.
#[derive(Clone)]
pub(crate) struct Accelerator(Arc<Inner>);

struct Inner {
    number: u32,
    launch: Duration,
    per_picture: Duration,
    depth: usize,
    classes: usize,
    line: Mutex<Line>,
    left: Condvar,
    lost: AtomicBool,
    /// Runs of more than one picture that fail, of 1,000.
    failing: AtomicUsize,
}

struct Line {
    /// When the last of the batches under way is done.
    free: Instant,
    under_way: usize,
    random: fastrand::Rng,
}

impl Accelerator {
    pub(crate) fn new(number: u32, launch: Duration, per_picture: Duration, classes: usize) -> Self {
        let line = Line { free: Instant::now(), under_way: 0, random: fastrand::Rng::with_seed(number.into()) };
        Self(Arc::new(Inner {
            number,
            launch,
            per_picture,
            depth: 2,
            classes,
            line: Mutex::new(line),
            left: Condvar::new(),
            lost: AtomicBool::new(false),
            failing: AtomicUsize::new(0),
        }))
    }

    /// Another way to it.
    pub(crate) fn handle(&self) -> Box<dyn Runner> {
        Box::new(Handle(self.0.clone()))
    }

    /// From now on every batch fails, those under way, too.
    #[allow(dead_code, reason = "benches lose no device")]
    pub(crate) fn lose(&self) {
        self.0.lost.store(true, Ordering::SeqCst);
    }

    /// Has so many of 1,000 batches fail, as a run may that is not the device's fault.
    #[allow(dead_code, reason = "benches have no faults")]
    pub(crate) fn fail(&self, of_a_thousand: usize) {
        self.0.failing.store(of_a_thousand, Ordering::SeqCst);
    }
}

struct Handle(Arc<Inner>);

impl Runner for Handle {
    fn run(&mut self, pictures: ArrayView4<'_, f32>, stop: &Stop) -> Result<Outputs, RuntimeError> {
        let Inner { number, launch, per_picture, depth, classes, line, left, lost, failing } = &*self.0;
        let n = pictures.shape()[0];
        let lock = || line.lock().unwrap_or_else(PoisonError::into_inner);
        let (end, fails) = {
            let mut line = lock();
            while line.under_way >= *depth {
                line = left.wait(line).unwrap_or_else(PoisonError::into_inner);
            }
            line.under_way += 1;
            line.free = line.free.max(Instant::now()) + *launch + *per_picture * n as u32;
            let fails = n > 1 && line.random.usize(0..1000) < failing.load(Ordering::SeqCst);
            (line.free, fails)
        };
        precisely();
        thread::sleep(end.saturating_duration_since(Instant::now()));
        lock().under_way -= 1;
        left.notify_one();
        if lost.load(Ordering::SeqCst) {
            return Err(RuntimeError::Lost { device: Device::Cuda(*number), reason: "it was lost on purpose".into() });
        }
        if stop.asked() {
            return Err(RuntimeError::Stopped);
        }
        if fails {
            // Its pictures must then be tried one by one.
            return Err(RuntimeError::Run("on purpose".into()));
        }
        let mark = |n: usize| pictures[[n, 0, 0, 0]];
        Ok(Outputs {
            logits: Array2::from_shape_fn((n, *classes), |(n, k)| if k == 0 { mark(n) } else { 0.0 }),
            features: Some(Array2::from_shape_fn((n, 1), |(n, _)| mark(n))),
        })
    }
}

/// Has this thread wake when it asked to, not up to 50 µs later.
fn precisely() {
    #[cfg(target_os = "linux")]
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
}
