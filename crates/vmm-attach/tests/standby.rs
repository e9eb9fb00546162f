//! A guest moves from one VMM to another by a checkpoint. Against fake VMMs, which refuse a state over the memory of another
//! moment.

mod common;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use common::{LONG, Vmm, empty, running};
use romulus_vmm_attach::client::{Client, ClientError};
use romulus_vmm_attach::fake::Call;
use romulus_vmm_attach::memfd;
use romulus_vmm_attach::proto::{ErrorCode, MachineInfo, Role};

/// A checkpoint: the machine, its memory in files of its own, and its state.
struct Taken {
    info: MachineInfo,
    files: Vec<OwnedFd>,
    state: Vec<u8>,
}

impl Taken {
    fn of(vmm: &Vmm) -> Self {
        let (mut client, attachment) = vmm.client();
        client.arm().unwrap();
        client.pause(LONG).unwrap();
        let captured = client.captured().unwrap();
        let mut state = Vec::new();
        client.read_state(&captured, &mut state).unwrap();
        let info = attachment.welcome.machine.unwrap();
        let regions = info.regions.iter().zip(attachment.regions);
        let files = regions
            .map(|(region, file)| {
                let mut bytes = vec![0; usize::try_from(region.bytes).unwrap()];
                File::from(file)
                    .read_exact_at(&mut bytes, region.fd_offset)
                    .unwrap();
                let copy = File::from(memfd::sealed("image", region.bytes).unwrap());
                copy.write_all_at(&bytes, 0).unwrap();
                copy.into()
            })
            .collect();
        client.resume().unwrap();
        Self { info, files, state }
    }

    fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.files.iter().map(AsFd::as_fd).collect()
    }

    fn first_word(&self) -> [u8; 8] {
        let file = File::from(self.files[0].try_clone().unwrap());
        let mut word = [0; 8];
        file.read_exact_at(&mut word, 0).unwrap();
        word
    }
}

fn code(result: Result<impl std::fmt::Debug, ClientError>) -> ErrorCode {
    match result {
        Err(ClientError::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_goes_on_in_another_vmm_from_its_checkpoint() {
    let mut vmm = running(|_| {});
    for _ in 0..5 {
        vmm.runs();
        let taken = Taken::of(&vmm);
        let next = empty();
        let (mut client, attachment) = next.client();
        assert_eq!(
            (attachment.welcome.role, attachment.welcome.machine),
            (Role::Empty, None)
        );
        client.prepare(&taken.info, &taken.borrowed(), false).unwrap();
        client.restore(&taken.state).unwrap();
        next.stands_still();
        client.activate().unwrap();
        next.runs();
        // The memory is the files' own.
        assert_ne!(taken.first_word()[..], taken.state[8..16]);
        client.halt(false).unwrap();
        client.go().unwrap();
        assert_eq!(
            code(client.arm()),
            ErrorCode::WrongOrder,
            "there is no bitmap on this connection"
        );
        drop(client);
        next.is_well();
        vmm = next;
    }
}

#[test]
fn a_trial_leaves_the_files_as_they_are_and_never_runs() {
    let taken = Taken::of(&running(|_| {}));
    let trial = empty();
    let (mut client, _) = trial.client();
    client.prepare(&taken.info, &taken.borrowed(), true).unwrap();
    client.restore(&taken.state).unwrap();
    assert_eq!(code(client.activate()), ErrorCode::TrialOnly);
    drop(client);
    let (mut client, attachment) = trial.client();
    assert_eq!(attachment.welcome.role, Role::Prepared);
    client.restore(&taken.state).unwrap();
    assert_eq!(
        code(client.activate()),
        ErrorCode::TrialOnly,
        "also for another client"
    );
    assert!(!trial.machine.is_running());
    assert_eq!(taken.first_word()[..], taken.state[8..16]);
}

#[test]
fn a_standby_waits_for_the_next_client_when_one_is_gone() {
    let taken = Taken::of(&running(|_| {}));
    let standby = empty();
    let prepared = |role: Role| {
        let (client, attachment) = standby.client();
        assert_eq!(attachment.welcome.role, role);
        client
    };
    drop(prepared(Role::Empty));
    let mut client = prepared(Role::Empty);
    client.prepare(&taken.info, &taken.borrowed(), false).unwrap();
    drop(client);
    let mut client = prepared(Role::Prepared);
    client.restore(&taken.state).unwrap();
    drop(client);
    // What was restored by somebody else is not activated.
    let mut client = prepared(Role::Prepared);
    assert_eq!(code(client.activate()), ErrorCode::WrongOrder);
    client.restore(&taken.state).unwrap();
    client.activate().unwrap();
    drop(client);
    standby.is_well();
}

#[test]
fn a_restore_that_fails_can_be_tried_again_and_does_not_run() {
    let vmm = running(|_| {});
    let (old, taken) = (Taken::of(&vmm), {
        vmm.runs();
        Taken::of(&vmm)
    });
    let standby = empty();
    let (mut client, _) = standby.client();
    client.prepare(&taken.info, &taken.borrowed(), false).unwrap();
    client.restore(&taken.state).unwrap();
    assert_eq!(code(client.restore(&old.state)), ErrorCode::MachineFailed);
    assert_eq!(code(client.activate()), ErrorCode::WrongOrder);
    assert!(!standby.machine.is_running());
    client.restore(&taken.state).unwrap();
    client.activate().unwrap();
    standby.runs();
}

#[test]
fn an_activation_that_fails_needs_another_restore() {
    let taken = Taken::of(&running(|_| {}));
    let standby = empty();
    let (mut client, _) = standby.client();
    client.prepare(&taken.info, &taken.borrowed(), false).unwrap();
    client.restore(&taken.state).unwrap();
    standby.machine.fail_next(Call::Activate);
    assert_eq!(code(client.activate()), ErrorCode::MachineFailed);
    assert_eq!(code(client.activate()), ErrorCode::WrongOrder);
    assert!(!standby.machine.is_running());
    client.restore(&taken.state).unwrap();
    client.activate().unwrap();
    standby.runs();
}

#[test]
fn a_client_checks_what_it_is_about_to_send() {
    let taken = Taken::of(&running(|_| {}));
    let standby = empty();
    let (mut client, _) = standby.client();
    let one = client.prepare(&taken.info, &taken.borrowed()[..1], false);
    assert!(
        matches!(
            one,
            Err(ClientError::Descriptors {
                came: 1,
                wanted: 2,
                ..
            })
        ),
        "{one:?}"
    );
    let mut wrong = taken.info.clone();
    wrong.regions.clear();
    assert!(matches!(
        client.prepare(&wrong, &[], false),
        Err(ClientError::Proto(_))
    ));
    client.prepare(&taken.info, &taken.borrowed(), false).unwrap();
}

#[test]
fn where_no_vmm_is_the_error_names_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nobody.sock");
    let error = Client::connect(&path, "test", LONG).unwrap_err();
    assert!(error.to_string().contains("nobody.sock"), "{error}");
}
