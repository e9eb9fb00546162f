//! Which host may speak for which VM, by the settings of the agent and of the witness; and that the daemons serve the API
//! that its document describes.

use romulus_protocol::{Answer, Ask, WitnessRequest};
use romulus_telemetry::AdminClient;
use romulus_telemetry::openapi::Document;
use romulus_transport::{CloseCode, Service, WitnessClient};
use romulus_types::{Epoch, HostId, Nonce, Session, VmId};
use serde_json::Value;

use crate::place::{Place, client, peer};
use crate::primary::{Primary, hello, machine_of, true_hello};

const AGENT: &str = "backup-agent";

#[tokio::test]
async fn a_host_has_those_vms_backed_up_that_the_settings_allow_it_and_no_other() {
    let place = Place::new();
    let _witness = place.start_witness().await;
    let mut agent = place
        .start_agent_with("allow = [{ host = \"primary\", vms = [\"web*\"] }]")
        .await;
    let endpoint = client(&place.identity("primary"), Service::Pair);
    let asked = true_hello(&place, "web-1", "primary", Session(1)).await;
    let mut good = Primary::open(&place, &endpoint, &asked).await.unwrap();
    good.commit().await;

    let others = client(&place.identity("other"), Service::Pair);
    for (number, vm, host, endpoint) in [(2, "db", "primary", &endpoint), (3, "web-2", "other", &others)] {
        // The witness's record is as good as it can be: it is the settings that refuse.
        let asked = true_hello(&place, vm, host, Session(number)).await;
        let refusal = Primary::open(&place, endpoint, &asked)
            .await
            .err()
            .expect("refused");
        assert_eq!(refusal.code, CloseCode::REFUSED, "{refusal:?}");
        let named = format!("do not allow {host} to have {vm} backed up here");
        assert!(refusal.reason.contains(&named), "{refusal:?}");
    }
    let status = place.status(AGENT);
    assert_eq!(status["refused_not_allowed"], 2, "{status}");
    let vms: Vec<&Value> = status["vms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| &vm["vm"])
        .collect();
    assert_eq!(vms, ["web-1"], "nothing is made for a VM that is refused");
    agent.assert_well("hosts that are not allowed");
    assert_eq!(good.commit().await, Epoch(2));
}

#[tokio::test]
async fn a_hello_that_is_refused_keeps_no_room_from_other_vms() {
    let place = Place::new();
    let _witness = place.start_witness().await;
    let mut agent = place.start_agent_with("image_bytes_max = \"200 MiB\"").await;
    let endpoint = client(&place.identity("primary"), Service::Pair);
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let mut good = Primary::open(&place, &endpoint, &asked).await.unwrap();
    good.commit().await;

    // All the room that is left, for a VM that another host speaks for.
    let mut greedy = hello("web", "other", Session(2));
    greedy.machine = machine_of(190 << 20).to_json();
    let others = client(&place.identity("other"), Service::Pair);
    let refusal = Primary::open(&place, &others, &greedy)
        .await
        .err()
        .expect("refused");
    assert_eq!(refusal.code, CloseCode::REFUSED, "{refusal:?}");
    assert!(
        !refusal.reason.contains("room"),
        "it had to get past that: {refusal:?}"
    );

    let asked = true_hello(&place, "db", "primary", Session(3)).await;
    let mut second = Primary::open(&place, &endpoint, &asked).await.unwrap();
    assert_eq!(second.commit().await, Epoch(1));
    assert_eq!(good.commit().await, Epoch(2));
    agent.assert_well("a hello that was refused");
}

#[tokio::test]
async fn a_vm_whose_image_would_lie_where_notes_on_others_do_is_refused() {
    let place = Place::new();
    let _witness = place.start_witness().await;
    let mut agent = place.start_agent().await;
    let endpoint = client(&place.identity("primary"), Service::Pair);
    for (number, vm) in [(1, "web.consumed"), (2, "web.machine.json")] {
        let asked = true_hello(&place, vm, "primary", Session(number)).await;
        let refusal = Primary::open(&place, &endpoint, &asked)
            .await
            .err()
            .expect("refused");
        assert!(refusal.reason.contains("must not have a name"), "{refusal:?}");
    }
    agent.assert_well("names that are taken");
}

#[tokio::test]
async fn a_witness_answers_a_host_for_the_vms_that_the_settings_allow_it_and_no_other() {
    let place = Place::new();
    drop(place.start_witness().await);
    let allow = "allow = [{ host = \"primary\", vms = [\"web\"] }, { host = \"back*\", vms = [\"*\"] }]";
    let _witness = place.restart_witness_with(allow).await;
    let asker = |host: &str| {
        let endpoint = client(&place.identity(host), Service::Witness);
        WitnessClient::new(std::sync::Arc::new(endpoint), vec![peer(place.witness_at)])
    };
    let (primary, other, backup) = (asker("primary"), asker("other"), asker("backup"));
    let request = |vm: &str, host: &str, nonce: u128, ask: Ask| WitnessRequest {
        vm: VmId::new(vm).unwrap(),
        host: HostId::new(host).unwrap(),
        nonce: Nonce(nonce),
        ask,
    };
    let granted = primary
        .ask(request("web", "primary", 1, Ask::Register))
        .await
        .unwrap();
    let Answer::Granted(record) = granted.answer else {
        panic!("{granted:?}")
    };
    // To a host that has no business with a VM there is no such VM, whether there is or not.
    let refused = primary
        .ask(request("db", "primary", 2, Ask::Register))
        .await
        .unwrap();
    assert_eq!(refused.answer, Answer::UnknownVm);
    let refused = other.ask(request("web", "other", 3, Ask::Read)).await.unwrap();
    assert_eq!(refused.answer, Answer::UnknownVm);
    // The connection of a host that was refused serves its other VMs.
    let read = primary
        .ask(request("web", "primary", 4, Ask::Read))
        .await
        .unwrap();
    assert_eq!(read.answer, Answer::Current(record.clone()));
    let read = backup.ask(request("web", "backup", 5, Ask::Read)).await.unwrap();
    assert_eq!(read.answer, Answer::Current(record));
    let status = place.status("witness");
    assert_eq!(
        (&status["not_allowed"], &status["vms"]),
        (&2.into(), &1.into()),
        "{status}"
    );
}

#[tokio::test]
async fn the_running_daemons_serve_what_the_api_document_says_and_nothing_else() {
    let place = Place::new();
    let _witness = place.start_witness().await;
    let _agent = place.start_agent().await;
    let endpoint = client(&place.identity("primary"), Service::Pair);
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let mut good = Primary::open(&place, &endpoint, &asked).await.unwrap();
    good.commit().await;
    let document = Document::shipped();
    for daemon in [AGENT, "witness"] {
        let admin = AdminClient::new(place.path(&format!("{daemon}.sock")));
        document.compare_with(daemon, &admin).await.unwrap();
        let served = admin.get("/v1/openapi.json").await.unwrap();
        assert_eq!(served["openapi"], "3.1.0");
        for (method, path, expected) in [("GET", "/v1/nothing", 404), ("POST", "/v1/status", 405)] {
            let (status, answer) = admin.ask_with_status(method, path).await.unwrap();
            assert_eq!(status, expected, "{path}");
            assert!(answer["error"].is_string(), "{answer}");
        }
    }
    // Orders that are refused answer as the document says, too.
    let admin = AdminClient::new(place.path("backup-agent.sock"));
    for vm in ["web", "unknown"] {
        let path = format!("/v1/failover?force=true&vm={vm}");
        let (status, answer) = admin.ask_with_status("POST", &path).await.unwrap();
        document.check("POST", "/v1/failover", status, &answer).unwrap();
    }
    let reloaded = admin
        .ask_with_status("POST", "/v1/reload-certificates")
        .await
        .unwrap();
    document
        .check("POST", "/v1/reload-certificates", reloaded.0, &reloaded.1)
        .unwrap();
}
