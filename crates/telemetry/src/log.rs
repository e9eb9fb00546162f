//! Logs on standard error: one line an event.
//!
//! A notable event has the field `event` (its stable name) and, where they apply, `vm`, `epoch`, `term` and
//! `phase`. As JSON all fields stand beside `timestamp` (RFC 3339, microseconds) and `level`.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use romulus_config::{Log, LogFormat};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::TelemetryError;

/// The process's filter, once it is set up.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Changes what is logged from now on. Without logs that were set up nothing happens.
///
/// # Errors
/// The level is no filter; the earlier one stays.
pub fn set_level(level: &str) -> Result<(), TelemetryError> {
    let filter = parse(level)?;
    if let Some(handle) = FILTER.get() {
        // Fails only when the subscriber is gone, and then nothing is logged anyway.
        let _ = handle.reload(filter);
    }
    Ok(())
}

fn parse(level: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(level).map_err(|source| TelemetryError::Level {
        level: level.to_owned(),
        source,
    })
}

/// Sets the process's logs up.
///
/// # Errors
/// The level is no filter, or logs were set up before.
pub fn init(log: &Log) -> Result<(), TelemetryError> {
    crate::process::note_start();
    let (filter, handle) = reload::Layer::new(parse(&log.level)?);
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let set = match log.format {
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
    .map_err(TelemetryError::LogTwice);
    if set.is_ok() {
        // Set up once, or the line before had failed.
        let _ = FILTER.set(handle);
    }
    set
}
