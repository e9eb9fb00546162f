//! Ctrl-C and its like: noted, so that whoever holds a guest lets it go first.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether this process was asked to end since [`watch`].
pub(crate) fn came() -> bool {
    INTERRUPTED.load(Ordering::Acquire)
}

/// From now on SIGINT, SIGTERM and SIGHUP do not end this process, but are noted.
///
/// # Errors
/// When a handler cannot be set.
pub(crate) fn watch() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let entered = runtime.enter();
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ];
    let signals: Vec<_> = kinds.into_iter().map(signal).collect::<Result<_, _>>()?;
    drop(entered);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            runtime.block_on(async {
                for mut signal in signals {
                    tokio::spawn(async move {
                        while signal.recv().await.is_some() {
                            INTERRUPTED.store(true, Ordering::Release);
                        }
                    });
                }
                std::future::pending::<()>().await;
            });
        })?;
    Ok(())
}
