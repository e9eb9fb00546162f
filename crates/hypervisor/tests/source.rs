//! Attaching to real guests: without a trace afterwards, and refused where it could not protect them.

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use common::Guest;
use common::attach::{Q35, Q35_SHARED, goes_on, options, start, status};
use romulus_hypervisor::qemu::bootstrap::MigrationSettings;
use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use romulus_hypervisor::qemu::source::{AttachError, CaptureError, QemuSource, Refusal, StoppedBy};
use romulus_hypervisor::source::{Checkpoint, GuestEvent, GuestSource};
use serde_json::{Value, json};

/// Not a test of its own: the guardian process of the tests below.
#[test]
fn helper_guardian() {
    common::attach::be_the_guardian_if_asked();
}

fn traces(guest: &Guest, other: &mut Qmp) -> (usize, bool, MigrationSettings) {
    let proc = format!("/proc/{}", guest.process.id());
    let smaps = std::fs::read_to_string(format!("{proc}/smaps")).unwrap();
    let registered = smaps
        .lines()
        .any(|line| line.starts_with("VmFlags") && line.contains(" uw"));
    let fds = std::fs::read_dir(format!("{proc}/fd")).unwrap().count();
    (fds, registered, MigrationSettings::read(other).unwrap())
}

fn attach_leaves_no_trace(arguments: &[&str]) {
    let (guest, mut other) = start(arguments, "counter:50,dirty:200:25");
    let folder = tempfile::tempdir().unwrap();
    // A folder that another user can pass through, too.
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let before = traces(&guest, &mut other);
    assert!(!before.1);
    for _ in 0..3 {
        let mut source = QemuSource::attach(options(&guest, folder.path())).unwrap();
        source.bootstrap().unwrap();
        source.arm().unwrap();
        assert!(traces(&guest, &mut other).1, "attached, so registered");
        let mut checkpoint = Checkpoint::default();
        for _ in 0..3 {
            source.capture(&mut || Ok(()), false, &mut checkpoint).unwrap();
        }
        Box::new(source).detach().unwrap();
        // QEMU closes our monitor connection in its own time.
        let deadline = Instant::now() + Duration::from_secs(10);
        while traces(&guest, &mut other) != before {
            assert!(
                Instant::now() < deadline,
                "{:?} is not {before:?}",
                traces(&guest, &mut other)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(std::fs::read_dir(folder.path().join("fifos")).unwrap().count(), 0);
        goes_on(&guest);
    }
}

#[test]
fn detaching_leaves_no_trace_and_attaching_again_works() {
    attach_leaves_no_trace(Q35_SHARED);
}

#[test]
fn a_qemu_of_another_user_is_protected_without_a_trace() {
    attach_leaves_no_trace(&[Q35, &["-runas", "nobody"]].concat());
}

#[test]
fn what_is_not_gated_is_refused_all_at_once_and_the_guest_is_untouched() {
    let (guest, mut other) = start(&["-accel", "tcg", "-m", "128"], "counter:50");
    let folder = tempfile::tempdir().unwrap();
    let before = traces(&guest, &mut other);
    let mut strict = options(&guest, folder.path());
    strict.allow.disposable = BTreeSet::new();
    strict.taps = vec!["no-such-tap".to_owned()];
    let Err(AttachError::Refused(refusals)) = QemuSource::attach(strict) else {
        panic!("it was not refused")
    };
    let netdev = |r: &Refusal| matches!(r, Refusal::UngatedNetdev { kind, .. } if kind == "user");
    let console = |r: &Refusal| matches!(r, Refusal::UngatedChardev { id, .. } if id == "serial0");
    assert!(
        refusals.iter().any(netdev) && refusals.iter().any(console),
        "{refusals:?}"
    );
    assert!(refusals.contains(&Refusal::TapNotUsed("no-such-tap".into())));
    assert_eq!(refusals.len(), 3, "{refusals:?}");
    goes_on(&guest);
    let after = traces(&guest, &mut other);
    assert!(!after.1 && after.2 == before.2);
}

#[test]
fn a_guest_that_somebody_protects_is_refused_by_name() {
    let (guest, other) = start(Q35, "counter:50");
    drop(other);
    let folder = tempfile::tempdir().unwrap();
    let source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    let refused = QemuSource::attach(options(&guest, folder.path())).err().unwrap();
    assert!(
        matches!(refused, AttachError::ProtectedByAnother { .. }),
        "{refused}"
    );
    drop(source);
    // Not detached: the guardian has to clean up first, and then it works.
    let source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    Box::new(source).detach().unwrap();
    goes_on(&guest);
}

#[test]
fn a_paused_guest_and_a_process_that_is_no_qemu_are_refused() {
    let (guest, mut other) = start(Q35, "counter:50");
    let folder = tempfile::tempdir().unwrap();
    other.execute("stop", Value::Null).unwrap();
    let Err(AttachError::Refused(refusals)) = QemuSource::attach(options(&guest, folder.path())) else {
        panic!("it was not refused")
    };
    assert_eq!(refusals, [Refusal::NotRunning("paused".into())]);
    let mut wrong = options(&guest, folder.path());
    wrong.pid = Some(std::process::id());
    assert!(matches!(
        QemuSource::attach(wrong),
        Err(AttachError::NotQemu { .. })
    ));
}

fn next_events(source: &mut QemuSource) -> Vec<GuestEvent> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let events = source.poll_events();
        if !events.is_empty() {
            return events;
        }
        assert!(Instant::now() < deadline, "no event came");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_others_do_to_the_guest_is_reported() {
    let arguments = ["-nodefaults", "-M", "pc,accel=tcg", "-m", "128"];
    let (guest, mut other) = start(&arguments, "counter:50");
    let folder = tempfile::tempdir().unwrap();
    let mut source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    source.bootstrap().unwrap();
    source.arm().unwrap();
    let mut checkpoint = Checkpoint::default();
    other.execute("stop", Value::Null).unwrap();
    assert_eq!(next_events(&mut source), [GuestEvent::Paused]);
    // A paused guest can still be captured, and stays paused.
    source.capture(&mut || Ok(()), false, &mut checkpoint).unwrap();
    assert_eq!(status(&mut other), "paused");
    other.execute("cont", Value::Null).unwrap();
    assert_eq!(next_events(&mut source), [GuestEvent::Resumed]);
    source.suspend().unwrap();
    assert_eq!(status(&mut other), "paused");
    source.resume().unwrap();
    assert_eq!(source.poll_events(), [], "suspending was our own doing");
    other
        .execute("device_add", json!({"driver": "virtio-rng-pci", "id": "rng7"}))
        .unwrap();
    assert_eq!(next_events(&mut source), [GuestEvent::DevicesChanged]);
    other.execute("system_reset", Value::Null).unwrap();
    assert_eq!(next_events(&mut source), [GuestEvent::Reset]);
    source.bootstrap().unwrap();
    source.arm().unwrap();
    source.capture(&mut || Ok(()), false, &mut checkpoint).unwrap();
    let quit = other.execute("quit", Value::Null);
    assert!(quit.is_ok());
    // A reset may be reported more than once, as the firmware resets the machine again.
    assert_eq!(next_events(&mut source).last(), Some(&GuestEvent::PoweredOff));
    assert!(source.capture(&mut || Ok(()), false, &mut checkpoint).is_err());
    assert_eq!(source.poll_events(), []);
}

/// The refusals for which a bootstrap failed.
fn refused_bootstrap(source: &mut QemuSource) -> Vec<Refusal> {
    let error = source.bootstrap().unwrap_err();
    let cause = error.source.as_ref().and_then(|cause| cause.downcast_ref());
    let Some(CaptureError::Learning(cause)) = cause else {
        panic!("{error}")
    };
    match &**cause {
        AttachError::Refused(refusals) => refusals.clone(),
        other => panic!("{other}"),
    }
}

#[test]
fn a_device_that_cannot_be_protected_is_refused_when_it_is_plugged_in_later() {
    let arguments = ["-nodefaults", "-M", "pc,accel=tcg", "-m", "128"];
    let (guest, mut other) = start(&arguments, "counter:50");
    let folder = tempfile::tempdir().unwrap();
    let plug = |other: &mut Qmp, name: &str| {
        other
            .execute("netdev_add", json!({"type": "user", "id": name}))
            .unwrap();
        let device = json!({"driver": "e1000", "netdev": name, "id": format!("nic-{name}")});
        other.execute("device_add", device).unwrap();
    };
    let ungated = |name: &str| Refusal::UngatedNetdev {
        id: name.into(),
        kind: "user".into(),
        interface: None,
    };
    let mut source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    // Between the attachment, which reads the machine, and the first session.
    plug(&mut other, "late");
    assert_eq!(refused_bootstrap(&mut source), [ungated("late")]);
    assert_eq!(next_events(&mut source), [GuestEvent::DevicesChanged]);
    // It stays refused until the device is gone.
    assert_eq!(refused_bootstrap(&mut source), [ungated("late")]);
    plug(&mut other, "later");
    assert_eq!(refused_bootstrap(&mut source).len(), 2);
    goes_on(&guest);
    Box::new(source).detach().unwrap();
    goes_on(&guest);
}

#[test]
fn the_guardian_knows_the_settings_of_now_before_the_next_bootstrap() {
    let (guest, mut other) = start(Q35, "counter:50");
    let folder = tempfile::tempdir().unwrap();
    let mut source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    source.bootstrap().unwrap();
    let first = guardian_of(&guest).expect("an attachment has a guardian");
    // The operator's new limit has to reach the guardian before the next bootstrap raises it.
    other
        .execute("migrate-set-parameters", json!({"max-bandwidth": 12_345_678}))
        .unwrap();
    let now = MigrationSettings::read(&mut other).unwrap();
    source.bootstrap().unwrap();
    assert_eq!(MigrationSettings::read(&mut other).unwrap(), now);
    let second = guardian_of(&guest).expect("an attachment has a guardian");
    assert_ne!(first, second, "the guardian has the settings of now");
    Box::new(source).detach().unwrap();
    assert_eq!(guardian_of(&guest), None);
}

#[test]
fn a_guest_that_another_host_speaks_for_stays_stopped_and_is_refused_until_it_is_resumed() {
    let (guest, mut other) = start(Q35, "counter:50");
    let folder = tempfile::tempdir().unwrap();
    let mut source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    source.suspend().unwrap();
    source.stop_guest().unwrap();
    // As if it had died.
    drop(source);
    let Err(AttachError::Refused(refusals)) = QemuSource::attach(options(&guest, folder.path())) else {
        panic!("it was not refused")
    };
    assert_eq!(refusals, [Refusal::StoppedByReplicator(StoppedBy::AnotherHost)]);
    other.execute("cont", Value::Null).unwrap();
    let source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    Box::new(source).detach().unwrap();
    assert_eq!(std::fs::read_dir(folder.path().join("fifos")).unwrap().count(), 0);
}

#[test]
fn a_suspended_guest_runs_on_when_its_replicator_dies_or_leaves_and_can_be_attached_to_again() {
    let (guest, mut other) = start(Q35, "counter:50");
    let folder = tempfile::tempdir().unwrap();
    for dies in [true, false] {
        let mut source = QemuSource::attach(options(&guest, folder.path())).unwrap();
        source.suspend().unwrap();
        assert_eq!(source.poll_events(), []);
        assert_eq!(status(&mut other), "paused");
        if dies {
            // Its guardian sees the end of its socket.
            drop(source);
        } else {
            Box::new(source).detach().unwrap();
        }
        goes_on(&guest);
    }
    // Nobody was left to let it run: the next one says so, and does not decide by itself.
    let mut source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    let guardian = guardian_of(&guest).expect("an attachment has a guardian");
    source.suspend().unwrap();
    rustix::process::kill_process(guardian, rustix::process::Signal::KILL).unwrap();
    drop(source);
    let Err(AttachError::Refused(refusals)) = QemuSource::attach(options(&guest, folder.path())) else {
        panic!("it was not refused")
    };
    assert_eq!(refusals, [Refusal::StoppedByReplicator(StoppedBy::Suspension)]);
    other.execute("cont", Value::Null).unwrap();
}

#[test]
fn a_guardian_that_dies_while_the_guest_is_suspended_is_replaced_by_one_that_knows_it() {
    let (guest, mut other) = start(Q35, "counter:50");
    let folder = tempfile::tempdir().unwrap();
    let mut source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    source.suspend().unwrap();
    let first = guardian_of(&guest).expect("an attachment has a guardian");
    rustix::process::kill_process(first, rustix::process::Signal::KILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while guardian_of(&guest).is_none_or(|now| now == first) {
        assert!(Instant::now() < deadline, "no other guardian was started");
        source.poll_events();
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(status(&mut other), "paused");
    drop(source);
    goes_on(&guest);
}

#[test]
fn a_machine_without_a_possible_standby_is_refused_at_attach_and_the_guest_goes_on() {
    let arguments = [Q35, &["-fsdev", "local,id=f,path=/tmp,security_model=none"]].concat();
    let (guest, mut other) = start(&arguments, "counter:50");
    let folder = tempfile::tempdir().unwrap();
    let before = traces(&guest, &mut other);
    let refused = QemuSource::attach(options(&guest, folder.path())).err().unwrap();
    assert!(matches!(refused, AttachError::Standby(_)), "{refused}");
    assert!(refused.to_string().contains("-fsdev"), "{refused}");
    assert_eq!(std::fs::read_dir(folder.path().join("fifos")).unwrap().count(), 0);
    goes_on(&guest);
    let after = traces(&guest, &mut other);
    assert!(!after.1 && after.2 == before.2);
}

#[test]
fn a_qemu_that_is_killed_is_gone() {
    let (mut guest, _other) = start(Q35, "counter:50");
    let folder = tempfile::tempdir().unwrap();
    let mut source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    guest.process.kill().unwrap();
    guest.process.wait().unwrap();
    assert_eq!(next_events(&mut source), [GuestEvent::Gone]);
    assert_eq!(source.poll_events(), []);
    Box::new(source).detach().unwrap();
}

/// The guardian of this guest: the process whose argument names its QMP socket.
fn guardian_of(guest: &Guest) -> Option<rustix::process::Pid> {
    let socket = guest.qmp_path().display().to_string();
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let command = std::fs::read_to_string(entry.path().join("cmdline")).ok()?;
        let is_guardian = command.contains("helper_guardian") && command.contains(&socket);
        is_guardian.then(|| rustix::process::Pid::from_raw(pid))?
    })
}

/// Whether a process is gone, or waits to be reaped. Its command line vanishes before its sockets are closed.
fn has_ended(pid: rustix::process::Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.map_or(true, |line| {
        line.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
    })
}

#[test]
fn a_guardian_that_dies_is_replaced_before_the_next_pause() {
    let (guest, _other) = start(Q35, "counter:50");
    let folder = tempfile::tempdir().unwrap();
    let mut source = QemuSource::attach(options(&guest, folder.path())).unwrap();
    source.bootstrap().unwrap();
    source.arm().unwrap();
    let first = guardian_of(&guest).expect("an attachment has a guardian");
    rustix::process::kill_process(first, rustix::process::Signal::KILL).unwrap();
    let mut checkpoint = Checkpoint::default();
    while !has_ended(first) {
        std::thread::sleep(Duration::from_millis(5));
    }
    source.capture(&mut || Ok(()), false, &mut checkpoint).unwrap();
    assert!(guardian_of(&guest).is_some_and(|second| second != first));
    Box::new(source).detach().unwrap();
    assert_eq!(guardian_of(&guest), None);
    goes_on(&guest);
}
