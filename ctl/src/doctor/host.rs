//! What this host's kernel, devices and memory are like. Everything is read from /proc, /sys and /dev.

use std::fs::OpenOptions;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{AllSettings, Finding};
use crate::args::Role;

/// PAGEMAP_SCAN came with this version.
const KERNEL_MIN: (u32, u32) = (6, 7);
/// Capabilities by their number in the kernel's bit mask (linux/capability.h).
const CAPABILITIES: [(&str, u32, Need); 5] = [
    ("CAP_SYS_PTRACE", 19, Need::Primary),
    ("CAP_NET_ADMIN", 12, Need::Both),
    ("CAP_BPF", 39, Need::Primary),
    ("CAP_CHOWN", 0, Need::Primary),
    ("CAP_SYS_NICE", 23, Need::Both),
];
/// The default `image_bytes_max` is no promise that the host has it: below this much, an agent is of little use.
const FREE_BYTES_MIN: u64 = 256 << 20;

/// Who needs a capability.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Primary,
    Both,
}

/// All checks of the host that its roles need.
pub(super) fn checks(roles: &[Role], settings: &AllSettings) -> Vec<Finding> {
    let (primary, backup) = (roles.contains(&Role::Primary), roles.contains(&Role::Backup));
    let mut findings = vec![kernel(&read("/proc/sys/kernel/osrelease"))];
    if primary || backup {
        findings.push(capabilities(&read("/proc/self/status"), primary));
        findings.push(hypervisor());
        findings.push(device("kvm", "/dev/kvm", "load kvm_intel or kvm_amd, and switch virtualisation on in the firmware; without it QEMU guests run in emulation (TCG) only", false));
        findings.push(device("tun", "/dev/net/tun", "modprobe tun", true));
        findings.push(huge_pages(&read("/proc/meminfo")));
    }
    if primary {
        findings.push(ptrace_scope(&read("/proc/sys/kernel/yama/ptrace_scope")));
        findings.push(userfaultfd(&read("/proc/sys/vm/unprivileged_userfaultfd")));
        findings.push(bpf(&read("/proc/filesystems")));
    }
    if backup {
        findings.push(memory(&read("/proc/meminfo"), settings));
        findings.push(image_folder(&settings.agent.image_dir));
    }
    if roles.contains(&Role::Witness) {
        findings.push(store(&settings.witness.dir));
    }
    findings
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn kernel(release: &str) -> Finding {
    let release = release.trim();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= KERNEL_MIN {
        return Finding::good("kernel", format!("Linux {release}"));
    }
    let (major, minor) = KERNEL_MIN;
    Finding::bad(
        "kernel",
        format!("Linux {release}"),
        format!("QEMU guests need Linux {major}.{minor} or newer on the primary (PAGEMAP_SCAN)"),
    )
}

fn capabilities(status: &str, primary: bool) -> Finding {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(_, bit, need)| mask >> bit & 1 == 0 && (primary || *need == Need::Both))
        .map(|(name, ..)| *name)
        .collect();
    if missing.is_empty() {
        return Finding::good("capabilities", "all that the daemons need");
    }
    Finding::warning(
        "capabilities",
        format!("this shell lacks {}", missing.join(", ")),
        "run doctor as root to see what the daemons see; as a service, give them to the unit (AmbientCapabilities)",
    )
}

fn hypervisor() -> Finding {
    let output = Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            Finding::good("hypervisor", text.lines().next().unwrap_or("QEMU").to_owned())
        }
        _ => Finding::warning(
            "hypervisor",
            "no qemu-system-x86_64 in the path",
            "install QEMU (Debian: qemu-system-x86), unless all VMs here run in a VMM with the attach library",
        ),
    }
}

fn device(check: &'static str, path: &str, remedy: &str, needed: bool) -> Finding {
    let opened = std::fs::metadata(path).and_then(|metadata| {
        if !metadata.file_type().is_char_device() {
            return Err(std::io::Error::other("is no device"));
        }
        OpenOptions::new().read(true).write(true).open(path)
    });
    match opened {
        Ok(_) => Finding::good(check, format!("{path} can be opened")),
        Err(error) if needed => Finding::bad(check, format!("{path}: {error}"), remedy),
        Err(error) => Finding::warning(check, format!("{path}: {error}"), remedy),
    }
}

/// A line of /proc/meminfo, in bytes or in pages as it stands there.
fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let mut words = line.split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    Some(if words.next() == Some("kB") {
        number << 10
    } else {
        number
    })
}

fn huge_pages(text: &str) -> Finding {
    let (all, free) = (meminfo(text, "HugePages_Total"), meminfo(text, "HugePages_Free"));
    match (all, free) {
        (Some(all), Some(0)) if all > 0 => Finding::warning(
            "huge pages",
            format!("{all} set aside, none free"),
            "raise vm.nr_hugepages if guests or images are to use them",
        ),
        (Some(all), Some(free)) => Finding::good(
            "huge pages",
            format!("{all} set aside, {free} free; none are needed"),
        ),
        _ => Finding::good("huge pages", "none; none are needed"),
    }
}

fn memory(text: &str, settings: &AllSettings) -> Finding {
    let Some(available) = meminfo(text, "MemAvailable") else {
        return Finding::warning(
            "memory",
            "/proc/meminfo does not say what is available",
            "is /proc mounted?",
        );
    };
    let limit = settings.agent.image_bytes_max.bytes();
    let found = format!(
        "{} MiB available; image_bytes_max is {} MiB",
        available >> 20,
        limit >> 20
    );
    if available < FREE_BYTES_MIN {
        return Finding::bad(
            "memory",
            found,
            "a VM needs as much here as its guest has: add memory, or back up elsewhere",
        );
    }
    if limit > available {
        let remedy =
            "VMs that do not fit are refused when they attach; lower image_bytes_max to what is really there";
        return Finding::warning("memory", found, remedy);
    }
    Finding::good("memory", found)
}

fn image_folder(dir: &Path) -> Finding {
    let mounts = read("/proc/self/mounts");
    let over = |line: &str| -> Option<(usize, String)> {
        let mut fields = line.split(' ').skip(1);
        let (point, kind) = (fields.next()?, fields.next()?);
        dir.starts_with(point).then(|| (point.len(), kind.to_owned()))
    };
    // Of several that lie over each other the last one counts.
    let kind = mounts.lines().filter_map(over).max_by_key(|(length, _)| *length);
    let (_, kind) = kind.unwrap_or_default();
    let found = format!("{} lies on {kind}", dir.display());
    if kind == "tmpfs" {
        return Finding::good("images", found);
    }
    let remedy = "images are written many times a second: set image_dir to a folder on a tmpfs, or they wear a disk and commits wait for it";
    Finding::warning("images", found, remedy)
}

fn store(dir: &Path) -> Finding {
    if dir.exists() {
        return Finding::good("store", format!("{} is there", dir.display()));
    }
    Finding::bad(
        "store",
        format!("{} is not there", dir.display()),
        "make it once: witness init",
    )
}

fn ptrace_scope(text: &str) -> Finding {
    match text.trim() {
        "3" => Finding::bad(
            "ptrace",
            "kernel.yama.ptrace_scope is 3: nobody may attach",
            "set it to 2 or less, which needs a reboot; or protect VMs of a VMM with the attach library only",
        ),
        "" => Finding::good("ptrace", "no Yama; CAP_SYS_PTRACE decides"),
        scope => Finding::good(
            "ptrace",
            format!("kernel.yama.ptrace_scope is {scope}; CAP_SYS_PTRACE is enough"),
        ),
    }
}

fn userfaultfd(text: &str) -> Finding {
    match text.trim() {
        "" => Finding::bad(
            "userfaultfd",
            "this kernel has no userfaultfd",
            "use a kernel with CONFIG_USERFAULTFD, or a VMM with the attach library",
        ),
        _ => Finding::good(
            "userfaultfd",
            "there; QEMU's is made inside of QEMU, and needs no privilege for its user faults",
        ),
    }
}

/// The `bpf` file system is there exactly where the kernel has bpf(2).
fn bpf(filesystems: &str) -> Finding {
    if filesystems.lines().any(|line| line.trim_end().ends_with("\tbpf")) {
        return Finding::good("bpf", "the kernel has bpf(2), which the packet gate is made with");
    }
    Finding::bad(
        "bpf",
        "the kernel has no bpf(2)",
        "the packet gate needs CONFIG_BPF_SYSCALL, CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Grade;

    #[test]
    fn kernels_are_judged_by_their_number_and_not_by_their_text() {
        for (release, grade) in [
            ("6.7.0-rc1\n", Grade::Good),
            ("6.12.9+deb13-amd64", Grade::Good),
            ("10.0.1", Grade::Good),
            ("6.6.99", Grade::Bad),
            ("5.15.0-91-generic", Grade::Bad),
            ("", Grade::Bad),
        ] {
            assert_eq!(kernel(release).grade, grade, "{release}");
        }
    }

    #[test]
    fn missing_capabilities_are_named_for_the_role_that_needs_them() {
        let all = "Name:\tx\nCapEff:\t000001ffffffffff\n";
        assert_eq!(capabilities(all, true).grade, Grade::Good);
        let no_ptrace = "CapEff:\t000001fffff7ffff\n";
        let found = capabilities(no_ptrace, true);
        assert!(found.found.ends_with("lacks CAP_SYS_PTRACE"), "{found:?}");
        assert_eq!(capabilities(no_ptrace, false).grade, Grade::Good);
        assert!(capabilities("", false).found.contains("CAP_NET_ADMIN"));
    }

    #[test]
    fn memory_is_compared_with_what_the_agent_may_take() {
        let settings = |mib| {
            let mut settings = AllSettings {
                replicator: romulus_config::Replicator::default(),
                agent: romulus_config::BackupAgent::default(),
                witness: romulus_config::Witness::default(),
            };
            settings.agent.image_bytes_max = romulus_config::ByteSize::from_mib(mib);
            settings
        };
        let text = "MemTotal: 9999999 kB\nMemAvailable: 1048576 kB\nHugePages_Total:       4\nHugePages_Free:        0\n";
        assert_eq!(memory(text, &settings(1024)).grade, Grade::Good);
        assert_eq!(memory(text, &settings(1025)).grade, Grade::Warning);
        assert_eq!(memory("MemAvailable: 1024 kB", &settings(1)).grade, Grade::Bad);
        assert_eq!(huge_pages(text).grade, Grade::Warning);
    }

    #[test]
    fn a_kernel_that_lets_nobody_attach_is_bad() {
        assert_eq!(ptrace_scope("3\n").grade, Grade::Bad);
        assert_eq!(ptrace_scope("1\n").grade, Grade::Good);
        assert_eq!(bpf("nodev\tsysfs\nnodev\tbpf\n").grade, Grade::Good);
        assert_eq!(bpf("nodev\tsysfs\n").grade, Grade::Bad);
        assert_eq!(userfaultfd("").grade, Grade::Bad);
    }
}
