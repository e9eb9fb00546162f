//! One command line a rule, and those that are found in the wild.

use proptest::strategy::Strategy;

use super::*;
use crate::spec::tests::{own, spec};
use crate::spec::{Disk, Nic};

const PLAIN: &[(&str, u64)] = &[("pc.ram", 128 << 20), ("pc.bios", 1 << 18)];
const BACKEND: &[(&str, u64)] = &[("ram0", 128 << 20), ("pc.bios", 1 << 18)];

fn plan(taps: &[&str]) -> Plan {
    Plan {
        name: "web".into(),
        main_ram: "/image/ram-0".into(),
        share: true,
        taps: taps.iter().map(|t| (*t).to_owned()).collect(),
        qmp: "/run/q".into(),
        serial_log: None,
        private_dir: "/run/private".into(),
        host_cpu: "AMD EPYC".into(),
    }
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

fn machine(line: &str, blocks: &[(&str, u64)]) -> MachineSpec {
    let mut argv = vec!["/usr/bin/qemu-system-x86_64"];
    argv.extend(words(line));
    spec(&argv, blocks)
}

/// Derives without the parts that are always the same.
fn derived(line: &str, taps: &[&str]) -> String {
    let line = format!("-nodefaults {line}");
    let text = derive(&machine(&line, PLAIN), &plan(taps))
        .unwrap()
        .argv
        .join(" ");
    let head = "qemu-system-x86_64 -name guest=web -nodefaults ";
    let (middle, _) = text
        .strip_prefix(head)
        .unwrap()
        .split_once("-object qom-type=memory-backend-file")
        .unwrap();
    middle.trim().to_owned()
}

fn refused(line: &str) -> String {
    let line = format!("-nodefaults {line}");
    derive(&machine(&line, PLAIN), &plan(&[]))
        .unwrap_err()
        .to_string()
}

#[test]
fn plain_memory_becomes_a_backend_of_the_blocks_name() {
    let derived = derive(&machine("-nodefaults -M q35,accel=tcg -m 128", PLAIN), &plan(&[])).unwrap();
    assert_eq!(
        derived.argv.join(" "),
        "qemu-system-x86_64 -name guest=web -nodefaults -m 128 \
         -object qom-type=memory-backend-file,id=pc.ram,size=134217728,mem-path=/image/ram-0,share=on,\
         x-use-canonical-path-for-ramblock-id=off \
         -machine type=pc-q35-7.2,accel=tcg,memory-backend=pc.ram \
         -display none -monitor none -qmp unix:/run/q,server=on,wait=off -incoming defer"
    );
}

#[test]
fn a_shared_backend_keeps_its_id_and_several_machine_options_are_one() {
    let line = "-nodefaults -machine q35 --object memory-backend-memfd,id=ram0,size=128M,share=on -m 128 \
                -machine memory-backend=ram0,vmport=off -accel kvm -enable-kvm";
    let argv = derive(&machine(line, BACKEND), &plan(&[]))
        .unwrap()
        .argv
        .join(" ");
    assert!(
        argv.contains("-object qom-type=memory-backend-file,id=ram0,size=134217728"),
        "{argv}"
    );
    assert!(
        argv.contains("-machine type=pc-q35-7.2,memory-backend=ram0,vmport=off"),
        "{argv}"
    );
    assert!(argv.contains("-accel kvm -enable-kvm"), "{argv}");
    assert!(!argv.contains("memfd"), "{argv}");
    let canonical = derive(&machine(line, &[("/objects/ram0", 128 << 20)]), &plan(&[]))
        .unwrap()
        .argv
        .join(" ");
    assert!(
        canonical.contains("id=ram0") && canonical.contains("ramblock-id=on"),
        "{canonical}"
    );
}

#[test]
fn a_backend_that_is_not_the_main_block_is_refused() {
    let line = "-nodefaults -object memory-backend-ram,id=other,size=1M -machine q35,memory-backend=other";
    assert!(matches!(
        derive(&machine(line, PLAIN), &plan(&[])),
        Err(CmdlineError::MainBlock { .. })
    ));
    assert!(refused("-object memory-backend-ram,id=second,size=1M").contains("besides the main one"));
    assert!(refused("-m 1G,slots=2,maxmem=2G").contains("plugged"));
    assert!(refused("-numa node").contains("nodes"));
}

#[test]
fn a_derived_command_line_derives_to_itself() {
    let first = "-nodefaults -M q35 -m 128 -netdev tap,id=n0,ifname=tap7,vhost=off -device virtio-net-pci,netdev=n0 \
                 -serial mon:stdio -chardev socket,id=c0,path=/x,server=on,wait=off -nographic";
    let once = derive(&machine(first, PLAIN), &plan(&["t0"])).unwrap();
    let mut again = machine("", PLAIN);
    own(&mut again).argv = once.argv.clone();
    let twice = derive(&again, &plan(&["t0"])).unwrap();
    let sorted = |argv: &[String]| {
        let mut words: Vec<String> = argv
            .iter()
            .flat_map(|a| a.split(','))
            .map(str::to_owned)
            .filter(|w| w != "guest=web")
            .collect();
        words.sort();
        words
    };
    assert_eq!(sorted(&twice.argv), sorted(&once.argv));
}

#[test]
fn taps_become_the_standbys_taps_with_the_same_offloads_and_queues() {
    assert_eq!(
        derived(
            "-netdev tap,id=n0,ifname=tap7,script=/etc/qemu-ifup,vhost=on,queues=2",
            &["b0"]
        ),
        "-netdev type=tap,id=n0,vhost=on,queues=2,ifname=b0,script=no,downscript=no"
    );
    assert_eq!(
        derived("-netdev tap,fds=20:21,id=n0,vhost=on,vhostfds=22:23", &["b0"]),
        "-netdev type=tap,id=n0,vhost=on,queues=2,ifname=b0,script=no,downscript=no"
    );
    assert_eq!(
        derived("-netdev bridge,id=n0,br=br0", &["b0"]),
        "-netdev type=tap,id=n0,ifname=b0,script=no,downscript=no"
    );
    assert_eq!(
        derived(
            "-nic tap,model=virtio-net-pci,mac=52:54:00:00:00:01,ifname=x -net nic,macaddr=52:54:00:00:00:02 -net tap,ifname=y",
            &["b0", "b1"]
        ),
        "-nic type=tap,model=virtio-net-pci,mac=52:54:00:00:00:01,ifname=b0,script=no,downscript=no \
         -net nic,macaddr=52:54:00:00:00:02 -net type=tap,ifname=b1,script=no,downscript=no"
    );
    let two = machine("-nodefaults -netdev tap,id=a -netdev tap,id=b", PLAIN);
    assert_eq!(taps_needed(&two).unwrap(), 2);
    assert!(matches!(
        derive(&two, &plan(&["one"])),
        Err(CmdlineError::Taps { needed: 2, given: 1 })
    ));
}

#[test]
fn json_forms_follow_the_same_rules() {
    let netdev = r#"-netdev {"type":"tap","fd":"33","vhost":false,"id":"hostnet0"}"#;
    assert_eq!(
        derived(netdev, &["b0"]),
        "-netdev id=hostnet0,type=tap,vhost=off,ifname=b0,script=no,downscript=no"
    );
    let device = r#"-device {"driver":"vfio-pci","host":"0000:01:00.0"}"#;
    assert!(refused(device).contains("passed-through"));
    let kept = r#"-device {"driver":"virtio-net-pci","netdev":"hostnet0"}"#;
    assert_eq!(derived(kept, &[]), kept);
}

#[test]
fn networks_that_are_not_gated_are_refused_unless_disposable() {
    assert!(refused("-netdev user,id=u0").contains("declare it disposable"));
    assert!(refused("-netdev socket,id=s0,listen=:1").contains("not gated"));
    assert!(refused("-netdev vhost-user,id=s0,chardev=c").contains("unseen"));
    let mut spec = machine(
        "-nodefaults -netdev user,id=u0,hostfwd=tcp::22-:22,net=10.9.0.0/24",
        PLAIN,
    );
    spec.disposable.push("u0".into());
    let derived = derive(&spec, &plan(&[])).unwrap();
    assert!(
        derived
            .argv
            .join(" ")
            .contains("-netdev type=user,id=u0,net=10.9.0.0/24 ")
    );
    assert!(
        derived.changes.iter().any(|c| c.contains("hostfwd")),
        "{:?}",
        derived.changes
    );
    let mut by_default = machine("-m 128", PLAIN);
    by_default.nics.push(Nic {
        name: "e1000.0".into(),
        mac: [0; 6],
    });
    assert!(
        derive(&by_default, &plan(&[]))
            .unwrap_err()
            .to_string()
            .contains("SLIRP")
    );
    by_default.disposable.push("user".into());
    derive(&by_default, &plan(&[])).unwrap();
}

#[test]
fn consoles_keep_their_device_and_lose_their_output() {
    assert_eq!(
        derived("-serial mon:stdio -serial none -parallel file:/x", &[]),
        "-serial null -serial none -parallel null"
    );
    assert_eq!(
        derived(
            "-chardev socket,id=c,path=/p,mux=on -serial chardev:c -mon chardev=c,mode=control",
            &[]
        ),
        "-chardev backend=null,id=c,mux=on -serial chardev:c"
    );
    let mut logging = plan(&[]);
    logging.serial_log = Some("/run/serial".into());
    let argv = derive(&machine("-nodefaults -serial pty -serial pty", PLAIN), &logging)
        .unwrap()
        .argv
        .join(" ");
    assert!(argv.contains("-serial file:/run/serial -serial null"), "{argv}");
}

#[test]
fn what_belongs_to_the_primarys_process_is_left_out_and_said() {
    let line = "-name other -S -daemonize -pidfile /p -D /log -runas nobody -vnc :0 -spice port=1 -incoming defer \
                -qmp unix:/old,server=on,wait=off -monitor stdio -display gtk -d int";
    assert_eq!(derived(line, &[]), "");
    let changes = derive(&machine(&format!("-nodefaults {line}"), PLAIN), &plan(&[]))
        .unwrap()
        .changes;
    assert!(
        changes.iter().any(|c| c.starts_with("-runas left out")),
        "{changes:?}"
    );
}

#[test]
fn kept_options_are_kept_word_for_word() {
    let line = "-uuid 12345678-1234-1234-1234-123456789abc -smbios type=1,serial=7 -smp 2,sockets=1 -rtc base=utc \
                -global PIIX4_PM.disable_s3=1 -cpu qemu64,+ssse3 -sandbox on -no-user-config -boot order=c";
    assert_eq!(
        derived(line, &[]),
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    );
}

#[test]
fn unknown_refused_and_malformed_options_are_named() {
    assert!(refused("-frobnicate").contains("frobnicate"));
    assert!(refused("-m=128").contains("m=128"));
    assert!(refused("-readconfig /etc/q.cfg").contains("readconfig /etc/q.cfg"));
    assert!(refused("disk.img").contains("disk.img"));
    assert!(refused("-m").contains("lacks its value"));
    assert!(refused("-object filter-mirror,id=f,netdev=n").contains("no rule"));
    assert!(refused("-icount shift=auto,rr=record,rrfile=/x").contains("replay"));
    let mut other = machine("", PLAIN);
    own(&mut other).argv[0] = "/tmp/evil".into();
    assert!(matches!(derive(&other, &plan(&[])), Err(CmdlineError::Program(name)) if name == "evil"));
    own(&mut other).argv.clear();
    assert!(derive(&other, &plan(&[])).is_err());
}

#[test]
fn the_hosts_processor_must_be_the_same_for_cpu_host_under_kvm() {
    let mut spec = machine("-nodefaults -cpu host,migratable=on", PLAIN);
    derive(&spec, &plan(&[])).unwrap();
    own(&mut spec).accelerator = "kvm".into();
    derive(&spec, &plan(&[])).unwrap();
    spec.host_cpu = "Xeon".into();
    let error = derive(&spec, &plan(&[])).unwrap_err().to_string();
    assert!(error.contains("Xeon") && error.contains("AMD EPYC"), "{error}");
}

#[test]
fn files_are_absolute_and_listed() {
    let line = "-nodefaults -kernel vmlinuz -initrd /boot/i -append quiet -bios b.bin -fw_cfg name=opt/x,file=y \
                -fw_cfg opt/z,string=s -device e1000,romfile=/roms/e.rom -device rtl8139,romfile=";
    let derived = derive(&machine(line, PLAIN), &plan(&[])).unwrap();
    let listed: Vec<String> = derived.files.iter().map(|f| f.display().to_string()).collect();
    assert_eq!(
        listed,
        ["/srv/vmlinuz", "/boot/i", "/srv/b.bin", "/srv/y", "/roms/e.rom"]
    );
    let argv = derived.argv.join(" ");
    assert!(
        argv.contains("-kernel /srv/vmlinuz") && argv.contains("name=opt/x,file=/srv/y"),
        "{argv}"
    );
    assert!(argv.contains("-fw_cfg opt/z,string=s"), "{argv}");
}

#[test]
fn firmware_code_is_kept_and_its_variables_become_a_private_file() {
    let line = "-nodefaults -drive if=pflash,format=raw,readonly=on,file=/ovmf/CODE.fd \
                -drive if=pflash,format=raw,file=/vms/web/VARS.fd";
    let mut spec = machine(line, PLAIN);
    spec.disks.push(Disk {
        id: "pflash1".into(),
        bytes: 540_672,
    });
    let derived = derive(&spec, &plan(&[])).unwrap();
    let argv = derived.argv.join(" ");
    assert!(
        argv.contains("-drive if=pflash,format=raw,file=/ovmf/CODE.fd,read-only=on"),
        "{argv}"
    );
    assert!(
        argv.contains("-drive if=pflash,format=raw,file=/run/private/pflash1.flash"),
        "{argv}"
    );
    assert_eq!(
        derived.private_files,
        [PrivateFile {
            path: "/run/private/pflash1.flash".into(),
            bytes: 540_672
        }]
    );
}

#[test]
fn libvirts_flash_nodes_are_told_from_disks() {
    let line = r#"-nodefaults -machine pc-q35-7.2,pflash0=code,pflash1=vars
        -blockdev {"driver":"file","filename":"/ovmf/CODE.fd","node-name":"code-s","read-only":true}
        -blockdev {"node-name":"code","read-only":true,"driver":"raw","file":"code-s"}
        -blockdev {"driver":"file","filename":"/nvram/web.fd","node-name":"vars-s"}
        -blockdev {"node-name":"vars","read-only":false,"driver":"raw","file":"vars-s"}"#;
    let mut spec = machine(line, PLAIN);
    spec.disks.push(Disk {
        id: "vars".into(),
        bytes: 4096,
    });
    let derived = derive(&spec, &plan(&[])).unwrap();
    assert_eq!(derived.private_files.len(), 1);
    assert!(
        derived
            .argv
            .join(" ")
            .contains("filename=/run/private/vars_s.flash")
    );
    assert!(refused(r#"-blockdev {"driver":"file","filename":"/d","node-name":"d"}"#).contains("writable"));
}

#[test]
fn disks_are_read_only_disposable_or_refused() {
    assert!(refused("-drive file=/d.img,if=virtio").contains("disk virtio0 is writable"));
    assert!(refused("-hda /d.img").contains("writable"));
    assert!(refused("-drive file=nbd://h/x,readonly=on").contains("only files"));
    assert_eq!(
        derived(
            "-drive file=/d.iso,if=virtio,readonly=on -cdrom /c.iso -drive if=ide,media=cdrom,id=empty",
            &[]
        ),
        "-drive file=/d.iso,if=virtio,read-only=on -drive media=cdrom,index=2,file=/c.iso,read-only=on \
         -drive if=ide,media=cdrom,id=empty"
    );
    let mut scratch = machine(
        "-nodefaults -drive file=/s.qcow2,if=virtio,format=qcow2,cache=none",
        PLAIN,
    );
    scratch.disposable.push("virtio0".into());
    assert!(matches!(
        derive(&scratch, &plan(&[])),
        Err(CmdlineError::DiskSize(_))
    ));
    scratch.disks.push(Disk {
        id: "virtio0".into(),
        bytes: 1 << 20,
    });
    let argv = derive(&scratch, &plan(&[])).unwrap().argv.join(" ");
    assert!(
        argv.contains("-drive if=virtio,driver=null-co,size=1048576,read-zeroes=on"),
        "{argv}"
    );
}

#[test]
fn devices_that_write_unseen_or_hold_state_elsewhere_are_refused() {
    for device in [
        "vhost-user-blk-pci,chardev=c",
        "vhost-vsock-pci,guest-cid=3",
        "ivshmem-plain,memdev=m",
        "usb-host",
    ] {
        assert!(
            refused(&format!("-device {device}")).contains("cannot be protected"),
            "{device}"
        );
    }
    assert_eq!(
        derived("-device virtio-balloon-pci", &[]),
        "-device virtio-balloon-pci"
    );
}

#[test]
fn a_trial_keeps_what_it_writes_for_itself() {
    let mut trial = plan(&[]);
    trial.share = false;
    let argv = derive(&machine("-nodefaults", PLAIN), &trial)
        .unwrap()
        .argv
        .join(" ");
    assert!(argv.contains("mem-path=/image/ram-0,share=off"), "{argv}");
}

#[test]
fn paths_with_commas_are_escaped() {
    let mut commas = plan(&[]);
    commas.main_ram = "/a,b/ram".into();
    commas.qmp = "/a,b/qmp".into();
    let argv = derive(&machine("-nodefaults", PLAIN), &commas)
        .unwrap()
        .argv
        .join(" ");
    assert!(
        argv.contains("mem-path=/a,,b/ram,share") && argv.contains("unix:/a,,b/qmp,server"),
        "{argv}"
    );
}

proptest::proptest! {
    #[test]
    fn no_command_line_makes_the_rules_panic(arguments in proptest::collection::vec(
        proptest::prop_oneof![
            proptest::sample::select(rules::RULES).prop_map(|r| format!("-{}", r.names[0])),
            "[a-z0-9=,.:{}\"-]{0,24}",
            proptest::sample::select(vec!["tap,id=x", "user", "{\"driver\":\"raw\"}", "if=pflash", "file=/x", "q35"])
                .prop_map(str::to_owned),
        ], 0..12)) {
        let mut spec = machine("", PLAIN);
        own(&mut spec).argv.extend(arguments);
        let taps = taps_needed(&spec).unwrap_or(0);
        let taps = vec!["t"; taps];
        let _ = derive(&spec, &plan(&taps));
        let _ = files_needed(&spec);
    }
}

#[test]
fn a_command_line_cannot_name_a_file_that_the_standby_would_write() {
    assert!(refused("-device usb-tablet,pcap=/etc/cron.d/x").contains("pcap"));
    assert!(refused("-global usb-tablet.pcap=/etc/cron.d/x").contains("pcap"));
    assert!(refused("-device usb-mtp,rootdir=/,readonly=off").contains("shared folder"));
}
