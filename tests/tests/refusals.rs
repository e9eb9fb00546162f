//! What can't be protected is refused by the real daemons, with the cause and the remedy, and the guest is not hurt.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, anyhow};
use romulus_e2e::daemons::{AgentConfig, ProtectConfig};
use romulus_e2e::guest::{Guest, QemuConfig};
use romulus_e2e::qmp::Qmp;
use romulus_e2e::{BRIDGE, Host, Lab, Paths, Process, TEST_LAB, wait_for};
use romulus_transport::pki::{HostNames, Validity, issue};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

fn argv(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A guest that serves, a witness and certificates; no agent yet.
struct Place {
    guest: Guest,
    _witness: Process,
    lab: Lab,
}

fn place(lab: Lab, config: &QemuConfig) -> Result<Place> {
    let mut guest = Guest::start(&lab, &config.clone().into())?;
    lab.init_pki()?;
    let witness = lab.start_witness()?;
    guest.wait_redis(&lab, SOON)?;
    Ok(Place {
        guest,
        _witness: witness,
        lab,
    })
}

impl Place {
    /// What a replicator says that ends because it is refused.
    fn refusal(&mut self, argv: &[String]) -> Result<String> {
        let mut replicator = self.lab.spawn(Host::Primary, "refused", argv)?;
        let ended = replicator.wait(SOON)?;
        let said = replicator.tail();
        assert!(!ended.success(), "it was not refused: {said}");
        self.guest.wait_redis(&self.lab, Duration::from_secs(10))?;
        Ok(said)
    }

    fn assert_refused(&mut self, protect: &ProtectConfig, words: &[&str]) -> Result<()> {
        let argv = self.lab.protect_argv(protect)?;
        let said = self.refusal(&argv)?;
        assert_says(&said, words);
        Ok(())
    }
}

fn assert_says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
}

/// A character device that leads to a macvtap on the primary's bridge.
fn make_macvtap(lab: &Lab) -> Result<PathBuf> {
    let run = |line: &str| lab.output(Host::Primary, &argv(&line.split(' ').collect::<Vec<_>>()));
    run(&format!(
        "ip link add link {BRIDGE} name mv0 type macvtap mode bridge"
    ))?;
    run("ip link set mv0 up")?;
    // `ip netns exec` mounts a /sys that shows the namespace's interfaces.
    let namespace = lab.net.namespace(Host::Primary);
    let numbers = run(&format!(
        "ip netns exec {namespace} sh -c cat$IFS/sys/class/net/mv0/tap*/dev"
    ))?;
    let (major, minor) = numbers
        .trim()
        .split_once(':')
        .ok_or_else(|| anyhow!("the macvtap has no device: {numbers:?}"))?;
    let path = lab.run_path("macvtap");
    run(&format!("mknod {} c {major} {minor}", path.display()))?;
    Ok(path)
}

#[test]
fn everything_that_is_neither_gated_nor_replicated_is_refused_at_once_by_name() -> Result<()> {
    let lab = Lab::new(Paths::here(), TEST_LAB)?;
    let macvtap = make_macvtap(&lab)?;
    let extra = argv(&[
        "-netdev",
        "user,id=slirp0",
        "-device",
        "virtio-net-pci,netdev=slirp0",
        "-netdev",
        "tap,id=macvtap0,fd=3",
        "-device",
        "virtio-net-pci,netdev=macvtap0",
        "-drive",
        "driver=null-co,size=1M,if=none,id=disk0",
        "-device",
        "virtio-blk-pci,drive=disk0",
        "-fsdev",
        "local,id=share0,path=/usr/share/doc,security_model=none",
        "-device",
        "virtio-9p-pci,fsdev=share0,mount_tag=doc,id=nine0",
    ]);
    let config = QemuConfig {
        extra,
        descriptor: Some(macvtap),
        ..QemuConfig::default()
    };
    let mut place = place(lab, &config)?;
    let protect = ProtectConfig {
        disposable: Some(Vec::new()),
        extra: argv(&["--tap", "nosuch0"]),
        ..ProtectConfig::default()
    };
    place.assert_refused(
        &protect,
        &[
            "slirp0",
            "(user)",
            "use a tap",
            "macvtap0",
            "disk0",
            "is writable and not replicated",
            "make it read-only",
            "virtio-9p",
            "without a gate: remove it",
            "console",
            "connect it to null",
            "disposable",
            "tap nosuch0 is no network back end of this QEMU: correct --tap",
        ],
    )
}

#[test]
fn a_guest_that_is_busy_or_not_ours_is_refused_until_it_is_not() -> Result<()> {
    let lab = Lab::new(Paths::here(), TEST_LAB)?;
    let config = QemuConfig {
        extra: argv(&[
            "-drive",
            "driver=null-co,size=1G,if=none,id=disk0",
            "-device",
            "virtio-blk-pci,drive=disk0",
        ]),
        user: Some("nobody".to_owned()),
        second_monitor: true,
        ..QemuConfig::default()
    };
    let mut place = place(lab, &config)?;
    let _agent = place.lab.start_agent()?;
    let protect = ProtectConfig {
        disposable: Some(argv(&["console", "disk0"])),
        ..ProtectConfig::default()
    };
    let mut monitor = Qmp::connect(&place.lab)?;

    let mut untraced = argv(&["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]);
    untraced.extend(place.lab.protect_argv(&protect)?);
    let said = place.refusal(&untraced)?;
    assert_says(&said, &["CAP_SYS_PTRACE"]);

    monitor.execute_with(
        "blockdev-add",
        &json!({"driver": "null-co", "node-name": "copy0", "size": 1 << 30}),
    )?;
    let mirror = json!({"job-id": "job0", "device": "disk0", "target": "copy0", "sync": "full", "speed": 1});
    monitor.execute_with("blockdev-mirror", &mirror)?;
    place.assert_refused(
        &protect,
        &["block job \\\"job0\\\" is under way: wait for its end or cancel it"],
    )?;
    monitor.execute_with("block-job-cancel", &json!({"device": "job0", "force": true}))?;

    monitor.execute_with("migrate-set-parameters", &json!({"max-bandwidth": 1}))?;
    monitor.execute_with("migrate", &json!({"uri": "exec:cat > /dev/null"}))?;
    place.assert_refused(&protect, &["a migration is", "wait for its end or cancel it"])?;
    monitor.execute("migrate_cancel")?;
    wait_for("the migration's end", SOON, || {
        let status = monitor.execute("query-migrate").ok()?;
        (status.get("status").and_then(Value::as_str) == Some("cancelled")).then_some(())
    })?;

    let mut replicator = place.lab.start_replicator(&protect)?;
    place.lab.wait_protected(&mut replicator, SOON)?;
    place.assert_refused(&protect, &["is protected by another replicator"])?;
    place.lab.romulus(Host::Primary, &["unprotect"])?;
    assert!(replicator.wait(SOON)?.success(), "{}", replicator.tail());

    // Last, as a paused guest serves nobody.
    monitor.execute("stop")?;
    let mut refused = place.lab.start_replicator(&protect)?;
    assert!(!refused.wait(SOON)?.success());
    assert_says(
        &refused.tail(),
        &["the guest is paused: resume it first (QMP: cont)"],
    );
    assert_eq!(monitor.status()?, "paused");
    Ok(())
}

/// A QEMU of another series, as far as it is asked: it greets, and that is its end.
const OTHER_QEMU: &str = r#"#!/usr/bin/perl
use IO::Socket::UNIX;
my ($path) = "@ARGV" =~ /-qmp unix:([^,]+)/;
my $server = IO::Socket::UNIX->new(Local => $path, Listen => 1) or die;
while (my $client = $server->accept) {
    $client->autoflush(1);
    print $client '{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 99}, "package": ""}, "capabilities": ["oob"]}}', "\r\n";
    while (my $line = <$client>) {
        my ($id) = $line =~ /"id":\s*(\d+)/;
        print $client '{"return": {"status": "inmigrate", "running": false}', (defined $id ? ", \"id\": $id" : ''), "}\r\n";
    }
}
"#;

/// What starts a program in a world whose QEMU is another one.
fn with_other_qemu(lab: &Lab) -> Result<Vec<String>> {
    use std::os::unix::fs::PermissionsExt as _;
    let fake = lab.run_path("other-qemu");
    fs::write(&fake, OTHER_QEMU).context("cannot write the other QEMU")?;
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).context("cannot make it a program")?;
    let script = format!(
        "mount --bind {} /usr/bin/qemu-system-x86_64 && exec \"$@\"",
        fake.display()
    );
    Ok(argv(&["unshare", "--mount", "bash", "-c", &script, "agent"]))
}

fn wait_said(lab: &Lab, host: Host, words: &[&str]) -> Result<()> {
    let mut last = String::new();
    wait_for(&format!("{words:?}"), SOON, || {
        last = lab.status(host).ok()?.to_string();
        words.iter().all(|word| last.contains(word)).then_some(())
    })
    .map_err(|error| anyhow!("{error:#}; the last status: {last}"))
}

#[test]
fn a_backup_that_cannot_be_one_is_named_with_the_reason_until_it_can() -> Result<()> {
    let place = place(Lab::new(Paths::here(), TEST_LAB)?, &QemuConfig::default())?;
    let lab = &place.lab;
    let mut replicator = lab.start_replicator(&ProtectConfig::default())?;

    let settings = lab.run_path("small.toml");
    fs::write(&settings, "image_bytes_max = \"64MiB\"\n").context("cannot write settings")?;
    let agent = lab.start_agent_with(&AgentConfig {
        extra: argv(&["--config", &settings.display().to_string()]),
        ..AgentConfig::default()
    })?;
    wait_said(
        lab,
        Host::Primary,
        &[
            "the backup has no room",
            "the guest needs 256 MiB, 64 MiB are free",
            "image_bytes_max",
        ],
    )?;
    drop(agent);

    let agent = lab.start_agent_with(&AgentConfig {
        wrapper: with_other_qemu(lab)?,
        ..AgentConfig::default()
    })?;
    wait_said(
        lab,
        Host::Backup,
        &[
            "the primary runs QEMU 7",
            "99.0.0",
            "install the same series on both",
        ],
    )?;
    wait_said(
        lab,
        Host::Primary,
        &["not_protected", "the standby has not loaded a checkpoint"],
    )?;
    drop(agent);

    let _agent = lab.start_agent()?;
    lab.wait_protected(&mut replicator, SOON)?;
    Ok(())
}

/// The command line of a replicator with the certificates of another folder.
fn with_pki(lab: &Lab, folder: &Path) -> Result<Vec<String>> {
    let mut argv = lab.protect_argv(&ProtectConfig::default())?;
    let at = argv
        .iter()
        .position(|word| word == "--pki")
        .ok_or_else(|| anyhow!("no --pki"))?;
    *argv.get_mut(at + 1).ok_or_else(|| anyhow!("no folder"))? = folder.display().to_string();
    Ok(argv)
}

/// A certificate of the lab's own authority for the primary, valid then.
fn issued(lab: &Lab, name: &str, from: SystemTime, until: SystemTime) -> Result<PathBuf> {
    let dir = lab.run_path(name);
    let authority = dir.join("ca");
    fs::create_dir_all(&authority).context("cannot make a folder")?;
    for file in fs::read_dir(lab.run_path("pki").join("ca")).context("cannot list the authority")? {
        let file = file.context("cannot list the authority")?;
        fs::copy(file.path(), authority.join(file.file_name())).context("cannot copy the authority")?;
    }
    let names: HostNames = format!("primary,{}", Host::Primary.ip()).parse()?;
    Ok(issue(&dir, &names, Validity { from, until })?)
}

#[test]
fn wrong_and_expired_certificates_are_named_and_the_guest_is_not_hurt() -> Result<()> {
    let mut place = place(Lab::new(Paths::here(), TEST_LAB)?, &QemuConfig::default())?;
    let _agent = place.lab.start_agent()?;
    let (now, day) = (SystemTime::now(), Duration::from_secs(86_400));

    let of_the_backup = place.lab.run_path("pki").join("backup");
    let argv_of_backup = with_pki(&place.lab, &of_the_backup)?;
    assert_says(
        &place.refusal(&argv_of_backup)?,
        &["this host is primary", "are those of backup"],
    );

    let old = issued(&place.lab, "pki-old", now - day * 3, now - day)?;
    let young = issued(&place.lab, "pki-young", now + day, now + day * 3)?;
    for (folder, words) in [
        (old, ["has expired", "romulus pki"]),
        (young, ["is not valid yet", "clocks"]),
    ] {
        let argv = with_pki(&place.lab, &folder)?;
        assert_says(&place.refusal(&argv)?, &words);
    }

    let other = place.lab.run_path("pki-other");
    let romulus = place.lab.paths.binary("romulus")?.display().to_string();
    let made = argv(&[
        &romulus,
        "pki",
        "init",
        "--dir",
        &other.display().to_string(),
        "--host",
        "primary",
    ]);
    place.lab.output(Host::Client, &made)?;
    let foreign = with_pki(&place.lab, &other.join("primary"))?;
    let replicator = place.lab.spawn(Host::Primary, "foreign", &foreign)?;
    wait_for("the certificate's refusal", SOON, || {
        replicator.tail().contains("another CA").then_some(())
    })
    .map_err(|error| anyhow!("{error:#}: {}", replicator.tail()))?;
    place.guest.wait_redis(&place.lab, Duration::from_secs(10))
}
