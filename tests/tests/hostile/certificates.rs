//! Certificates that are replaced while the daemons run.

use romulus_transport::{CertificateProblem, CloseCode, Service, TransportError};
use romulus_types::{Epoch, Session};

use crate::place::{Place, client, peer};
use crate::primary::{Primary, true_hello};

const AGENT: &str = "backup-agent";

#[tokio::test]
async fn certificates_are_replaced_under_a_session_that_goes_on() {
    let place = Place::new();
    let _witness = place.start_witness().await;
    let mut agent = place.start_agent().await;
    let before = client(&place.identity("primary"), Service::Pair);
    let asked = true_hello(&place, "web", "primary", Session(1)).await;
    let mut steady = Primary::open(&place, &before, &asked).await.unwrap();
    steady.commit().await;

    // Renewed: new keys of the same authority.
    let pki = place.dir.path().join("pki");
    let renew = ["pki", "renew", "--dir", pki.to_str().unwrap()];
    let output = std::process::Command::new(romulus_e2e::Paths::here().binary("romulus").unwrap())
        .args(renew)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    for daemon in [AGENT, "witness"] {
        let (done, said) = place.romulus(&["pki", "reload"], daemon);
        assert!(done, "{said}");
    }
    assert_eq!(steady.commit().await, Epoch(2));
    let renewed = client(&place.identity("primary"), Service::Pair);
    renewed
        .connect(&peer(place.agent_at))
        .await
        .unwrap()
        .close(CloseCode::DONE, "");
    place.register("db", "primary").await;

    // Another authority: who has certificates of the old one stays out; the session goes on.
    std::fs::rename(pki.join("backup"), pki.join("kept")).unwrap();
    std::fs::rename(place.dir.path().join("other-pki/backup"), pki.join("backup")).unwrap();
    assert!(place.romulus(&["pki", "reload"], AGENT).0);
    let refused = renewed.connect(&peer(place.agent_at)).await;
    let Err(TransportError::PeerCertificate { problem, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(problem, CertificateProblem::OtherCa);
    assert_eq!(steady.commit().await, Epoch(3));

    // What can't be used, and another host's, are refused with the cause; what was there stays.
    std::fs::remove_file(pki.join("backup/server-key.pem")).unwrap();
    let (done, said) = place.romulus(&["pki", "reload"], AGENT);
    assert!(!done && said.contains("server-key.pem"), "{said}");
    std::fs::remove_dir_all(pki.join("backup")).unwrap();
    std::fs::rename(pki.join("other"), pki.join("backup")).unwrap();
    let (done, said) = place.romulus(&["pki", "reload"], AGENT);
    assert!(!done && said.contains("this daemon runs as \"backup\""), "{said}");
    assert_eq!(steady.commit().await, Epoch(4));
    agent.assert_well("certificates that were replaced");
}
