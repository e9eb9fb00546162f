//! How a daemon shows what it does: logs, metrics, an admin socket, and notes to systemd.
//!
//! ```text
//!   log::init(settings.log)            one line an event, for people or as JSON
//!   Metrics ── router ─┐
//!   the daemon's routes ┴► serve_admin(/run/romulus/NAME.sock)  ◄── AdminClient (romulus, tests)
//!   systemd::ready(), status(), watchdog(), stopping();  FdStore: files that outlive the daemon
//! ```
//!
//! Nothing here may hold the daemon up: a failed note to systemd is dropped, connections are bounded, and the
//! client has a deadline.
#![forbid(unsafe_code)]

mod admin;
mod api;
mod client;
mod error;
mod event_log;
mod fd_store;
mod histogram;
pub mod log;
mod metrics;
mod notice;
pub mod openapi;
pub mod systemd;

pub use admin::{CONNECTIONS_MAX, Server, serve_admin, serve_metrics};
pub use api::{Api, ApiQuery, Route, refusal};
pub use client::{ANSWER_BYTES_MAX, AdminClient};
pub use error::TelemetryError;
pub use event_log::{EVENTS_MAX, EventLog};
pub use fd_store::FdStore;
pub use histogram::{Histogram, Summary};
pub use metrics::{Metrics, PREFIX, VmLabel};
pub use notice::{mode_json, notice_event};
pub use prometheus_client;
