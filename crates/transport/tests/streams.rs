//! The contract of a connection, kept by QUIC and by its twin in memory alike.

mod common;

use std::time::Duration;

use bytes::Bytes;
use romulus_config::ByteSize;
use romulus_transport::{CloseCode, ClosedBy, Connection, Network, TransportError, memory};
use romulus_types::HostId;

/// Runs a body with a QUIC connection, then with one in memory; `$a` connected, `$b` accepted.
macro_rules! for_both {
    ($name:ident, $network:expr, |$a:ident, $b:ident| $body:block) => {
        #[tokio::test]
        async fn $name() {
            let network: Network = $network;
            let pair = common::connected(&network).await;
            within_a_minute(async {
                let ($a, $b) = (pair.at_client.clone(), pair.at_server.clone());
                $body
            })
            .await;
            let hosts = (
                HostId::new("primary").unwrap(),
                HostId::new("backup").unwrap(),
            );
            let ($a, $b, _cable) = memory::pair(&hosts.0, &hosts.1, &network);
            within_a_minute(async { $body }).await;
        }
    };
}

/// A contract that is broken shows as a failure, not as a test that never ends.
async fn within_a_minute(body: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(60), body)
        .await
        .expect("something waits for ever");
}

async fn recv_all(connection: &Connection) -> Result<Vec<u8>, TransportError> {
    connection.accept_data().await?.recv_to_end(64 << 20).await
}

for_both!(both_ends_know_who_the_peer_is, Network::default(), |a, b| {
    assert_eq!(a.peer().as_str(), "backup");
    assert_eq!(b.peer().as_str(), "primary");
});

for_both!(
    what_is_sent_arrives_whole_and_in_order,
    Network::default(),
    |a, b| {
        let sent: Vec<u8> = (0..8u32 << 20).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let receiving = tokio::spawn(async move { recv_all(&b).await });
        let mut stream = a.open_data().await.unwrap();
        let sent = Bytes::from(sent);
        let (first, mut rest) = (sent.slice(..1000), [sent.slice(1000..5000), sent.slice(5000..)]);
        stream.send(first).await.unwrap();
        stream.send_all(&mut rest).await.unwrap();
        stream.finish();
        assert!(receiving.await.unwrap().unwrap() == expected);
    }
);

for_both!(control_goes_both_ways, Network::default(), |a, b| {
    let mut ours = a.open_control().await.unwrap();
    ours.sender.send(Bytes::from_static(b"hello")).await.unwrap();
    let mut theirs = b.accept_control().await.unwrap();
    assert_eq!(theirs.receiver.recv().await.unwrap().unwrap(), "hello");
    theirs.sender.send(Bytes::from_static(b"welcome")).await.unwrap();
    assert_eq!(ours.receiver.recv().await.unwrap().unwrap(), "welcome");
    ours.sender.finish();
    assert!(theirs.receiver.recv().await.unwrap().is_none());
});

for_both!(
    control_passes_while_all_page_streams_are_full_and_unread,
    small_window(),
    |a, b| {
        // Fill every data stream until its sender has to wait.
        let mut stuck = Vec::new();
        for _ in 0..2 {
            let mut stream = a.open_data().await.unwrap();
            let block = Bytes::from(vec![7u8; 8 << 20]);
            stuck.push(tokio::spawn(async move { stream.send(block).await }));
        }
        let unread = (b.accept_data().await.unwrap(), b.accept_data().await.unwrap());
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(
            stuck.iter().all(|task| !task.is_finished()),
            "the receiver's memory is not bounded"
        );
        let mut ours = a.open_control().await.unwrap();
        let answering = b.clone();
        let echo = tokio::spawn(async move {
            let mut theirs = answering.accept_control().await.unwrap();
            while let Some(chunk) = theirs.receiver.recv().await.unwrap() {
                theirs.sender.send(chunk).await.unwrap();
            }
        });
        for round in 0..100u8 {
            ours.sender.send(Bytes::from(vec![round; 1000])).await.unwrap();
            let mut back = 0;
            while back < 1000 {
                back += ours.receiver.recv().await.unwrap().unwrap().len();
            }
        }
        ours.sender.finish();
        echo.await.unwrap();
        drop(unread);
        for task in stuck {
            task.abort();
        }
    }
);

fn small_window() -> Network {
    Network {
        receive_window: ByteSize::from_mib(1),
        ..Network::default()
    }
}

for_both!(
    a_stream_dropped_before_its_end_is_not_taken_for_a_whole_one,
    Network::default(),
    |a, b| {
        let mut stream = a.open_data().await.unwrap();
        stream.send(Bytes::from_static(b"half of")).await.unwrap();
        let mut receiving = b.accept_data().await.unwrap();
        assert_eq!(receiving.recv().await.unwrap().unwrap(), "half of");
        drop(stream);
        assert!(matches!(receiving.recv().await, Err(TransportError::StreamReset)));
    }
);

for_both!(a_stream_over_the_limit_is_refused, Network::default(), |a, b| {
    let mut stream = a.open_data().await.unwrap();
    stream.send(Bytes::from(vec![0; 5000])).await.unwrap();
    stream.finish();
    let refused = b.accept_data().await.unwrap().recv_to_end(4999).await;
    assert!(matches!(refused, Err(TransportError::TooLarge { max: 4999 })));
});

for_both!(
    no_more_streams_than_allowed_can_be_open,
    Network {
        data_streams_max: 2,
        ..Network::default()
    },
    |a, b| {
        // QUIC allows one more, which its server uses for the greeting.
        let mut open = Vec::new();
        let refused = loop {
            match tokio::time::timeout(Duration::from_millis(100), a.open_data()).await {
                Ok(stream) => open.push(stream.unwrap()),
                Err(_) => break true,
            }
            if open.len() > 3 {
                break false;
            }
        };
        assert!(refused);
        drop(b);
    }
);

for_both!(
    a_close_reaches_the_peer_with_its_code_and_reason,
    Network::default(),
    |a, b| {
        let mut stream = a.open_data().await.unwrap();
        stream.send(Bytes::from_static(b"x")).await.unwrap();
        let mut receiving = b.accept_data().await.unwrap();
        assert!(receiving.recv().await.is_ok());
        assert!(b.close_reason().is_none());
        a.close(CloseCode::REFUSED, &"no memory ".repeat(100));
        let TransportError::Closed { by, code, reason } = b.closed().await else {
            panic!("another error")
        };
        assert_eq!((by, code), (ClosedBy::Peer, CloseCode::REFUSED));
        assert!(reason.starts_with("no memory") && reason.len() <= romulus_transport::REASON_BYTES_MAX);
        assert!(matches!(
            receiving.recv().await,
            Err(TransportError::Closed {
                by: ClosedBy::Peer,
                ..
            })
        ));
        assert!(matches!(
            stream.send(Bytes::from_static(b"y")).await,
            Err(TransportError::Closed { by: ClosedBy::Us, .. })
        ));
        assert!(matches!(
            a.close_reason(),
            Some(TransportError::Closed { by: ClosedBy::Us, .. })
        ));
    }
);

#[tokio::test]
async fn a_cut_cable_is_a_lost_connection_on_both_sides() {
    let hosts = (HostId::new("a").unwrap(), HostId::new("b").unwrap());
    let (a, b, cable) = memory::pair(&hosts.0, &hosts.1, &Network::default());
    let waiting = tokio::spawn(async move { b.accept_control().await.map(drop) });
    cable.cut();
    assert!(matches!(waiting.await.unwrap(), Err(TransportError::Lost(_))));
    assert!(matches!(a.open_data().await, Err(TransportError::Lost(_))));
}

#[tokio::test]
async fn a_connection_counts_what_it_moved() {
    let pair = common::connected(&Network::default()).await;
    let mut stream = pair.at_client.open_data().await.unwrap();
    let at_server = pair.at_server.clone();
    let receiving = tokio::spawn(async move { recv_all(&at_server).await });
    stream.send(Bytes::from(vec![1; 1 << 20])).await.unwrap();
    stream.finish_and_flush().await.unwrap();
    assert_eq!(receiving.await.unwrap().unwrap().len(), 1 << 20);
    let stats = pair.at_client.stats();
    assert!(
        stats.sent_bytes > 1 << 20 && stats.rtt_ns > 0 && stats.mtu_bytes >= 1200,
        "{stats:?}"
    );
}

#[tokio::test]
async fn jumbo_packets_are_found_and_used_where_the_path_carries_them() {
    let pair = common::connected(&Network {
        mtu: 6500,
        ..Network::default()
    })
    .await;
    let at_server = pair.at_server.clone();
    let receiving = tokio::spawn(async move { recv_all(&at_server).await });
    let mut stream = pair.at_client.open_data().await.unwrap();
    for _ in 0..32 {
        stream.send(Bytes::from(vec![1; 1 << 20])).await.unwrap();
    }
    stream.finish_and_flush().await.unwrap();
    assert_eq!(receiving.await.unwrap().unwrap().len(), 32 << 20);
    assert!(
        pair.at_client.stats().mtu_bytes > 6000,
        "{:?}",
        pair.at_client.stats()
    );
}
