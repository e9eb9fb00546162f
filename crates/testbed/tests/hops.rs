//! A machine goes from process to process, and neither the guest nor its clients notice anything but time.

mod common;

use std::path::Path;
use std::time::Duration;

use common::hop::Session;
use common::network::Network;
use common::service::Service;
use common::vmm::Vmm;

const TESTBED: &str = env!("CARGO_BIN_EXE_testbed");
const HOPS: usize = 6;
const DISK_BYTES: u64 = 8 << 20;

/// Moves a machine with network, disk and self-checks `HOPS` times.
fn hop_around(vcpus: &str) {
    let mut network = Network::new();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    let disk = disk.to_str().unwrap();
    let words = "check=on log=on dirty=random/counter:200:5:8";
    let run = [
        "--memory",
        "48",
        "--vcpus",
        vcpus,
        "--disk",
        disk,
        "--cmdline",
        words,
    ];
    let program = Path::new(TESTBED);
    let mut vmm = Vmm::start(program, folder.path(), "vm0", "run", Some("tap0"), &run);
    drop(vmm.attach());
    network.join("tap0");
    let mut service = Service::connect();
    assert_eq!(service.ask("SET first kept"), "+OK");
    let mut clock_ns = 0;
    for hop in 1..=HOPS {
        let tap = format!("tap{hop}");
        let name = format!("vm{hop}");
        let mut standby = Vmm::start(
            program,
            folder.path(),
            &name,
            "standby",
            Some(&tap),
            &["--disk", disk],
        );
        let mut session = Session::begin(&mut vmm);
        let waiting = session.prepare(&mut standby);
        network.join(&tap);
        for epoch in 0..3 {
            assert_eq!(service.ask(&format!("SET hop{hop} epoch{epoch}")), "+OK");
            std::thread::sleep(Duration::from_millis(5));
            session.checkpoint();
        }
        // On its way when the guest stops, in one direction or the other.
        service.send(&format!("INCR hops{hop}"));
        session.last_checkpoint();
        assert_eq!(
            session.differences(),
            Vec::<u64>::new(),
            "pages that the bitmap missed, at hop {hop}"
        );
        vmm.kill();
        session.activate(waiting);
        vmm = standby;
        assert_eq!(service.reply(), "1", "the request is answered once");
        assert_eq!(service.ask("GET first"), "kept");
        assert_eq!(service.ask(&format!("GET hop{hop}")), "epoch2");
        assert_eq!(service.ask("SELFCHECK"), "+OK");
        let clock = service.ask("CLOCK");
        let now_ns: u64 = clock.split(' ').next().unwrap().parse().unwrap();
        assert!(
            now_ns > clock_ns,
            "the guest's clock went from {clock_ns} to {now_ns}"
        );
        clock_ns = now_ns;
    }
    assert_eq!(vmm.ended(), None);
}

#[test]
fn a_guest_of_one_vcpu_goes_on_in_process_after_process() {
    hop_around("1");
}

#[test]
fn a_guest_of_two_vcpus_goes_on_in_process_after_process() {
    hop_around("2");
}
