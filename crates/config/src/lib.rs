//! The daemons' settings: TOML in `/etc/romulus/NAME.toml` and `/etc/romulus/NAME.d/*.toml`.
//!
//! Every key has a default, an unknown key is an error, and an error names the file and the key. The
//! commented example of each daemon ([`Settings::EXAMPLE`]) holds exactly the defaults; a test keeps it so.
//!
//! ```text
//!   NAME.toml ─┐
//!   NAME.d/10-site.toml ─┼─► merged table ─► typed settings ─► range checks ─► the daemon
//!   NAME.d/20-host.toml ─┘      (later wins)
//! ```
//!
//! The replicator of one VM also reads `/etc/romulus/vms/VM.toml` and `/etc/romulus/vms/VM.d/*.toml`, which win.
#![forbid(unsafe_code)]

use std::path::PathBuf;

mod allow;
mod backup_agent;
mod check;
mod common;
mod daemons;
mod epochs;
mod load;
mod peer;
mod quantity;
mod replicator;
mod vms;
mod witness;

pub use allow::{ALLOW_MAX, Allow, is_allowed};
pub use backup_agent::{BackupAgent, KeepImages, StandbyKind, StandbyUnits, Vmm};
pub use check::Invalid;
pub use common::{Failover, Log, LogFormat, Metrics, MetricsListen, Network};
pub use daemons::{AGENT_METRICS_PORT, PKI_DIR, REPLICATOR_METRICS_PORT, RUN_DIR, WITNESS_METRICS_PORT};
pub use epochs::{AutoEpochs, EpochGoal, EpochLength, EpochLengthError, Epochs};
pub use load::{
    DROP_INS_MAX, FILE_BYTES_MAX, Settings, changed_keys, default_path, load, load_over, vm_path,
};
pub use peer::{PeerAddress, PeerAddressError};
pub use quantity::{ByteSize, SizeError};
pub use replicator::{Guest, Memory, Replicator};
pub use vms::{Vm, VmLimits};
pub use witness::Witness;

/// Why settings could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or folder could not be read.
    #[error("cannot read {}: check that it exists and may be read", file.display())]
    Read {
        /// The file or folder.
        file: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file is over [`FILE_BYTES_MAX`].
    #[error("{} is over {FILE_BYTES_MAX} bytes, which no settings file needs", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
    },
    /// A folder has more than [`DROP_INS_MAX`] files.
    #[error("{} holds more than {DROP_INS_MAX} settings files: merge some of them", folder.display())]
    TooManyFiles {
        /// The folder.
        folder: PathBuf,
    },
    /// Not TOML, an unknown key, or a value of the wrong form.
    #[error("{}: {source}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Line, column, key and problem.
        source: Box<toml::de::Error>,
    },
    /// Files that are each well-formed contradict each other in form.
    #[error("the settings files do not fit together: {source}")]
    Merge {
        /// Key and problem.
        source: Box<toml::de::Error>,
    },
    /// A value out of its range.
    #[error("{place}: {source}")]
    Invalid {
        /// The file that set it, or "the default settings".
        place: String,
        /// Key and problem.
        source: Invalid,
    },
}
