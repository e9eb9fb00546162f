//! Killed at every point of a write: after the restart the record is the old one or the new one, whole, and
//! what was granted to somebody is there.

mod common;

use std::time::Duration;

use common::{Place, alone, change, granted, paired, request};
use romulus_protocol::{Answer, Ask, Record};

/// Each point, and whether the new record must be on disk (`None`: either may be).
const POINTS: [(&str, Option<bool>); 7] = [
    ("store.before_write", Some(false)),
    ("store.half_written", Some(false)),
    ("store.written", Some(false)),
    ("store.synced", Some(false)),
    ("store.renamed", None),
    ("store.durable", Some(true)),
    ("reply.sent", Some(true)),
];

/// A store with a record `Paired` of term 2.
async fn prepared() -> (Place, Record) {
    let place = Place::with_store();
    let mut daemon = place.start_and_wait(None).await;
    let a = place.client("a");
    let first = granted(&a.ask(request("a", 1, Ask::Register)).await.unwrap().answer).clone();
    let reply = a
        .ask(request("a", 2, change(first.instance, 1, paired())))
        .await
        .unwrap();
    let record = granted(&reply.answer).clone();
    daemon.terminate();
    assert!(daemon.ended().await.success());
    (place, record)
}

async fn kill_at(point: &str, must_be_new: Option<bool>) {
    let (place, before) = prepared().await;
    let mut daemon = place.start_and_wait(Some(&format!("{point}:sigkill"))).await;
    let wanted = request("b", 3, change(before.instance, 2, alone("b")));
    let b = place
        .client("b")
        .with_deadline(Duration::from_secs(2), Duration::from_secs(1));
    let answered = b.ask(wanted.clone()).await;
    assert!(!daemon.ended().await.success(), "{point} was not passed");

    let shown = place.witness(&["show", "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    let term = shown["records"][0]["term"].as_u64().unwrap();
    assert!(term == 2 || term == 3, "{point}: term {term}");
    if let Some(new) = must_be_new {
        assert_eq!(term == 3, new, "{point}");
    }
    if let Ok(reply) = &answered {
        granted(&reply.answer);
        assert_eq!(term, 3, "{point}: granted, and not durable");
    }

    // The same request again gets its grant, whichever record there was; and no other host gets one.
    let _daemon = place.start_and_wait(None).await;
    let b = place
        .client("b")
        .with_deadline(Duration::from_secs(10), Duration::from_secs(1));
    let record = granted(&b.ask(wanted).await.unwrap().answer).clone();
    assert_eq!((record.term.0, &record.mode), (3, &alone("b")), "{point}");
    let late = request("a", 4, change(before.instance, 2, alone("a")));
    let reply = place.client("a").ask(late).await.unwrap();
    assert!(matches!(reply.answer, Answer::Refused(_)), "{point}: {reply:?}");
}

#[tokio::test]
async fn killed_at_any_point_the_record_is_whole_and_no_grant_is_lost() {
    for (point, must_be_new) in POINTS {
        kill_at(point, must_be_new).await;
    }
}

#[tokio::test]
async fn a_witness_stopped_in_the_middle_of_a_write_answers_nobody_meanwhile() {
    let (place, before) = prepared().await;
    let daemon = place.start_and_wait(Some("store.synced:sigstop")).await;
    let quick = |name| {
        place
            .client(name)
            .with_deadline(Duration::from_millis(900), Duration::from_millis(400))
    };
    let wanted = request("b", 3, change(before.instance, 2, alone("b")));
    assert!(quick("b").ask(wanted.clone()).await.is_err());
    let late = request("a", 4, change(before.instance, 2, alone("a")));
    assert!(quick("a").ask(late.clone()).await.is_err());
    let pid = rustix::process::Pid::from_child(&daemon.child);
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    let patient = |name| {
        place
            .client(name)
            .with_deadline(Duration::from_secs(10), Duration::from_secs(1))
    };
    granted(&patient("b").ask(wanted).await.unwrap().answer);
    assert!(matches!(
        patient("a").ask(late).await.unwrap().answer,
        Answer::Refused(_)
    ));
}
