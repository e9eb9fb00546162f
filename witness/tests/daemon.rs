//! The witness as hosts and operators meet it: real processes, real certificates, real QUIC.

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{Place, alone, change, granted, paired, request, vm};
use romulus_protocol::{Answer, Ask, WitnessRequest};
use romulus_telemetry::AdminClient;
use romulus_transport::{CloseCode, TransportError};
use romulus_types::Session;
use romulus_wire::{FrameType, encode_message};

#[tokio::test]
async fn of_two_hosts_that_lost_each_other_one_gets_the_vm() {
    let place = Place::with_store();
    let _daemon = place.start_and_wait(None).await;
    let (a, b) = (place.client("a"), place.client("b"));
    let reply = a.ask(request("a", 1, Ask::Read)).await.unwrap();
    assert_eq!(reply.answer, Answer::UnknownVm);
    let reply = a.ask(request("a", 2, Ask::Register)).await.unwrap();
    let record = granted(&reply.answer).clone();
    assert_eq!(record.mode, alone("a"));
    let reply = a
        .ask(request("a", 3, change(record.instance, 1, paired())))
        .await
        .unwrap();
    assert_eq!(granted(&reply.answer).term.0, 2);
    let (for_a, for_b) = tokio::join!(
        a.ask(request("a", 4, change(record.instance, 2, alone("a")))),
        b.ask(request("b", 5, change(record.instance, 2, alone("b")))),
    );
    let grants = [for_a.unwrap().answer, for_b.unwrap().answer];
    assert_eq!(
        grants
            .iter()
            .filter(|answer| matches!(answer, Answer::Granted(_)))
            .count(),
        1,
        "{grants:?}"
    );
    assert!(a.is_connected() && b.is_connected());
}

#[tokio::test]
async fn a_host_cannot_ask_in_the_name_of_another() {
    let place = Place::with_store();
    let _daemon = place.start_and_wait(None).await;
    let honest = place.client("a");
    granted(&honest.ask(request("a", 1, Ask::Register)).await.unwrap().answer);
    let liar = place.endpoint("b").connect(&place.address()).await.unwrap();
    let mut control = liar.open_control().await.unwrap();
    let forged = request("a", 9, Ask::Read);
    let frame = encode_message(FrameType::WitnessRequest, Session(9), &forged).unwrap();
    control.sender.send(frame).await.unwrap();
    let closed = tokio::time::timeout(Duration::from_secs(10), liar.closed()).await;
    let Ok(TransportError::Closed { code, reason, .. }) = closed else {
        panic!("{closed:?}")
    };
    assert_eq!(code, CloseCode::IDENTITY);
    assert!(
        reason.contains("asks for a") && reason.contains("that of b"),
        "{reason}"
    );
    assert!(
        honest.ask(request("a", 2, Ask::Read)).await.is_ok(),
        "others are not disturbed"
    );
}

#[tokio::test]
async fn garbage_truncation_and_a_wrong_nonce_end_the_connection_and_are_counted() {
    let place = Place::with_store();
    let _daemon = place.start_and_wait(None).await;
    let endpoint = place.endpoint("a");
    let good: WitnessRequest = request("a", 7, Ask::Read);
    let frame = encode_message(FrameType::WitnessRequest, Session(7), &good).unwrap();
    let mut flipped = frame.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    let other_nonce = encode_message(FrameType::WitnessRequest, Session(8), &good).unwrap();
    let other_type = encode_message(FrameType::WitnessReply, Session(7), &good).unwrap();
    let cases: [Bytes; 5] = [
        vec![0xee; 4096].into(),
        frame.slice(..frame.len() - 1),
        flipped.into(),
        other_nonce,
        other_type,
    ];
    for (number, case) in cases.into_iter().enumerate() {
        let connection = endpoint.connect(&place.address()).await.unwrap();
        let mut control = connection.open_control().await.unwrap();
        control.sender.send(case).await.unwrap();
        control.sender.finish();
        let closed = tokio::time::timeout(Duration::from_secs(5), connection.closed()).await;
        let Ok(TransportError::Closed { code, .. }) = closed else {
            panic!("case {number}: {closed:?}")
        };
        assert_eq!(code, CloseCode::BAD_INPUT, "case {number}");
    }
    let status = AdminClient::new(place.admin()).get("/v1/status").await.unwrap();
    assert_eq!(status["bad"], 5);
    let metrics = AdminClient::new(place.admin()).text("/metrics").await.unwrap();
    assert!(
        metrics.contains("romulus_witness_bad_requests_total{cause=\"other_nonce\"} 1"),
        "{metrics}"
    );
    assert!(place.client("a").ask(good).await.is_ok());
}

#[tokio::test]
async fn a_client_finds_the_witness_again_after_its_restart_and_says_so_while_it_is_away() {
    let place = Place::with_store();
    let daemon = place.start_and_wait(None).await;
    let client = place.client("a");
    granted(&client.ask(request("a", 1, Ask::Register)).await.unwrap().answer);
    daemon.kill_and_read();
    let quick = client
        .clone()
        .with_deadline(Duration::from_millis(700), Duration::from_millis(200));
    let error = quick.ask(request("a", 2, Ask::Read)).await.unwrap_err();
    assert!(
        error.to_string().contains("did not answer within 700 ms"),
        "{error}"
    );
    let _daemon = place.start_and_wait(None).await;
    let patient = client.with_deadline(Duration::from_secs(20), Duration::from_millis(500));
    let reply = patient.ask(request("a", 2, Ask::Read)).await.unwrap();
    assert!(matches!(reply.answer, Answer::Current(_)), "{reply:?}");
}

#[tokio::test]
async fn a_client_without_a_witness_says_what_to_set() {
    let place = Place::new();
    let client = romulus_transport::WitnessClient::new(place.endpoint("a").into(), Vec::new());
    let quick = client.with_deadline(Duration::from_millis(50), Duration::from_millis(50));
    let error = quick.ask(request("a", 1, Ask::Read)).await.unwrap_err();
    assert!(error.to_string().contains("set `witness`"), "{error}");
}

#[tokio::test]
async fn a_daemon_of_another_ca_is_named_as_the_cause() {
    let (place, stranger) = (Place::with_store(), Place::new());
    let _daemon = place.start_and_wait(None).await;
    let client = romulus_transport::WitnessClient::new(stranger.endpoint("a").into(), vec![place.address()]);
    let quick = client.with_deadline(Duration::from_millis(800), Duration::from_millis(400));
    let error = quick.ask(request("a", 1, Ask::Read)).await.unwrap_err();
    assert!(error.to_string().contains("signed by another CA"), "{error}");
}

#[tokio::test]
async fn sigterm_ends_the_daemon_cleanly_and_removes_its_socket() {
    let place = Place::with_store();
    let mut daemon = place.start_and_wait(None).await;
    let connection = place.endpoint("a").connect(&place.address()).await.unwrap();
    daemon.terminate();
    assert!(daemon.ended().await.success());
    assert!(!place.admin().exists());
    let TransportError::Closed { code, .. } = connection.closed().await else {
        panic!("another error")
    };
    assert_eq!(code, CloseCode::SHUTDOWN);
}

#[tokio::test]
async fn operators_can_make_show_and_forget() {
    let place = Place::new();
    let mut early = place.start(None);
    assert!(!early.ended().await.success());
    let text = early.kill_and_read();
    assert!(text.contains("witness init"), "{text}");
    assert!(place.witness(&["init"]).status.success());
    let again = place.witness(&["init"]);
    assert!(
        !again.status.success() && String::from_utf8_lossy(&again.stderr).contains("holds a store already")
    );

    let _daemon = place.start_and_wait(None).await;
    granted(
        &place
            .client("a")
            .ask(request("a", 1, Ask::Register))
            .await
            .unwrap()
            .answer,
    );
    let shown = place.witness(&["show", "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["records"][0]["vm"], "web");
    assert_eq!(
        shown,
        AdminClient::new(place.admin()).get("/v1/records").await.unwrap()
    );

    let offline = place.witness(&["forget", "web"]);
    assert!(
        String::from_utf8_lossy(&offline.stderr).contains("stop it first"),
        "{offline:?}"
    );
    let admin = place.admin();
    let online = place.witness(&["forget", "web", "--admin", admin.to_str().unwrap()]);
    assert!(online.status.success(), "{online:?}");
    let reply = place.client("a").ask(request("a", 2, Ask::Read)).await.unwrap();
    assert_eq!(reply.answer, Answer::UnknownVm);
    assert_eq!(reply.vm, vm());
}

#[tokio::test]
async fn a_copied_store_is_not_served() {
    let place = Place::with_store();
    let instance = place.store().join("instance");
    let copy = place.dir.path().join("copy");
    std::fs::copy(&instance, &copy).unwrap();
    std::fs::rename(&copy, &instance).unwrap();
    let mut daemon = place.start(None);
    assert!(!daemon.ended().await.success());
    let text = daemon.kill_and_read();
    assert!(
        text.contains("copied or restored") && text.contains("--renew"),
        "{text}"
    );
    assert!(place.witness(&["init", "--renew"]).status.success());
    drop(place.start_and_wait(None).await);
}
