//! Certificates: who gets in, who does not, and how the refusal reads.

mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::{client, identity, issue, peer, pki_for, server};
use romulus_transport::pki::{self, HostNames, Validity};
use romulus_transport::{
    CertificateProblem as P, Certificates, Connection, Endpoint, Identity, Network, PkiError, Service,
    TransportError,
};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn past() -> Validity {
    let now = SystemTime::now();
    Validity {
        from: now - 20 * DAY,
        until: now - 10 * DAY,
    }
}

fn future() -> Validity {
    let now = SystemTime::now();
    Validity {
        from: now + 10 * DAY,
        until: now + 20 * DAY,
    }
}

async fn try_connect(client_id: &Identity, server_id: &Identity) -> Result<Connection, TransportError> {
    let network = Network::default();
    let (server, address) = server(server_id, &network);
    let client = client(client_id, &network);
    let result = client.connect(&peer(address)).await;
    drop(server);
    result
}

#[tokio::test]
async fn each_side_learns_that_the_other_has_another_ca() {
    let (ours, theirs) = (pki_for(&["primary"]), pki_for(&["backup"]));
    let refused = try_connect(&identity(&ours, "primary"), &identity(&theirs, "backup")).await;
    let Err(TransportError::PeerCertificate {
        problem: P::OtherCa,
        peer,
    }) = refused
    else {
        panic!("{refused:?}")
    };
    assert!(peer.starts_with("127.0.0.1:"));
}

#[tokio::test]
async fn a_client_that_the_server_does_not_trust_is_told_so() {
    // The client trusts the server's CA, but shows a certificate of its own.
    let (ours, theirs) = (pki_for(&["primary"]), pki_for(&["backup"]));
    let mixed = ours.path().join("primary");
    // Load before the CA is swapped, as loading would refuse the mixture.
    let own = Identity::load(&mixed).unwrap();
    std::fs::copy(
        theirs.path().join("backup/ca-cert.pem"),
        mixed.join("ca-cert.pem"),
    )
    .unwrap();
    let refused = Identity::load(&mixed);
    assert!(
        matches!(
            refused,
            Err(PkiError::Certificate {
                problem: P::OtherCa,
                ..
            })
        ),
        "a certificate of another CA was not noticed: {refused:?}"
    );
    // A server that trusts only its own CA, whose certificate the client does trust.
    let both = theirs.path().join("backup");
    let chain = std::fs::read_to_string(ours.path().join("ca/ca-cert.pem")).unwrap();
    let trusted = std::fs::read_to_string(theirs.path().join("ca/ca-cert.pem")).unwrap();
    std::fs::write(mixed.join("ca-cert.pem"), chain + &trusted).unwrap();
    let own_and_theirs = Identity::load(&mixed).unwrap();
    let refused = try_connect(&own_and_theirs, &Identity::load(&both).unwrap()).await;
    assert!(
        matches!(
            refused,
            Err(TransportError::OwnCertificate {
                problem: P::OtherCa,
                ..
            })
        ),
        "{refused:?}"
    );
    drop(own);
}

#[tokio::test]
async fn an_expired_certificate_is_named_before_anything_is_sent() {
    let pki = pki_for(&[]);
    issue(pki.path(), "old", past());
    issue(pki.path(), "early", future());
    let refused = Identity::load(&pki.path().join("old")).unwrap_err();
    assert!(matches!(
        &refused,
        PkiError::Certificate {
            problem: P::Expired,
            ..
        }
    ));
    assert!(refused.to_string().contains("server-cert.pem"), "{refused}");
    let refused = Identity::load(&pki.path().join("early")).unwrap_err();
    assert!(matches!(
        &refused,
        PkiError::Certificate {
            problem: P::NotYetValid,
            ..
        }
    ));
}

#[tokio::test]
async fn a_certificate_that_expired_while_a_daemon_ran_is_refused_on_either_side() {
    let pki = pki_for(&["good"]);
    issue(pki.path(), "old", past());
    let old = Identity::load_at(&pki.path().join("old"), SystemTime::now() - 15 * DAY).unwrap();
    let good = identity(&pki, "good");
    let refused = try_connect(&good, &old).await;
    assert!(
        matches!(
            refused,
            Err(TransportError::PeerCertificate {
                problem: P::Expired,
                ..
            })
        ),
        "{refused:?}"
    );
    let refused = try_connect(&old, &good).await;
    assert!(
        matches!(
            refused,
            Err(TransportError::OwnCertificate {
                problem: P::OutOfTime,
                ..
            })
        ),
        "{refused:?}"
    );
}

#[tokio::test]
async fn the_end_of_what_expires_first_is_known_and_changes_with_a_reload() {
    let pki = pki_for(&[]);
    let until = |days: u32| Validity::days(days).unwrap();
    issue(pki.path(), "brief", until(10));
    issue(pki.path(), "long", until(100));
    let days_left = |expiry_s: u64| {
        let left = (SystemTime::UNIX_EPOCH + Duration::from_secs(expiry_s)).duration_since(SystemTime::now());
        left.unwrap().as_secs_f64() / DAY.as_secs_f64()
    };
    let near = |expiry_s: u64, days: f64| (days_left(expiry_s) - days).abs() < 0.1;
    let brief = identity(&pki, "brief");
    let long = identity(&pki, "long");
    assert!(near(brief.expiry_s(), 10.0), "{}", days_left(brief.expiry_s()));
    assert!(
        near(long.expiry_s(), 100.0),
        "whatever the authority's: {}",
        days_left(long.expiry_s())
    );

    let (server, _) = server(&brief, &Network::default());
    assert_eq!(server.certificate_expiry_s(), brief.expiry_s());
    server.reload(&long).unwrap();
    assert_eq!(server.certificate_expiry_s(), long.expiry_s());
}

#[tokio::test]
async fn a_server_with_another_name_is_refused_and_the_right_name_is_accepted() {
    let pki = pki_for(&["primary", "backup", "witness"]);
    let network = Network::default();
    let (server, address) = server(&identity(&pki, "backup"), &network);
    let client = client(&identity(&pki, "primary"), &network);
    let named = |name: &str| format!("{name}@{address}").parse().unwrap();
    let refused = client.connect(&named("witness")).await;
    assert!(
        matches!(
            refused,
            Err(TransportError::PeerCertificate {
                problem: P::WrongName,
                ..
            })
        ),
        "{refused:?}"
    );
    let accepted = client.connect(&named("backup")).await.unwrap();
    assert_eq!(accepted.peer().as_str(), "backup");
    drop(server);
}

#[tokio::test]
async fn a_daemon_of_another_kind_is_refused_by_name() {
    let pki = pki_for(&["primary", "backup"]);
    let network = Network::default();
    let (server, address) = server(&identity(&pki, "backup"), &network);
    let client = Endpoint::client(&identity(&pki, "primary"), &network, Service::Witness, None).unwrap();
    let refused = client.connect(&peer(address)).await;
    assert!(
        matches!(refused, Err(TransportError::OtherService { .. })),
        "{refused:?}"
    );
    drop(server);
}

#[test]
fn a_missing_or_foreign_file_is_named() {
    let pki = pki_for(&["a", "b"]);
    let dir = pki.path().join("a");
    for file in [
        "ca-cert.pem",
        "server-cert.pem",
        "server-key.pem",
        "client-cert.pem",
        "client-key.pem",
    ] {
        let kept = std::fs::read(dir.join(file)).unwrap();
        std::fs::remove_file(dir.join(file)).unwrap();
        let text = Identity::load(&dir).unwrap_err().to_string();
        assert!(text.contains(file), "{text}");
        std::fs::write(dir.join(file), "garbage").unwrap();
        let text = Identity::load(&dir).unwrap_err().to_string();
        assert!(text.contains(file), "{text}");
        std::fs::write(dir.join(file), kept).unwrap();
    }
    std::fs::copy(pki.path().join("b/server-key.pem"), dir.join("server-key.pem")).unwrap();
    assert!(matches!(Identity::load(&dir), Err(PkiError::KeyMismatch { .. })));
}

#[test]
fn a_folder_whose_certificates_name_two_hosts_is_refused() {
    let pki = pki_for(&["a", "b"]);
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::copy(pki.path().join("b").join(file), pki.path().join("a").join(file)).unwrap();
    }
    assert!(matches!(
        Identity::load(&pki.path().join("a")),
        Err(PkiError::TwoNames { .. })
    ));
}

#[test]
fn a_client_certificate_does_not_pass_as_a_servers() {
    let pki = pki_for(&["a"]);
    let dir = pki.path().join("a");
    std::fs::copy(dir.join("client-cert.pem"), dir.join("server-cert.pem")).unwrap();
    std::fs::copy(dir.join("client-key.pem"), dir.join("server-key.pem")).unwrap();
    let refused = Identity::load(&dir);
    assert!(
        matches!(
            refused,
            Err(PkiError::Certificate {
                problem: P::WrongPurpose,
                ..
            })
        ),
        "{refused:?}"
    );
}

#[test]
fn nothing_is_overwritten_and_keys_are_private() {
    let pki = pki_for(&["a"]);
    let days = Validity::days(1).unwrap();
    assert!(matches!(
        pki::init(pki.path(), "x", days),
        Err(PkiError::Exists { .. })
    ));
    let names: HostNames = "a".parse().unwrap();
    let before = std::fs::read(pki.path().join("a/server-key.pem")).unwrap();
    assert!(matches!(
        pki::issue(pki.path(), &names, days),
        Err(PkiError::Exists { .. })
    ));
    assert!(std::fs::read(pki.path().join("a/server-key.pem")).unwrap() == before);
    for key in ["ca/ca-key.pem", "a/server-key.pem", "a/client-key.pem"] {
        let mode = std::fs::metadata(pki.path().join(key))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    let left = std::fs::read_dir(pki.path()).unwrap().count();
    assert_eq!(left, 2, "a partial folder was left behind");
}

#[test]
fn names_and_validities_that_make_no_sense_are_refused() {
    for bad in ["", "a b", "../x", "a,", "a,not a name", "a,b/c", ",a"] {
        assert!(bad.parse::<HostNames>().is_err(), "{bad:?} was accepted");
    }
    let pki = pki_for(&[]);
    let days = Validity::days(1).unwrap();
    assert!(matches!(
        pki::issue(pki.path(), &"ca".parse().unwrap(), days),
        Err(PkiError::Name { .. })
    ));
    assert!(Validity::days(0).is_err() && Validity::days(u32::MAX).is_err());
}

#[test]
fn a_check_reports_names_dates_and_what_should_be_mended() {
    let pki = pki_for(&[]);
    issue(pki.path(), "a", Validity::days(400).unwrap());
    let dir = pki.path().join("a");
    let report = pki::check(&dir).unwrap();
    assert_eq!(report.host.as_str(), "a");
    let server = report
        .files
        .iter()
        .find(|f| f.file.ends_with("server-cert.pem"))
        .unwrap();
    assert_eq!(server.names, ["a", "127.0.0.1"]);
    assert!(server.not_after > SystemTime::now() + 300 * DAY && server.not_before < SystemTime::now());
    // The CA of `pki_for` ends in 30 days.
    assert!(
        report.warnings.iter().any(|w| w.contains("ca-cert.pem")),
        "{:?}",
        report.warnings
    );
    std::fs::set_permissions(dir.join("server-key.pem"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let report = pki::check(&dir).unwrap();
    assert!(
        report.warnings.iter().any(|w| w.contains("server-key.pem")),
        "{:?}",
        report.warnings
    );
}

#[tokio::test]
async fn reloaded_certificates_serve_new_connections() {
    let (old, new) = (pki_for(&["primary", "backup"]), pki_for(&["primary", "backup"]));
    let network = Network::default();
    let (server, address) = server(&identity(&old, "backup"), &network);
    let client = client(&identity(&old, "primary"), &network);
    let kept = client.connect(&peer(address)).await.unwrap();
    server.reload(&identity(&new, "backup")).unwrap();
    assert!(client.connect(&peer(address)).await.is_err());
    client.reload(&identity(&new, "primary")).unwrap();
    client.connect(&peer(address)).await.unwrap();
    assert!(
        kept.close_reason().is_none(),
        "an existing connection was disturbed"
    );
}

#[tokio::test]
async fn a_daemon_reads_its_certificates_again_and_its_sessions_go_on() {
    let pki = pki_for(&["primary", "backup"]);
    let at_backup = identity(&pki, "backup");
    let (server, address) = server(&at_backup, &Network::default());
    let server = Arc::new(server);
    let certificates = Certificates::new(&at_backup, vec![Arc::clone(&server)]);
    let old = client(&identity(&pki, "primary"), &Network::default());
    let target = peer(address);
    let (at_client, at_server) = tokio::join!(old.connect(&target), server.accept());
    let (at_client, at_server) = (at_client.unwrap(), at_server.unwrap());
    // The folder is replaced by one of another authority.
    let others = pki_for(&["primary", "backup", "third"]);
    let folder = pki.path().join("backup");
    std::fs::rename(&folder, pki.path().join("before")).unwrap();
    std::fs::rename(others.path().join("backup"), &folder).unwrap();
    assert_eq!(certificates.reload().unwrap().as_str(), "backup");
    assert!(at_client.close_reason().is_none() && at_server.close_reason().is_none());
    let refused = old.connect(&peer(address)).await;
    assert!(
        matches!(
            refused,
            Err(TransportError::PeerCertificate {
                problem: P::OtherCa,
                ..
            })
        ),
        "{refused:?}"
    );
    let new = client(&identity(&others, "primary"), &Network::default());
    new.connect(&peer(address)).await.unwrap();
    // What a handshake would refuse, and another host's certificates, change nothing.
    std::fs::remove_file(folder.join("server-key.pem")).unwrap();
    assert!(certificates.reload().is_err());
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::rename(others.path().join("third"), &folder).unwrap();
    let Err(TransportError::Pki(error)) = certificates.reload() else {
        panic!("another host's")
    };
    assert!(matches!(*error, PkiError::OtherHost { .. }), "{error}");
    new.connect(&peer(address)).await.unwrap();
}

#[test]
fn a_renewed_host_keeps_its_names_and_gets_new_keys_and_dates() {
    let dir = tempfile::tempdir().unwrap();
    pki::init(dir.path(), "test CA", Validity::days(300).unwrap()).unwrap();
    let names: HostNames = "web1,10.0.0.1,web1.example".parse().unwrap();
    let folder = pki::issue(dir.path(), &names, Validity::days(5).unwrap()).unwrap();
    let (before, key) = (
        pki::check(&folder).unwrap(),
        std::fs::read(folder.join("server-key.pem")).unwrap(),
    );
    assert!(!before.warnings.is_empty());
    let renewed = pki::renew(dir.path(), &names.host, Validity::days(200).unwrap()).unwrap();
    assert_eq!(renewed, folder);
    let after = pki::check(&folder).unwrap();
    assert!(after.warnings.is_empty(), "{:?}", after.warnings);
    assert_eq!(
        (&after.host, &after.files[1].names),
        (&before.host, &before.files[1].names)
    );
    assert!(after.files[1].not_after > before.files[1].not_after);
    assert_ne!(std::fs::read(folder.join("server-key.pem")).unwrap(), key);
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
    let unknown = romulus_types::HostId::new("nobody").unwrap();
    assert!(pki::renew(dir.path(), &unknown, Validity::days(9).unwrap()).is_err());
}
