//! The main job: a host dies under load, and its clients notice a stall and nothing else.

use std::time::Duration;

use anyhow::Result;
use romulus_e2e::guest::{GuestConfig, Memory};
use romulus_e2e::report::OK;
use romulus_e2e::scenario::{ScenarioConfig, kill_once};
use romulus_e2e::stage::StageConfig;
use romulus_e2e::{Paths, TEST_LAB};

/// The failover of this guest, which must not lose anything.
fn survives(guest: GuestConfig, seed: u64) -> Result<()> {
    let config = ScenarioConfig {
        stage: StageConfig {
            guest,
            seed,
            ..StageConfig::default()
        },
        before: Duration::from_secs(1),
        protected: Duration::from_secs(3),
        after: Duration::from_secs(2),
        ..ScenarioConfig::default()
    };
    let kill = kill_once(&Paths::here(), TEST_LAB, &config)?;
    assert_eq!(kill.verdict, OK, "{kill:#?}");
    assert_eq!(
        (kill.lost_acked_writes, kill.connection_resets, kill.late_frames),
        (0, 0, 0),
        "{kill:#?}"
    );
    assert!(
        kill.epochs > 20,
        "only {} epochs in {} s",
        kill.epochs,
        kill.protected_s
    );
    assert!(kill.acked_writes > 200, "only {} writes", kill.acked_writes);
    Ok(())
}

fn loaded() -> GuestConfig {
    GuestConfig {
        workload: "redis,dirty:400:25".to_owned(),
        ..GuestConfig::default()
    }
}

#[test]
fn a_host_dies_and_its_clients_lose_nothing() -> Result<()> {
    survives(loaded(), 1)
}

#[test]
fn a_guest_with_shared_memory_and_two_processors_survives_its_host() -> Result<()> {
    survives(
        GuestConfig {
            memory: Memory::Memfd,
            vcpus: 2,
            ..loaded()
        },
        2,
    )
}

#[test]
fn a_guest_on_the_default_machine_with_its_vga_survives_its_host() -> Result<()> {
    survives(
        GuestConfig {
            machine: "pc".to_owned(),
            no_defaults: false,
            extra: no_slirp(),
            ..loaded()
        },
        3,
    )
}

/// The default machine has a network card on SLIRP, which cannot be gated, unless it is told to have none.
fn no_slirp() -> Vec<String> {
    ["-nic", "none", "-parallel", "none", "-monitor", "none"]
        .map(str::to_owned)
        .to_vec()
}
