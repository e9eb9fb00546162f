//! The inbox of one VM's driver: everything reaches it through one bounded channel, in the order it happened.

use romulus_protocol::BackupEvent;
use romulus_types::{HostId, Term, WitnessInstance};
use tokio::sync::{mpsc, oneshot};

use crate::session::SessionIn;

/// Most inputs that wait for the driver. Producers wait when it is full.
pub const INBOX_MAX: usize = 1024;

/// Something for the driver.
pub enum Input {
    /// For the protocol.
    Event(BackupEvent),
    /// A primary asks for a session; admission is checked.
    Hello {
        /// Its connection.
        session: Box<SessionIn>,
        /// Its host, as its certificate says.
        primary: HostId,
        /// The term it knows.
        term: Term,
        /// The witness instance it knows.
        instance: WitnessInstance,
    },
    /// An operator gives the VM up.
    Forget {
        /// Though a commit is kept here.
        force: bool,
        /// Hears the end of it: why not, or that nothing is left.
        done: oneshot::Sender<Result<(), String>>,
    },
}

/// The sending end.
#[derive(Clone)]
pub struct EventSink(pub mpsc::Sender<Input>);

impl EventSink {
    /// Hands an event in from a thread; waits while the inbox is full. A driver that is gone needs no events.
    pub fn send(&self, event: BackupEvent) {
        let _ = self.0.blocking_send(Input::Event(event));
    }

    /// Hands an event in from a task.
    pub async fn send_async(&self, event: BackupEvent) {
        let _ = self.0.send(Input::Event(event)).await;
    }
}
