//! Guests in our own test VMM over KVM (`crates/testbed`), which has its guest built in.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::Pid;

use super::{MAC, attach, console};
use crate::Lab;
use crate::daemons::VM;
use crate::lab::word;
use crate::netns::{GUEST_IP, GUEST_IP6, Host, TAP};

/// The system call and the request by which a virtual processor runs (`ioctl`, `KVM_RUN`), as /proc shows them.
const IOCTL: &str = "16";
const KVM_RUN: &str = "0xae80";
/// What the names of the VMM's threads for virtual processors begin with.
const VCPU_THREAD: &str = "vcpu-";
const LOOKS: u32 = 30;
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What to start.
#[derive(Clone, Debug)]
pub struct TestbedConfig {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors, 1 to 4.
    pub vcpus: u32,
    /// How writes are seen: `manual`, `log` or `ring`; the testbed's own default when empty.
    pub tracking: String,
    /// What the guest writes beside its service: `PATTERN:PAGES:PERIOD_MS`; nothing when empty.
    pub dirty: String,
    /// Whether the guest looks for wrong bytes, registers and lost interrupts all the time.
    pub check: bool,
    /// Further words for the guest.
    pub words: String,
}

impl Default for TestbedConfig {
    fn default() -> TestbedConfig {
        TestbedConfig {
            memory_mib: 256,
            vcpus: 1,
            tracking: String::new(),
            dirty: String::new(),
            check: true,
            words: String::new(),
        }
    }
}

impl TestbedConfig {
    /// Has the guest write so many pages, at random places, every 25 ms.
    #[must_use]
    pub fn dirty_pages(self, pages: u32) -> TestbedConfig {
        TestbedConfig {
            dirty: match pages {
                0 => String::new(),
                pages => format!("random/counter:{pages}:25"),
            },
            ..self
        }
    }

    /// The testbed's command line, for a guest on the primary.
    pub(crate) fn argv(&self, lab: &Lab) -> Result<Vec<String>> {
        let mut argv = vec![word(&lab.paths.binary("testbed")?), "run".to_owned()];
        let mut add = |option: &str, value: &str| argv.extend([option.to_owned(), value.to_owned()]);
        add("--name", VM);
        add("--memory", &self.memory_mib.to_string());
        add("--vcpus", &self.vcpus.to_string());
        add("--tap", TAP);
        add("--mac", MAC);
        add("--attach", &word(&attach(lab)));
        add("--serial", &word(&console(lab)));
        if !self.tracking.is_empty() {
            add("--tracking", &self.tracking);
        }
        add("--cmdline", &self.guest_words());
        Ok(argv)
    }

    /// The command line of the guest itself.
    fn guest_words(&self) -> String {
        let mut words = format!(
            "ip={GUEST_IP}/24 ip6={GUEST_IP6}/64 gw={} port=6379",
            Host::Client.ip()
        );
        if !self.dirty.is_empty() {
            words.push_str(&format!(" dirty={}", self.dirty));
        }
        if self.check {
            words.push_str(" check=on");
        }
        if !self.words.is_empty() {
            words.push_str(&format!(" {}", self.words));
        }
        words
    }
}

/// Whether a VMM's virtual processors run: whether the kernel says of any of its threads that it waits in `KVM_RUN`, or counts more of its
/// time as a guest's than at first. A guest that waits leaves `KVM_RUN` for a moment, so it is looked at many times; one that has much to do
/// never waits.
pub(crate) fn runs(vmm: Pid) -> Result<bool> {
    let first = vcpus(vmm)?;
    let mut now = first.clone();
    for _ in 0..LOOKS {
        if run_since(&first, &now) {
            return Ok(true);
        }
        sleep(LOOK_EVERY);
        now = vcpus(vmm)?;
    }
    eprintln!("no virtual processor is in the guest: {first:?}, and then {now:?}");
    Ok(false)
}

/// What the kernel says of a thread that runs a virtual processor.
#[derive(Clone, Debug)]
struct Vcpu {
    name: String,
    /// `NUMBER ARGUMENT…` of a thread that waits in a system call, `running` of one that is on a processor or waits for one.
    call: String,
    /// Time that it spent in the guest, in ticks of its clock.
    guest_ticks: u64,
}

/// All of them. A thread that has just ended runs nothing, and is left out.
fn vcpus(vmm: Pid) -> Result<Vec<Vcpu>> {
    let folder = format!("/proc/{}/task", vmm.as_raw_nonzero());
    let threads = fs::read_dir(&folder).with_context(|| format!("cannot list {folder}"))?;
    // The kernel has a thread of its own in the process, which shows the call that it was made in for ever.
    let all = threads.flatten().filter_map(|thread| vcpu(&thread.path()));
    Ok(all.filter(|vcpu| vcpu.name.starts_with(VCPU_THREAD)).collect())
}

fn vcpu(thread: &Path) -> Option<Vcpu> {
    let read = |file| fs::read_to_string(thread.join(file)).ok();
    Some(Vcpu {
        name: read("comm")?.trim_end().to_owned(),
        call: read("syscall")?.trim_end().to_owned(),
        guest_ticks: guest_ticks(&read("stat")?)?,
    })
}

/// Field 43 of /proc/PID/stat, `guest_time`; the second one is a name in parentheses with whatever in it.
fn guest_ticks(stat: &str) -> Option<u64> {
    let (_, from_third) = stat.rsplit_once(')')?;
    from_third.split_whitespace().nth(40)?.parse().ok()
}

fn run_since(first: &[Vcpu], now: &[Vcpu]) -> bool {
    now.iter().any(|vcpu| {
        let before = first.iter().find(|before| before.name == vcpu.name);
        runs_guest(&vcpu.call) || before.is_some_and(|before| vcpu.guest_ticks > before.guest_ticks)
    })
}

/// `NUMBER ARGUMENT…` of a thread that waits in a system call. One that is on a processor right now shows `running`.
fn runs_guest(call: &str) -> bool {
    let mut words = call.split_whitespace();
    words.next() == Some(IOCTL) && words.nth(1) == Some(KVM_RUN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_that_waits_for_the_guest_is_told_from_one_that_is_held() {
        assert!(runs_guest("16 0xb 0xae80 0x0 0x0 0x0 0x0 0x7ffc 0x7f\n"));
        for other in [
            "202 0x7f 0x80 0x0 0x0 0x0 0x0 0x7ffc 0x7f",
            "16 0xb 0xae81 0x0 0x0 0x0 0x0 0x7ffc 0x7f",
            "running",
            "",
        ] {
            assert!(!runs_guest(other), "{other}");
        }
    }

    fn seen(call: &str, guest_ticks: u64) -> Vcpu {
        Vcpu {
            name: "vcpu-0".to_owned(),
            call: call.to_owned(),
            guest_ticks,
        }
    }

    #[test]
    fn a_processor_that_never_waits_runs_when_its_time_in_the_guest_grows() {
        let first = [seen("running", 7)];
        assert!(run_since(&first, &[seen("running", 8)]));
        assert!(!run_since(&first, &[seen("running", 7)]), "it may be anywhere");
        assert!(!run_since(&first, &[seen("202 0x7f 0x80", 7)]));
        assert!(run_since(&first, &[seen("16 0xb 0xae80 0x0", 7)]));
    }

    #[test]
    fn the_time_in_the_guest_is_found_behind_any_name() {
        let numbers: Vec<String> = (4..=52).map(|field| field.to_string()).collect();
        let stat = format!("12 (a) b (c) S {}", numbers.join(" "));
        assert_eq!(guest_ticks(&stat), Some(43));
        assert_eq!(guest_ticks("12 (short) S 1 2"), None);
    }

    #[test]
    fn a_guest_that_is_to_write_nothing_is_told_nothing_of_it() {
        let quiet = TestbedConfig::default().dirty_pages(0);
        assert!(!quiet.guest_words().contains("dirty="));
        assert!(
            quiet
                .dirty_pages(600)
                .guest_words()
                .contains(" dirty=random/counter:600:25")
        );
    }
}
