//! Hosts with good certificates that say they run a VM, which another host runs or which there is not; and hosts that
//! say nothing. The witness's record decides, and the true primary is served throughout.

use romulus_protocol::{Ask, Hello, Mode};
use romulus_transport::{CloseCode, Service, TransportError};
use romulus_types::{Epoch, HostId, Session, Term};
use serde_json::Value;

use crate::place::{Daemon, Place, SOON, client, peer};
use crate::primary::{Primary, closed, hello, true_hello};

const AGENT: &str = "backup-agent";
/// Places that one host has at the agent.
const PER_HOST_MAX: usize = 6;

fn vm(place: &Place, name: &str) -> Value {
    let status = place.status(AGENT);
    let vms = status["vms"].as_array().unwrap().clone();
    vms.into_iter().find(|vm| vm["vm"] == name).unwrap_or(Value::Null)
}

/// What the agent remembers of a VM, as its file has it.
fn remembered(place: &Place, name: &str) -> Option<String> {
    std::fs::read_to_string(place.dir.path().join(format!("state/{name}.json"))).ok()
}

async fn start() -> (Place, Daemon, Daemon) {
    let place = Place::new();
    let witness = place.start_witness().await;
    let agent = place.start_agent().await;
    (place, witness, agent)
}

async fn assert_not_named(place: &Place, lie: Hello) {
    let liar = client(&place.identity("other"), Service::Pair);
    let refusal = Primary::open(place, &liar, &lie).await.err().expect("a lie");
    assert_eq!(refusal.code, CloseCode::REFUSED);
    assert!(
        refusal.reason.contains("record does not name the host"),
        "{refusal:?}"
    );
}

#[tokio::test]
async fn a_liar_neither_voids_a_commit_that_waits_nor_locks_its_primary_out() {
    let (place, _witness, mut agent) = start().await;
    let endpoint = client(&place.identity("primary"), Service::Pair);
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let mut primary = Primary::open(&place, &endpoint, &asked).await.unwrap();
    primary.commit().await;
    primary.leave(&place).await;
    let before = remembered(&place, "web").expect("a session was accepted");

    // Nobody is connected now, and the image holds a commit.
    for (number, term) in (100u128..).zip([asked.term, asked.term.next(), Term(u64::MAX)]) {
        let lie = Hello {
            term,
            ..true_hello(&place, "web", "other", Session(number)).await
        };
        assert_not_named(&place, lie).await;
        agent.assert_well("a lie");
        assert_eq!(vm(&place, "web")["committed"], 1, "the commit stands");
        assert_eq!(
            remembered(&place, "web"),
            Some(before.clone()),
            "nothing was learnt"
        );
    }

    let again = true_hello(&place, "web", "primary", Session(2)).await;
    let mut primary = Primary::open(&place, &endpoint, &again).await.unwrap();
    assert_eq!(primary.commit().await, Epoch(1));
}

#[tokio::test]
async fn a_host_that_was_handed_the_vm_is_believed_at_once_and_its_predecessor_no_more() {
    let (place, _witness, _agent) = start().await;
    let endpoint = client(&place.identity("primary"), Service::Pair);
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let mut primary = Primary::open(&place, &endpoint, &asked).await.unwrap();
    primary.commit().await;

    let change = Ask::Change {
        instance: asked.instance,
        term: asked.term,
        mode: Mode::Alone {
            host: HostId::new("other").unwrap(),
        },
    };
    let record = place.ask("web", "primary", change).await;
    let hello_of = |host, session| Hello {
        term: record.term,
        instance: record.instance,
        ..hello("web", host, Session(session))
    };
    let other = client(&place.identity("other"), Service::Pair);
    // The old session is still connected: the record's word is newer.
    let mut new = Primary::open(&place, &other, &hello_of("other", 2))
        .await
        .unwrap();
    assert_eq!(new.commit().await, Epoch(1));
    assert_eq!(closed(&primary.connection).await.code, CloseCode::DONE);
    let refusal = Primary::open(&place, &endpoint, &hello_of("primary", 3)).await;
    assert_eq!(refusal.err().expect("refused").code, CloseCode::REFUSED);
    assert_eq!(new.commit().await, Epoch(2));
}

#[tokio::test]
async fn nothing_is_made_for_a_vm_that_only_a_liar_knows() {
    let (place, mut witness, mut agent) = start().await;
    // More names than the agent has places for VMs.
    for number in 0..5u32 {
        let name = format!("invented-{number}");
        let lie = hello(&name, "other", Session(u128::from(number) + 1));
        assert_not_named(&place, lie).await;
        assert_eq!(vm(&place, &name), Value::Null);
        assert_eq!(remembered(&place, &name), None);
    }
    place.register("web", "primary").await;
    let elsewhere = true_hello(&place, "web", "other", Session(10)).await;
    assert_not_named(&place, elsewhere).await;
    assert_eq!(vm(&place, "web"), Value::Null);

    // The witness's silence is a reason of its own, and no permission.
    let asked = true_hello(&place, "web", "primary", Session(11)).await;
    witness.kill();
    let endpoint = client(&place.identity("primary"), Service::Pair);
    let refusal = Primary::open(&place, &endpoint, &asked)
        .await
        .err()
        .expect("refused");
    assert!(
        refusal
            .reason
            .contains("the witness did not tell this host in time"),
        "{refusal:?}"
    );
    assert_eq!(vm(&place, "web"), Value::Null);
    assert_eq!(place.status(AGENT)["witness"], "unreachable");
    agent.assert_well("a silent witness");

    let _witness = place.restart_witness().await;
    let began = std::time::Instant::now();
    // The same hello is welcome as soon as the witness answers.
    let mut primary = loop {
        match Primary::open(&place, &endpoint, &asked).await {
            Ok(primary) => break primary,
            Err(refusal) => assert!(began.elapsed() < 3 * SOON, "{refusal:?}"),
        }
    };
    assert_eq!(primary.commit().await, Epoch(1));
}

#[tokio::test]
async fn a_known_vms_hello_waits_for_a_silent_witness_within_a_bound() {
    let (place, mut witness, _agent) = start().await;
    let endpoint = client(&place.identity("primary"), Service::Pair);
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let mut primary = Primary::open(&place, &endpoint, &asked).await.unwrap();
    primary.commit().await;
    primary.leave(&place).await;
    witness.kill();
    let again = Hello {
        session: Session(2),
        ..asked
    };
    let refusal = Primary::open(&place, &endpoint, &again)
        .await
        .err()
        .expect("refused");
    assert!(
        refusal
            .reason
            .contains("the witness did not tell this host in time"),
        "{refusal:?}"
    );
    assert_eq!(vm(&place, "web")["committed"], 1, "the commit stands");
}

#[tokio::test]
async fn a_host_that_says_nothing_takes_neither_all_places_nor_any_for_long() {
    let (place, _witness, mut agent) = start().await;
    let silent = client(&place.identity("other"), Service::Pair);
    let refused = || {
        place.status(AGENT)["handshakes"]["refused_of_host"]
            .as_u64()
            .unwrap()
    };
    let mut held = Vec::new();
    // On a machine that is so busy that the first ones are closed meanwhile, it takes more.
    while refused() == 0 {
        assert!(held.len() < 20 * PER_HOST_MAX, "one host takes all places");
        match silent.connect(&peer(place.agent_at)).await {
            Ok(connection) => held.push(connection),
            Err(TransportError::Busy { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    // Another host has places of its own.
    let endpoint = client(&place.identity("primary"), Service::Pair);
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let mut primary = Primary::open(&place, &endpoint, &asked).await.unwrap();
    primary.commit().await;

    let counted = || place.status(AGENT)["refused_connections"].as_u64().unwrap();
    let mut silent_ones = 0;
    for connection in &held {
        let refusal = closed(connection).await;
        if refusal.code == CloseCode::LIMIT {
            continue;
        }
        assert!(
            refusal.reason.contains("did not say hello in time"),
            "{refusal:?}"
        );
        silent_ones += 1;
    }
    assert!(silent_ones >= PER_HOST_MAX as u64, "{silent_ones}");
    assert_eq!(counted(), silent_ones);
    drop(held);
    agent.assert_well("silent connections");
    assert_eq!(primary.commit().await, Epoch(2));
}
