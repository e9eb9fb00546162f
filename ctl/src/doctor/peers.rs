//! Certificates, the clock, and the way to the peers.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use romulus_config::{Network, PeerAddress};
use romulus_transport::{CloseCode, Endpoint, Identity, Service, pki};

use super::{AllSettings, Finding};
use crate::args::{DoctorOptions, Role};

/// A round trip that takes longer makes epochs of 25 ms wait for their acknowledgement.
const RTT_NS_WARNING: u64 = 5_000_000;
/// systemd-timesyncd makes this file when it has set the clock.
const TIMESYNC: &str = "/run/systemd/timesync/synchronized";

/// All checks of what this host needs of others.
pub(super) async fn checks(options: &DoctorOptions, roles: &[Role], settings: &AllSettings) -> Vec<Finding> {
    let mut findings = vec![clock()];
    for dir in folders(options, roles, settings) {
        findings.push(certificates(&dir));
        let Ok(identity) = Identity::load(&dir) else {
            continue;
        };
        for (check, peer, network, service) in peers(options, roles, settings) {
            findings.push(link(check, &identity, &peer, network, service).await);
        }
        break;
    }
    findings
}

/// The folders of certificates that the roles use, each once.
fn folders(options: &DoctorOptions, roles: &[Role], settings: &AllSettings) -> Vec<PathBuf> {
    if let Some(dir) = &options.pki {
        return vec![dir.clone()];
    }
    let mut dirs = Vec::new();
    for role in roles {
        let dir = match role {
            Role::Primary => &settings.replicator.pki_dir,
            Role::Backup => &settings.agent.pki_dir,
            Role::Witness => &settings.witness.pki_dir,
        };
        if !dirs.contains(dir) {
            dirs.push(dir.clone());
        }
    }
    dirs
}

type Peer<'a> = (&'static str, PeerAddress, &'a Network, Service);

fn peers<'a>(options: &DoctorOptions, roles: &[Role], settings: &'a AllSettings) -> Vec<Peer<'a>> {
    let mut peers = Vec::new();
    let network = &settings.replicator.network;
    if roles.contains(&Role::Primary)
        && let Some(backup) = options.backup.as_ref().or(settings.replicator.backup.as_ref())
    {
        peers.push(("backup", backup.clone(), network, Service::Pair));
    }
    let witness = match &options.witness {
        Some(witness) => Some(witness),
        None if roles.contains(&Role::Primary) => settings.replicator.witness.first(),
        None => None,
    };
    let witness = witness.or_else(|| {
        let backup = roles.contains(&Role::Backup);
        backup.then(|| settings.agent.witness.first()).flatten()
    });
    if let Some(witness) = witness {
        peers.push(("witness", witness.clone(), network, Service::Witness));
    }
    peers
}

fn certificates(dir: &Path) -> Finding {
    let remedy = "make them with `romulus pki init` on one machine, and copy this host's folder here";
    match pki::check(dir) {
        Err(error) => Finding::bad("certificates", error.to_string(), remedy),
        Ok(report) => {
            let first_end = report.files.iter().map(|file| file.not_after).min();
            let left = first_end.and_then(|end| end.duration_since(SystemTime::now()).ok());
            let days = left.unwrap_or(Duration::ZERO).as_secs() / (24 * 3600);
            let found = format!(
                "{}: of {}, valid for {days} days more",
                dir.display(),
                report.host
            );
            if report.warnings.is_empty() {
                return Finding::good("certificates", found);
            }
            let remedy = "`romulus pki renew`, copy the folder here, then `romulus pki reload`";
            Finding::warning(
                "certificates",
                format!("{found}: {}", report.warnings.join("; ")),
                remedy,
            )
        }
    }
}

/// Certificates have dates, and logs of two hosts are compared; who may speak depends on no clock.
fn clock() -> Finding {
    let says = |program: &str, arguments: &[&str], wanted: &str| {
        let output = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .output();
        output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(wanted))
    };
    let synchronised = Path::new(TIMESYNC).exists()
        || says(
            "timedatectl",
            &["show", "-p", "NTPSynchronized"],
            "NTPSynchronized=yes",
        )
        || says("chronyc", &["tracking"], "Leap status     : Normal");
    if synchronised {
        return Finding::good("clock", "is synchronised");
    }
    Finding::warning(
        "clock",
        "neither systemd-timesyncd nor chrony says that it is synchronised",
        "install one of them: certificates have dates. Protection itself does not depend on clocks",
    )
}

async fn link(
    check: &'static str,
    identity: &Identity,
    peer: &PeerAddress,
    network: &Network,
    service: Service,
) -> Finding {
    let endpoint = match Endpoint::client(identity, network, service, None) {
        Ok(endpoint) => endpoint,
        Err(error) => return Finding::bad(check, error.to_string(), "see the message"),
    };
    let connection = match endpoint.connect(peer).await {
        Ok(connection) => connection,
        Err(error) => {
            let remedy = "is the daemon there running, is its UDP port open, and are both certificates of one authority?";
            return Finding::bad(check, error.to_string(), remedy);
        }
    };
    let rtt_ns = connection.stats().rtt_ns;
    connection.close(CloseCode::DONE, "doctor has seen enough");
    endpoint.shutdown("doctor has seen enough").await;
    let found = format!("{peer} answers, round trip {} us", rtt_ns / 1000);
    if rtt_ns > RTT_NS_WARNING {
        let remedy = "every answer of a protected VM waits for at least one round trip: choose a nearer host or a better link";
        return Finding::warning(check, found, remedy);
    }
    Finding::good(check, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Grade;
    use romulus_transport::pki::{Validity, init, issue};

    fn folder(days: u32) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "test CA", Validity::days(60).unwrap()).unwrap();
        issue(
            dir.path(),
            &"a,127.0.0.1".parse().unwrap(),
            Validity::days(days).unwrap(),
        )
        .unwrap();
        dir
    }

    #[test]
    fn certificates_that_end_soon_are_a_warning_and_missing_ones_are_bad() {
        assert_eq!(certificates(&folder(50).path().join("a")).grade, Grade::Good);
        let soon = certificates(&folder(5).path().join("a"));
        assert_eq!(soon.grade, Grade::Warning);
        assert!(soon.found.contains("expires within 30 days"), "{}", soon.found);
        assert_eq!(certificates(Path::new("/nowhere")).grade, Grade::Bad);
    }

    #[tokio::test]
    async fn a_peer_that_answers_has_a_round_trip_and_one_that_is_not_there_a_remedy() {
        let dir = folder(50);
        let identity = Identity::load(&dir.path().join("a")).unwrap();
        let network = Network::default();
        let listen = "127.0.0.1:0".parse().unwrap();
        let server = Endpoint::server(&identity, &network, Service::Pair, listen, None).unwrap();
        let peer: PeerAddress = server.local_addr().unwrap().to_string().parse().unwrap();
        let found = link("backup", &identity, &peer, &network, Service::Pair).await;
        assert!(found.found.contains("round trip"), "{found:?}");
        let wrong = link("witness", &identity, &peer, &network, Service::Witness).await;
        assert_eq!(wrong.grade, Grade::Bad);
        assert!(!wrong.remedy.is_empty());
    }
}
