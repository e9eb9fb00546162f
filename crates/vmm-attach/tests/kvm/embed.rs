//! The example for authors of VMMs does what it says.

#[allow(dead_code)]
#[path = "../../examples/embed.rs"]
mod example;

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use romulus_vmm_attach::client::Client;
use romulus_vmm_attach::proto::Role;

use crate::guest::wait_for;
use example::Counter;

const LONG: Duration = Duration::from_secs(1);

#[test]
fn a_guest_of_the_example_moves_to_its_standby_by_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = (folder.path().join("here"), folder.path().join("there"));
    let (old, new) = (Counter::default(), Counter::default());
    let vmm = example::run(&here, old.clone()).unwrap();
    let waiting = example::standby(&there, new.clone()).unwrap();
    let rings = |counter: &Counter| counter.0.load(Ordering::SeqCst);
    wait_for("the guest rings", || rings(&old) > 3);

    let (mut client, attachment) = Client::connect(&here, "test", LONG).unwrap();
    client.set_reply_limit(Duration::from_secs(20));
    client.arm().unwrap();
    let armed_at = rings(&old);
    wait_for("the guest rings on", || rings(&old) > armed_at + 1);
    assert!(client.pause(LONG).unwrap().dirty_pages > 0);
    let captured = client.captured().unwrap();
    let mut state = Vec::new();
    client.read_state(&captured, &mut state).unwrap();
    client.halt(true).unwrap();
    let at_checkpoint = rings(&old);

    let (mut standby, welcome) = Client::connect(&there, "test", LONG).unwrap();
    standby.set_reply_limit(Duration::from_secs(20));
    assert_eq!(welcome.welcome.role, Role::Empty);
    let info = attachment.welcome.machine.unwrap();
    let memory: Vec<_> = attachment.regions.iter().map(AsFd::as_fd).collect();
    standby.prepare(&info, &memory, false).unwrap();
    standby.restore(&state).unwrap();
    standby.activate().unwrap();
    wait_for("the guest rings on, from where it was", || {
        rings(&new) > at_checkpoint
    });
    assert_eq!(rings(&old), at_checkpoint, "it rings in one place only");
    drop((vmm, waiting));
}
