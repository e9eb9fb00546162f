//! Those who have no certificate, or who send packets that belong to no connection.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

/// A packet that is not answered is sent again after so long.
const AGAIN: Duration = Duration::from_secs(2);

/// A small deterministic generator, so that a failure repeats.
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
fn nobody(ca: &Path, service: &[u8]) -> quinn::Endpoint {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![service.to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    let mut endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    endpoint.set_default_client_config(config);
    endpoint
}

/// Connects without a certificate, and gives what the daemon closed the connection with.
pub async fn connect_without_certificate(
    ca: &Path,
    service: &[u8],
    address: SocketAddr,
) -> quinn::ConnectionError {
    let endpoint = nobody(ca, service);
    match endpoint.connect(address, "127.0.0.1").unwrap().await {
        // The client's side of the handshake ends before the server has looked for a certificate.
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    }
}

/// A handshake that a client begins towards a trap, which keeps its packets from where they should go.
struct Trapped {
    trap: tokio::net::UdpSocket,
    client: SocketAddr,
    first: Vec<u8>,
    _connecting: quinn::Connecting,
}

impl Trapped {
    async fn begin(endpoint: &quinn::Endpoint) -> Trapped {
        let trap = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let connecting = endpoint.connect(trap.local_addr().unwrap(), "127.0.0.1").unwrap();
        let mut buffer = vec![0; 2000];
        let (bytes, client) = trap.recv_from(&mut buffer).await.unwrap();
        buffer.truncate(bytes);
        Trapped {
            trap,
            client,
            first: buffer,
            _connecting: connecting,
        }
    }

    /// Tells the client to prove its address, and gives the packet that does.
    async fn prove(&self, retry: &[u8]) -> Vec<u8> {
        self.trap.send_to(retry, self.client).await.unwrap();
        let mut buffer = vec![0; 2000];
        loop {
            let bytes = self.trap.recv(&mut buffer).await.unwrap();
            // It may send its first packet again before it has the answer.
            if has_token(&buffer[..bytes]) {
                return buffer[..bytes].to_vec();
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
pub async fn first_packets(ca: &Path, service: &[u8], count: usize) -> Vec<Vec<u8>> {
    let endpoint = nobody(ca, service);
    let mut packets = Vec::new();
    for _ in 0..count {
        packets.push(Trapped::begin(&endpoint).await.first);
    }
    packets
}

/// The same, but every second one is damaged, or noise of the same length.
pub async fn storm_packets(ca: &Path, service: &[u8], batch: usize, count: usize) -> Vec<Vec<u8>> {
    let mut packets = first_packets(ca, service, count / 2).await;
    for number in 0..count / 2 {
        let mut garbage = packets[number].clone();
        match number % 2 {
            0 => garbage[number % 1200] ^= 0xff,
            _ => garbage = noise((batch * count + number) as u64, 1200),
        }
        packets.push(garbage);
    }
    packets
}

/// A handshake whose sender has proven its address, and then says no more.
pub struct Hanging {
    _socket: tokio::net::UdpSocket,
    _client: Trapped,
}

impl Hanging {
    /// Begins it from this address, and waits for the server's first answer.
    pub async fn begin(ca: &Path, service: &[u8], from: IpAddr, server: SocketAddr) -> Hanging {
        let client = Trapped::begin(&nobody(ca, service)).await;
        let socket = tokio::net::UdpSocket::bind((from, 0)).await.unwrap();
        let mut answer = vec![0; 2000];
        let mut packet = client.first.clone();
        loop {
            socket.send_to(&packet, server).await.unwrap();
            // A packet may be lost when the server's buffer is full: it is sent again, as a client does.
            let heard = tokio::time::timeout(AGAIN, socket.recv(&mut answer)).await;
            let Ok(bytes) = heard else { continue };
            let answer = &answer[..bytes.unwrap()];
            if !is_retry(answer) {
                break;
            }
            packet = client.prove(answer).await;
        }
        Hanging {
            _socket: socket,
            _client: client,
        }
    }
}

/// Noise, and real first packets that are damaged or cut off.
pub fn send_noise(address: SocketAddr, first_packet: &[u8]) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for seed in 0..300u64 {
        let bytes = usize::try_from(seed * 7 % 1400).unwrap() + 1;
        socket.send_to(&noise(seed, bytes), address).unwrap();
        let mut damaged = first_packet.to_vec();
        let at = usize::try_from(seed).unwrap() * 31 % damaged.len();
        damaged[at] ^= 0x55;
        socket.send_to(&damaged, address).unwrap();
        socket.send_to(&first_packet[..at], address).unwrap();
    }
}

/// Begins each handshake from a port of its own at this address and never answers. The sockets stay open while they are held.
pub fn half_open(from: Ipv4Addr, server: SocketAddr, packets: &[Vec<u8>]) -> Vec<UdpSocket> {
    let begin = |packet: &Vec<u8>| {
        let socket = UdpSocket::bind((from, 0)).unwrap();
        socket.send_to(packet, server).unwrap();
        socket
    };
    packets.iter().map(begin).collect()
}
