//! Logs on standard error: one line an event.
//!
//! A notable event has the field `event` (its stable name) and, where they apply, `vm`, `epoch`, `term` and
//! `phase`. As JSON all fields stand beside `timestamp` (RFC 3339, microseconds) and `level`.

use std::io::IsTerminal as _;

use romulus_config::{Log, LogFormat};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::TelemetryError;

/// Sets the process's logs up.
///
/// # Errors
/// The level is no filter, or logs were set up before.
pub fn init(log: &Log) -> Result<(), TelemetryError> {
    crate::process::note_start();
    let filter = EnvFilter::try_new(&log.level).map_err(|source| TelemetryError::Level {
        level: log.level.clone(),
        source,
    })?;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match log.format {
        LogFormat::Json => registry
            .with(
                layer
                    .json()
                    .flatten_event(true)
                    .with_current_span(true)
                    .with_span_list(false),
            )
            .try_init(),
        LogFormat::Text => {
            let ansi = std::io::stderr().is_terminal();
            registry
                .with(layer.with_ansi(ansi).with_target(false).compact())
                .try_init()
        }
    }
    .map_err(TelemetryError::LogTwice)
}
