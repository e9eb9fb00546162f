//! The task that carries requests to the witness and its answers back. Losing either is allowed: the protocol repeats.

use romulus_protocol::{PrimaryEvent, WitnessRequest};
use romulus_transport::WitnessClient;
use tokio::sync::mpsc;
use tracing::debug;

use crate::events::EventSink;

/// Requests under way at once, at most.
pub const REQUESTS_MAX: usize = 8;

/// Asks until the sender is gone.
pub async fn run(client: WitnessClient, mut requests: mpsc::Receiver<WitnessRequest>, events: EventSink) {
    while let Some(request) = requests.recv().await {
        match client.ask(request).await {
            Ok(reply) => events.send_async(PrimaryEvent::Witness(reply)).await,
            Err(error) => debug!(%error, "the witness did not answer"),
        }
    }
}
