//! QUIC with mutual TLS between the daemons: page data and acknowledgements on streams of their own.
//!
//! Who the peer is, is what its certificate says ([`Connection::peer`]); a connection without a verified
//! certificate does not exist. Nothing here blocks a thread, except [`Identity::load`] and [`pki`], which read
//! and write files and are called at start. Memory that a peer can make us hold is bounded by
//! `network.receive_window` a connection and `network.connections_max` connections,
//! of which one host has at most `network.connections_per_host_max`.
//!
//! ```text
//!   Identity (certificates) ─┐
//!   Network (settings) ──────┼─► Endpoint ─► Connection ─► Control, SendStream, RecvStream
//!   PeerAddress ─────────────┘        memory::pair ─┘
//! ```
#![forbid(unsafe_code)]

mod accept;
mod bulk;
mod certificate;
mod certificates;
mod code;
mod connection;
mod endpoint;
mod error;
mod failure;
mod frames;
mod identity;
pub mod memory;
pub mod pki;
mod quic;
mod tls;
mod witness_client;

pub use accept::AcceptCounts;
pub use bulk::Bulk;
pub use certificates::Certificates;
pub use code::{CloseCode, REASON_BYTES_MAX};
pub use connection::{CHUNK_BYTES_MAX, Connection, ConnectionStats, Control, RecvStream, SendStream};
pub use endpoint::Endpoint;
pub use error::{CertificateProblem, ClosedBy, PkiError, TransportError};
pub use frames::{FrameError, FrameReader};
pub use identity::Identity;
pub use romulus_config::{Network, PeerAddress};
pub use tls::Service;
pub use witness_client::{WitnessClient, WitnessFailure, WitnessUnreachable};
