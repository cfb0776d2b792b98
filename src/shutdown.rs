//! SIGTERM and Ctrl-C: the first asks for a drain, the second ends the process at once.

use tokio::sync::watch;

use crate::stop::exit_at_once;

/// Exit status after a second signal, as shells report an interrupt.
const INTERRUPTED: i32 = 130;

/// The receiver becomes true at the first signal, or when something is sent. Must be called inside a tokio runtime.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn on_signal() -> std::io::Result<(watch::Sender<bool>, watch::Receiver<bool>)> {
    let (sender, receiver) = watch::channel(false);
    let own = sender.clone();
    #[cfg(unix)]
    let mut terminate = {
        use tokio::signal::unix::{SignalKind, signal};
        signal(SignalKind::terminate())?
    };
    tokio::spawn(async move {
        loop {
            #[cfg(unix)]
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            #[cfg(not(unix))]
            let _ = tokio::signal::ctrl_c().await;
            if *sender.borrow() {
                tracing::warn!("second signal: exiting at once");
                exit_at_once(INTERRUPTED);
            }
            let _ = sender.send(true);
        }
    });
    Ok((own, receiver))
}
