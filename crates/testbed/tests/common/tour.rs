//! A machine that hops from process to process, with a client that never loses its connection.

use std::path::Path;
use std::time::Duration;

use super::hop::Session;
use super::network::Network;
use super::service::Service;
use super::vmm::Vmm;

const DISK_BYTES: u64 = 8 << 20;
/// All of memory is compared at one hop in so many, and at the first ones.
const COMPARE_EVERY: usize = 64;

/// Moves a machine with network, disk and self-checks `hops` times.
///
/// # Panics
/// When the guest or its client notices anything but time.
pub fn hop_around(program: &Path, vcpus: &str, hops: usize, mut told: impl FnMut(usize)) {
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
    let mut vmm = Vmm::start(program, folder.path(), "vm0", "run", Some("tap0"), &run);
    drop(vmm.attach());
    network.join("tap0");
    let mut service = Service::connect();
    assert_eq!(service.ask("SET first kept"), "+OK");
    let mut clock_ns = 0;
    for hop in 1..=hops {
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
        if hop < COMPARE_EVERY || hop.is_multiple_of(COMPARE_EVERY) {
            assert_eq!(
                session.differences(),
                Vec::<u64>::new(),
                "pages that the bitmap missed, at hop {hop}"
            );
        }
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
        told(hop);
    }
    assert_eq!(vmm.ended(), None);
}
