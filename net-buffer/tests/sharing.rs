//! Crashes, leftovers, and other people's filters on the same tap. Needs root.

mod lab;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use lab::{GUEST, Lab, frame, run};
use net_buffer::{Announcer, Gate, GateError, GateOptions, LearntAddress, Mac, announce};
use romulus_host_sys::tap::Tap;
use romulus_types::Epoch;

/// The filters on the guest's tap, without the numbers that change from run to run.
fn traces() -> String {
    run("tc qdisc show dev nbg0") + &run("tc filter show dev nbg0 ingress")
}

#[test]
fn a_gate_that_was_never_closed_leaves_no_trace() {
    let lab = Lab::new();
    let before = traces();
    drop(lab.gate());
    assert_eq!(traces(), before);
    lab.guest_sends(&frame("free"));
    assert_eq!(lab.client_gets(1), [frame("free")]);
}

/// Not a test by itself: the process that the next tests kill, started by them in their namespace.
#[test]
fn helper_process_that_holds_a_gate() {
    if std::env::var_os("NB_HOLD_A_GATE").is_none() {
        return;
    }
    let gate = Gate::prepare(&GateOptions::new("nbg0")).unwrap();
    gate.close().unwrap();
    println!("closed");
    loop {
        std::thread::park();
    }
}

fn start_holder() -> std::process::Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_process_that_holds_a_gate", "--nocapture"])
        .env("NB_HOLD_A_GATE", "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut lines = lines.map_while(Result::ok);
    assert!(
        lines.any(|line| line.contains("closed")),
        "the holder did not close its gate"
    );
    child
}

#[test]
fn a_killed_process_leaves_the_guest_mute_until_its_gate_is_removed() {
    let lab = Lab::new();
    let before = traces();
    let mut holder = start_holder();
    lab.guest_sends(&frame("held when it dies"));
    assert!(matches!(Gate::remove_stale("nbg0"), Err(GateError::InUse { .. })));
    assert!(matches!(
        Gate::prepare(&GateOptions::new("nbg0")),
        Err(GateError::InUse { .. })
    ));
    holder.kill().unwrap();
    holder.wait().unwrap();
    lab.guest_sends(&frame("after its death"));
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
    assert!(matches!(
        Gate::prepare(&GateOptions::new("nbg0")),
        Err(GateError::Stale { .. })
    ));

    lab::remove_stale();
    assert_eq!(traces(), before);
    assert!(!Gate::remove_stale("nbg0").unwrap(), "nothing is left to remove");
    lab.guest_sends(&frame("free again"));
    assert_eq!(lab.client_gets(1), [frame("free again")]);
    lab.closed_gate().open_and_remove().unwrap();
}

#[test]
fn a_dropped_closed_gate_is_mute_and_can_be_removed() {
    let lab = Lab::new();
    drop(lab.closed_gate());
    lab.guest_sends(&frame("mute"));
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
    lab::remove_stale();
    lab.guest_sends(&frame("free"));
    assert_eq!(lab.client_gets(1), [frame("free")]);
}

#[test]
fn filters_of_others_see_each_frame_once_and_survive() {
    for qdisc in ["clsact", "ingress"] {
        let lab = Lab::new();
        run(&format!("tc qdisc add dev nbg0 {qdisc}"));
        // Classic BPF: drop what still has the gate's mark, go on with the rest. And a copy of every frame to a tap of ours.
        let no_mark = "4,32 0 0 4294963220,21 0 1 1380796245,6 0 0 2,6 0 0 4294967295";
        let filter = "tc filter add dev nbg0 ingress protocol all prio 5 bpf direct-action bytecode";
        lab::run_with(filter, &[no_mark]);
        let copies = Tap::create("nbm0", true).unwrap();
        run("ip link set nbm0 up");
        run(
            "tc filter add dev nbg0 ingress protocol all prio 10 u32 match u32 0 0 action mirred egress mirror dev nbm0",
        );
        let before = traces();
        let gate = lab.closed_gate();
        lab.guest_sends(&frame("counted"));
        gate.barrier(Epoch(1)).unwrap();
        assert_eq!(lab::received(&copies), []);
        gate.release(Epoch(1)).unwrap();
        assert_eq!(lab.client_gets(1), [frame("counted")]);
        let copied: Vec<_> = lab::received(&copies)
            .into_iter()
            .map(|(_, frame)| frame)
            .collect();
        assert_eq!(copied, [frame("counted")]);
        gate.open_and_remove().unwrap();
        assert_eq!(traces(), before);
        // The same when the gate is left behind by a crash.
        drop(lab.closed_gate());
        lab::remove_stale();
        assert_eq!(traces(), before);
    }
}

#[test]
fn filters_that_others_add_later_keep_their_qdisc() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    run("tc filter add dev nbg0 egress protocol all prio 10 u32 match u32 0 0 flowid 1:1");
    gate.open_and_remove().unwrap();
    assert!(run("tc filter show dev nbg0 egress").contains("u32"));
    assert_eq!(run("tc filter show dev nbg0 ingress"), "");
}

#[test]
fn a_filter_that_would_run_first_is_refused() {
    let lab = Lab::new();
    run("tc qdisc add dev nbg0 clsact");
    run("tc filter add dev nbg0 ingress protocol ip prio 1 u32 match u32 0 0 flowid 1:1");
    let before = traces();
    let refused = Gate::prepare(&GateOptions::new("nbg0"));
    assert!(
        matches!(refused, Err(GateError::RunsBefore { .. })),
        "{refused:?}"
    );
    assert_eq!(traces(), before);
    drop(lab);
}

#[test]
fn what_is_not_a_tap_is_refused_by_name() {
    let _lab = Lab::new();
    run("ip link add nbv0 type veth peer name nbv1");
    let prepare = |tap: &str| Gate::prepare(&GateOptions::new(tap)).unwrap_err();
    assert!(matches!(prepare("nbv0"), GateError::NotATap { kind, .. } if kind == "veth"));
    assert!(matches!(prepare("lo"), GateError::NotATap { .. }));
    for name in ["nothere", "", "a name that is much too long for an interface"] {
        let error = prepare(name);
        assert!(
            matches!(error, GateError::NoSuchTap { .. }),
            "{name:?}: {error:?}"
        );
    }
}

#[test]
fn a_gate_that_others_took_apart_says_so() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    gate.check().unwrap();
    run("tc qdisc del dev nbg0 clsact");
    assert!(matches!(gate.check(), Err(GateError::FilterLost { .. })));
    gate.open_and_remove().unwrap();

    let gate = lab.closed_gate();
    run(&format!("ip link del {}", gate.relay_name()));
    assert!(matches!(gate.check(), Err(GateError::RelayLost { .. })));
    assert!(matches!(gate.barrier(Epoch(1)), Err(GateError::RelayLost { .. })));
    lab.guest_sends(&frame("mute"));
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
}

#[test]
fn a_gate_outlives_a_tap_that_goes() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    run("ip link del nbg0");
    gate.barrier(Epoch(1)).unwrap();
    gate.release(Epoch(1)).unwrap();
    assert!(gate.check().is_err());
    gate.open_and_remove().unwrap();
}

#[test]
fn announcements_come_from_the_guests_port() {
    let lab = Lab::new();
    let address = |ip: &str| LearntAddress {
        mac: Mac(GUEST),
        vlan: None,
        ip: Some(ip.parse().unwrap()),
        router: false,
    };
    let addresses = vec![address("10.99.0.2"), address("fe80::2")];
    let expected = announce::frames(&addresses);
    let announcing = Announcer::prepare("nbg0").unwrap().repeat(addresses).unwrap();
    // At once, and again.
    let got = lab.client_gets(2 * expected.len());
    assert_eq!(got, [expected.clone(), expected].concat());
    let learnt = run("bridge fdb show br nbbr0");
    let ours = learnt
        .lines()
        .find(|l| l.starts_with("52:54:00:99:00:02"))
        .expect("the MAC is learnt");
    assert!(ours.contains("dev nbg0"), "{ours}");
    drop(announcing);
    lab::eventually("removing the announcer", || !run("ip -o link").contains("romann"));
}

#[test]
fn announcements_on_a_gated_tap_are_held_like_the_guests_frames() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    let mac_only = LearntAddress {
        mac: Mac(GUEST),
        vlan: None,
        ip: None,
        router: false,
    };
    let announcer = Announcer::prepare("nbg0").unwrap();
    assert_eq!(announcer.announce(std::slice::from_ref(&mac_only)), 1);
    // The write returns when the frame is in the relay's queue or in that of a softirq: wait for the gate to see it.
    while gate.learnt().is_empty() {
        std::thread::yield_now();
    }
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
    assert_eq!(gate.learnt(), [mac_only]);
}
