//! Strangers on the port: noise, half-open handshakes, too many peers. Good peers keep working.

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use bytes::Bytes;
use common::{client, identity, peer, pki_for, server};
use romulus_transport::{CloseCode, Connection, Network, TransportError};

/// A small deterministic generator, so that a failure repeats.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed
        .wrapping_mul(2_862_933_555_777_941_757)
        .wrapping_add(3_037_000_493);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..bytes).map(|_| next()).collect()
}

async fn echo_once(from: &Connection, at: &Connection) {
    let mut ours = from.open_control().await.unwrap();
    ours.sender
        .send(Bytes::from_static(b"still there?"))
        .await
        .unwrap();
    let mut theirs = at.accept_control().await.unwrap();
    assert_eq!(theirs.receiver.recv().await.unwrap().unwrap(), "still there?");
    theirs.sender.finish();
    ours.sender.finish();
}

/// A client's first packet, as it leaves the socket of a peer without certificates of this CA.
async fn first_packets(count: usize) -> Vec<Vec<u8>> {
    let pki = pki_for(&["stranger"]);
    let network = Network {
        handshake_timeout: Duration::from_millis(100),
        ..Network::default()
    };
    let mut packets = Vec::new();
    for _ in 0..count {
        // A trap each, as the client sends its packet more than once.
        let trap = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = trap.local_addr().unwrap();
        let stranger = client(&identity(&pki, "stranger"), &network);
        let target = peer(address);
        let connecting = tokio::spawn(async move { stranger.connect(&target).await.map(drop) });
        let mut buffer = vec![0; 2000];
        let (bytes, _) = trap.recv_from(&mut buffer).await.unwrap();
        buffer.truncate(bytes);
        packets.push(buffer);
        assert!(matches!(
            connecting.await.unwrap(),
            Err(TransportError::NoAnswer { .. })
        ));
    }
    packets
}

#[tokio::test]
async fn noise_on_the_port_disturbs_nobody() {
    let pair = common::connected(&Network::default()).await;
    let address = pair.server.local_addr().unwrap();
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    let initial = first_packets(1).await.remove(0);
    for seed in 0..500u64 {
        let bytes = usize::try_from(seed * 7 % 1400).unwrap() + 1;
        stranger.send_to(&noise(seed, bytes), address).unwrap();
        // A good first packet with damage in it, and a truncated one.
        let mut damaged = initial.clone();
        let at = usize::try_from(seed).unwrap() * 31 % damaged.len();
        damaged[at] ^= 0x55;
        stranger.send_to(&damaged, address).unwrap();
        stranger.send_to(&initial[..at], address).unwrap();
    }
    echo_once(&pair.at_client, &pair.at_server).await;
    let again = pair.client.connect(&peer(address)).await.unwrap();
    assert_eq!(again.peer().as_str(), "backup");
}

#[tokio::test]
async fn half_open_handshakes_take_a_bounded_number_of_places_and_give_them_back() {
    let network = Network {
        handshakes_max: 8,
        handshake_timeout: Duration::from_millis(1500),
        ..Network::default()
    };
    let pki = pki_for(&["primary", "backup"]);
    let (server, address) = server(&identity(&pki, "backup"), &network);
    let good = client(&identity(&pki, "primary"), &network);
    let before = good.connect(&peer(address)).await.unwrap();
    let at_server = server.accept().await.unwrap();
    // Each first packet from another port, and never an answer to what comes back.
    let mut sockets = Vec::new();
    for packet in first_packets(40).await {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(&packet, address).unwrap();
        sockets.push(socket);
    }
    let turned_away = || server.accept_counts().retried + server.accept_counts().refused;
    for _ in 0..100 {
        if turned_away() >= 32 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(turned_away() >= 32, "{:?}", server.accept_counts());
    // A peer that proves its address gets in while they are still open.
    let during = good.connect(&peer(address)).await.unwrap();
    echo_once(&before, &at_server).await;
    drop(during);
    for _ in 0..100 {
        if server.accept_counts().failed > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(
        server.accept_counts().failed > 0,
        "half-open handshakes were not given up"
    );
}

#[tokio::test]
async fn a_peer_beyond_the_limit_is_told_that_the_server_is_full_and_others_stay() {
    let network = Network {
        connections_max: 2,
        ..Network::default()
    };
    let pki = pki_for(&["primary", "backup"]);
    let (server, address) = server(&identity(&pki, "backup"), &network);
    let good = client(&identity(&pki, "primary"), &network);
    let first = good.connect(&peer(address)).await.unwrap();
    let first_at_server = server.accept().await.unwrap();
    let second = good.connect(&peer(address)).await.unwrap();
    let second_at_server = server.accept().await.unwrap();
    let refused = good.connect(&peer(address)).await;
    assert!(matches!(refused, Err(TransportError::Busy { .. })), "{refused:?}");
    echo_once(&first, &first_at_server).await;
    second.close(CloseCode::DONE, "");
    second_at_server.closed().await;
    drop(second_at_server);
    good.connect(&peer(address)).await.unwrap();
}

#[tokio::test]
async fn a_silent_address_and_a_port_without_a_daemon_are_no_answer() {
    let pki = pki_for(&["primary"]);
    let network = Network {
        handshake_timeout: Duration::from_millis(200),
        ..Network::default()
    };
    let client = client(&identity(&pki, "primary"), &network);
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let error = client
        .connect(&peer(silent.local_addr().unwrap()))
        .await
        .unwrap_err();
    assert!(matches!(error, TransportError::NoAnswer { .. }), "{error:?}");
    let free: SocketAddr = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(client.connect(&peer(free)).await.is_err());
}

#[tokio::test]
async fn a_peer_that_vanishes_without_a_word_is_lost_and_its_place_is_free_again() {
    let network = Network {
        idle_timeout: Duration::from_millis(500),
        keep_alive: Duration::from_millis(100),
        connections_max: 1,
        ..Network::default()
    };
    let pki = pki_for(&["primary", "backup"]);
    let (server, address) = server(&identity(&pki, "backup"), &network);
    // A runtime of its own that is stopped dead, as a killed process would be.
    let own = identity(&pki, "primary");
    let (dies, target) = (network.clone(), peer(address));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let connected = runtime.spawn(async move {
        let client = client(&own, &dies);
        let connection = client.connect(&target).await.unwrap();
        (client, connection)
    });
    let at_server = server.accept().await.unwrap();
    let kept = connected.await.unwrap();
    runtime.shutdown_background();
    let gone = tokio::time::timeout(Duration::from_secs(10), at_server.closed())
        .await
        .unwrap();
    assert!(matches!(gone, TransportError::Lost(_)), "{gone:?}");
    drop(at_server);
    let good = client(&identity(&pki, "primary"), &network);
    good.connect(&peer(address)).await.unwrap();
    drop(kept);
}
