//! Ten thousand connections that come to nothing, and a good connection's packets sent again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use romulus_transport::{CloseCode, Endpoint, Network, Service};
use romulus_types::{Epoch, Session};
use tokio::net::UdpSocket;
use tokio::sync::Mutex;

use crate::place::{Place, SOON, client, peer};
use crate::primary::{Primary, true_hello};
use crate::stranger::{first_packets, half_open, noise};

const AGENT: &str = "backup-agent";
const PAIR: &[u8] = b"romulus-pair/1";
/// Connections that are begun and never finished, or were never one.
const CONNECTIONS: usize = 10_000;
/// Sockets that are open at a time.
const BATCH: usize = 250;

/// A client that does not give a connection up because the machine is busy.
fn patient(place: &Place, host: &str) -> Endpoint {
    let network = Network {
        idle_timeout: Duration::from_secs(60),
        handshake_timeout: Duration::from_secs(60),
        ..Network::default()
    };
    Endpoint::client(&place.identity(host), &network, Service::Pair).unwrap()
}

#[tokio::test]
async fn ten_thousand_half_open_and_garbage_connections_disturb_no_session_and_cost_no_memory() {
    let place = Place::new();
    let _witness = place.start_witness().await;
    let mut agent = place.start_agent_with("", "idle_timeout = \"60s\"").await;
    let endpoint = patient(&place, "primary");
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let mut steady = Primary::open(&place, &endpoint, &asked).await.unwrap();
    steady.commit().await;
    agent.note_memory();
    let accepted = || place.status(AGENT)["handshakes"]["accepted"].as_u64().unwrap();
    let before = accepted();

    let ca = place.dir.path().join("pki/primary/ca-cert.pem");
    let mut begun = 0;
    for batch in 0..CONNECTIONS / BATCH {
        // Every second one is a real first packet, the others are damaged or noise of the same length.
        let mut packets = first_packets(&ca, PAIR, BATCH / 2).await;
        for number in 0..BATCH / 2 {
            let mut garbage = packets[number].clone();
            match number % 2 {
                0 => garbage[number % 1200] ^= 0xff,
                _ => garbage = noise((batch * BATCH + number) as u64, 1200),
            }
            packets.push(garbage);
        }
        begun += half_open(place.agent_at, &packets).len();
        if batch % 8 == 7 {
            agent.assert_well("a storm of connections");
            steady.commit().await;
        }
    }
    assert_eq!(begun, CONNECTIONS);
    assert_eq!(accepted(), before, "none of them was a connection");
    let status = place.status(AGENT);
    assert_eq!(status["vms"][0]["committed"], steady.epoch().0, "{status}");
    assert_eq!(status["vms"][0]["refused_input"], 0, "{status}");
    // Who has a certificate gets in while the last of them still hang.
    let other = patient(&place, "other");
    other
        .connect(&peer(place.agent_at))
        .await
        .unwrap()
        .close(CloseCode::DONE, "");
    steady.commit().await;
    agent.assert_well("the end of the storm");
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
    first.leave().await;
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
    for packet in &packets {
        socket.send_to(packet, place.agent_at).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // It begins a handshake, and nobody can finish it.
    let began = std::time::Instant::now();
    while counts()["failed"] == before["failed"] {
        assert!(began.elapsed() < 6 * SOON, "it is counted: {}", counts());
        tokio::time::sleep(Duration::from_millis(50)).await;
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
