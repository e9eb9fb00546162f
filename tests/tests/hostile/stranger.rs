//! Those who have no certificate, or who send packets that belong to no connection.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;

use quinn::crypto::rustls::QuicClientConfig;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

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

/// First packets of handshakes, each of another connection.
pub async fn first_packets(ca: &Path, service: &[u8], count: usize) -> Vec<Vec<u8>> {
    let endpoint = nobody(ca, service);
    let mut packets = Vec::new();
    for _ in 0..count {
        // A trap each: the client sends its packet more than once.
        let trap = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let connecting = endpoint.connect(trap.local_addr().unwrap(), "127.0.0.1").unwrap();
        let mut buffer = vec![0; 2000];
        let (bytes, _) = trap.recv_from(&mut buffer).await.unwrap();
        buffer.truncate(bytes);
        packets.push(buffer);
        drop(connecting);
    }
    packets
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

/// Begins each handshake from a port of its own and never answers. The sockets stay open while they are held.
pub fn half_open(address: SocketAddr, packets: &[Vec<u8>]) -> Vec<UdpSocket> {
    let begin = |packet: &Vec<u8>| {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(packet, address).unwrap();
        socket
    };
    packets.iter().map(begin).collect()
}
