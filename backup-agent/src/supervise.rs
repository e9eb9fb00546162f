//! Keeps a VM's parts at work: a driver that gives up, or panics, costs its VM the session and no other VM anything. Its parts are
//! started again from what is on disk, as at the agent's own start.
//!
//! ```text
//!   driver ends ─► its session's tasks, then the store's thread ─► pause ─► the image is opened again ─► driver
//! ```
//!
//! What a broken disk or a broken invariant ends would soon be ended again, so that each pause is longer than the one before.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use romulus_protocol::{NotProtected, Protection};
use serde_json::json;
use tracing::{error, info};

use crate::registry::Registry;
use crate::starts::Starts;
use crate::status::VmStatus;
use crate::store::Store;
use crate::vm_driver::VmDriver;

/// The first pause.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// The longest one; who was at work for so long begins with the first again.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Who takes longer to end hangs.
const ENDS_AT_MOST: Duration = Duration::from_mins(2);
/// Between two looks whether the store's thread has ended.
const LOOK: Duration = Duration::from_millis(50);

/// A VM's parts, of which the driver is to be run.
pub struct Parts {
    /// Runs as long as all is well.
    pub driver: VmDriver,
    /// With it, nobody else is at work at the image any more.
    pub store: Arc<Mutex<Store>>,
    /// Who waits for whose start.
    pub starts: Starts,
    /// Figures.
    pub status: Arc<VmStatus>,
    /// How long to pause when they give up soon.
    pub pause: Duration,
}

impl Parts {
    /// The first pause of parts that have never given up.
    pub const FIRST_PAUSE: Duration = PAUSE_MIN;

    /// Runs the driver until the VM is forgotten or the agent ends; when it gives up, has the registry start all parts again.
    pub fn run(self, registry: Registry) {
        let Parts {
            driver,
            store,
            starts,
            status,
            pause,
        } = self;
        let began = Instant::now();
        tokio::spawn(async move {
            let failed = match tokio::spawn(driver.run()).await {
                Ok(Ok(())) => return registry.ended(status.vm_id()),
                Ok(Err(error)) => error,
                Err(panicked) => anyhow!(panicked),
            };
            let pause = if began.elapsed() > PAUSE_MAX {
                PAUSE_MIN
            } else {
                pause
            };
            status.count_given_up();
            give_up(&status, &failed, pause);
            starts.heard(status.vm_id(), None);
            end(store, &status).await;
            status.parts_ended();
            start_again(&registry, &status, pause).await;
        });
    }
}

fn give_up(status: &VmStatus, failed: &anyhow::Error, pause: Duration) {
    let failed = format!("{failed:#}");
    error!(event = "vm_given_up", vm = status.vm(), error = failed);
    status.event("vm_given_up", &json!({"error": failed}));
    status.set_protection(Protection::NotProtected(NotProtected::NoBackup));
    status.set_detail(format!(
        "the agent gave this VM up, and begins with it again in {} s: {failed}",
        pause.as_secs()
    ));
}

/// Waits until nobody else has the store, whose thread and whose session's tasks end by themselves, and until it is gone. Says so when
/// something hangs.
async fn end(store: Arc<Mutex<Store>>, status: &VmStatus) {
    let mut end = Box::pin(async {
        while Arc::strong_count(&store) > 1 {
            tokio::time::sleep(LOOK).await;
        }
        // It waits for the end of the standby that it has.
        let _ = tokio::task::spawn_blocking(move || drop(store)).await;
    });
    if tokio::time::timeout(ENDS_AT_MOST, &mut end).await.is_err() {
        error!(event = "store_hangs", vm = status.vm());
        status.event("store_hangs", &json!({}));
        status.set_detail(
            "the agent gave this VM up, and what works at its image does not end: a disk or a standby hangs. If it stays so, restart the agent"
                .to_owned(),
        );
        end.await;
    }
}

/// Waits for `work`, and has the VM's pulse beat meanwhile: it is being worked at.
async fn beating<T>(status: &VmStatus, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(PAUSE_MIN) => status.pulse.beat(),
        }
    }
}

/// Tries until it is done: an image that can't be opened now may be later.
async fn start_again(registry: &Registry, status: &Arc<VmStatus>, mut pause: Duration) {
    loop {
        beating(status, tokio::time::sleep(pause)).await;
        pause = (2 * pause).min(PAUSE_MAX);
        let (registry, again) = (registry.clone(), Arc::clone(status));
        // All memory is read and compared with its digests: off the event loop.
        let start = tokio::task::spawn_blocking(move || registry.start_again(again, pause));
        let started = beating(status, start).await;
        match started.unwrap_or_else(|panicked| Err(anyhow!(panicked))) {
            Ok(()) => {
                status.set_detail("the agent gave this VM up, and has begun with it again".to_owned());
                info!(event = "vm_started_again", vm = status.vm());
                return status.event("vm_started_again", &json!({}));
            }
            Err(error) => give_up(status, &error, pause),
        }
    }
}
