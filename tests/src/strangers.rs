//! Those who have no certificate, or who send packets that belong to no connection.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use quinn::crypto::rustls::QuicClientConfig;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use crate::{Host, Lab};

/// A packet that is not answered is sent again after so long.
const AGAIN: Duration = Duration::from_secs(2);
/// The longest packet that is looked at.
const PACKET_BYTES_MAX: usize = 2000;
/// What a client's first packet is filled up to, at least (RFC 9000, 14.1).
const FIRST_BYTES: usize = 1200;
/// Sockets that are open at a time.
const BATCH: usize = 250;

/// A small deterministic generator, so that a failure repeats.
#[must_use]
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..bytes).map(|_| next()).collect()
}

/// A QUIC client that trusts the CA and has no certificate of its own.
fn nobody(ca: &Path, service: &[u8]) -> Result<quinn::Endpoint> {
    let mut roots = rustls::RootCertStore::empty();
    let certificate = CertificateDer::from_pem_file(ca);
    roots.add(certificate.with_context(|| format!("cannot read {}", ca.display()))?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![service.to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    let mut endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

/// Connects without a certificate, and gives what the daemon closed the connection with.
///
/// # Errors
/// When there is no such CA, or no socket.
pub async fn connect_without_certificate(
    ca: &Path,
    service: &[u8],
    address: SocketAddr,
) -> Result<quinn::ConnectionError> {
    let endpoint = nobody(ca, service)?;
    Ok(match endpoint.connect(address, "127.0.0.1")?.await {
        // The client's side of the handshake ends before the server has looked for a certificate.
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    })
}

/// A handshake that a client begins towards a trap, which keeps its packets from where they should go.
#[derive(Debug)]
struct Trapped {
    trap: tokio::net::UdpSocket,
    client: SocketAddr,
    first: Vec<u8>,
    _connecting: quinn::Connecting,
}

impl Trapped {
    async fn begin(endpoint: &quinn::Endpoint) -> Result<Trapped> {
        let trap = tokio::net::UdpSocket::bind("127.0.0.1:0").await?;
        let connecting = endpoint.connect(trap.local_addr()?, "127.0.0.1")?;
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        let (bytes, client) = trap.recv_from(&mut buffer).await?;
        buffer.truncate(bytes);
        Ok(Trapped {
            trap,
            client,
            first: buffer,
            _connecting: connecting,
        })
    }

    /// Tells the client to prove its address, and gives the packet that does.
    async fn prove(&self, retry: &[u8]) -> Result<Vec<u8>> {
        self.trap.send_to(retry, self.client).await?;
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        loop {
            let bytes = self.trap.recv(&mut buffer).await?;
            // It may send its first packet again before it has the answer.
            if has_token(&buffer[..bytes]) {
                return Ok(buffer[..bytes].to_vec());
            }
        }
    }
}

/// Whether an initial packet carries a token (RFC 9000, 17.2.2): after the connection ids comes the token's length.
fn has_token(packet: &[u8]) -> bool {
    let destination = usize::from(packet[5]);
    let source = usize::from(packet[6 + destination]);
    packet[7 + destination + source] != 0
}

/// Whether a packet is a server's demand for a proof of the address (RFC 9000, 17.2.5).
fn is_retry(packet: &[u8]) -> bool {
    packet[0] & 0xf0 == 0xf0
}

/// First packets of handshakes, each of another connection.
///
/// # Errors
/// As [`connect_without_certificate`].
pub async fn first_packets(ca: &Path, service: &[u8], count: usize) -> Result<Vec<Vec<u8>>> {
    let endpoint = nobody(ca, service)?;
    let mut packets = Vec::new();
    for _ in 0..count {
        packets.push(Trapped::begin(&endpoint).await?.first);
    }
    Ok(packets)
}

/// The same, but every second one is damaged, or noise of the same length.
///
/// # Errors
/// As [`connect_without_certificate`].
pub async fn storm_packets(ca: &Path, service: &[u8], seed: u64, count: usize) -> Result<Vec<Vec<u8>>> {
    let mut packets = first_packets(ca, service, count / 2).await?;
    for number in 0..count / 2 {
        let mut garbage = packets[number].clone();
        match number % 2 {
            0 => garbage[number % FIRST_BYTES] ^= 0xff,
            _ => garbage = noise(seed * count as u64 + number as u64, FIRST_BYTES),
        }
        packets.push(garbage);
    }
    Ok(packets)
}

/// A handshake whose sender has proven its address, and then says no more.
#[derive(Debug)]
pub struct Hanging {
    _socket: tokio::net::UdpSocket,
    _client: Trapped,
}

impl Hanging {
    /// Begins it from this address, and waits for the server's first answer.
    ///
    /// # Errors
    /// As [`connect_without_certificate`].
    pub async fn begin(ca: &Path, service: &[u8], from: IpAddr, server: SocketAddr) -> Result<Hanging> {
        let client = Trapped::begin(&nobody(ca, service)?).await?;
        let socket = tokio::net::UdpSocket::bind((from, 0)).await?;
        let mut answer = vec![0; PACKET_BYTES_MAX];
        let mut packet = client.first.clone();
        loop {
            socket.send_to(&packet, server).await?;
            // A packet may be lost when the server's buffer is full: it is sent again, as a client does.
            let heard = tokio::time::timeout(AGAIN, socket.recv(&mut answer)).await;
            let Ok(bytes) = heard else { continue };
            let answer = &answer[..bytes?];
            if !is_retry(answer) {
                break;
            }
            packet = client.prove(answer).await?;
        }
        Ok(Hanging {
            _socket: socket,
            _client: client,
        })
    }
}

/// Noise, and real first packets that are damaged or cut off.
///
/// # Errors
/// When the host has no sockets.
pub fn send_noise(address: SocketAddr, first_packet: &[u8]) -> Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    for seed in 0..300u64 {
        let bytes = usize::try_from(seed * 7 % 1400)? + 1;
        socket.send_to(&noise(seed, bytes), address)?;
        let mut damaged = first_packet.to_vec();
        let at = usize::try_from(seed)? * 31 % damaged.len();
        damaged[at] ^= 0x55;
        socket.send_to(&damaged, address)?;
        socket.send_to(&first_packet[..at], address)?;
    }
    Ok(())
}

/// Begins each handshake from a port of its own at this address and never answers. The sockets stay open while they are held.
///
/// # Errors
/// When the host has no more sockets.
pub fn half_open(from: Ipv4Addr, server: SocketAddr, packets: &[Vec<u8>]) -> Result<Vec<UdpSocket>> {
    let begin = |packet: &Vec<u8>| {
        let socket = UdpSocket::bind((from, 0))?;
        socket.send_to(packet, server)?;
        Ok(socket)
    };
    packets.iter().map(begin).collect()
}

/// What became of a storm.
#[derive(Clone, Copy, Debug, Default)]
pub struct Blown {
    /// Connections that were begun.
    pub begun: usize,
    /// Those of them that the daemon answered: it tells each handshake that it can read to prove its address. Half of them can't be
    /// read, and of bursts the kernel may drop some.
    pub answered: usize,
}

impl Blown {
    /// It reached the daemon.
    ///
    /// # Errors
    /// When the daemon answered less than half of what can be read.
    pub fn ensure_arrived(&self) -> Result<()> {
        ensure!(self.answered >= self.begun / 4, "it did not arrive: {self:?}");
        Ok(())
    }
}

/// Connections that come to nothing, made before they are begun: making them takes much longer.
#[derive(Debug)]
pub struct Storm {
    server: SocketAddr,
    batches: Vec<Vec<Vec<u8>>>,
}

impl Storm {
    /// As many connections, rounded down to batches of 250, to a daemon of the lab that serves `service` at `port` of `host`.
    ///
    /// # Errors
    /// When the lab has no certificates, or no socket is to be had.
    pub fn gather(lab: &Lab, (host, port): (Host, u16), service: &[u8], connections: u32) -> Result<Storm> {
        let ca = lab.run_path("pki").join(host.name()).join("ca-cert.pem");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut batches = Vec::new();
        for seed in 0..u64::from(connections) / BATCH as u64 {
            batches.push(runtime.block_on(storm_packets(&ca, service, seed, BATCH))?);
        }
        Ok(Storm {
            server: SocketAddr::from((host.ip(), port)),
            batches,
        })
    }

    /// Begins them all from the lab's client, with a pause after each batch.
    ///
    /// # Errors
    /// When the client has no sockets.
    pub fn blow(&self, lab: &Lab, pause: Duration) -> Result<Blown> {
        let mut blown = Blown::default();
        for packets in &self.batches {
            let begin = || half_open(Ipv4Addr::UNSPECIFIED, self.server, packets);
            let open = lab.on(Host::Client, begin)??;
            std::thread::sleep(pause);
            blown.begun += open.len();
            for socket in open {
                socket.set_nonblocking(true)?;
                blown.answered += usize::from(socket.recv(&mut [0; 1]).is_ok());
            }
        }
        Ok(blown)
    }

    /// How many batches there are.
    #[must_use]
    pub fn batches(&self) -> usize {
        self.batches.len()
    }
}
