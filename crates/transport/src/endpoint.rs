//! A UDP socket that connects, accepts, or both.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};

use quinn::{ClientConfig, ServerConfig};
use romulus_config::{Network, PeerAddress};
use romulus_types::HostId;
use rustls_pki_types::CertificateDer;

use crate::accept::{AcceptCounts, Acceptor};
use crate::bulk::{Bulk, Load, Places};
use crate::certificate;
use crate::code::CloseCode;
use crate::connection::Connection;
use crate::error::{CertificateProblem, TransportError};
use crate::failure;
use crate::identity::Identity;
use crate::quic;
use crate::tls::{self, Service};

/// What a server says first, so that a client knows that its own certificate was accepted: in TLS 1.3 a client
/// is done before the server has seen that certificate.
pub(crate) const GREETING: &[u8] = b"romulus";
/// Most first packets that wait for the acceptor to look at them; quinn refuses further ones by itself.
const INCOMING_MAX: usize = 256;
/// Most bytes that one of them may bring before it is looked at; all together sixteen times that.
const INCOMING_BYTES_MAX: u64 = 16 << 10;
/// How long [`Endpoint::shutdown`] waits for goodbyes to leave.
const SHUTDOWN_WAIT: std::time::Duration = std::time::Duration::from_millis(500);

/// Connects to peers and accepts them, with this host's certificates.
#[derive(Debug)]
pub struct Endpoint {
    quinn: quinn::Endpoint,
    network: Network,
    service: Service,
    identity: RwLock<Identity>,
    acceptor: Option<Acceptor>,
    places: Arc<Places>,
    /// Of all connections that this end has begun; none: they stay on the thread of the endpoint.
    load: Option<Arc<Load>>,
}

impl Endpoint {
    /// An endpoint that only connects. Must be called within a tokio runtime. With `bulk`, what is [spawned](Self::spawn) here and its
    /// connections' own work leave the thread of that runtime while they have much to do.
    ///
    /// # Errors
    /// Settings that are not allowed, or no socket.
    pub fn client(
        identity: &Identity,
        network: &Network,
        service: Service,
        bulk: Option<&Bulk>,
    ) -> Result<Self, TransportError> {
        network.check()?;
        let places = Arc::default();
        Ok(Self {
            quinn: open(None, None, network, &places)?,
            network: network.clone(),
            service,
            identity: RwLock::new(identity.clone()),
            acceptor: None,
            places,
            load: bulk.map(Load::new),
        })
    }

    /// An endpoint that listens on `listen`, and may connect as well. Must be called within a tokio runtime. With `bulk`, each
    /// accepted connection leaves the thread of that runtime while it has much to do.
    ///
    /// # Errors
    /// Settings that are not allowed, certificates that cannot be used, or no socket.
    pub fn server(
        identity: &Identity,
        network: &Network,
        service: Service,
        listen: SocketAddr,
        bulk: Option<&Bulk>,
    ) -> Result<Self, TransportError> {
        network.check()?;
        let config = server_config(identity, network, service)?;
        let places = Arc::default();
        let quinn = open(Some(listen), Some(config), network, &places)?;
        let acceptor = Acceptor::start(quinn.clone(), network, Arc::clone(&places), bulk.cloned());
        Ok(Self {
            quinn,
            network: network.clone(),
            service,
            identity: RwLock::new(identity.clone()),
            acceptor: Some(acceptor),
            places,
            load: None,
        })
    }

    /// Runs a task that uses the connections of a client, on the thread that they are on.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        spawn(self.load.as_ref(), task);
    }

    /// The address that the socket is bound to.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.quinn.local_addr()
    }

    /// Uses other certificates from now on; connections that exist keep theirs.
    ///
    /// # Errors
    /// Certificates that cannot be used; the earlier ones stay.
    pub fn reload(&self, identity: &Identity) -> Result<(), TransportError> {
        if self.acceptor.is_some() {
            self.quinn
                .set_server_config(Some(server_config(identity, &self.network, self.service)?));
        }
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = identity.clone();
        Ok(())
    }

    /// When the certificates in use for new connections expire, in seconds since 1970, as [`Identity::expiry_s`] has it.
    pub fn certificate_expiry_s(&self) -> u64 {
        let identity = self.identity.read().unwrap_or_else(PoisonError::into_inner);
        identity.expiry_s()
    }

    /// Connects to a peer whose certificate must carry [`PeerAddress::certificate_name`], and waits until
    /// the peer has accepted ours. Tries the addresses of a name in turn, each for `handshake_timeout`.
    ///
    /// # Errors
    /// [`TransportError`] of the last address tried; the certificate errors say which side's.
    pub async fn connect(&self, peer: &PeerAddress) -> Result<Connection, TransportError> {
        let mut last = TransportError::Resolve {
            host: peer.host().to_owned(),
            source: None,
        };
        for address in resolve(peer).await? {
            match self.connect_to(address, peer).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect_to(
        &self,
        address: SocketAddr,
        peer: &PeerAddress,
    ) -> Result<Connection, TransportError> {
        let text = peer.to_string();
        let (crypto, verdict) = {
            let identity = self.identity.read().unwrap_or_else(PoisonError::into_inner);
            tls::client_config(&identity, self.service)?
        };
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(quic::transport_config(&self.network, self.service)));
        let handshake = async {
            let connect = || self.quinn.connect_with(config, address, peer.certificate_name());
            let begun = self.places.with(self.load.as_ref(), connect);
            let connecting =
                begun.map_err(|error| TransportError::Lost(format!("cannot connect to {text}: {error}")))?;
            let connection = connecting
                .await
                .map_err(|error| failure::of_connect(error, &text, verdict.problem()))?;
            greeted(&connection)
                .await
                .map_err(|error| failure::of_connect(error, &text, None))?;
            Ok::<_, TransportError>(connection)
        };
        let connection = tokio::time::timeout(self.network.handshake_timeout, handshake)
            .await
            .map_err(|_| TransportError::NoAnswer { peer: text.clone() })??;
        let host = peer_host(&connection)
            .map_err(|problem| TransportError::PeerCertificate { peer: text, problem })?;
        Ok(Connection::quic(connection, host, None, self.load.clone()))
    }

    /// The next peer that has connected and shown a good certificate. Cancel safe.
    ///
    /// # Errors
    /// The endpoint was closed, or made by [`Endpoint::client`].
    pub async fn accept(&self) -> Result<Connection, TransportError> {
        match &self.acceptor {
            Some(acceptor) => acceptor.next().await.ok_or(TransportError::EndpointClosed),
            None => Err(TransportError::EndpointClosed),
        }
    }

    /// Counts of connections accepted, refused and failed; zero for a client.
    pub fn accept_counts(&self) -> AcceptCounts {
        self.acceptor.as_ref().map(Acceptor::counts).unwrap_or_default()
    }

    /// Closes all connections, tells the peers, and accepts no more.
    pub async fn shutdown(&self, reason: &str) {
        self.quinn.close(
            CloseCode::SHUTDOWN.number().into(),
            crate::code::shorten(reason).as_bytes(),
        );
        // A peer that does not answer must not hold the shutdown up.
        let _ = tokio::time::timeout(SHUTDOWN_WAIT, self.quinn.wait_idle()).await;
    }
}

fn open(
    local: Option<SocketAddr>,
    server: Option<ServerConfig>,
    network: &Network,
    places: &Arc<Places>,
) -> Result<quinn::Endpoint, TransportError> {
    let socket = quic::socket(local, network)?;
    let address = socket
        .local_addr()
        .ok()
        .or(local)
        .unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)));
    quinn::Endpoint::new(
        quic::endpoint_config(network),
        server,
        socket,
        Arc::clone(places) as Arc<dyn quinn::Runtime>,
    )
    .map_err(|source| TransportError::Bind {
        address,
        source: Arc::new(source),
    })
}

fn server_config(
    identity: &Identity,
    network: &Network,
    service: Service,
) -> Result<ServerConfig, TransportError> {
    let crypto = tls::server_config(identity, service)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::new(quic::transport_config(network, service)))
        .migration(false)
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BYTES_MAX)
        .incoming_buffer_size_total(INCOMING_BYTES_MAX * 16);
    Ok(config)
}

async fn resolve(peer: &PeerAddress) -> Result<Vec<SocketAddr>, TransportError> {
    if let Ok(ip) = peer.host().parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, peer.port())]);
    }
    match tokio::net::lookup_host((peer.host(), peer.port())).await {
        Ok(addresses) => Ok(addresses.take(8).collect()),
        Err(error) => Err(TransportError::Resolve {
            host: peer.host().to_owned(),
            source: Some(Arc::new(error)),
        }),
    }
}

/// Waits for the server's greeting.
async fn greeted(connection: &quinn::Connection) -> Result<(), quinn::ConnectionError> {
    let mut stream = connection.accept_uni().await?;
    match stream.read_to_end(GREETING.len()).await {
        Ok(greeting) if greeting == GREETING => Ok(()),
        Err(quinn::ReadToEndError::Read(quinn::ReadError::ConnectionLost(error))) => Err(error),
        Ok(_) | Err(_) => {
            connection.close(CloseCode::BAD_INPUT.number().into(), b"not a greeting");
            // Another version of this program, at best.
            Err(quinn::ConnectionError::VersionMismatch)
        }
    }
}

/// The host that the peer's certificate stands for.
pub(crate) fn peer_host(connection: &quinn::Connection) -> Result<HostId, CertificateProblem> {
    let identity = connection.peer_identity().ok_or(CertificateProblem::Missing)?;
    let chain = identity
        .downcast::<Vec<CertificateDer<'static>>>()
        .map_err(|_| CertificateProblem::Damaged)?;
    let leaf = chain.first().ok_or(CertificateProblem::Missing)?;
    certificate::read(leaf)?
        .host
        .ok_or(CertificateProblem::NoHostName)
}

/// Runs a task with those of a connection.
pub(crate) fn spawn(load: Option<&Arc<Load>>, task: impl Future<Output = ()> + Send + 'static) {
    match load {
        Some(load) => load.spawn(Box::pin(task)),
        None => drop(tokio::spawn(task)),
    }
}
