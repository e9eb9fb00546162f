//! What a VMM's author can set.

use std::time::Duration;

use super::Events;

/// Settings of [`serve`](super::serve). [`ServeOptions::new`] has the defaults.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// The VMM's name, at most 128 bytes: only a VMM of the same name can take a machine over.
    pub vmm: String,
    /// Its version, at most 128 bytes.
    pub vmm_version: String,
    /// Where the VMM posts its events.
    pub events: Events,
    /// Most bytes of a state, saved or restored. 16 MiB.
    pub state_bytes_max: u64,
    /// The longest limit that a client may give a pause. 1 s.
    pub pause_limit_max: Duration,
    /// How long a halt lasts without a word from the client. 10 s.
    pub halt_limit: Duration,
    /// How long a connection may last without a `Hello`. 5 s.
    pub hello_limit: Duration,
    /// How long a message may take to arrive, once it has begun. 1 s.
    pub message_limit: Duration,
    /// How long a client may not read while something is to be sent to it. 1 s.
    pub write_limit: Duration,
}

impl ServeOptions {
    /// The defaults.
    pub fn new(vmm: impl Into<String>, vmm_version: impl Into<String>, events: Events) -> Self {
        Self {
            vmm: vmm.into(),
            vmm_version: vmm_version.into(),
            events,
            state_bytes_max: 16 << 20,
            pause_limit_max: Duration::from_secs(1),
            halt_limit: Duration::from_secs(10),
            hello_limit: Duration::from_secs(5),
            message_limit: Duration::from_secs(1),
            write_limit: Duration::from_secs(1),
        }
    }
}

/// In nanoseconds, as far as they go.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
