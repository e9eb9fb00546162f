//! This host's certificates, in the directory layout that QEMU uses.
//!
//! ```text
//!   DIR/ca-cert.pem      whom we trust
//!   DIR/server-cert.pem  DIR/server-key.pem   what we show to those who connect
//!   DIR/client-cert.pem  DIR/client-key.pem   what we show to those we connect to
//! ```
//!
//! Everything is checked when it is loaded, by the very verifiers that the handshake uses, so that an error
//! names a file instead of a TLS alert.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use romulus_types::HostId;
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};

use crate::certificate::{self, problem_of};
use crate::error::{CertificateProblem, PkiError};

/// Most bytes in one PEM file.
const PEM_BYTES_MAX: u64 = 1 << 20;
/// Most certificates in one PEM file.
const CERTIFICATES_MAX: usize = 64;

pub(crate) const CA_CERT: &str = "ca-cert.pem";
/// Names of a role's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Server,
    Client,
}

impl Role {
    pub(crate) const fn cert_file(self) -> &'static str {
        match self {
            Self::Server => "server-cert.pem",
            Self::Client => "client-cert.pem",
        }
    }

    pub(crate) const fn key_file(self) -> &'static str {
        match self {
            Self::Server => "server-key.pem",
            Self::Client => "client-key.pem",
        }
    }
}

/// A certificate chain with its key.
pub(crate) struct Credentials {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

/// This host's name, certificates and keys, and the CA that it trusts.
#[derive(Clone)]
pub struct Identity {
    dir: PathBuf,
    host: HostId,
    expiry_s: u64,
    pub(crate) server: Credentials,
    pub(crate) client: Credentials,
    pub(crate) server_verifier: Arc<WebPkiServerVerifier>,
    pub(crate) client_verifier: Arc<dyn ClientCertVerifier>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys stay out of logs.
        f.debug_struct("Identity")
            .field("dir", &self.dir)
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

/// The one cryptography provider; it is passed explicitly and never installed for the process.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl Identity {
    /// Loads and checks a certificate directory. Blocks on file reads: call it at start, not in a task.
    ///
    /// # Errors
    /// [`PkiError`] names the file and what is wrong with it.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        Self::load_at(dir, SystemTime::now())
    }

    /// As [`Identity::load`], judged at another time.
    ///
    /// # Errors
    /// As [`Identity::load`].
    pub fn load_at(dir: &Path, now: SystemTime) -> Result<Self, PkiError> {
        let (server_verifier, client_verifier) = verifiers(dir)?;
        let verifiers = (server_verifier.as_ref(), client_verifier.as_ref());
        let (server, server_host) = load_role(dir, Role::Server, verifiers, now)?;
        let (client, host) = load_role(dir, Role::Client, verifiers, now)?;
        if server_host != host {
            let (server, client) = (server_host.into(), host.into());
            return Err(PkiError::TwoNames {
                dir: dir.to_owned(),
                server,
                client,
            });
        }
        let expiry_s = expiry_s(server.chain.iter().chain(&client.chain));
        Ok(Self {
            dir: dir.to_owned(),
            host,
            expiry_s,
            server,
            client,
            server_verifier,
            client_verifier,
        })
    }

    /// This host's name, as its certificates have it.
    pub fn host(&self) -> &HostId {
        &self.host
    }

    /// When the first of this host's certificates expires, in seconds since 1970. An authority's own end does not matter: handshakes do not
    /// look at it.
    pub fn expiry_s(&self) -> u64 {
        self.expiry_s
    }

    /// The directory that this was loaded from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// When the first of them expires. One that cannot be read has been refused before.
fn expiry_s<'a>(certificates: impl Iterator<Item = &'a CertificateDer<'static>>) -> u64 {
    let end_s = |certificate| certificate::read(certificate).map_or(0, |facts| facts.not_after_s);
    let first_s = certificates.map(end_s).min().unwrap_or(0);
    u64::try_from(first_s).unwrap_or(0)
}

type Verifiers = (Arc<WebPkiServerVerifier>, Arc<dyn ClientCertVerifier>);

/// Verifiers that trust what `ca-cert.pem` holds.
pub(crate) fn verifiers(dir: &Path) -> Result<Verifiers, PkiError> {
    let file = dir.join(CA_CERT);
    let damaged = || PkiError::Certificate {
        file: file.clone(),
        problem: CertificateProblem::Damaged,
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&file)? {
        roots.add(certificate).map_err(|_| damaged())?;
    }
    let roots = Arc::new(roots);
    let server = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider());
    let client = WebPkiClientVerifier::builder_with_provider(roots, provider());
    Ok((
        server.build().map_err(|_| damaged())?,
        client.build().map_err(|_| damaged())?,
    ))
}

fn load_role(
    dir: &Path,
    role: Role,
    (server_verifier, client_verifier): (&WebPkiServerVerifier, &dyn ClientCertVerifier),
    now: SystemTime,
) -> Result<(Credentials, HostId), PkiError> {
    let file = dir.join(role.cert_file());
    let chain = certificates(&file)?;
    let bad = |problem| PkiError::Certificate {
        file: file.clone(),
        problem,
    };
    let facts = certificate::read(&chain[0]).map_err(bad)?;
    let host = facts.host.ok_or_else(|| bad(CertificateProblem::NoHostName))?;
    let unix_now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    let verdict = match role {
        Role::Server => {
            let name = facts
                .server_names
                .into_iter()
                .next()
                .ok_or_else(|| bad(CertificateProblem::WrongName))?;
            server_verifier
                .verify_server_cert(&chain[0], &chain[1..], &name, &[], unix_now)
                .map(drop)
        }
        Role::Client => client_verifier
            .verify_client_cert(&chain[0], &chain[1..], unix_now)
            .map(drop),
    };
    verdict.map_err(|error| bad(problem_of(&error)))?;
    let key_file = dir.join(role.key_file());
    let key = private_key(&key_file)?;
    let certified = CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider());
    match certified {
        Ok(_) => Ok((Credentials { chain, key }, host)),
        Err(rustls::Error::InconsistentKeys(_)) => Err(PkiError::KeyMismatch { file: key_file }),
        Err(_) => Err(PkiError::Form {
            file: key_file,
            wanted: "private key that is supported",
        }),
    }
}

pub(crate) fn read_pem(file: &Path) -> Result<Vec<u8>, PkiError> {
    use std::io::Read as _;
    let unreadable = |source| PkiError::Read {
        file: file.to_owned(),
        source,
    };
    let opened = std::fs::File::open(file).map_err(unreadable)?;
    let mut pem = Vec::new();
    opened
        .take(PEM_BYTES_MAX + 1)
        .read_to_end(&mut pem)
        .map_err(unreadable)?;
    if pem.len() as u64 > PEM_BYTES_MAX {
        return Err(unreadable(std::io::Error::from(std::io::ErrorKind::FileTooLarge)));
    }
    Ok(pem)
}

/// The certificates in a PEM file: at least one.
pub(crate) fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let form = || PkiError::Form {
        file: file.to_owned(),
        wanted: "certificate",
    };
    let pem = read_pem(file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem)
        .take(CERTIFICATES_MAX + 1)
        .collect();
    let found = found.map_err(|_| form())?;
    if found.is_empty() || found.len() > CERTIFICATES_MAX {
        return Err(form());
    }
    Ok(found)
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, PkiError> {
    let pem = read_pem(file)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| PkiError::Form {
        file: file.to_owned(),
        wanted: "private key",
    })
}
