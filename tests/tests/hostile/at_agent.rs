//! The agent under attack. One good session commits checkpoint after checkpoint meanwhile.

use std::time::{Duration, Instant};

use bytes::Bytes;
use romulus_e2e::strangers::{connect_without_certificate, first_packets, half_open, send_noise};
use romulus_image::{Image, ImageState, Limits};
use romulus_transport::{CertificateProblem, CloseCode, Identity, Service, TransportError, pki};
use romulus_types::{Epoch, Session, Term, VmId};
use serde_json::Value;

use crate::cases::{BAD_CHECKPOINTS, BAD_FRAMES, BadSession, VM, bad_hellos, bad_machines, unknown_frame};
use crate::place::{Daemon, Place, SOON, client, peer};
use crate::primary::{INSTANCE, Primary, Refusal, closed, hello, true_hello};

const AGENT: &str = "backup-agent";
const PAIR: &[u8] = b"romulus-pair/1";
/// The VM of the good session.
const STEADY: &str = "web";

/// The daemons, the good session, and how many cases were tried.
struct Siege {
    agent: Daemon,
    _witness: Daemon,
    steady: Primary,
    _steady_endpoint: romulus_transport::Endpoint,
    done: Vec<&'static str>,
    sessions: std::cell::Cell<u128>,
    /// Last, so that its folder goes after the daemons that write into it.
    place: Place,
}

impl Siege {
    async fn begin() -> Siege {
        let place = Place::new();
        let witness = place.start_witness().await;
        let mut agent = place.start_agent().await;
        let endpoint = client(&place.identity("primary"), Service::Pair);
        let asked = true_hello(&place, STEADY, "primary", Session(1)).await;
        let mut steady = Primary::open(&place, &endpoint, &asked).await.unwrap();
        steady.commit().await;
        agent.note_memory();
        Siege {
            place,
            agent,
            _witness: witness,
            steady,
            _steady_endpoint: endpoint,
            done: Vec::new(),
            sessions: std::cell::Cell::new(0x100),
        }
    }

    /// A number that no session had.
    fn new_session(&self) -> Session {
        self.sessions.set(self.sessions.get() + 1);
        Session(self.sessions.get())
    }

    fn vm(&self, name: &str) -> Value {
        let status = self.place.status(AGENT);
        let vms = status["vms"].as_array().unwrap().clone();
        vms.into_iter().find(|vm| vm["vm"] == name).unwrap_or(Value::Null)
    }

    fn refused_connections(&self) -> u64 {
        self.place.status(AGENT)["refused_connections"].as_u64().unwrap()
    }

    /// A hello of a new session that says what the record says.
    async fn hello(&self, vm: &str, host: &str) -> romulus_protocol::Hello {
        true_hello(&self.place, vm, host, self.new_session()).await
    }

    /// What holds after every case: the agent is well, reports the good session's last commit, and commits its next.
    async fn still_serves(&mut self, case: &'static str) {
        self.agent.assert_well(case);
        let steady = self.vm(STEADY);
        assert_eq!(steady["committed"], self.steady.epoch().0, "{case}: {steady}");
        assert_eq!(steady["refused_input"], 0, "{case}: {steady}");
        self.steady.heartbeat().await;
        self.steady.commit().await;
        self.done.push(case);
    }
}

fn assert_refused(case: &str, refusal: &Refusal, code: CloseCode, reason: &str) {
    assert_eq!(refusal.code, code, "{case}: {refusal:?}");
    assert!(refusal.reason.contains(reason), "{case}: {refusal:?}");
}

/// Waits for what shows a little later than the close does.
async fn wait_for(case: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < SOON, "{case}: it did not happen in time");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn strangers_and_noise_reach_nothing_and_are_counted() {
    let mut siege = Siege::begin().await;
    let at = siege.place.agent_at;
    let ca = siege.place.dir.path().join("pki/primary/ca-cert.pem");
    let failed = |siege: &Siege| {
        siege.place.status(AGENT)["handshakes"]["failed"]
            .as_u64()
            .unwrap()
    };

    let packets = first_packets(&ca, PAIR, 101).await.unwrap();
    send_noise(at, &packets[100]).unwrap();
    siege.still_serves("noise and damaged packets").await;

    let held = half_open(std::net::Ipv4Addr::LOCALHOST, at, &packets[..100]).unwrap();
    siege.still_serves("100 half-open handshakes").await;
    let endpoint = client(&siege.place.identity("other"), Service::Pair);
    let connected = endpoint.connect(&peer(at)).await;
    connected
        .expect("a good host gets in beside half-open handshakes")
        .close(CloseCode::DONE, "");
    drop(held);

    let before = failed(&siege);
    let refused = connect_without_certificate(&ca, PAIR, at).await.unwrap();
    assert!(refused.to_string().contains("certificate"), "{refused}");
    wait_for("no certificate is counted", || failed(&siege) > before).await;
    siege.still_serves("no certificate").await;

    let stranger = Identity::load(&siege.place.dir.path().join("other-pki/primary")).unwrap();
    let refused = client(&stranger, Service::Pair).connect(&peer(at)).await;
    let Err(TransportError::PeerCertificate { problem, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(problem, CertificateProblem::OtherCa);
    siege.still_serves("another CA").await;

    let day = Duration::from_secs(24 * 3600);
    let now = std::time::SystemTime::now();
    let past = pki::Validity {
        from: now - 20 * day,
        until: now - 10 * day,
    };
    let dir = pki::issue(
        &siege.place.dir.path().join("pki"),
        &"old,127.0.0.1".parse().unwrap(),
        past,
    )
    .unwrap();
    let old = Identity::load_at(&dir, now - 15 * day).unwrap();
    let before = failed(&siege);
    let refused = client(&old, Service::Pair).connect(&peer(at)).await;
    let Err(TransportError::OwnCertificate { problem, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(problem, CertificateProblem::OutOfTime);
    wait_for("the expired certificate is counted", || failed(&siege) > before).await;
    siege.still_serves("an expired certificate").await;

    let refused = client(&siege.place.identity("other"), Service::Witness)
        .connect(&peer(at))
        .await;
    assert!(
        matches!(refused, Err(TransportError::OtherService { .. })),
        "{refused:?}"
    );
    siege.still_serves("another service").await;
    assert_eq!(siege.done.len(), 6);
}

#[tokio::test]
async fn hellos_that_are_no_hellos_are_named_and_counted() {
    let mut siege = Siege::begin().await;
    let endpoint = client(&siege.place.identity("other"), Service::Pair);
    for bad in bad_hellos() {
        let before = siege.refused_connections();
        let connection = endpoint.connect(&peer(siege.place.agent_at)).await.unwrap();
        let mut streams = connection.open_control().await.unwrap();
        if !bad.bytes.is_empty() {
            streams.sender.send(bad.bytes).await.unwrap();
        }
        streams.sender.finish();
        assert_refused(
            bad.name,
            &closed(&connection).await,
            CloseCode::BAD_INPUT,
            bad.reason,
        );
        assert_eq!(siege.refused_connections(), before + 1, "{}", bad.name);
        assert_eq!(
            siege.vm(VM),
            Value::Null,
            "{}: nothing was begun for it",
            bad.name
        );
        siege.still_serves(bad.name).await;
    }
    assert_eq!(siege.done.len(), 13);
}

#[tokio::test]
async fn sessions_that_may_not_be_are_refused_with_the_cause() {
    let mut siege = Siege::begin().await;
    let endpoint = client(&siege.place.identity("other"), Service::Pair);
    let mut asked = Vec::new();
    for (name, machine, reason) in bad_machines() {
        let mut bad = siege.hello(VM, "other").await;
        bad.machine = machine;
        asked.push((name, bad, reason));
    }
    asked.push((
        "another host's name",
        hello(VM, "primary", siege.new_session()),
        "the certificate is that of other",
    ));
    let busy = siege.hello(STEADY, "other").await;
    asked.push((
        "a session beside a live one",
        busy.clone(),
        "protected by someone else",
    ));
    let newer = romulus_protocol::Hello {
        term: Term(u64::MAX),
        session: siege.new_session(),
        ..busy
    };
    asked.push((
        "a newer term beside a live session",
        newer,
        "record does not name the host",
    ));

    let mut good = Primary::open(&siege.place, &endpoint, &siege.hello(VM, "other").await)
        .await
        .unwrap();
    good.commit().await;
    good.leave(&siege.place).await;
    let mut older = siege.hello(VM, "other").await;
    older.term = Term(0);
    asked.push(("an older term", older, "it was taken over since"));
    let mut ahead = siege.hello(VM, "other").await;
    ahead.term = ahead.term.next();
    asked.push((
        "the right host in a term that there never was",
        ahead,
        "record does not name the host",
    ));
    let mut instance = siege.hello(VM, "other").await;
    instance.instance = INSTANCE;
    asked.push(("another witness", instance, "uses another witness"));
    let third = siege.hello("third", "other").await;
    Primary::open(&siege.place, &endpoint, &third)
        .await
        .unwrap()
        .leave(&siege.place)
        .await;
    asked.push((
        "one VM too many",
        siege.hello("fourth", "other").await,
        "backs up 3 VMs already",
    ));

    for (name, hello, reason) in asked {
        let before = siege.refused_connections();
        let refused = Primary::open(&siege.place, &endpoint, &hello).await;
        let refusal = refused.err().unwrap_or_else(|| panic!("{name} was welcome"));
        assert_refused(name, &refusal, CloseCode::REFUSED, reason);
        assert_eq!(siege.refused_connections(), before + 1, "{name}");
        assert_eq!(siege.vm(VM)["committed"], 1, "{name}: the last commit stands");
        siege.still_serves(name).await;
    }
    assert_eq!(siege.done.len(), 13);
}

#[tokio::test]
async fn frames_that_do_not_fit_end_their_session_and_leave_the_last_commit() {
    let siege = lie_in_sessions(BAD_FRAMES).await;
    assert_eq!(siege.done.len(), 19);
}

#[tokio::test]
async fn checkpoints_that_lie_end_their_session_and_leave_the_last_commit() {
    let mut siege = lie_in_sessions(BAD_CHECKPOINTS).await;
    assert_eq!(siege.done.len(), 16);
    // What the status says is what is on disk, to the last byte.
    siege.agent.kill();
    let images = siege.place.dir.path().join("images");
    for (vm, epoch) in [(VM, Epoch(1)), (STEADY, siege.steady.epoch())] {
        let image = Image::open_in(&images, &VmId::new(vm).unwrap(), Limits::default()).unwrap();
        let ImageState::Committed { epoch: found, .. } = image.state() else {
            panic!("{vm}: {}", image.state())
        };
        assert_eq!(found, epoch, "{vm}");
        image.verify_image().unwrap();
    }
}

async fn lie_in_sessions(cases: &'static [BadSession]) -> Siege {
    let mut siege = Siege::begin().await;
    let endpoint = client(&siege.place.identity("other"), Service::Pair);
    for (number, bad) in (1u64..).zip(cases) {
        let session = siege.new_session();
        let asked = true_hello(&siege.place, VM, "other", session).await;
        let mut liar = Primary::open(&siege.place, &endpoint, &asked).await.unwrap();
        liar.commit().await;
        let lie = (bad.lie)(&mut liar);
        // The agent may close the connection before it has everything.
        for frame in lie.control {
            let _ = liar.control.send(frame).await;
        }
        for frame in lie.data {
            let _ = liar.data.send(frame).await;
        }
        if lie.finish {
            liar.data.finish();
        }
        assert_refused(
            bad.name,
            &closed(&liar.connection).await,
            CloseCode::BAD_INPUT,
            bad.reason,
        );
        wait_for(bad.name, || siege.vm(VM)["session"].is_null()).await;
        let vm = siege.vm(VM);
        assert_eq!(vm["refused_input"], number, "{}: counted once: {vm}", bad.name);
        assert_eq!(vm["committed"], 1, "{}: {vm}", bad.name);
        siege.still_serves(bad.name).await;
    }
    // A good session of the very VM and host still works, skips what is optional, and survives streams that nobody reads.
    let session = siege.new_session();
    let asked = true_hello(&siege.place, VM, "other", session).await;
    let mut good = Primary::open(&siege.place, &endpoint, &asked).await.unwrap();
    good.commit().await;
    good.data.send(unknown_frame(0x8123, session)).await.unwrap();
    let mut unread = good.connection.open_data().await.unwrap();
    let stuffed = async { while unread.send(Bytes::from_static(&[0; 1 << 16])).await.is_ok() {} };
    let stuffed = tokio::time::timeout(Duration::from_millis(300), stuffed).await;
    assert!(
        stuffed.is_err(),
        "what nobody reads must not be taken without end"
    );
    assert_eq!(good.commit().await, Epoch(2));
    siege.agent.assert_well("a stream that nobody reads");
    good.leave(&siege.place).await;
    // Back to one commit, for the callers: a new session begins afresh.
    let mut last = Primary::open(&siege.place, &endpoint, &siege.hello(VM, "other").await)
        .await
        .unwrap();
    assert_eq!(last.commit().await, Epoch(1));
    siege
}
