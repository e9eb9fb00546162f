//! `romulus may-run`: whether the witness's record lets a VM be started on this host from its disk. For boot scripts, before
//! anything starts the VM: what is known here may be older than a takeover elsewhere.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::ensure;
use romulus_config::{PeerAddress, Replicator, load};
use romulus_daemon::RecordFile;
use romulus_protocol::{Answer, Ask, Mode, Remembered, WitnessRequest};
use romulus_transport::{Endpoint, Identity, Service, WitnessClient};
use romulus_types::{HostId, Nonce, VmId};
use serde_json::json;

use crate::args::MayRunOptions;
use crate::exit;

/// Largest file of what a daemon remembers, in bytes.
/// The folders of the daemons' state, below the state folder.
const DAEMONS: [&str; 2] = ["replicator", "backup-agent"];

/// What the record means for this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    MayRun,
    MustNot,
    Unknown,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::MayRun => "may_run",
            Self::MustNot => "must_not_run",
            Self::Unknown => "unknown",
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::MayRun => exit::OK,
            Self::MustNot => exit::MUST_NOT_RUN,
            Self::Unknown => exit::UNKNOWN,
        }
    }
}

/// Asks the witness and says what its record means.
pub(crate) async fn run(options: MayRunOptions) -> anyhow::Result<u8> {
    let settings: Replicator = load(options.config.as_deref())?;
    let identity = Identity::load(options.pki.as_ref().unwrap_or(&settings.pki_dir))?;
    let host = identity.host().clone();
    let remembered = remembered(&options.state_dir, &options.vm)?;
    let witness = if options.witness.is_empty() {
        settings.witness.clone()
    } else {
        options.witness.clone()
    };
    ensure!(
        !witness.is_empty(),
        "name the witness with --witness or in the replicator's settings"
    );
    let (verdict, reason) = match ask(&options, &settings, &identity, witness).await {
        Ok(answer) => judge(&answer, &host, &remembered),
        Err(error) => (Verdict::Unknown, format!("{error:#}")),
    };
    if options.json {
        let answer = json!({
            "schema": 1,
            "vm": options.vm,
            "host": host,
            "verdict": verdict.word(),
            "reason": reason,
        });
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        println!("{} on {host}: {} ({reason})", options.vm, verdict.word());
    }
    Ok(verdict.code())
}

async fn ask(
    options: &MayRunOptions,
    settings: &Replicator,
    identity: &Identity,
    witness: Vec<PeerAddress>,
) -> anyhow::Result<Answer> {
    let endpoint = Arc::new(Endpoint::client(
        identity,
        &settings.network,
        Service::Witness,
        None,
    )?);
    let client = WitnessClient::new(endpoint, witness).with_deadline(options.timeout, options.timeout / 4);
    let request = WitnessRequest {
        vm: options.vm.clone(),
        host: identity.host().clone(),
        nonce: Nonce(romulus_host_sys::random::random_u128()?),
        ask: Ask::Read,
    };
    Ok(client.ask(request).await?.answer)
}

/// What the daemons of this host remember of the record.
fn remembered(state_dir: &Path, vm: &VmId) -> anyhow::Result<Vec<Remembered>> {
    let file = |daemon: &str| -> PathBuf { state_dir.join(daemon).join(format!("{vm}.json")) };
    let mut found = Vec::new();
    for path in DAEMONS.map(file) {
        found.extend(RecordFile::<Remembered>::read(&path)?);
    }
    Ok(found)
}

fn judge(answer: &Answer, host: &HostId, remembered: &[Remembered]) -> (Verdict, String) {
    let record = match answer {
        Answer::Current(record) => record,
        Answer::UnknownVm => {
            return (
                Verdict::Unknown,
                "the witness does not know this VM: it was never protected, or the witness lost its store"
                    .to_owned(),
            );
        }
        Answer::WrongInstance(_) | Answer::Granted(_) | Answer::Refused(_) => {
            return (
                Verdict::Unknown,
                "the witness's record is of another store: an operator has to say what is true".to_owned(),
            );
        }
    };
    let older = |known: &Remembered| known.instance != record.instance || known.term > record.term;
    if remembered.iter().any(older) {
        return (
            Verdict::Unknown,
            "the witness is another one than this host remembers, or one restored from an old copy"
                .to_owned(),
        );
    }
    match &record.mode {
        Mode::Alone { host: named } if named == host => (
            Verdict::MayRun,
            format!("the record names this host, term {}", record.term),
        ),
        Mode::Alone { host: named } => (Verdict::MustNot, format!("{named} runs it, term {}", record.term)),
        Mode::Paired { primary, backup, .. } => (
            Verdict::MustNot,
            format!(
                "the record pairs {primary} and {backup}, term {}: what clients have seen is in the checkpoints of {backup}, \
                 not on a disk; fail over there",
                record.term
            ),
        ),
        Mode::Ended => (
            Verdict::MustNot,
            "it was powered off on purpose: start it by hand on one host, and protect it with --register"
                .to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use romulus_protocol::Record;
    use romulus_types::{Epoch, Session, Term, WitnessInstance};

    use super::*;

    fn host(name: &str) -> HostId {
        HostId::new(name).unwrap()
    }

    fn current(mode: Mode) -> Answer {
        Answer::Current(Record {
            instance: WitnessInstance(1),
            term: Term(5),
            mode,
            nonce: Nonce(0),
        })
    }

    fn alone(name: &str) -> Answer {
        current(Mode::Alone { host: host(name) })
    }

    fn known(instance: u128, term: u64) -> Remembered {
        Remembered {
            instance: WitnessInstance(instance),
            term: Term(term),
        }
    }

    #[test]
    fn only_the_host_that_the_record_names_alone_may_start_a_vm_from_its_disk() {
        let paired = current(Mode::Paired {
            primary: host("a"),
            backup: host("b"),
            session: Session(1),
            first_epoch: Epoch(1),
        });
        let verdict = |answer: &Answer| judge(answer, &host("a"), &[known(1, 5)]).0;
        assert_eq!(verdict(&alone("a")), Verdict::MayRun);
        assert_eq!(verdict(&alone("b")), Verdict::MustNot);
        assert_eq!(verdict(&paired), Verdict::MustNot);
        assert_eq!(verdict(&current(Mode::Ended)), Verdict::MustNot);
        assert_eq!(verdict(&Answer::UnknownVm), Verdict::Unknown);
        assert_eq!(
            verdict(&Answer::WrongInstance(WitnessInstance(2))),
            Verdict::Unknown
        );
    }

    #[test]
    fn a_witness_that_forgot_what_this_host_remembers_is_no_permission() {
        for remembered in [known(1, 6), known(2, 5)] {
            assert_eq!(judge(&alone("a"), &host("a"), &[remembered]).0, Verdict::Unknown);
        }
    }
}
