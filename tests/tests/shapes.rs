//! Every shape of machine: attached to while it serves, protected, its host killed, and its client loses nothing.
//!
//! Those that cover most run always. All of them are on with the feature `every-shape`: `cargo xtask test --shapes all`.

use std::time::Duration;

use anyhow::Result;
use romulus_e2e::guest::{Firmware, Memory, Nic, QemuConfig};
use romulus_e2e::scenario::{ScenarioConfig, survive};
use romulus_e2e::stage::StageConfig;
use romulus_e2e::{Kernel, Paths, TEST_LAB};

/// Memory on both sides of the hole below 4 GiB.
const BIG_MIB: u32 = 4096;

fn loaded() -> QemuConfig {
    QemuConfig {
        workload: "redis,dirty:200:25".to_owned(),
        ..QemuConfig::default()
    }
}

fn another_user() -> Option<String> {
    Some("nobody".to_owned())
}

/// What `qemu-system-x86_64 -nic tap` is in Debian: i440fx, VGA, an e1000, floppy and CD drives, a parallel port.
fn default_machine() -> QemuConfig {
    QemuConfig {
        machine: String::new(),
        no_defaults: false,
        kernel: Kernel::Ordinary,
        nic: Nic::Default,
        ..loaded()
    }
}

fn survives(guest: QemuConfig) -> Result<()> {
    let config = ScenarioConfig {
        stage: StageConfig {
            guest: guest.into(),
            ..StageConfig::default()
        },
        before: Duration::from_millis(500),
        protected: Duration::from_secs(2),
        after: Duration::from_secs(2),
        ..ScenarioConfig::default()
    };
    let kill = survive(&Paths::here(), TEST_LAB, &config)?;
    println!(
        "survived: {} epochs, pause {:?}, outage {:?} ms, {} writes",
        kill.epochs, kill.pause_ms, kill.outage_ms, kill.acked_writes
    );
    Ok(())
}

macro_rules! shapes {
    ($($(#[$condition:meta])* $name:ident: $guest:expr;)*) => {
        $(
            $(#[$condition])*
            #[test]
            fn $name() -> Result<()> {
                survives($guest)
            }
        )*
    };
}

shapes! {
    debians_default_machine_with_its_vga_and_its_default_card_survives_its_host: default_machine();

    a_q35_with_ovmf_shared_memory_two_processors_and_another_user_survives_its_host: QemuConfig {
        firmware: Firmware::Ovmf,
        memory: Memory::Memfd,
        vcpus: 2,
        user: another_user(),
        ..loaded()
    };

    a_guest_with_memory_on_both_sides_of_the_hole_survives_its_host: QemuConfig {
        memory_mib: BIG_MIB,
        ..loaded()
    };

    #[cfg(feature = "every-shape")]
    a_big_guest_with_shared_memory_survives_its_host: QemuConfig {
        memory_mib: BIG_MIB,
        memory: Memory::Memfd,
        vcpus: 2,
        ..loaded()
    };

    #[cfg(feature = "every-shape")]
    a_big_default_machine_with_two_processors_survives_its_host: QemuConfig {
        memory_mib: BIG_MIB,
        vcpus: 2,
        ..default_machine()
    };

    #[cfg(feature = "every-shape")]
    the_default_machine_with_shared_memory_survives_its_host: QemuConfig {
        memory: Memory::Memfd,
        ..default_machine()
    };

    #[cfg(feature = "every-shape")]
    a_q35_with_all_its_default_devices_survives_its_host: QemuConfig {
        machine: "q35".to_owned(),
        ..default_machine()
    };

    #[cfg(feature = "every-shape")]
    a_q35_with_ovmf_and_all_its_default_devices_survives_its_host: QemuConfig {
        machine: "q35".to_owned(),
        firmware: Firmware::Ovmf,
        vcpus: 2,
        ..default_machine()
    };

    #[cfg(feature = "every-shape")]
    a_pc_with_ovmf_survives_its_host: QemuConfig {
        machine: "pc".to_owned(),
        firmware: Firmware::Ovmf,
        ..loaded()
    };

    #[cfg(feature = "every-shape")]
    a_guest_of_another_user_with_plain_memory_survives_its_host: QemuConfig {
        user: another_user(),
        ..loaded()
    };

    #[cfg(feature = "every-shape")]
    a_guest_with_two_processors_and_plain_memory_survives_its_host: QemuConfig {
        vcpus: 2,
        ..loaded()
    };
}
