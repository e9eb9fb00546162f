//! The table: every option of QEMU that we know and what becomes of it. An option that is not here is refused by name.
//!
//! `docs/src/standby-rules.md` is this table; a test holds the two together.

/// What becomes of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Taken over as it is.
    Keep,
    /// Taken over; its value is a file that the backup must have, too.
    KeepFile,
    /// Taken over; its key `file` (or `file=` keys) names a file that the backup must have, too.
    KeepFileKey,
    /// Left out.
    Drop,
    /// The machine cannot be protected.
    Refuse,
    /// `-machine`, `-M`: merged into one; the type becomes the versioned one, the memory backend ours.
    Machine,
    /// `-m`.
    Memory,
    /// `-cpu`.
    Cpu,
    /// `-global`.
    Global,
    /// `-object`.
    Object,
    /// `-device`.
    Device,
    /// `-netdev`, `-nic` and `-net`.
    Net,
    /// `-chardev`: becomes the null device of the same id.
    Chardev,
    /// `-serial`, `-parallel`, `-debugcon`: the device stays, its output goes nowhere (or to the log of the first serial line).
    Console,
    /// `-drive` and its short forms.
    Drive,
    /// `-blockdev`.
    Blockdev,
    /// `-audiodev`: becomes the null device of the same id.
    Audio,
    /// `-nographic`: the machine's part of it is kept.
    Nographic,
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// The option's names, without dash.
    pub(super) names: &'static [&'static str],
    /// Whether it takes a value.
    pub(super) value: bool,
    /// What becomes of it.
    pub(super) fate: Fate,
    /// Why, for the refusal and the table.
    pub(super) why: &'static str,
}

const fn rule(names: &'static [&'static str], value: bool, fate: Fate, why: &'static str) -> Rule {
    Rule {
        names,
        value,
        fate,
        why,
    }
}

const MACHINE: &str = "part of the machine";
const OURS: &str = "the standby has its own";
const SCREEN: &str = "nobody looks at the standby's screen";
const DEBUG: &str = "for debugging the primary's process only";

/// The table.
pub(super) const RULES: &[Rule] = &[
    rule(
        &["machine", "M"],
        true,
        Fate::Machine,
        "type as the stream names it, memory backend ours, the rest as it is",
    ),
    rule(
        &["m"],
        true,
        Fate::Memory,
        "kept; slots and maxmem are refused: memory cannot be plugged while protected",
    ),
    rule(
        &["cpu"],
        true,
        Fate::Cpu,
        "kept; under KVM, host and max need the same processor model on both hosts. The waiting standby's CPU features must be the primary's",
    ),
    rule(&["accel"], true, Fate::Keep, MACHINE),
    rule(&["enable-kvm"], false, Fate::Keep, MACHINE),
    rule(
        &["smp", "uuid", "boot", "rtc", "icount", "vga", "seed", "action"],
        true,
        Fate::Keep,
        MACHINE,
    ),
    rule(
        &["global"],
        true,
        Fate::Global,
        "kept; a property that names a file to write is refused",
    ),
    rule(
        &["watchdog-action", "overcommit", "compat"],
        true,
        Fate::Keep,
        MACHINE,
    ),
    rule(
        &[
            "no-acpi",
            "no-hpet",
            "no-fd-bootchk",
            "no-reboot",
            "no-shutdown",
            "nodefaults",
            "usb",
            "win2k-hack",
        ],
        false,
        Fate::Keep,
        MACHINE,
    ),
    rule(
        &["no-user-config", "only-migratable", "singlestep"],
        false,
        Fate::Keep,
        MACHINE,
    ),
    rule(&["usbdevice"], true, Fate::Keep, MACHINE),
    rule(
        &["kernel", "initrd", "bios", "option-rom", "dtb"],
        true,
        Fate::KeepFile,
        "a file of the same content",
    ),
    rule(
        &["L"],
        true,
        Fate::KeepFile,
        "a folder of firmware at the same place",
    ),
    rule(&["append"], true, Fate::Keep, MACHINE),
    rule(
        &["fw_cfg", "smbios", "acpitable"],
        true,
        Fate::KeepFileKey,
        "files of the same content",
    ),
    rule(
        &["sandbox"],
        true,
        Fate::Keep,
        "protects the standby as it did the primary",
    ),
    rule(
        &["object"],
        true,
        Fate::Object,
        "the main memory backend becomes the image's file; see below",
    ),
    rule(
        &["device"],
        true,
        Fate::Device,
        "kept; devices with state outside the guest are refused; see below",
    ),
    rule(
        &["netdev", "nic", "net"],
        true,
        Fate::Net,
        "taps become the standby's taps; see below",
    ),
    rule(
        &["chardev"],
        true,
        Fate::Chardev,
        "the null device of the same id: what was written to it cannot be taken back",
    ),
    rule(
        &["serial", "parallel", "debugcon"],
        true,
        Fate::Console,
        "the device stays, connected to nothing (the first serial line to a log, if wanted)",
    ),
    rule(
        &[
            "drive", "cdrom", "pflash", "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock",
        ],
        true,
        Fate::Drive,
        "see below",
    ),
    rule(&["blockdev"], true, Fate::Blockdev, "see below"),
    rule(&["audiodev"], true, Fate::Audio, "the null device of the same id"),
    rule(
        &["nographic"],
        false,
        Fate::Nographic,
        "becomes graphics=off; the terminal is not taken over",
    ),
    rule(
        &[
            "name",
            "qmp",
            "qmp-pretty",
            "monitor",
            "mon",
            "incoming",
            "pidfile",
        ],
        true,
        Fate::Drop,
        OURS,
    ),
    rule(&["daemonize", "S"], false, Fate::Drop, OURS),
    rule(
        &["display", "vnc", "spice", "k", "rotate", "g"],
        true,
        Fate::Drop,
        SCREEN,
    ),
    rule(
        &[
            "sdl",
            "curses",
            "gtk",
            "full-screen",
            "alt-grab",
            "ctrl-grab",
            "portrait",
            "show-cursor",
            "no-quit",
        ],
        false,
        Fate::Drop,
        SCREEN,
    ),
    rule(
        &["D", "d", "dfilter", "trace", "gdb", "msg"],
        true,
        Fate::Drop,
        DEBUG,
    ),
    rule(&["s", "perfmap", "jitdump"], false, Fate::Drop, DEBUG),
    rule(
        &["runas", "chroot"],
        true,
        Fate::Drop,
        "the standby runs as the agent's user",
    ),
    rule(
        &["mem-path"],
        true,
        Fate::Drop,
        "the image's file takes its place",
    ),
    rule(
        &["mem-prealloc", "async-teardown"],
        false,
        Fate::Drop,
        "the image's file takes its place",
    ),
    rule(&["loadvm"], true, Fate::Drop, "the checkpoint takes its place"),
    rule(
        &["readconfig", "writeconfig", "set"],
        true,
        Fate::Refuse,
        "put its options on the command line instead",
    ),
    rule(
        &["numa"],
        true,
        Fate::Refuse,
        "several memory nodes are not supported",
    ),
    rule(
        &["add-fd"],
        true,
        Fate::Refuse,
        "file descriptors handed to QEMU cannot be made again on the backup",
    ),
    rule(
        &["fsdev", "virtfs"],
        true,
        Fate::Refuse,
        "a shared folder is not replicated",
    ),
    rule(
        &["tpmdev"],
        true,
        Fate::Refuse,
        "the TPM's state is outside the guest and not replicated",
    ),
    rule(
        &["iscsi"],
        true,
        Fate::Refuse,
        "an iSCSI disk cannot be written by two hosts",
    ),
    rule(
        &["snapshot"],
        false,
        Fate::Refuse,
        "the temporary overlay is not replicated; mark the disk disposable instead",
    ),
    rule(
        &["plugin"],
        true,
        Fate::Refuse,
        "a TCG plugin runs foreign code in QEMU",
    ),
    rule(
        &["preconfig"],
        false,
        Fate::Refuse,
        "the machine is completed by commands that are not on the command line",
    ),
    rule(
        &["dump-vmstate", "xen-domid", "audio", "bt"],
        true,
        Fate::Refuse,
        "not supported",
    ),
    rule(
        &["xen-attach", "xen-domid-restrict"],
        false,
        Fate::Refuse,
        "not supported",
    ),
];

/// The rule for an option.
pub(super) fn find(name: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.names.contains(&name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Write;

    use super::*;

    #[test]
    fn no_option_has_two_rules() {
        let mut seen = BTreeSet::new();
        for name in RULES.iter().flat_map(|r| r.names) {
            assert!(seen.insert(*name), "{name} has two rules");
        }
    }

    #[test]
    fn the_manual_has_the_table_as_it_is_here() {
        let mut table = String::from("| option | becomes | because |\n|---|---|---|\n");
        for rule in RULES {
            let names: Vec<String> = rule.names.iter().map(|n| format!("`-{n}`")).collect();
            let fate = match rule.fate {
                Fate::Keep => "kept",
                Fate::KeepFile | Fate::KeepFileKey => "kept, file checked",
                Fate::Drop => "left out",
                Fate::Refuse => "**refused**",
                _ => "changed",
            };
            writeln!(table, "| {} | {fate} | {} |", names.join(", "), rule.why).unwrap();
        }
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/src/standby-rules.md");
        let manual = std::fs::read_to_string(page).unwrap();
        assert!(manual.contains(&table), "{page} lacks this table:\n{table}");
    }
}
