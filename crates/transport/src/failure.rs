//! QUIC's errors in our words.

use quinn::{ConnectionError, ReadError, StoppedError, WriteError};

use crate::certificate::problem_of_alert;
use crate::code::CloseCode;
use crate::connection::closed;
use crate::error::{CertificateProblem, ClosedBy, TransportError};

/// Codes from 0x100 carry a TLS alert in their low byte (RFC 9001, section 4.8).
const CRYPTO_BASE: u64 = 0x100;
/// TLS's alert for "no protocol in common" (RFC 7301).
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// The TLS alert in a QUIC error code.
fn alert(code: quinn::TransportErrorCode) -> Option<u8> {
    u64::from(code)
        .checked_sub(CRYPTO_BASE)
        .and_then(|low| u8::try_from(low).ok())
}

/// An error of an established connection.
pub(crate) fn of_connection(error: ConnectionError) -> TransportError {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            let code = u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX);
            closed(
                ClosedBy::Peer,
                CloseCode::new(code),
                &String::from_utf8_lossy(&close.reason),
            )
        }
        ConnectionError::LocallyClosed => closed(ClosedBy::Us, CloseCode::DONE, ""),
        ConnectionError::TimedOut => TransportError::Lost("the peer fell silent".into()),
        ConnectionError::Reset => TransportError::Lost("the peer was restarted".into()),
        other => TransportError::Lost(other.to_string()),
    }
}

/// An error while `peer` was being connected to; `refused` is what our verifier said of its certificate.
pub(crate) fn of_connect(
    error: ConnectionError,
    peer: &str,
    refused: Option<CertificateProblem>,
) -> TransportError {
    let peer = || peer.to_owned();
    if let Some(problem) = refused {
        return TransportError::PeerCertificate {
            peer: peer(),
            problem,
        };
    }
    match error {
        ConnectionError::TimedOut => TransportError::NoAnswer { peer: peer() },
        ConnectionError::ConnectionClosed(close) => match alert(close.error_code) {
            Some(NO_APPLICATION_PROTOCOL) => TransportError::OtherService { peer: peer() },
            Some(alert) => match problem_of_alert(alert) {
                Some(problem) => TransportError::OwnCertificate {
                    peer: peer(),
                    problem,
                },
                None => of_connection(ConnectionError::ConnectionClosed(close)),
            },
            None if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED => {
                TransportError::Busy { peer: peer() }
            }
            None => of_connection(ConnectionError::ConnectionClosed(close)),
        },
        ConnectionError::TransportError(error) if alert(error.code) == Some(NO_APPLICATION_PROTOCOL) => {
            TransportError::OtherService { peer: peer() }
        }
        ConnectionError::VersionMismatch => TransportError::OtherService { peer: peer() },
        ConnectionError::ApplicationClosed(close) if close.error_code == CloseCode::LIMIT.number().into() => {
            TransportError::Busy { peer: peer() }
        }
        other => of_connection(other),
    }
}

pub(crate) fn of_write(error: WriteError) -> TransportError {
    match error {
        WriteError::ConnectionLost(error) => of_connection(error),
        WriteError::Stopped(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => {
            TransportError::StreamReset
        }
    }
}

pub(crate) fn of_read(error: ReadError) -> TransportError {
    match error {
        ReadError::ConnectionLost(error) => of_connection(error),
        ReadError::Reset(_)
        | ReadError::ClosedStream
        | ReadError::IllegalOrderedRead
        | ReadError::ZeroRttRejected => TransportError::StreamReset,
    }
}

pub(crate) fn of_stopped(error: StoppedError) -> TransportError {
    match error {
        StoppedError::ConnectionLost(error) => of_connection(error),
        StoppedError::ZeroRttRejected => TransportError::StreamReset,
    }
}
