//! TLS 1.3 with certificates on both sides, and the names of what goes wrong in it.

use std::sync::{Arc, Mutex, PoisonError};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::certificate::problem_of;
use crate::error::{CertificateProblem, PkiError};
use crate::identity::{Identity, provider};

/// What is spoken over a connection; a daemon refuses another kind during the handshake (ALPN).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Service {
    /// Between a replicator and a backup agent.
    Pair,
    /// Between a host and the witness.
    Witness,
}

impl Service {
    fn alpn(self) -> Vec<u8> {
        match self {
            Self::Pair => b"romulus-pair/1".to_vec(),
            Self::Witness => b"romulus-witness/1".to_vec(),
        }
    }

    /// Most control streams that the client may have open.
    pub(crate) fn control_streams_max(self) -> u32 {
        match self {
            Self::Pair => 1,
            // One a request.
            Self::Witness => 16,
        }
    }
}

pub(crate) fn server_config(identity: &Identity, service: Service) -> Result<QuicServerConfig, PkiError> {
    let server = identity.server.clone();
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(identity.client_verifier.clone())
        .with_single_cert(server.chain, server.key)?;
    config.alpn_protocols = vec![service.alpn()];
    // No resumption: every connection shows its certificate again.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(QuicServerConfig::try_from(config).expect("ring has the QUIC initial cipher suite"))
}

pub(crate) fn client_config(
    identity: &Identity,
    service: Service,
) -> Result<(QuicClientConfig, Arc<Verdict>), PkiError> {
    let client = identity.client.clone();
    let verdict = Arc::new(Verdict {
        inner: identity.server_verifier.clone(),
        problem: Mutex::new(None),
    });
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verdict.clone())
        .with_client_auth_cert(client.chain, client.key)?;
    config.alpn_protocols = vec![service.alpn()];
    config.resumption = rustls::client::Resumption::disabled();
    let config = QuicClientConfig::try_from(config).expect("ring has the QUIC initial cipher suite");
    Ok((config, verdict))
}

/// The standard verifier, which also remembers *why* it refused: QUIC itself reports no more than an alert.
#[derive(Debug)]
pub(crate) struct Verdict {
    inner: Arc<WebPkiServerVerifier>,
    problem: Mutex<Option<CertificateProblem>>,
}

impl Verdict {
    /// Why the server's certificate was refused, if it was.
    pub(crate) fn problem(&self) -> Option<CertificateProblem> {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note<T>(&self, result: Result<T, rustls::Error>) -> Result<T, rustls::Error> {
        if let Err(error) = &result {
            *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = Some(problem_of(error));
        }
        result
    }
}

impl ServerCertVerifier for Verdict {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.note(
            self.inner
                .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now),
        )
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.note(self.inner.verify_tls12_signature(message, cert, dss))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.note(self.inner.verify_tls13_signature(message, cert, dss))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
