//! Settings files: what is read, what wins, what is refused and how the error reads.

use std::path::Path;
use std::time::Duration;

use romulus_config::{
    BackupAgent, ConfigError, EpochGoal, EpochLength, Replicator, Settings, StandbyKind, Witness,
    changed_keys, load, load_over,
};

fn write(dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// Loads the replicator's settings from files given as (name, text).
fn load_files(files: &[(&str, &str)]) -> Result<Replicator, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        write(dir.path(), name, text);
    }
    load(Some(&dir.path().join("replicator.toml")))
}

fn example_is_the_default<S: Settings + PartialEq + std::fmt::Debug>() {
    let parsed: S = toml::from_str(S::EXAMPLE).unwrap();
    assert_eq!(parsed, S::default());
    parsed.check().unwrap();
    // Every key that has a default is shown, with the value that it has.
    let shown: toml::Table = toml::from_str(S::EXAMPLE).unwrap();
    let defaults = toml::Table::try_from(S::default()).unwrap();
    assert_eq!(keys(&shown, ""), keys(&defaults, ""));
}

fn keys(table: &toml::Table, prefix: &str) -> Vec<String> {
    let mut all = Vec::new();
    for (key, value) in table {
        match value {
            toml::Value::Table(inner) => all.extend(keys(inner, &format!("{prefix}{key}."))),
            _ => all.push(format!("{prefix}{key}")),
        }
    }
    all.sort();
    all
}

#[test]
fn each_example_holds_exactly_the_defaults() {
    example_is_the_default::<Replicator>();
    example_is_the_default::<BackupAgent>();
    example_is_the_default::<Witness>();
}

#[test]
fn lines_without_a_default_are_accepted_when_uncommented() {
    for (example, check) in [
        (
            Replicator::EXAMPLE,
            (|t| toml::from_str::<Replicator>(t).map(drop)) as fn(&str) -> _,
        ),
        (BackupAgent::EXAMPLE, |t| {
            toml::from_str::<BackupAgent>(t).map(drop)
        }),
        (Witness::EXAMPLE, |t| toml::from_str::<Witness>(t).map(drop)),
    ] {
        let mut uncommented = String::new();
        for line in example.lines() {
            let assignment = line
                .strip_prefix("# ")
                .filter(|rest| rest.split_once(" = ").is_some_and(|(key, _)| !key.contains(' ')));
            uncommented.push_str(assignment.unwrap_or(line));
            uncommented.push('\n');
        }
        check(&uncommented).unwrap();
    }
}

#[test]
fn a_section_that_is_given_in_part_has_this_daemons_defaults_for_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "witness.toml", "[network]\nmtu = 1400\n");
    let witness: Witness = load(Some(&dir.path().join("witness.toml"))).unwrap();
    let mut expected = Witness::default();
    expected.network.mtu = 1400;
    assert_eq!(witness, expected);
}

#[test]
fn a_later_drop_in_wins_and_leaves_other_keys_alone() {
    let settings = load_files(&[
        (
            "replicator.toml",
            "[epochs]\nlength = \"50ms\"\nin_flight_max = 2\n",
        ),
        ("replicator.d/20-b.toml", "[epochs]\nlength = \"10ms\"\n"),
        (
            "replicator.d/10-a.toml",
            "backup = \"b:7700\"\n[epochs]\nlength = \"20ms\"\n",
        ),
        ("replicator.d/notes.txt", "not toml at all"),
    ])
    .unwrap();
    assert_eq!(
        settings.epochs.length,
        EpochLength::Fixed(Duration::from_millis(10))
    );
    assert_eq!(settings.epochs.in_flight_max, 2);
    assert_eq!(settings.backup.unwrap().to_string(), "b:7700");
}

#[test]
fn what_a_vm_has_of_its_own_wins_over_what_its_host_has() {
    let dir = tempfile::tempdir().unwrap();
    let host = "backup = \"b:7700\"\n[epochs]\nlength = \"50ms\"\n";
    write(dir.path(), "replicator.toml", host);
    write(
        dir.path(),
        "replicator.d/10-host.toml",
        "[epochs]\nin_flight_max = 2\n",
    );
    let (file, vm) = (
        dir.path().join("replicator.toml"),
        dir.path().join("vms/web.toml"),
    );
    let bare: Replicator = load_over(Some(&file), Some(&vm)).unwrap();
    assert_eq!(bare, load(Some(&file)).unwrap());
    write(
        dir.path(),
        "vms/web.toml",
        "[vm]\ntaps = [\"tap0\"]\n[epochs]\nin_flight_max = 3\n",
    );
    write(
        dir.path(),
        "vms/web.d/10-slow.toml",
        "[epochs]\nlength = \"10ms\"\n",
    );
    let web: Replicator = load_over(Some(&file), Some(&vm)).unwrap();
    assert_eq!(
        (web.epochs.length, web.epochs.in_flight_max),
        (EpochLength::Fixed(Duration::from_millis(10)), 3)
    );
    assert_eq!(
        (web.vm.taps.as_slice(), web.backup),
        (["tap0".to_owned()].as_slice(), bare.backup.clone())
    );
    write(
        dir.path(),
        "vms/web.toml",
        "[vm]\nqmp = \"/q\"\nattach = \"/a\"\n",
    );
    let both = load_over::<Replicator>(Some(&file), Some(&vm))
        .unwrap_err()
        .to_string();
    assert!(both.contains("web.toml") && both.contains("vm.attach"), "{both}");
}

#[test]
fn what_has_changed_is_told_by_its_keys() {
    let before = Replicator::default();
    let mut after = before.clone();
    assert_eq!(changed_keys(&before, &after), [""; 0]);
    after.epochs.length = EpochLength::Auto;
    after.log.level = "debug".into();
    after.backup = Some("b:7700".parse().unwrap());
    after.vm.taps = vec!["tap0".into()];
    assert_eq!(
        changed_keys(&before, &after),
        ["backup", "epochs.length", "log.level", "vm.taps"]
    );
    assert_eq!(
        changed_keys(&after, &before),
        ["backup", "epochs.length", "log.level", "vm.taps"]
    );
}

#[test]
fn an_unknown_key_is_named_with_its_file() {
    let error = load_files(&[
        ("replicator.toml", ""),
        ("replicator.d/10-typo.toml", "[epochs]\nlenght = \"20ms\"\n"),
    ])
    .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("10-typo.toml") && text.contains("lenght") && text.contains("line 2"),
        "{text}"
    );
}

#[test]
fn a_value_out_of_range_is_named_with_the_file_that_set_it() {
    let error = load_files(&[
        ("replicator.toml", "[failover]\nsuspicion_timeout = \"150ms\"\n"),
        (
            "replicator.d/10-slow.toml",
            "[failover]\nheartbeat_interval = \"100ms\"\n",
        ),
    ])
    .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("10-slow.toml") && text.contains("failover.heartbeat_interval"),
        "{text}"
    );
}

#[test]
fn values_that_would_break_an_invariant_are_refused() {
    for bad in [
        "[epochs]\nlength = \"0s\"",
        "[epochs]\nin_flight_max = 0",
        "[failover]\nsuspicion_timeout = \"1ms\"",
        "[failover]\nmute_limit = \"10ms\"",
        "[network]\nmtu = 9000",
        "[network]\nmtu = 100",
        "[network]\nreceive_window = \"1KiB\"",
        "[network]\nkeep_alive = \"10s\"",
        "[memory]\nheld_frames_max = 1",
        "[log]\nlevel = \"\"",
        "pki_dir = \"relative\"",
        "witness = [\"nowhere\"]",
        "host = \"../etc\"",
        "[log]\nformat = \"xml\"",
        "[epochs]\nlength = 25",
        "[epochs]\nlength = \"automatic\"",
        "[epochs.auto]\nlatency = \"0s\"",
        "[epochs.auto]\noverhead_percent = 0",
        "[epochs.auto]\nlatency = \"9ms\"\noverhead_percent = 9",
        "[epochs.auto]\nlength_min = \"1s\"\nlength_max = \"10ms\"",
    ] {
        assert!(
            load_files(&[("replicator.toml", bad)]).is_err(),
            "{bad} was accepted"
        );
    }
}

#[test]
fn a_standbys_command_is_the_operators_and_names_its_program_by_its_path() {
    let load_agent = |text: &str| {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "agent.toml", text);
        load::<BackupAgent>(Some(&dir.path().join("agent.toml")))
    };
    let table = "[[vmm]]\nname = \"testbed\"\nstandby = [\"/usr/bin/testbed\", \"standby\"]\n";
    let agent = load_agent(table).unwrap();
    assert_eq!(agent.vmm[0].standby, ["/usr/bin/testbed", "standby"]);
    for bad in [
        "vmm = [{ name = \"a\", standby = [] }]".to_owned(),
        "vmm = [{ name = \"a\", standby = [\"testbed\"] }]".to_owned(),
        "vmm = [{ name = \"\", standby = [\"/bin/true\"] }]".to_owned(),
        "vmm = [{ name = \"a\", standby = [\"/bin/true\"], shell = true }]".to_owned(),
        [table, table].concat(),
    ] {
        assert!(load_agent(&bad).is_err(), "{bad} was accepted");
    }
}

#[test]
fn a_named_file_that_is_missing_or_huge_is_an_error() {
    assert!(matches!(load_files(&[]), Err(ConfigError::Read { .. })));
    let huge = "#".repeat(2 << 20);
    assert!(matches!(
        load_files(&[("replicator.toml", &huge)]),
        Err(ConfigError::TooLarge { .. })
    ));
}

#[test]
fn the_defaults_are_those_of_the_design() {
    let replicator = Replicator::default();
    assert_eq!(
        replicator.epochs.length,
        EpochLength::Fixed(Duration::from_millis(25))
    );
    assert_eq!(replicator.failover.suspicion_timeout, Duration::from_millis(150));
    assert!(replicator.failover.heartbeat_interval * 5 <= replicator.failover.suspicion_timeout);
    assert_eq!(replicator.failover.mute_limit, Duration::from_secs(60));
    assert_eq!(BackupAgent::default().standby, StandbyKind::Warm);
    let vm = romulus_types::VmId::new("web").unwrap();
    assert_eq!(
        replicator.admin_socket(&vm),
        Path::new("/run/romulus/replicator-web.sock")
    );
}

#[test]
fn metrics_are_served_on_the_loopback_address_elsewhere_or_not_at_all() {
    let listen =
        |text: &str| load_files(&[("replicator.toml", text)]).map(|settings| settings.metrics.listen(7702));
    assert_eq!(listen("").unwrap(), Some(([127, 0, 0, 1], 7702).into()));
    assert_eq!(
        listen("[metrics]\nlisten = \"10.0.0.1:99\"").unwrap(),
        Some(([10, 0, 0, 1], 99).into())
    );
    assert_eq!(listen("[metrics]\nlisten = \"none\"").unwrap(), None);
    let error = listen("[metrics]\nlisten = \"everywhere\"").unwrap_err();
    let text = error.to_string();
    assert!(text.contains("no TCP address"), "{text}");
    assert!(listen("[metrics]\nstall_limit = \"1s\"").is_err());
}

#[test]
fn epochs_are_steered_to_the_goal_that_is_set() {
    let goal = |text: &str| {
        let file = format!("[epochs]\nlength = \"auto\"\n[epochs.auto]\n{text}");
        let settings: Replicator = load_files(&[("replicator.toml", &file)]).unwrap();
        assert_eq!(settings.epochs.length, EpochLength::Auto);
        settings.epochs.auto.goal()
    };
    assert_eq!(goal(""), EpochGoal::OverheadPercent(10));
    assert_eq!(goal("overhead_percent = 5"), EpochGoal::OverheadPercent(5));
    assert_eq!(
        goal("latency = \"15ms\""),
        EpochGoal::Latency(Duration::from_millis(15))
    );
}
