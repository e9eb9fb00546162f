//! The witness under attack, and a good host that asks it all the time.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use romulus_e2e::strangers::{connect_without_certificate, first_packets, half_open, noise, send_noise};
use romulus_protocol::{Answer, Ask, Mode, Record, WitnessRequest};
use romulus_transport::{CloseCode, Endpoint, Service, TransportError, WitnessClient};
use romulus_types::{Epoch, HostId, Nonce, Session, Term, VmId, WitnessInstance};
use romulus_wire::{FrameType, encode_frame, encode_message};

use crate::place::{Daemon, Place, client, peer};
use crate::primary::{Refusal, closed};

const WITNESS: &[u8] = b"romulus-witness/1";

fn request(vm: &str, from: &str, nonce: u128, ask: Ask) -> WitnessRequest {
    WitnessRequest {
        vm: VmId::new(vm).unwrap(),
        host: HostId::new(from).unwrap(),
        nonce: Nonce(nonce),
        ask,
    }
}

fn alone(host: &str) -> Mode {
    Mode::Alone {
        host: HostId::new(host).unwrap(),
    }
}

fn asker(place: &Place, host: &str) -> WitnessClient {
    let endpoint = client(&place.identity(host), Service::Witness);
    WitnessClient::new(Arc::new(endpoint), vec![peer(place.witness_at)])
}

/// The witness, the record that must stand, and how many cases were tried.
struct Siege {
    witness: Daemon,
    good: WitnessClient,
    record: Record,
    nonce: u128,
    done: Vec<&'static str>,
    /// Last, so that its folder goes after the daemons that write into it.
    place: Place,
}

impl Siege {
    async fn begin() -> Siege {
        let place = Place::new();
        let mut witness = place.start_witness().await;
        let good = asker(&place, "primary");
        let reply = good
            .ask(request("web", "primary", 1, Ask::Register))
            .await
            .unwrap();
        let Answer::Granted(record) = reply.answer else {
            panic!("{reply:?}")
        };
        witness.note_memory();
        Siege {
            place,
            witness,
            good,
            record,
            nonce: 1000,
            done: Vec::new(),
        }
    }

    /// The good host is answered, and the record is what it was.
    async fn still_answers(&mut self, case: &'static str) {
        self.witness.assert_well(case);
        self.nonce += 1;
        let reply = self
            .good
            .ask(request("web", "primary", self.nonce, Ask::Read))
            .await;
        assert_eq!(
            reply.expect(case).answer,
            Answer::Current(self.record.clone()),
            "{case}"
        );
        self.done.push(case);
    }

    fn bad(&self) -> u64 {
        self.place.status("witness")["bad"].as_u64().unwrap()
    }
}

/// Sends bytes as a request, and gives how the connection was closed.
async fn closed_after(endpoint: &Endpoint, place: &Place, bytes: Bytes) -> Refusal {
    let connection = endpoint.connect(&peer(place.witness_at)).await.unwrap();
    let mut control = connection.open_control().await.unwrap();
    // The witness may close before it has everything.
    let _ = control.sender.send(bytes).await;
    control.sender.finish();
    closed(&connection).await
}

#[tokio::test]
async fn the_witness_answers_a_good_host_whatever_strangers_do() {
    let mut siege = Siege::begin().await;
    let at = siege.place.witness_at;
    let ca = siege.place.dir.path().join("pki/primary/ca-cert.pem");
    let packets = first_packets(&ca, WITNESS, 201).await.unwrap();
    send_noise(at, &packets[200]).unwrap();
    siege.still_answers("noise and damaged packets").await;

    let held = half_open(std::net::Ipv4Addr::LOCALHOST, at, &packets[..200]).unwrap();
    assert_eq!(held.len(), 200);
    siege.still_answers("200 half-open handshakes").await;
    let fresh = asker(&siege.place, "backup");
    let reply = fresh.ask(request("web", "backup", 5, Ask::Read)).await;
    assert!(reply.is_ok(), "a host that connects only now: {reply:?}");

    let refused = connect_without_certificate(&ca, WITNESS, at).await.unwrap();
    assert!(refused.to_string().contains("certificate"), "{refused}");
    siege.still_answers("no certificate").await;
    let refused = client(&siege.place.identity("other"), Service::Pair)
        .connect(&peer(at))
        .await;
    assert!(
        matches!(refused, Err(TransportError::OtherService { .. })),
        "{refused:?}"
    );
    siege.still_answers("another service").await;
    assert_eq!(siege.done.len(), 4);
}

#[tokio::test]
async fn the_witness_names_and_counts_requests_that_are_none() {
    let mut siege = Siege::begin().await;
    let endpoint = client(&siege.place.identity("other"), Service::Witness);
    let good = request("web", "other", 7, Ask::Read);
    let frame = encode_message(FrameType::WitnessRequest, Session(7), &good).unwrap();
    let mut flipped = frame.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    let mut version = frame.to_vec();
    version[4] = 9;
    let own = request("web", "primary", 7, Ask::Read);
    let forged = encode_message(FrameType::WitnessRequest, Session(7), &own).unwrap();
    // The header alone says 1 MiB, more than any request has.
    let oversized = encode_frame(FrameType::Pages, Session(7), &vec![0; 1 << 20]);
    let bad = CloseCode::BAD_INPUT;
    let cases: [(&'static str, Bytes, CloseCode, &str); 9] = [
        ("nothing at all", Bytes::new(), bad, "ended before the request"),
        ("noise", noise(1, 5000).into(), bad, "a frame that can't be taken"),
        (
            "a request that is cut off",
            frame.slice(..frame.len() - 1),
            bad,
            "in the middle of a frame",
        ),
        (
            "a flipped bit",
            flipped.into(),
            bad,
            "a frame that can't be taken",
        ),
        (
            "another version",
            version.into(),
            bad,
            "a frame that can't be taken",
        ),
        (
            "a request of noise",
            encode_frame(FrameType::WitnessRequest, Session(7), &noise(2, 60)),
            bad,
            "can't be read",
        ),
        (
            "1 MiB of another frame",
            oversized,
            bad,
            "a frame that can't be taken",
        ),
        (
            "another nonce",
            encode_message(FrameType::WitnessRequest, Session(8), &good).unwrap(),
            bad,
            "nonce is not its frame's",
        ),
        (
            "another host's name",
            forged,
            CloseCode::IDENTITY,
            "the certificate is that of other",
        ),
    ];
    for (name, bytes, code, reason) in cases {
        let before = siege.bad();
        let refusal = closed_after(&endpoint, &siege.place, bytes).await;
        assert_eq!(refusal.code, code, "{name}: {refusal:?}");
        assert!(refusal.reason.contains(reason), "{name}: {refusal:?}");
        assert_eq!(siege.bad(), before + 1, "{name}");
        siege.still_answers(name).await;
    }
    assert_eq!(siege.done.len(), 9);
}

#[tokio::test]
async fn the_witness_gives_nobody_a_record_that_is_not_theirs() {
    let mut siege = Siege::begin().await;
    let other = asker(&siege.place, "other").with_deadline(Duration::from_secs(5), Duration::from_secs(1));
    let (instance, term) = (siege.record.instance, siege.record.term);
    let paired = Mode::Paired {
        primary: HostId::new("primary").unwrap(),
        backup: HostId::new("other").unwrap(),
        session: Session(9),
        first_epoch: Epoch(1),
    };
    let change = |instance, term, mode| Ask::Change { instance, term, mode };
    let wrong = WitnessInstance(instance.0 ^ 1);
    let refused = Answer::Refused(siege.record.clone());
    let cases = [
        (
            "an unknown VM",
            "nobody",
            change(instance, term, alone("other")),
            Answer::UnknownVm,
        ),
        (
            "taking another's VM",
            "web",
            change(instance, term, alone("other")),
            refused.clone(),
        ),
        (
            "pairing another's VM with oneself",
            "web",
            change(instance, term, paired),
            refused.clone(),
        ),
        (
            "ending another's VM",
            "web",
            change(instance, term, Mode::Ended),
            refused.clone(),
        ),
        (
            "a term of the future",
            "web",
            change(instance, Term(u64::MAX), alone("other")),
            refused.clone(),
        ),
        ("registering another's VM", "web", Ask::Register, refused),
        (
            "another instance",
            "web",
            change(wrong, term, alone("other")),
            Answer::WrongInstance(instance),
        ),
    ];
    for (nonce, (name, vm, ask, expected)) in (50u128..).zip(cases) {
        let reply = other.ask(request(vm, "other", nonce, ask)).await.unwrap();
        assert_eq!(reply.answer, expected, "{name}");
        siege.still_answers(name).await;
    }
    // The nonce of the request that made the record repeats that request's answer, which names its owner and nobody else.
    let nonce = siege.record.nonce.0;
    let replay = other
        .ask(request("web", "other", nonce, Ask::Register))
        .await
        .unwrap();
    assert_eq!(replay.answer, Answer::Granted(siege.record.clone()));
    siege.still_answers("another's nonce").await;
    assert_eq!(siege.done.len(), 8);
}
