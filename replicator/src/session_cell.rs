//! The session that is current, shared by the threads that drop what belongs to another one.

use std::sync::{Arc, Mutex, PoisonError};

use romulus_types::Session;

/// A shared cell with the current session, if any.
#[derive(Clone, Default)]
pub struct SessionCell(Arc<Mutex<Option<Session>>>);

impl SessionCell {
    /// Makes `session` current, or none.
    pub fn set(&self, session: Option<Session>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = session;
    }

    /// Whether `session` is current.
    pub fn is(&self, session: Session) -> bool {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) == Some(session)
    }
}
