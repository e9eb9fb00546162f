//! Looks at the gates twice a second: their figures for the status, and whether they still hold.
//!
//! On a thread of its own, because the kernel answers such questions only when nobody else is changing interfaces: on a
//! busy host that takes hundreds of milliseconds, in which the driver must go on with heartbeats and releases.

use std::sync::Arc;
use std::time::Duration;

use romulus_host_sys::priority;
use tokio::sync::mpsc;

use crate::events::Input;
use crate::gates::Gates;
use crate::status::Status;

const INTERVAL: Duration = Duration::from_millis(500);

/// Watches until the driver is gone.
pub fn run(gates: &Gates, status: &Arc<Status>, inbox: &mpsc::Sender<Input>) {
    priority::lower();
    while !inbox.is_closed() {
        std::thread::sleep(INTERVAL);
        status.set_gates(gates.figures());
        if let Err(error) = gates.check()
            && inbox.blocking_send(Input::GateLost(error.to_string())).is_err()
        {
            return;
        }
    }
}
