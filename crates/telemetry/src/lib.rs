//! How a daemon shows what it does: logs, metrics, an admin socket, and notes to systemd.
//!
//! ```text
//!   log::init(settings.log)            one line an event, for people or as JSON
//!   Metrics, health ────┬► serve_metrics(127.0.0.1:PORT)         ◄── Prometheus
//!   the daemon's routes ┴► serve_admin(/run/romulus/NAME.sock)  ◄── AdminClient (romulus, tests)
//!   systemd::ready(), status(), watchdog(), stopping();  FdStore: files that outlive the daemon
//! ```
//!
//! Nothing here may hold the daemon up: a failed note to systemd is dropped, connections are bounded, and the
//! client has a deadline.
#![forbid(unsafe_code)]

mod admin;
mod api;
mod buckets;
pub mod catalogue;
mod client;
mod error;
mod event_log;
mod fd_store;
mod health;
mod histogram;
pub mod log;
mod metrics;
mod notice;
pub mod openapi;
mod process;
pub mod systemd;

pub use admin::{CONNECTIONS_MAX, Server, serve_admin, serve_metrics};
pub use api::{Api, ApiQuery, Route, refusal};
pub use buckets::{BOUNDS, Buckets};
pub use client::{ANSWER_BYTES_MAX, AdminClient};
pub use error::TelemetryError;
pub use event_log::{EVENTS_MAX, EventLog};
pub use fd_store::FdStore;
pub use health::{Check, Pulse, health_router, watched_router};
pub use histogram::{Histogram, Summary};
pub use metrics::{Form, Metrics, Samples};
pub use notice::{mode_json, notice_event};
