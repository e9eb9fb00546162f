//! Accepting connections within limits.
//!
//! ```text
//!   packet ─► too many handshakes? refuse ─► address not proven and some under way? retry (stateless)
//!          ─► handshake in a task, with a timeout ─► certificate names a host? ─► room, and for this host? ─► greeting ─► accept()
//! ```
//!
//! A handshake that stalls costs one place for `handshake_timeout`, and one address cannot take all places.
//! One host cannot take all connections (`network.connections_per_host_max`).
//! Connections that exist are never disturbed by new ones.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use romulus_config::Network;
use romulus_types::HostId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::{debug, warn};

use crate::bulk::{Bulk, Load, Places};
use crate::code::CloseCode;
use crate::connection::Connection;
use crate::endpoint::{GREETING, peer_host};

/// What has become of connection attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AcceptCounts {
    /// Accepted, with a verified certificate.
    pub accepted: u64,
    /// Handshakes that failed: a bad certificate, garbage, a timeout.
    pub failed: u64,
    /// Turned away by a limit.
    pub refused: u64,
    /// Those among them that were one too many of their host.
    pub refused_of_host: u64,
    /// Made to prove their address first.
    pub retried: u64,
    /// Open now.
    pub open: u64,
}

impl AcceptCounts {
    /// The attempts that have ended, by what became of them: each in one of these.
    pub fn by_result(&self) -> [(&'static str, u64); 4] {
        [
            ("accepted", self.accepted),
            ("failed", self.failed),
            ("refused", self.refused - self.refused_of_host.min(self.refused)),
            ("refused_of_host", self.refused_of_host),
        ]
    }
}

#[derive(Debug)]
pub(crate) struct Acceptor {
    accepted: tokio::sync::Mutex<mpsc::Receiver<Connection>>,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug)]
struct Shared {
    accepted: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
    refused_of_host: AtomicU64,
    retried: AtomicU64,
    connections: Arc<Semaphore>,
    connections_max: usize,
    hosts: Arc<Mutex<HashMap<HostId, u16>>>,
    per_host_max: u16,
    handshakes: Mutex<HashMap<IpAddr, u16>>,
    handshakes_max: u16,
    handshake_timeout: Duration,
    places: Arc<Places>,
    bulk: Option<Bulk>,
}

impl Acceptor {
    pub(crate) fn start(
        endpoint: quinn::Endpoint,
        network: &Network,
        places: Arc<Places>,
        bulk: Option<Bulk>,
    ) -> Self {
        let connections_max = usize::from(network.connections_max);
        let (queue, accepted) = mpsc::channel(connections_max);
        let shared = Arc::new(Shared {
            accepted: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            refused_of_host: AtomicU64::new(0),
            retried: AtomicU64::new(0),
            connections: Arc::new(Semaphore::new(connections_max)),
            connections_max,
            hosts: Arc::default(),
            per_host_max: network.connections_per_host_max,
            handshakes: Mutex::new(HashMap::new()),
            handshakes_max: network.handshakes_max,
            handshake_timeout: network.handshake_timeout,
            places,
            bulk,
        });
        // The queue ends when the task and its handshakes do, so its only senders are theirs.
        let task = tokio::spawn(run(endpoint, shared.clone(), queue));
        Self {
            accepted: tokio::sync::Mutex::new(accepted),
            shared,
            task,
        }
    }

    pub(crate) async fn next(&self) -> Option<Connection> {
        self.accepted.lock().await.recv().await
    }

    pub(crate) fn counts(&self) -> AcceptCounts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        AcceptCounts {
            accepted: load(&self.shared.accepted),
            failed: load(&self.shared.failed),
            refused: load(&self.shared.refused),
            refused_of_host: load(&self.shared.refused_of_host),
            retried: load(&self.shared.retried),
            open: (self.shared.connections_max - self.shared.connections.available_permits()) as u64,
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

async fn run(endpoint: quinn::Endpoint, shared: Arc<Shared>, queue: mpsc::Sender<Connection>) {
    while let Some(incoming) = endpoint.accept().await {
        let address = incoming.remote_address().ip();
        let Some(place) = Place::take(&shared, address) else {
            count(&shared.refused);
            incoming.refuse();
            continue;
        };
        // With handshakes under way a forged sender address must not take places: prove it first.
        if place.others > 0 && !incoming.remote_address_validated() && incoming.may_retry() {
            count(&shared.retried);
            // Fails only where `may_retry` is false.
            let _ = incoming.retry();
            continue;
        }
        tokio::spawn(handshake(incoming, place, queue.clone()));
    }
}

/// One of the places for handshakes, given back when dropped.
struct Place {
    shared: Arc<Shared>,
    address: IpAddr,
    /// Handshakes that were under way before this one.
    others: u32,
}

impl Place {
    /// A place, unless all are taken, or half of them by this address.
    fn take(shared: &Arc<Shared>, address: IpAddr) -> Option<Self> {
        let mut handshakes = shared.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        let others: u32 = handshakes.values().copied().map(u32::from).sum();
        let own = handshakes.get(&address).copied().unwrap_or(0);
        if others >= u32::from(shared.handshakes_max) || own >= shared.handshakes_max.div_ceil(2) {
            return None;
        }
        handshakes.insert(address, own + 1);
        Some(Self {
            shared: shared.clone(),
            address,
            others,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut handshakes = self
            .shared
            .handshakes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = handshakes.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                handshakes.remove(&self.address);
            }
        }
    }
}

/// A place among a server's connections, given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    _permit: OwnedSemaphorePermit,
    _of_host: HostPlace,
}

/// One of the places that a host has, by its certificate.
#[derive(Debug)]
struct HostPlace {
    hosts: Arc<Mutex<HashMap<HostId, u16>>>,
    host: HostId,
}

impl HostPlace {
    fn take(shared: &Shared, host: &HostId) -> Option<Self> {
        let mut hosts = shared.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let held = hosts.entry(host.clone()).or_insert(0);
        if *held >= shared.per_host_max {
            return None;
        }
        *held += 1;
        Some(Self {
            hosts: shared.hosts.clone(),
            host: host.clone(),
        })
    }
}

impl Drop for HostPlace {
    fn drop(&mut self) {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = hosts.get_mut(&self.host) {
            *held -= 1;
            if *held == 0 {
                hosts.remove(&self.host);
            }
        }
    }
}

async fn handshake(incoming: quinn::Incoming, place: Place, queue: mpsc::Sender<Connection>) {
    let shared = place.shared.clone();
    let address = incoming.remote_address();
    let load = shared.bulk.as_ref().map(Load::new);
    let accepted = shared.places.with(load.as_ref(), || incoming.accept());
    let connecting = async { accepted?.await };
    let connection = match tokio::time::timeout(shared.handshake_timeout, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            count(&shared.failed);
            return warn!(%address, %error, "a connection attempt failed");
        }
        Err(_) => {
            count(&shared.failed);
            return warn!(%address, "a connection attempt did not finish in time");
        }
    };
    let close = |code: CloseCode, reason: &str| connection.close(code.number().into(), reason.as_bytes());
    let host = match peer_host(&connection) {
        Ok(host) => host,
        Err(problem) => {
            count(&shared.failed);
            warn!(%address, %problem, "the peer's certificate names no host");
            return close(CloseCode::IDENTITY, "your certificate names no host");
        }
    };
    let Some(of_host) = HostPlace::take(&shared, &host) else {
        count(&shared.refused);
        count(&shared.refused_of_host);
        warn!(%address, %host, "refused: network.connections_per_host_max is reached");
        return close(CloseCode::LIMIT, "network.connections_per_host_max is reached");
    };
    let Ok(permit) = shared.connections.clone().try_acquire_owned() else {
        count(&shared.refused);
        warn!(%address, %host, "refused: network.connections_max is reached");
        return close(CloseCode::LIMIT, "network.connections_max is reached");
    };
    let greeted = async {
        let mut stream = connection.open_uni().await?;
        stream.write_all(GREETING).await?;
        Ok::<_, quinn::WriteError>(stream.finish())
    };
    if !matches!(
        tokio::time::timeout(shared.handshake_timeout, greeted).await,
        Ok(Ok(_))
    ) {
        count(&shared.failed);
        return close(CloseCode::FAULT, "no greeting");
    }
    drop(place);
    count(&shared.accepted);
    debug!(%address, %host, "accepted");
    // There is room for every slot; this fails only when nobody accepts any more.
    let slot = Slot {
        _permit: permit,
        _of_host: of_host,
    };
    let _ = queue.try_send(Connection::quic(connection, host, Some(slot), load));
}
