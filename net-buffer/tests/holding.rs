//! What the gate holds, releases and lets alone, on real taps and a real bridge. Needs root.

mod lab;

use std::net::IpAddr;

use lab::{GUEST, Lab, NO_OFFLOAD, ethernet, frame, large_tcp, received, run, send};
use net_buffer::{Gate, GateError, GateOptions, LearntAddress, Mac, announce};
use romulus_host_sys::tap::Tap;
use romulus_types::Epoch;

#[test]
fn an_open_gate_changes_nothing() {
    let lab = Lab::new();
    let gate = lab.gate();
    lab.guest_sends(&frame("free"));
    gate.barrier(Epoch(1)).unwrap();
    assert_eq!(lab.client_gets(1), [frame("free")]);
    assert_eq!(gate.stats().held_frames, 0);
}

#[test]
fn held_output_wakes_who_waits_for_it_until_its_epoch_ends() {
    let lab = Lab::new();
    let waits = std::thread::current();
    let gate = Gate::prepare(&GateOptions {
        unparks: Some(waits),
        ..GateOptions::new("nbg0")
    })
    .unwrap();
    gate.close().unwrap();
    assert!(!gate.holds_output());
    lab.guest_sends(&frame("held"));
    // For ever, were nobody to unpark it.
    while !gate.holds_output() {
        std::thread::park();
    }
    gate.barrier(Epoch(1)).unwrap();
    assert!(!gate.holds_output(), "it is of an epoch that has ended");
    assert_eq!(gate.stats().held_frames, 1);
    lab.guest_sends(&frame("held as well"));
    gate.barrier(Epoch(2)).unwrap();
    gate.release(Epoch(2)).unwrap();
    assert_eq!(lab.client_gets(2), [frame("held"), frame("held as well")]);
    assert!(!gate.holds_output());
}

#[test]
fn every_protocol_is_held_and_comes_out_whole_and_in_order() {
    let lab = Lab::new();
    let mac = Mac(GUEST);
    let (large_header, large) = large_tcp();
    let plain = NO_OFFLOAD.to_vec();
    let ipv6 = announce::neighbour_advertisement(mac, None, "fe80::2".parse().unwrap(), false);
    let stacked = ethernet(
        &[0xff; 6],
        &GUEST,
        &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 5, 0x88, 0xb5],
        b"two tags",
    );
    let sent = [
        (
            plain.clone(),
            announce::gratuitous_arp(mac, None, [10, 99, 0, 2].into())[0].clone(),
        ),
        (plain.clone(), ipv6),
        (plain.clone(), announce::rarp(mac, Some(5))),
        (plain.clone(), lab::multicast()),
        (large_header, large),
        (plain.clone(), stacked),
        (plain, frame("no protocol at all")),
    ];
    let send_all = || {
        sent.iter()
            .for_each(|(header, frame)| send(&lab.guest, header, frame))
    };
    // What arrives without a gate is the measure: a bridge may trim padding, for instance.
    let gate = lab.gate();
    send_all();
    let reference = lab::receive(&lab.client, sent.len());
    let large = &reference[4];
    assert_eq!(
        (large.0[1], large.1.len()),
        (1, 8054),
        "segmentation offload is not kept whole even without a gate"
    );

    gate.close().unwrap();
    send_all();
    gate.barrier(Epoch(1)).unwrap();
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
    assert_eq!(gate.stats().held_frames, sent.len());
    gate.release(Epoch(1)).unwrap();
    assert_eq!(lab::receive(&lab.client, sent.len()), reference);
    let stats = gate.stats();
    assert_eq!((stats.held_frames, stats.released_frames), (0, sent.len() as u64));
    assert_eq!(stats.dropped_by_kernel_frames, 0);
}

#[test]
fn a_barrier_separates_epochs_exactly() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    for epoch in 1..=50 {
        for i in 0..40 {
            lab.guest_sends(&frame(&format!("{epoch}.{i}")));
        }
        gate.barrier(Epoch(epoch)).unwrap();
    }
    lab.guest_sends(&frame("51"));
    for epoch in 1..=50 {
        gate.release(Epoch(epoch)).unwrap();
        let expected: Vec<_> = (0..40).map(|i| frame(&format!("{epoch}.{i}"))).collect();
        assert_eq!(lab.client_gets(40), expected);
    }
    gate.release(Epoch(50)).unwrap();
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
}

#[test]
fn the_numbers_of_barriers_before_closing_count() {
    let lab = Lab::new();
    let gate = lab.gate();
    gate.barrier(Epoch(6)).unwrap();
    gate.close().unwrap();
    gate.barrier(Epoch(7)).unwrap();
    lab.guest_sends(&frame("eight"));
    gate.release(Epoch(7)).unwrap();
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
    gate.barrier(Epoch(8)).unwrap();
    gate.release(Epoch(8)).unwrap();
    assert_eq!(lab.client_gets(1), [frame("eight")]);
}

#[test]
#[should_panic(expected = "release of epoch 1 while 1 is running")]
fn releasing_an_epoch_that_still_runs_is_a_broken_invariant() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    let _ = gate.release(Epoch(1));
}

#[test]
fn a_long_burst_is_held_completely_and_leaves_in_order() {
    let lab = Lab::new();
    // The client's queue must take the burst as well.
    run("ip link set nbc0 txqueuelen 10000");
    let gate = lab.closed_gate();
    let frames: Vec<_> = (0..5000).map(|i| frame(&format!("number {i}"))).collect();
    for frame in &frames {
        lab.guest_sends(frame);
    }
    gate.barrier(Epoch(1)).unwrap();
    assert_eq!(gate.stats().held_frames, 5000);
    gate.release(Epoch(1)).unwrap();
    assert_eq!(lab.client_gets(5000), frames);
}

#[test]
fn what_is_over_the_limit_is_dropped_and_counted_and_never_sent_early() {
    let lab = Lab::new();
    let options = GateOptions {
        held_frames_max: 3,
        ..GateOptions::new("nbg0")
    };
    let gate = Gate::prepare(&options).unwrap();
    gate.close().unwrap();
    for i in 0..5 {
        lab.guest_sends(&frame(&format!("{i}")));
    }
    gate.barrier(Epoch(1)).unwrap();
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
    assert_eq!(gate.stats().dropped_by_limit_frames, 2);
    gate.release(Epoch(1)).unwrap();
    assert_eq!(lab.client_gets(3), [frame("0"), frame("1"), frame("2")]);
}

#[test]
fn frames_to_the_guest_never_wait() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    let inbound = ethernet(&GUEST, &[0x52, 0x54, 0, 0x99, 0, 9], &[0x88, 0xb5], b"inbound");
    send(&lab.client, &NO_OFFLOAD, &inbound);
    assert_eq!(received(&lab.guest)[0].1, inbound);
    gate.barrier(Epoch(1)).unwrap();
    assert_eq!(gate.stats().held_frames, 0);
}

#[test]
fn opening_releases_everything_in_order_and_leaves_no_trace() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    let relay = gate.relay_name().to_owned();
    lab.guest_sends(&frame("first"));
    gate.barrier(Epoch(1)).unwrap();
    lab.guest_sends(&frame("second, of an epoch that still runs"));
    let stats = gate.open_and_remove().unwrap();
    assert_eq!(stats.released_frames, 2);
    lab.guest_sends(&frame("third"));
    let all = [
        frame("first"),
        frame("second, of an epoch that still runs"),
        frame("third"),
    ];
    assert_eq!(lab.client_gets(3), all);
    assert_eq!(run("tc filter show dev nbg0 ingress"), "");
    assert!(!run("tc qdisc show dev nbg0").contains("clsact"));
    lab::eventually("removing the relay", || !run("ip -o link").contains(&relay));
    // And again: a gate that was removed is no obstacle to the next.
    let again = lab.closed_gate();
    lab.guest_sends(&frame("fourth"));
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
    again.open_and_remove().unwrap();
    assert_eq!(lab.client_gets(1), [frame("fourth")]);
}

#[test]
fn what_was_discarded_never_leaves_and_the_guest_stays_mute() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    lab.guest_sends(&frame("held"));
    gate.barrier(Epoch(1)).unwrap();
    gate.discard();
    lab.guest_sends(&frame("later"));
    gate.barrier(Epoch(2)).unwrap();
    assert_eq!(gate.stats().discarded_frames, 2);
    assert!(matches!(gate.release(Epoch(1)), Err(GateError::Discarded { .. })));
    assert!(matches!(gate.open_and_remove(), Err(GateError::Discarded { .. })));
    lab.guest_sends(&frame("after the gate's end"));
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
}

#[test]
fn two_gates_on_one_bridge_do_not_mix() {
    let lab = Lab::new();
    let other_guest = Tap::create("nbg1", true).unwrap();
    run("ip link set nbg1 master nbbr0 up");
    let (one, two) = (
        lab.closed_gate(),
        Gate::prepare(&GateOptions::new("nbg1")).unwrap(),
    );
    two.close().unwrap();
    let theirs = lab::frame_from([0x52, 0x54, 0, 0x99, 0, 3], b"two");
    lab.guest_sends(&frame("one"));
    send(&other_guest, &NO_OFFLOAD, &theirs);
    one.barrier(Epoch(1)).unwrap();
    two.barrier(Epoch(1)).unwrap();
    one.release(Epoch(1)).unwrap();
    assert_eq!(lab.client_gets(1), [frame("one")]);
    assert_eq!((one.stats().held_frames, two.stats().held_frames), (0, 1));
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
    two.release(Epoch(1)).unwrap();
    assert_eq!(lab.client_gets(1), [theirs]);
}

#[test]
fn a_tap_without_virtio_net_header_is_gated_as_well() {
    let lab = Lab::with_guest_header(false);
    let gate = lab.closed_gate();
    send(&lab.guest, &[], &frame("bare"));
    gate.barrier(Epoch(1)).unwrap();
    assert_eq!(lab.client_has(), Vec::<Vec<u8>>::new());
    gate.release(Epoch(1)).unwrap();
    assert_eq!(lab.client_gets(1), [frame("bare")]);
}

#[test]
fn what_the_guest_sends_to_the_host_of_a_routed_tap_arrives_there_also_when_the_taps_address_changes() {
    let lab = Lab::new();
    run("ip link set nbg0 nomaster");
    run("ip addr add 10.99.0.1/24 dev nbg0");
    let socket = std::net::UdpSocket::bind("10.99.0.1:80").unwrap();
    socket
        .set_read_timeout(Some(std::time::Duration::from_secs(30)))
        .unwrap();
    let gate = lab.closed_gate();
    for (epoch, address) in [(1, [0x52, 0x54, 0, 0x99, 1, 1]), (2, [0x52, 0x54, 0, 0x99, 1, 2])] {
        run(&format!("ip link set nbg0 address {}", Mac(address)));
        gate.check().unwrap();
        let text = format!("in epoch {epoch}");
        lab.guest_sends(&lab::datagram(&address, [10, 99, 0, 1], text.as_bytes()));
        gate.barrier(Epoch(epoch)).unwrap();
        socket.set_nonblocking(true).unwrap();
        assert!(socket.recv(&mut [0; 100]).is_err(), "it came before its release");
        socket.set_nonblocking(false).unwrap();
        gate.release(Epoch(epoch)).unwrap();
        let mut got = [0; 100];
        let bytes = socket.recv(&mut got).expect("the host gets it");
        assert_eq!(&got[..bytes], text.as_bytes());
    }
    // What is for another host is not for this one, though it enters by the same way.
    lab.guest_sends(&lab::datagram(
        &[0x52, 0x54, 0, 0x99, 1, 3],
        [10, 99, 0, 1],
        b"not for you",
    ));
    lab.guest_sends(&lab::datagram(
        &[0x52, 0x54, 0, 0x99, 1, 2],
        [10, 99, 0, 1],
        b"for you",
    ));
    gate.barrier(Epoch(3)).unwrap();
    gate.release(Epoch(3)).unwrap();
    let mut got = [0; 100];
    let bytes = socket.recv(&mut got).expect("the host gets it");
    assert_eq!(&got[..bytes], b"for you");
}

#[test]
fn what_the_host_itself_sends_through_the_relay_does_not_become_the_guests() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    let relay = gate.relay_name();
    run(&format!("ip addr add 10.98.0.1/24 dev {relay}"));
    // Nobody answers, but the host asks: ARP requests go into the relay.
    let socket = std::net::UdpSocket::bind("10.98.0.1:0").unwrap();
    socket.send_to(b"anybody?", "10.98.0.2:9").unwrap();
    let dropped = || !run(&format!("tc -s qdisc show dev {relay} clsact")).contains("dropped 0,");
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !dropped() {
        assert!(
            std::time::Instant::now() < until,
            "the ARP requests were not sent"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    gate.barrier(Epoch(1)).unwrap();
    assert_eq!(gate.stats().held_frames, 0);
}

#[test]
fn the_guests_addresses_are_learnt_while_frames_are_held() {
    let lab = Lab::new();
    let gate = lab.closed_gate();
    let address = |vlan, ip: &str| LearntAddress {
        mac: Mac(GUEST),
        vlan,
        ip: Some(ip.parse::<IpAddr>().unwrap()),
        router: false,
    };
    let sent = [
        address(None, "10.99.0.2"),
        address(Some(5), "10.98.0.2"),
        address(None, "fe80::2"),
    ];
    for frame in announce::frames(&sent) {
        lab.guest_sends(&frame);
    }
    gate.barrier(Epoch(1)).unwrap();
    let learnt = gate.learnt();
    assert_eq!(learnt.len(), sent.len());
    assert!(sent.iter().all(|a| learnt.contains(a)), "{learnt:?}");
}
