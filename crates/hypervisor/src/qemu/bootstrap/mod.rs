//! Learning a running machine from the stream that QEMU would send to a COLO secondary.
//!
//! ```text
//!   us                                       QEMU
//!   settings: x-colo [, x-ignore-shared] ──► on
//!   getfd + migrate fd: ───────────────────► streams header, RAM blocks, device sections, vmdesc
//!   read, keep the small blocks                (guest stops for the end of it, and waits for READY)
//!   never answer; x-colo-lost-heartbeat ───► "the secondary is lost": the guest goes on
//!   settings as before ────────────────────► off
//! ```
//!
//! A migration would do as well and would leave the guest stopped if we died; a COLO primary whose secondary is lost
//! goes on. If we die between `migrate` and the heartbeat, whoever comes next calls [`rescue`].
//!
//! With shared RAM the stream holds the small blocks only and the pause is about a millisecond. With anonymous RAM, QEMU
//! streams everything and we drop all but the small blocks. Pages of this stream are not for use as a first copy:
//! QEMU 7.2 under TCG can lose some.

mod receive;
mod settings;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use romulus_types::{BlockId, LayoutError, RamBlock, RamLayout};
use serde_json::{Value, json};

pub use settings::{MigrationSettings, Rescued, rescue};

use super::qmp::{Monitor, QmpError, QmpEvent};
use super::stream::{StreamError, Template};
use crate::fault;

const FD_NAME: &str = "romulus-bootstrap";
/// How long an earlier migration may take to be cleared away.
const YANK_PATIENCE: Duration = Duration::from_secs(3);

/// Why a machine could not be learnt.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The monitor failed or refused.
    #[error("QEMU's monitor failed while its machine was being read")]
    Monitor(#[from] QmpError),
    /// The stream is not what we know.
    #[error("QEMU's migration stream cannot be read; is this QEMU version supported?")]
    Stream(#[from] StreamError),
    /// The socket failed.
    #[error("the migration socket failed")]
    Socket(#[source] std::io::Error),
    /// The guest does not run.
    #[error("the guest is {0:?}, not running: start or resume it first")]
    NotRunning(String),
    /// Somebody migrates it.
    #[error("a migration of this guest is {0:?}: wait for its end or cancel it")]
    MigrationInProgress(String),
    /// QEMU cannot migrate this machine.
    #[error("QEMU cannot migrate this machine, so it cannot be protected: {0}")]
    NotMigratable(String),
    /// The stream ended early.
    #[error("QEMU gave up its stream: {0}")]
    GaveUp(String),
    /// A command in the stream that we did not ask for.
    #[error("QEMU's stream carries command {0}, which was not asked for")]
    Command(u16),
    /// The device sections have no end within the limit.
    #[error("QEMU's device state is over the limit")]
    TailTooLarge,
    /// It took too long. The guest is let go.
    #[error("QEMU's stream did not end in time: the guest writes its memory faster than it can be read")]
    TooSlow,
    /// After all, the guest does not run as before.
    #[error("the guest did not go on after it was read: it is {0:?}")]
    NotFreed(String),
    /// The block list does not make a layout.
    #[error("QEMU's RAM blocks cannot be protected")]
    Layout(#[from] LayoutError),
}

/// What to read and how long it may take.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether the main RAM is a shared memory backend (`share=on`): it need not be streamed then.
    pub shared_ram: bool,
    /// Deadline for everything.
    pub timeout: Duration,
    /// Blocks besides the main one are kept up to this many bytes in all, in the stream's order.
    pub small_bytes_max: u64,
    /// With anonymous RAM: longest pause that QEMU may plan, in milliseconds. It begins with a tenth and doubles while the
    /// guest writes too fast.
    pub pause_ms_max: u64,
}

impl Options {
    /// Defaults for a machine with or without shared RAM.
    pub fn new(shared_ram: bool) -> Self {
        Self {
            shared_ram,
            timeout: Duration::from_secs(120),
            small_bytes_max: 128 << 20,
            pause_ms_max: 500,
        }
    }
}

/// A machine as its stream showed it.
#[derive(Clone, Debug)]
pub struct Bootstrap {
    /// All of the stream but RAM and device state.
    pub template: Template,
    /// The blocks as a layout, in the stream's order.
    pub layout: RamLayout,
    /// The largest block: the guest's main memory.
    pub main: BlockId,
    /// What the blocks held, one entry each; `None` for the main one and for those over the limit.
    pub contents: Vec<Option<Vec<u8>>>,
    /// How long QEMU says that the guest stood still, in microseconds; `None` when it did not say.
    pub pause_us: Option<u64>,
    /// What happened meanwhile, except our own pause, oldest first.
    pub events: Vec<QmpEvent>,
}

/// Reads the machine behind `monitor`. `progress` is called often while the stream flows; a caller with a kill timer winds it up
/// there, as the guest stands still for the last part.
///
/// Whatever happens, the guest goes on and the migration settings are as before.
///
/// # Errors
/// [`BootstrapError`] says what to do. [`BootstrapError::NotFreed`] is the only one after which the guest may stand still.
pub fn bootstrap(
    monitor: &mut dyn Monitor,
    options: &Options,
    progress: &mut dyn FnMut(),
) -> Result<Bootstrap, BootstrapError> {
    let deadline = Instant::now() + options.timeout;
    let mut events = drain_events(monitor)?;
    check_idle(monitor)?;
    let settings = MigrationSettings::read(monitor)?;
    let prepared = settings.prepare(monitor, options.shared_ram, options.pause_ms_max / 10);
    let received = prepared.map_err(BootstrapError::from).and_then(|()| {
        let stream = start(monitor, deadline, progress)?;
        let received = receive::receive(monitor, &stream, options, deadline, progress);
        progress();
        fault::point("bootstrap.before_release");
        // The guest goes on only if this socket stays open until QEMU has let go of it by itself.
        let freed = settings::release(monitor);
        received.and_then(|received| freed.map(|()| received))
    });
    fault::point("bootstrap.before_restore");
    settings.restore(monitor)?;
    let received = received?;
    let (pause_us, others) = split_pause(drain_events(monitor)?);
    events.extend(others);
    Ok(Bootstrap {
        layout: layout(&received.template)?,
        main: received.main,
        template: received.template,
        contents: received.contents,
        pause_us,
        events,
    })
}

fn check_idle(monitor: &mut dyn Monitor) -> Result<(), BootstrapError> {
    let status = settings::run_state(monitor)?;
    if status != "running" {
        return Err(BootstrapError::NotRunning(status));
    }
    match settings::migration_state(monitor)? {
        Some(state) if !settings::is_over(&state) => Err(BootstrapError::MigrationInProgress(state)),
        _ => Ok(()),
    }
}

/// Has QEMU stream into a socket and returns our end.
fn start(
    monitor: &mut dyn Monitor,
    deadline: Instant,
    progress: &mut dyn FnMut(),
) -> Result<UnixStream, BootstrapError> {
    let (ours, theirs) = UnixStream::pair().map_err(BootstrapError::Socket)?;
    ours.set_nonblocking(true).map_err(BootstrapError::Socket)?;
    // A larger buffer saves round trips; without the privilege the default does.
    let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(&theirs, 4 << 20);
    monitor.execute_with_fds("getfd", json!({ "fdname": FD_NAME }), &[theirs.as_fd()])?;
    drop(theirs);
    fault::point("bootstrap.before_migrate");
    let patience = deadline.min(Instant::now() + YANK_PATIENCE);
    loop {
        progress();
        match monitor.execute("migrate", json!({ "uri": format!("fd:{FD_NAME}") })) {
            Ok(_) => break,
            // QEMU has not finished clearing away the migration before this one.
            Err(QmpError::Refused { description, .. })
                if description.contains("yank") && Instant::now() < patience =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => {
                // Not to be found by whoever looks at QEMU's fds next. It may be gone already.
                let _ = monitor.execute("closefd", json!({ "fdname": FD_NAME }));
                return Err(match error {
                    QmpError::Refused { description, .. } => BootstrapError::NotMigratable(description),
                    other => other.into(),
                });
            }
        }
    }
    fault::point("bootstrap.after_migrate");
    Ok(ours)
}

fn layout(template: &Template) -> Result<RamLayout, LayoutError> {
    let block = |b: &super::stream::StreamBlock| RamBlock {
        name: b.name.clone(),
        bytes: b.bytes,
    };
    RamLayout::new(template.blocks.iter().map(block).collect())
}

fn drain_events(monitor: &mut dyn Monitor) -> Result<Vec<QmpEvent>, QmpError> {
    let mut events = Vec::new();
    while let Some(event) = monitor.next_event(Instant::now())? {
        events.push(event);
    }
    Ok(events)
}

/// Takes our own pause out of the events: the first STOP, the RESUME after it, and COLO's farewell.
fn split_pause(events: Vec<QmpEvent>) -> (Option<u64>, Vec<QmpEvent>) {
    let (mut stopped, mut pause_us) = (None, None);
    let others = events
        .into_iter()
        .filter(|event| match (event.name.as_str(), stopped, pause_us) {
            ("STOP", None, _) => {
                stopped = Some(event.at_us());
                false
            }
            ("RESUME", Some(since), None) => {
                pause_us = Some(event.at_us().saturating_sub(since));
                false
            }
            ("COLO_EXIT" | "MIGRATION" | "MIGRATION_PASS", ..) => false,
            _ => true,
        });
    let others = others.collect();
    (pause_us, others)
}

/// The text of `value[key]`, or an error that names the command.
fn text(value: &Value, key: &'static str, command: &str) -> Result<String, QmpError> {
    let text = value.get(key).and_then(Value::as_str);
    Ok(text
        .ok_or_else(|| QmpError::Reply {
            command: command.to_owned(),
            what: key,
        })?
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, microseconds: u32) -> QmpEvent {
        QmpEvent {
            name: name.into(),
            data: Value::Null,
            seconds: 1,
            microseconds,
        }
    }

    #[test]
    fn only_our_own_pause_is_taken_out_of_the_events() {
        let seen = ["STOP", "RESET", "RESUME", "COLO_EXIT", "STOP"];
        let (pause_us, others) = split_pause(
            seen.iter()
                .zip(1..)
                .map(|(name, at)| event(name, at * 100))
                .collect(),
        );
        assert_eq!(pause_us, Some(200));
        assert_eq!(
            others.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(),
            ["RESET", "STOP"]
        );
    }
}
