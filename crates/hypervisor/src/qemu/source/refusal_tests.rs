use serde_json::json;

use super::*;

fn running() -> Facts {
    Facts {
        status: json!({"status": "running"}),
        migration: json!({}),
        ..Facts::default()
    }
}

fn allowing(ids: &[&str]) -> Allowances {
    Allowances {
        disposable: ids.iter().map(|id| (*id).to_owned()).collect(),
    }
}

fn verdict(facts: &Facts, taps: &[&str], allowed: &[&str]) -> Vec<Refusal> {
    let taps: Vec<String> = taps.iter().map(|tap| (*tap).to_owned()).collect();
    check(facts, &taps, &allowing(allowed))
}

#[test]
fn a_machine_without_anything_special_is_accepted() {
    assert_eq!(verdict(&running(), &[], &[]), []);
}

#[test]
fn a_guest_that_is_paused_or_migrates_or_copies_disks_is_refused() {
    let facts = Facts {
        status: json!({"status": "paused"}),
        migration: json!({"status": "active"}),
        block_jobs: json!([{"device": "mirror0", "type": "mirror"}]),
        ..Facts::default()
    };
    let expected = [
        Refusal::NotRunning("paused".into()),
        Refusal::Migration("active".into()),
        Refusal::BlockJob("mirror0".into()),
    ];
    assert_eq!(verdict(&facts, &[], &[]), expected);
}

#[test]
fn a_guest_that_a_replicator_stopped_is_refused_with_who_and_what_to_do() {
    for (by, remedy) in [
        (StoppedBy::Suspension, "resume it yourself"),
        (StoppedBy::AnotherHost, "do not resume it"),
    ] {
        let mut facts = Facts {
            status: json!({"status": "paused"}),
            stopped: Some(by),
            ..running()
        };
        let refused = verdict(&facts, &[], &[]);
        assert_eq!(refused, [Refusal::StoppedByReplicator(by)]);
        assert!(refused[0].to_string().contains(remedy), "{}", refused[0]);
        // Somebody resumed it.
        facts.status = json!({"status": "running"});
        assert_eq!(verdict(&facts, &[], &[]), []);
    }
    let by_somebody = Refusal::NotRunning("paused".into()).to_string();
    assert!(
        by_somebody.contains("cont") && by_somebody.contains("witness"),
        "{by_somebody}"
    );
}

#[test]
fn devices_with_untracked_dma_are_refused_whatever_is_allowed() {
    let tree = "  dev: vfio-pci, id \"gpu\"\n    addr = 01.0\n      dev: vhost-user-blk-pci, id \"\"\n";
    let facts = Facts {
        device_tree: tree.into(),
        ..running()
    };
    let refused = verdict(&facts, &[], &["gpu"]);
    assert_eq!(refused.len(), 2);
    assert!(refused[0].to_string().contains("vfio-pci"), "{}", refused[0]);
}

#[test]
fn vsock_is_refused_unless_it_is_disposable() {
    let facts = Facts {
        device_tree: "dev: vhost-vsock-pci, id \"vs\"\n".into(),
        ..running()
    };
    assert_eq!(verdict(&facts, &[], &[]).len(), 1);
    assert_eq!(verdict(&facts, &[], &["vs"]), []);
}

#[test]
fn a_balloon_is_refused_with_shared_memory_only() {
    let tree = "dev: virtio-balloon-pci, id \"b\"\n dev: virtio-balloon-device, id \"\"\n";
    let facts = Facts {
        device_tree: tree.into(),
        ..running()
    };
    assert_eq!(verdict(&facts, &[], &[]), []);
    let shared = Facts {
        device_tree: tree.into(),
        shared_ram: true,
        ..running()
    };
    assert_eq!(verdict(&shared, &[], &[]).len(), 2);
}

#[test]
fn only_taps_with_a_gate_are_accepted() {
    let network = "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n \\ n0: index=0,type=tap,ifname=tap7,script=no,downscript=no\n";
    let facts = Facts {
        network: network.into(),
        ..running()
    };
    assert_eq!(verdict(&facts, &["tap7"], &[]), []);
    let ungated = Refusal::UngatedNetdev {
        id: "n0".into(),
        kind: "tap".into(),
        interface: Some("tap7".into()),
    };
    assert_eq!(verdict(&facts, &[], &[]), std::slice::from_ref(&ungated));
    assert_eq!(
        verdict(&facts, &["tap8"], &[]),
        [ungated, Refusal::TapNotUsed("tap8".into())]
    );
    assert_eq!(verdict(&facts, &[], &["n0"]), []);
}

#[test]
fn slirp_on_a_hub_is_refused_by_its_own_name() {
    let network = "hub 0\n \\ hub0port1: #net150: index=0,type=user,net=10.0.2.0,restrict=off\n \\ hub0port0: e1000.0: index=0,type=nic,model=e1000\n";
    let facts = Facts {
        network: network.into(),
        ..running()
    };
    let expected = Refusal::UngatedNetdev {
        id: "user".into(),
        kind: "user".into(),
        interface: None,
    };
    assert_eq!(verdict(&facts, &[], &[]), [expected]);
    assert_eq!(verdict(&facts, &[], &["user"]), []);
}

#[test]
fn a_tap_by_descriptor_is_known_by_its_interface() {
    let network = " \\ n0: index=0,type=tap,fd=21\n \\ n1: index=0,type=tap,fd=23\n";
    let tun_fds = vec![(21, "vnet0".to_owned()), (22, "vnet9".to_owned())];
    let facts = Facts {
        network: network.into(),
        tun_fds,
        ..running()
    };
    // Descriptor 23 is no tun: a macvtap.
    let expected = Refusal::UngatedNetdev {
        id: "n1".into(),
        kind: "tap".into(),
        interface: None,
    };
    assert_eq!(verdict(&facts, &["vnet0"], &[]), [expected]);
}

#[test]
fn consoles_of_the_guest_are_refused_and_monitors_are_not() {
    let facts = Facts {
        chardevs: json!([
            {"label": "serial0", "filename": "file"}, {"label": "compat_monitor0", "filename": "unix:/q"},
            {"label": "parallel0", "filename": "vc"}, {"label": "serial1", "filename": "null"},
            {"label": "charmon", "filename": "unix:/m"}, {"label": "q", "filename": "unix:/n"},
        ]),
        monitors: monitors(b"qemu\0-mon\0chardev=charmon,mode=control\0-qmp\0chardev:q\0-monitor\0stdio\0"),
        ..running()
    };
    let expected = Refusal::UngatedChardev {
        id: "serial0".into(),
        target: "file".into(),
    };
    assert_eq!(verdict(&facts, &[], &[]), [expected]);
    assert_eq!(verdict(&facts, &[], &["serial0"]), []);
}

#[test]
fn writable_disks_are_refused_and_empty_or_read_only_ones_are_not() {
    let facts = Facts {
        blocks: json!([
            {"device": "ide1-cd0", "qdev": "/machine/unattached/device[23]"},
            {"device": "cd", "inserted": {"ro": true, "file": "x.iso"}},
            {"device": "", "qdev": "/machine/peripheral/vd0/virtio-backend",
             "inserted": {"ro": false, "file": "disk.raw", "node-name": "node7"}},
            {"device": "pflash1", "inserted": {"ro": false, "file": "VARS.fd", "node-name": "#block1"}},
        ]),
        ..running()
    };
    let refused = verdict(&facts, &[], &[]);
    assert_eq!(refused.len(), 2);
    assert_eq!(
        refused[1],
        Refusal::WritableDisk {
            id: "pflash1".into(),
            file: "VARS.fd".into()
        }
    );
    assert_eq!(verdict(&facts, &[], &["vd0", "pflash1"]), []);
    assert_eq!(verdict(&facts, &[], &["node7", "pflash1"]), []);
}

#[test]
fn network_cards_are_found_with_their_addresses() {
    let network = "hub 0\n \\ hub0port0: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\r\nx: index=0,type=nic,macaddr=1:2\n";
    assert_eq!(
        nics(network).collect::<Vec<_>>(),
        [("e1000.0", [0x52, 0x54, 0, 0x12, 0x34, 0x56])]
    );
}

#[test]
fn the_machines_own_flash_is_no_disk_as_its_content_is_memory() {
    let facts = Facts {
        blocks: json!([
            {"device": "pflash1", "qdev": "/machine/system.flash1", "inserted": {"ro": false, "file": "VARS.fd", "node-name": "v"}},
            {"device": "hd0", "qdev": "/machine/peripheral/flash1", "inserted": {"ro": false, "file": "disk", "node-name": "d"}},
        ]),
        ..running()
    };
    let disk = Refusal::WritableDisk {
        id: "hd0".into(),
        file: "disk".into(),
    };
    assert_eq!(verdict(&facts, &[], &[]), [disk]);
}
