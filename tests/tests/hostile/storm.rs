//! Ten thousand connections that come to nothing, and a good connection's packets sent again.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use romulus_e2e::strangers::{Hanging, half_open, storm_packets};
use romulus_transport::{CloseCode, Service};
use romulus_types::{Epoch, Session};
use tokio::net::UdpSocket;
use tokio::sync::Mutex;

use crate::place::{Place, SOON, client, peer};
use crate::primary::{Primary, true_hello};

const AGENT: &str = "backup-agent";
const PAIR: &[u8] = b"romulus-pair/1";
/// Connections that are begun and never finished, or were never one.
const CONNECTIONS: usize = 10_000;
/// Sockets that are open at a time.
const BATCH: usize = 250;
/// What strangers may cost the agent, as docs/src/limits.md has it for the default of `network.handshakes_max`.
const STRANGERS_BYTES_MAX: u64 = 16 << 20;
/// Handshakes that one address may have under way: half of `network.handshakes_max`.
const OF_ADDRESS_MAX: usize = 16;

#[tokio::test]
async fn ten_thousand_half_open_and_garbage_connections_disturb_no_session_and_cost_no_memory() {
    let place = Place::new();
    let _witness = place.start_witness().await;
    let mut agent = place.start_agent().await;
    let endpoint = client(&place.identity("primary"), Service::Pair);
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let mut steady = Primary::open(&place, &endpoint, &asked).await.unwrap();
    steady.commit().await;
    agent.note_memory();
    let counts = || place.status(AGENT)["handshakes"].clone();
    let before = counts();

    let ca = place.dir.path().join("pki/primary/ca-cert.pem");
    let (mut begun, mut growth) = (0, 0);
    for batch in 0..CONNECTIONS / BATCH {
        let packets = storm_packets(&ca, PAIR, batch as u64, BATCH).await.unwrap();
        begun += half_open(Ipv4Addr::LOCALHOST, place.agent_at, &packets)
            .unwrap()
            .len();
        if batch % 8 == 7 {
            growth = agent.assert_grown_less_than(STRANGERS_BYTES_MAX, "a storm of connections");
            steady.commit().await;
        }
    }
    assert_eq!(begun, CONNECTIONS);
    let after = counts();
    assert_eq!(
        after["accepted"], before["accepted"],
        "none of them was a connection"
    );
    assert_ne!(
        after["retried"], before["retried"],
        "they were made to prove their addresses: {after}"
    );
    let status = place.status(AGENT);
    assert_eq!(status["vms"][0]["committed"], steady.epoch().0, "{status}");
    assert_eq!(status["vms"][0]["refused_input"], 0, "{status}");
    // Who has a certificate gets in while the last of them still hang.
    let other = client(&place.identity("other"), Service::Pair);
    other
        .connect(&peer(place.agent_at))
        .await
        .unwrap()
        .close(CloseCode::DONE, "");
    steady.commit().await;
    println!(
        "{begun} connections: the agent's peak grew by {} KiB; {after}",
        growth >> 10
    );
}

#[tokio::test]
async fn who_proves_an_address_and_then_says_no_more_takes_half_of_the_places_and_not_for_long() {
    let place = Place::new();
    let _witness = place.start_witness().await;
    let mut agent = place.start_agent().await;
    let endpoint = client(&place.identity("primary"), Service::Pair);
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let mut steady = Primary::open(&place, &endpoint, &asked).await.unwrap();
    steady.commit().await;
    agent.note_memory();
    let count = |name: &str| place.status(AGENT)["handshakes"][name].as_u64().unwrap();
    let (refused, failed) = (count("refused"), count("failed"));

    let ca = place.dir.path().join("pki/primary/ca-cert.pem");
    let from = IpAddr::from([127, 0, 0, 2]);
    let mut held = Vec::new();
    // On a machine that is so busy that places are free again meanwhile, it takes more.
    while count("refused") == refused {
        assert!(
            held.len() < 100 * OF_ADDRESS_MAX,
            "one address takes as many places as it likes"
        );
        held.push(Hanging::begin(&ca, PAIR, from, place.agent_at).await.unwrap());
    }
    assert!(held.len() > OF_ADDRESS_MAX, "{} took all", held.len());
    // Another address has places left.
    let other = client(&place.identity("other"), Service::Pair);
    other
        .connect(&peer(place.agent_at))
        .await
        .unwrap()
        .close(CloseCode::DONE, "");
    steady.commit().await;
    // Their places are taken back, and counted.
    let began = std::time::Instant::now();
    while count("failed") < failed + OF_ADDRESS_MAX as u64 {
        assert!(began.elapsed() < SOON, "they hang for ever: {}", count("failed"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    agent.assert_grown_less_than(STRANGERS_BYTES_MAX, "handshakes that hang");
    steady.commit().await;
}

#[tokio::test]
async fn the_packets_of_a_good_connection_sent_again_are_no_connection() {
    let place = Place::new();
    let _witness = place.start_witness().await;
    let mut agent = place.start_agent().await;
    let recorder = Recorder::start(place.agent_at).await;
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let through = Place {
        agent_at: recorder.at,
        ..place
    };
    let endpoint = client(&through.identity("primary"), Service::Pair);
    let mut first = Primary::open(&through, &endpoint, &asked).await.unwrap();
    assert_eq!(first.commit().await, Epoch(1));
    first.leave(&through).await;
    let place = Place {
        agent_at: recorder.agent_at,
        ..through
    };
    let counts = || place.status(AGENT)["handshakes"].clone();
    let before = counts();

    // From another address, in the same order: the handshake, the hello, the checkpoint.
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let packets = recorder.packets.lock().await.clone();
    assert!(packets.len() > 5, "{} packets", packets.len());
    // They begin a handshake, and nobody can finish it. As long as the agent still knows the connection that they were of, it
    // takes them for late ones: again, then.
    let began = std::time::Instant::now();
    while counts()["failed"] == before["failed"] {
        assert!(began.elapsed() < SOON, "it is counted: {}", counts());
        for packet in &packets {
            socket.send_to(packet, place.agent_at).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(counts()["accepted"], before["accepted"]);
    let status = place.status(AGENT);
    assert_eq!(status["vms"][0]["committed"], 1, "{status}");
    agent.assert_well("packets that were sent again");
    let again = true_hello(&place, "web", "primary", Session(2)).await;
    let mut second = Primary::open(&place, &endpoint, &again).await.unwrap();
    assert_eq!(second.commit().await, Epoch(1));
}

/// Passes packets between one client and the agent, and keeps what the client sent.
struct Recorder {
    at: SocketAddr,
    agent_at: SocketAddr,
    packets: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Recorder {
    async fn start(agent_at: SocketAddr) -> Recorder {
        let (outer, inner) = (
            UdpSocket::bind("127.0.0.1:0").await.unwrap(),
            UdpSocket::bind("127.0.0.1:0").await.unwrap(),
        );
        let at = outer.local_addr().unwrap();
        let packets: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let kept = Arc::clone(&packets);
        tokio::spawn(async move {
            let (mut there, mut back) = (vec![0; 65_536], vec![0; 65_536]);
            let mut client = None;
            loop {
                tokio::select! {
                    Ok((bytes, from)) = outer.recv_from(&mut there) => {
                        client = Some(from);
                        kept.lock().await.push(there[..bytes].to_vec());
                        let _ = inner.send_to(&there[..bytes], agent_at).await;
                    }
                    Ok((bytes, _)) = inner.recv_from(&mut back) => {
                        if let Some(client) = client {
                            let _ = outer.send_to(&back[..bytes], client).await;
                        }
                    }
                }
            }
        });
        Recorder {
            at,
            agent_at,
            packets,
        }
    }
}
