//! Tells work that is under way that nobody waits for it any more, and keeps a signal that somebody ignores on purpose.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Ends the process now, whatever its other threads do. The ordinary end runs the exit handlers of libraries, and those of ONNX
/// Runtime take apart what a network that is still running on another thread uses.
pub fn exit_at_once(status: i32) -> ! {
    #[cfg(unix)]
    // SAFETY: it takes nothing but a number, and does not come back.
    #[allow(unsafe_code)]
    unsafe {
        libc::_exit(status)
    }
    #[cfg(not(unix))]
    std::process::exit(status)
}

/// Runs `install`, which sets handlers for signals, and leaves SIGHUP ignored where it is: `nohup` has it so, and whoever
/// asked for that wants the work to go on when the terminal is closed.
pub fn with_hangup_kept<T>(install: impl FnOnce() -> T) -> T {
    #[cfg(unix)]
    {
        let ignored = is_hangup_ignored();
        let installed = install();
        if ignored {
            // SAFETY: it sets no handler.
            #[allow(unsafe_code)]
            unsafe {
                libc::signal(libc::SIGHUP, libc::SIG_IGN);
            }
        }
        installed
    }
    #[cfg(not(unix))]
    install()
}

#[cfg(unix)]
fn is_hangup_ignored() -> bool {
    let mut found = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: it changes nothing, and fills `found`, which is valid when it is all zeros, too.
    #[allow(unsafe_code)]
    unsafe {
        libc::sigaction(libc::SIGHUP, std::ptr::null(), found.as_mut_ptr()) == 0
            && found.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// A request to end, which work looks at between its steps. Asked for once, it stays.
#[derive(Default)]
pub struct Stop {
    asked: AtomicBool,
    deadline: Option<Instant>,
    waker: Mutex<Option<Waker>>,
}

type Waker = Arc<dyn Fn() + Send + Sync>;

impl Stop {
    /// A stop that comes by itself at `deadline`.
    pub fn at(deadline: Option<Instant>) -> Self {
        Self { deadline, ..Self::default() }
    }

    /// Asks work to end, also work that has not begun.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether work should end: somebody asked for it, or the deadline has passed.
    pub fn asked(&self) -> bool {
        self.asked_by_somebody() || self.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }

    /// Whether somebody asked, whatever the deadline.
    pub fn asked_by_somebody(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Has `waker` called when somebody asks for the stop, and at once when somebody has: for work that cannot look for
    /// itself. It takes the place of an earlier waker.
    pub fn on_ask(&self, waker: impl Fn() + Send + Sync + 'static) {
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(waker));
        // Whoever asks from here on finds the waker; whoever asked before the lock is seen now.
        if self.asked_by_somebody() {
            self.wake();
        }
    }

    fn wake(&self) {
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(waker) = waker {
            waker();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_waker_is_called_whether_the_stop_comes_before_or_after_it() {
        for before in [true, false] {
            let (stop, calls) = (Stop::default(), Arc::new(AtomicUsize::new(0)));
            let counted = calls.clone();
            if before {
                stop.ask();
            }
            stop.on_ask(move || {
                counted.fetch_add(1, Ordering::SeqCst);
            });
            if !before {
                assert_eq!((stop.asked(), calls.load(Ordering::SeqCst)), (false, 0));
                stop.ask();
            }
            assert_eq!((stop.asked(), calls.load(Ordering::SeqCst)), (true, 1));
        }
    }

    #[test]
    fn a_deadline_that_has_passed_is_a_stop() {
        assert!(Stop::at(Some(Instant::now())).asked());
        assert!(!Stop::at(Some(Instant::now() + Duration::from_secs(3600))).asked());
    }
}
