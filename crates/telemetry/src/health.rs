//! `/healthz` and `/readyz`: whether the daemon works, and whether it does what it is there for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;

use crate::Metrics;
use crate::systemd::Watchdog;

/// Beats each time that a loop which does the work has turned. Clones stand for the same loop.
#[derive(Clone, Debug)]
pub struct Pulse {
    began: Instant,
    /// Milliseconds after `began`.
    last: Arc<AtomicU64>,
    watchdog: Option<Arc<Watchdog>>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self::new()
    }
}

impl Pulse {
    /// A pulse that beats now.
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            last: Arc::default(),
            watchdog: None,
        }
    }

    /// That of the loop by which systemd judges the daemon: it pats the watchdog as well, when the unit has one.
    pub fn of_service() -> Self {
        Self {
            watchdog: Watchdog::from_environment().map(Arc::new),
            ..Self::new()
        }
    }

    /// The loop has turned. Call it from the loop that does the work, never from a timer of its own.
    pub fn beat(&self) {
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(ms, Ordering::Relaxed);
        if let Some(watchdog) = &self.watchdog {
            watchdog.pat(ms);
        }
    }

    /// How long ago the loop turned last.
    pub fn age(&self) -> Duration {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        self.began.elapsed().saturating_sub(last)
    }

    /// Whether `what` has turned within `limit`.
    ///
    /// # Errors
    /// What stands still, for how long.
    pub fn check(&self, what: &str, limit: Duration) -> Result<(), String> {
        let age = self.age();
        if age <= limit {
            return Ok(());
        }
        Err(format!("{what} has not turned for {} s", age.as_secs()))
    }
}

/// A daemon's answer about itself: good, or what is wrong.
pub type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What is served to those who watch the daemon: `/metrics`, `/healthz` and `/readyz`.
pub fn watched_router(metrics: &Metrics, alive: Check, ready: Check) -> Router {
    metrics.router().merge(health_router(alive, ready))
}

/// The routes `/healthz` and `/readyz`: 200 and `ok`, or 503 and the reason.
pub fn health_router(alive: Check, ready: Check) -> Router {
    let route = |check: Check| {
        get(move || {
            let result = check();
            async move {
                match result {
                    Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
                    Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
                }
            }
        })
    };
    Router::new()
        .route("/healthz", route(alive))
        .route("/readyz", route(ready))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_stands_still_is_found_and_named() {
        let pulse = Pulse {
            began: Instant::now() - Duration::from_secs(90),
            ..Pulse::new()
        };
        let found = pulse.check("the driver", Duration::from_secs(60)).unwrap_err();
        assert!(found.starts_with("the driver has not turned for 9"), "{found}");
        pulse.beat();
        assert_eq!(pulse.check("the driver", Duration::from_secs(60)), Ok(()));
    }
}
