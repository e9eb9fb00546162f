//! One agent and many VMs: of two primary hosts, by priority, by memory, and given up again.

use anyhow::{Result, ensure};
use romulus_e2e::crowd::{AT_MOST, Crowd, CrowdConfig};
use romulus_e2e::{Paths, TEST_LAB, wait_for};

fn crowd(hosts: &[&str], config: CrowdConfig) -> Result<Crowd> {
    Crowd::raise(&Paths::here(), TEST_LAB, hosts, config)
}

#[test]
fn of_two_hosts_with_two_vms_each_on_one_agent_one_dies_and_the_other_goes_on_protected() -> Result<()> {
    let mut crowd = crowd(&["left", "right"], CrowdConfig::default())?;
    for (host, vm) in [
        ("left", "l-0"),
        ("right", "r-0"),
        ("left", "l-1"),
        ("right", "r-1"),
    ] {
        crowd.add(host, vm, None)?;
    }
    crowd.protect_all()?;
    crowd.kill_host("left")?;
    for vm in ["l-0", "l-1"] {
        crowd.wait_serves(vm)?;
        assert_eq!(crowd.at_agent(vm)?["standby"], "active", "{vm}");
    }
    for vm in ["r-0", "r-1"] {
        // A busy machine may have cost a session; none of its own accord is lost for good.
        crowd.wait_protected(vm)?;
        assert_eq!(crowd.at_agent(vm)?["standby"], "waiting", "{vm}");
    }
    let mut activated = crowd.activated()?;
    activated.sort();
    assert_eq!(activated, ["l-0", "l-1"]);
    Ok(())
}

#[test]
fn the_vms_of_a_dead_host_start_in_the_order_of_their_priorities() -> Result<()> {
    let names = ["low", "high", "middle", "none"];
    let priorities = [1, 1000, 500, 0];
    let tables: String = names
        .iter()
        .zip(priorities)
        .map(|(name, priority)| format!("[[vm]]\nname = \"{name}\"\npriority = {priority}\n"))
        .collect();
    // The order holds among VMs that are missed within one suspicion timeout: long, so that a busy machine keeps to it.
    let failover = "[failover]\nsuspicion_timeout = \"4s\"\n";
    let mut crowd = crowd(
        &["left"],
        CrowdConfig {
            agent: "starts_max = 1\n".into(),
            agent_tables: format!("{tables}{failover}"),
            replicators: failover.into(),
            ..CrowdConfig::default()
        },
    )?;
    for name in names {
        crowd.add("left", name, None)?;
    }
    crowd.protect_all()?;
    crowd.kill_host("left")?;
    for name in names {
        crowd.wait_serves(name)?;
    }
    assert_eq!(crowd.activated()?, ["high", "middle", "low", "none"]);
    Ok(())
}

#[test]
fn a_vm_that_does_not_fit_is_told_so_with_the_figures_and_disturbs_nobody() -> Result<()> {
    let mut crowd = crowd(
        &["left"],
        CrowdConfig {
            agent: "image_bytes_max = \"120MiB\"\n".into(),
            ..CrowdConfig::default()
        },
    )?;
    crowd.add("left", "fits", None)?;
    crowd.protect_all()?;
    crowd.add("left", "more", None)?;
    crowd.start_replicator("more")?;
    let detail = wait_for("the refusal", AT_MOST, || {
        let status = crowd.status("more").ok()?;
        let detail = status["detail"].as_str()?;
        detail.contains("has no room").then(|| detail.to_owned())
    })?;
    for figure in ["needs 64 MiB", "56 MiB are free", "limit of 120 MiB"] {
        ensure!(detail.contains(figure), "{detail}");
    }
    assert_eq!(crowd.at_agent("more")?, serde_json::Value::Null);
    crowd.wait_protected("fits")
}

#[test]
fn a_vm_is_given_up_when_nobody_needs_it_here_and_can_come_back() -> Result<()> {
    let mut crowd = crowd(&["left"], CrowdConfig::default())?;
    crowd.add("left", "vm", None)?;
    crowd.protect_all()?;
    let forget = |crowd: &Crowd, query: &str| crowd.agent_asked("POST", &format!("/v1/forget?{query}"));
    for query in ["vm=vm", "vm=vm&force=true"] {
        let (code, answer) = forget(&crowd, query)?;
        assert_eq!(code, 409, "{query} while it is protected: {answer}");
    }
    assert_eq!(forget(&crowd, "vm=other")?.0, 404);
    crowd.unprotect("vm")?;
    // The agent hears of it a little later.
    let standby = crowd.at_agent("vm")?["standby_pid"].as_u64();
    wait_for("its being given up", AT_MOST, || match forget(&crowd, "vm=vm") {
        Ok((200, _)) => Some(()),
        _ => None,
    })?;
    assert_eq!(crowd.at_agent("vm")?, serde_json::Value::Null);
    let left: Vec<_> = std::fs::read_dir(&crowd.lab.images)?.flatten().collect();
    assert!(left.is_empty(), "left in the image folder: {left:?}");
    if let Some(pid) = standby {
        wait_for("the end of the waiting standby", AT_MOST, || {
            (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(())
        })?;
    }
    crowd.protect_all()?;
    crowd.kill_host("left")?;
    crowd.wait_serves("vm")?;
    let (code, answer) = forget(&crowd, "vm=vm&force=true")?;
    assert_eq!(code, 409, "while the guest runs here: {answer}");
    crowd.wait_serves("vm")?;
    Ok(())
}

#[test]
fn one_vm_floods_and_the_others_stay_protected_and_their_commits_go_on() -> Result<()> {
    let mut crowd = crowd(
        &["left"],
        CrowdConfig {
            agent_tables: "[[vm]]\nname = \"flood\"\nbandwidth_max = \"20MiB\"\n".into(),
            ..CrowdConfig::default()
        },
    )?;
    for name in ["quiet-0", "quiet-1"] {
        crowd.add("left", name, None)?;
    }
    crowd.protect_all()?;
    crowd.add("left", "flood", Some("random/random:4000:25:32"))?;
    crowd.start_replicator("flood")?;
    wait_for("the flood", AT_MOST, || {
        let flood = crowd.at_agent("flood").ok()?;
        (flood["commits"].as_u64()? > 5).then_some(())
    })?;
    for name in ["quiet-0", "quiet-1"] {
        let before = crowd.at_agent(name)?["commits"].as_u64();
        wait_for("the others' commits", AT_MOST, || {
            let now = crowd.at_agent(name).ok()?["commits"].as_u64();
            (now > before.map(|before| before + 20)).then_some(())
        })?;
        crowd.wait_protected(name)?;
    }
    Ok(())
}
