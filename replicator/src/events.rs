//! The driver's inbox: everything that happens reaches it through one bounded channel, in the order it happened.

use romulus_protocol::{PrimaryEvent, PrimaryOrder};
use romulus_types::{Epoch, Session, Time};
use tokio::sync::{mpsc, oneshot};

use crate::tuner::EpochFigures;

/// Most inputs that wait for the driver. A producer thread waits when it is full.
pub const INBOX_MAX: usize = 1024;

/// How an order ended: carried out, or why not.
pub type OrderEnd = Result<(), String>;

/// Something for the driver.
#[derive(Debug)]
pub enum Input {
    /// For the protocol.
    Event(PrimaryEvent),
    /// [`PrimaryEvent::Captured`], with what the epoch was like.
    Captured {
        session: Session,
        epoch: Epoch,
        due_at: Time,
        figures: EpochFigures,
    },
    /// An operator's order; the answer says whether it was taken.
    Order(PrimaryOrder, oneshot::Sender<OrderEnd>),
    /// A closed gate no longer holds, and why.
    GateLost(String),
    /// SIGTERM or SIGINT: go to not protected, leave no trace, end. A second one ends at once.
    Terminate,
}

/// The sending end, for threads.
#[derive(Clone)]
pub struct EventSink(pub mpsc::Sender<Input>);

impl EventSink {
    /// Hands an event in from a thread; waits while the inbox is full. A driver that is gone needs no events.
    pub fn send(&self, event: PrimaryEvent) {
        let _ = self.0.blocking_send(Input::Event(event));
    }

    /// Hands a capture in from its thread.
    pub fn send_captured(&self, session: Session, epoch: Epoch, due_at: Time, figures: EpochFigures) {
        let _ = self.0.blocking_send(Input::Captured {
            session,
            epoch,
            due_at,
            figures,
        });
    }

    /// Hands an event in from a task.
    pub async fn send_async(&self, event: PrimaryEvent) {
        let _ = self.0.send(Input::Event(event)).await;
    }
}
