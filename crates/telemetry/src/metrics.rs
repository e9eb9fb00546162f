//! Metrics in Prometheus' text form (OpenMetrics 1.0).

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};

/// What every metric's name begins with.
pub const PREFIX: &str = "romulus";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The label `vm`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct VmLabel {
    /// The VM's name.
    pub vm: String,
}

type Refresh = Box<dyn Fn() + Send + Sync>;

/// A daemon's metrics. Clones stand for the same ones.
#[derive(Clone, Default)]
pub struct Metrics {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    registry: Registry,
    refresh: Vec<Refresh>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            registry: Registry::with_prefix(PREFIX),
            refresh: Vec::new(),
        }
    }
}

impl Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// No metrics yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metric; its full name is `romulus_NAME`, and counters get `_total`. Gives the metric back.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        self.lock().registry.register(name, help, metric.clone());
        metric
    }

    /// Adds a counter.
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        self.register(name, help, Counter::default())
    }

    /// Adds a gauge of whole numbers.
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(name, help, Gauge::default())
    }

    /// Adds a counter for each VM.
    pub fn vm_counter(&self, name: &str, help: &str) -> Family<VmLabel, Counter> {
        self.register(name, help, Family::default())
    }

    /// Adds a gauge for each VM.
    pub fn vm_gauge(&self, name: &str, help: &str) -> Family<VmLabel, Gauge> {
        self.register(name, help, Family::default())
    }

    /// Runs `refresh` before metrics are read, to bring gauges up to date. It must be quick and must not use
    /// these metrics' [`Metrics::register`] or [`Metrics::text`].
    pub fn on_read(&self, refresh: impl Fn() + Send + Sync + 'static) {
        self.lock().refresh.push(Box::new(refresh));
    }

    /// All metrics as text.
    pub fn text(&self) -> String {
        let inner = self.lock();
        for refresh in &inner.refresh {
            refresh();
        }
        let mut text = String::new();
        let written = prometheus_client::encoding::text::encode(&mut text, &inner.registry);
        written.expect("writing to a string does not fail");
        text
    }

    /// A route `/metrics`, to be merged into a daemon's.
    pub fn router(&self) -> Router {
        let metrics = self.clone();
        Router::new().route(
            "/metrics",
            get(move || {
                let text = metrics.text();
                async move { ([(CONTENT_TYPE, OPEN_METRICS)], text) }
            }),
        )
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_have_the_prefix_their_labels_and_an_end() {
        let metrics = Metrics::new();
        let commits = metrics.vm_counter("commits", "Checkpoints committed");
        commits.get_or_create(&VmLabel { vm: "web".into() }).inc_by(3);
        let lag = metrics.gauge("lag_bytes", "Bytes not yet acknowledged");
        metrics.on_read(move || {
            lag.set(42);
        });
        let text = metrics.text();
        assert!(text.contains("romulus_commits_total{vm=\"web\"} 3"), "{text}");
        assert!(text.contains("romulus_lag_bytes 42"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
