//! What can go wrong, named so that the operator knows what to do.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::code::CloseCode;

/// Why a certificate, ours or the peer's, is not good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CertificateProblem {
    /// Its time has not come.
    #[error("is not valid yet: compare the clocks of the two hosts")]
    NotYetValid,
    /// Its time is over.
    #[error("has expired: issue a new one with `romulus pki`")]
    Expired,
    /// It is out of its time, and the peer did not say on which side.
    #[error("is expired or not valid yet: check its dates and the clocks of the two hosts")]
    OutOfTime,
    /// No certificate of the CA that the other side trusts.
    #[error("was signed by another CA: both hosts need certificates and ca-cert.pem of the same CA")]
    OtherCa,
    /// The name that was asked for is not in it.
    #[error(
        "does not carry the name that was asked for: use a name that it carries (NAME@HOST:PORT) or issue it anew"
    )]
    WrongName,
    /// It carries no name that can be a host's.
    #[error("carries no usable host name: its CN must hold letters, digits, '.', '_' and '-' only")]
    NoHostName,
    /// It may not be used for what it is used for here.
    #[error(
        "is for another purpose: a server's must allow TLS server authentication, a client's client authentication"
    )]
    WrongPurpose,
    /// None was sent.
    #[error("was not sent: mutual TLS is mandatory")]
    Missing,
    /// It is revoked.
    #[error("is revoked")]
    Revoked,
    /// It cannot be read, or its signature is wrong.
    #[error("is damaged or of a kind that is not supported")]
    Damaged,
}

/// Why the files in a certificate directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file is missing or may not be read.
    #[error("cannot read {}: a certificate directory holds ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem and client-key.pem (`romulus pki` makes one)", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file is not PEM, or holds no item of the wanted kind.
    #[error("{} holds no {wanted} in PEM form", file.display())]
    Form {
        /// The file.
        file: PathBuf,
        /// What should be in it.
        wanted: &'static str,
    },
    /// A certificate is not good.
    #[error("the certificate in {} {problem}", file.display())]
    Certificate {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: CertificateProblem,
    },
    /// A key and a certificate are not a pair.
    #[error("the key in {} does not belong to the certificate beside it: issue both anew", file.display())]
    KeyMismatch {
        /// The key's file.
        file: PathBuf,
    },
    /// The server's and the client's certificate name different hosts.
    #[error("{} names host {server:?} as server and {client:?} as client: both must name this host", dir.display())]
    TwoNames {
        /// The directory.
        dir: PathBuf,
        /// The name in server-cert.pem.
        server: String,
        /// The name in client-cert.pem.
        client: String,
    },
    /// The certificates are those of another host than the daemon runs as.
    #[error("{} holds the certificates of {found:?} now, this daemon runs as {host:?}: restart it if the host was renamed", dir.display())]
    OtherHost {
        /// The directory.
        dir: PathBuf,
        /// The name in the certificates.
        found: String,
        /// The daemon's name.
        host: String,
    },
    /// There is something already; keys are never overwritten.
    #[error("{} exists already and is left as it is: remove it first if it is to be replaced", path.display())]
    Exists {
        /// The file or directory.
        path: PathBuf,
    },
    /// A name that cannot go into a certificate.
    #[error("{name:?} is neither a host name nor an IP address")]
    Name {
        /// The name.
        name: String,
    },
    /// A validity of no days, or one that ends too far away.
    #[error("a certificate is valid for 1 to {max_days} days, not {days}")]
    Days {
        /// What was asked.
        days: u32,
        /// The most.
        max_days: u32,
    },
    /// A file or directory could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The certificate library refused.
    #[error("cannot make the certificate")]
    Make(#[from] rcgen::Error),
    /// The TLS library refused.
    #[error("cannot set TLS up")]
    Tls(#[from] rustls::Error),
}

/// Why a connection could not be made, or ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TransportError {
    /// Certificates are missing or not good.
    #[error(transparent)]
    Pki(#[from] Arc<PkiError>),
    /// The settings are not allowed.
    #[error("the network settings are not allowed: {0}")]
    Settings(#[from] romulus_config::Invalid),
    /// The UDP socket could not be opened.
    #[error("cannot open UDP socket {address}")]
    Bind {
        /// The local address.
        address: SocketAddr,
        /// The cause.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// The peer's name has no address.
    #[error("cannot resolve {host:?}")]
    Resolve {
        /// The name.
        host: String,
        /// The cause; none when the name has no address at all.
        #[source]
        source: Option<Arc<std::io::Error>>,
    },
    /// Nobody answered in time.
    #[error("{peer} did not answer in time: check that the daemon runs there and that UDP reaches it")]
    NoAnswer {
        /// The peer.
        peer: String,
    },
    /// The peer has as many connections as it takes.
    #[error("{peer} refused the connection: it has as many as its settings allow, or is shutting down")]
    Busy {
        /// The peer.
        peer: String,
    },
    /// The peer speaks another protocol.
    #[error("{peer} is another kind of Romulus daemon, or of another version")]
    OtherService {
        /// The peer.
        peer: String,
    },
    /// The certificate that the peer showed is not good.
    #[error("the certificate of {peer} {problem}")]
    PeerCertificate {
        /// The peer.
        peer: String,
        /// What is wrong with it.
        problem: CertificateProblem,
    },
    /// The peer does not accept our certificate.
    #[error("{peer} refused our certificate: it {problem}")]
    OwnCertificate {
        /// The peer.
        peer: String,
        /// What the peer says is wrong with it.
        problem: CertificateProblem,
    },
    /// The peer or this side closed the connection on purpose.
    #[error("closed by {by} ({code}): {reason:?}")]
    Closed {
        /// Who closed it.
        by: ClosedBy,
        /// Why, for programs.
        code: CloseCode,
        /// Why, for people; at most [`crate::REASON_BYTES_MAX`] bytes.
        reason: String,
    },
    /// The connection was lost: silence, or a reset by a restarted peer.
    #[error("the connection was lost: {0}")]
    Lost(String),
    /// A stream was reset by the peer or had ended.
    #[error("the stream ended before its end was sent")]
    StreamReset,
    /// A message is over its limit.
    #[error("a message has over {max} bytes")]
    TooLarge {
        /// The limit in bytes.
        max: usize,
    },
    /// The endpoint takes no more connections, as it was closed.
    #[error("the endpoint was closed")]
    EndpointClosed,
}

impl From<PkiError> for TransportError {
    fn from(error: PkiError) -> Self {
        Self::Pki(Arc::new(error))
    }
}

/// Who closed a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClosedBy {
    /// This side.
    Us,
    /// The other side.
    Peer,
}

impl std::fmt::Display for ClosedBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Us => "this side",
            Self::Peer => "the peer",
        })
    }
}
