//! What a standby over the attach protocol promises, with fake VMMs as processes of their own: this test's own executable, which waits
//! as a standby when it is started with `--attach`.

#[path = "common/fake_vmm.rs"]
#[allow(dead_code, reason = "each test file uses some of it")]
mod fake_vmm;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fake_vmm::{Vmm, running, wait_as_standby};
use romulus_host_sys::PidFd;
use romulus_hypervisor::kvm::source::{AttachOptions, KvmSource};
use romulus_hypervisor::kvm::standby::{KvmStandby, StandbyOptions};
use romulus_hypervisor::source::{Checkpoint, GuestEvent, GuestSource};
use romulus_hypervisor::spec::{Hypervisor, MachineSpec};
use romulus_hypervisor::standby::{Committed, Standby, StandbyError};
use romulus_types::{BlockId, Digest, PAGE_BYTES, PageIndex};

/// Long enough for anything on a busy machine.
const LONG: Duration = Duration::from_secs(60);
/// The environment variable that makes an agent of this test's executable.
const AGENT_DIR: &str = "HVKVM_AGENT_DIR";

/// Not a test of anything: what the other tests start as a standby.
#[test]
fn standby_process() {
    let mut words = std::env::args().skip_while(|word| word != "--attach");
    if let Some(socket) = words.nth(1) {
        wait_as_standby(Path::new(&socket));
    }
}

/// Not a test of anything either: an agent, in a folder that is named by the environment, which has a standby waiting until it is killed.
#[test]
fn agent_process() {
    let Some(dir) = std::env::var_os(AGENT_DIR).map(PathBuf::from) else {
        return;
    };
    let spec = MachineSpec::from_json(&fs::read(dir.join("machine")).unwrap()).unwrap();
    let mut standby = KvmStandby::prepare(&spec, options(&dir)).unwrap();
    standby.start_waiting(&ram_files(&dir, &spec)).unwrap();
    fs::write(dir.join("waits.new"), standby.pid().unwrap().to_string()).unwrap();
    fs::rename(dir.join("waits.new"), dir.join("waits")).unwrap();
    loop {
        std::thread::park();
    }
}

fn options(dir: &Path) -> StandbyOptions {
    let exe = std::env::current_exe().unwrap().display().to_string();
    let words = [&exe, "standby_process", "--exact", "--nocapture", "--"];
    let command = words.map(str::to_owned).to_vec();
    StandbyOptions::new(dir.join("run"), "hvkvm", command)
}

fn ram_files(dir: &Path, spec: &MachineSpec) -> Vec<PathBuf> {
    let blocks = 0..spec.layout.blocks().len();
    blocks.map(|number| dir.join(format!("ram-{number}"))).collect()
}

fn wait_for<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A guest that was checkpointed, as a backup has it.
struct Saved {
    vmm: Vmm,
    source: Box<KvmSource>,
    spec: MachineSpec,
    dir: tempfile::TempDir,
    ram: Vec<PathBuf>,
    state: Vec<u8>,
}

impl Saved {
    fn new() -> Self {
        let vmm = running();
        let mut source = Box::new(KvmSource::attach(AttachOptions::new(&vmm.socket)).unwrap());
        source.arm().unwrap();
        let mut memory = vec![0; usize::try_from(source.layout().bytes()).unwrap()];
        source.read_pages(PageIndex(0), &mut memory).unwrap();
        let mut checkpoint = Checkpoint::default();
        // The memory of the real one stands still until the test is over.
        source.capture(&mut || Ok(()), true, &mut checkpoint).unwrap();
        for (page, content) in checkpoint.page_contents() {
            let at = usize::try_from(page.0).unwrap() * PAGE_BYTES;
            memory[at..at + PAGE_BYTES].copy_from_slice(content);
        }
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let spec = MachineSpec::from_json(&source.machine().to_json()).unwrap();
        let layout = spec.layout.clone();
        let ram = ram_files(dir.path(), &spec);
        for (number, (path, block)) in ram.iter().zip(layout.blocks()).enumerate() {
            let first = layout.first_page(BlockId(u16::try_from(number).unwrap())).0;
            let from = usize::try_from(first).unwrap() * PAGE_BYTES;
            fs::write(path, &memory[from..from + usize::try_from(block.bytes).unwrap()]).unwrap();
        }
        Self {
            vmm,
            source,
            spec,
            dir,
            ram,
            state: checkpoint.device_state,
        }
    }

    fn options(&self) -> StandbyOptions {
        options(self.dir.path())
    }

    /// An agent of its own, and the process that it has waiting.
    fn agent(&self) -> (Child, u32) {
        fs::write(self.dir.path().join("machine"), self.spec.to_json()).unwrap();
        let agent = Command::new(std::env::current_exe().unwrap())
            .args(["agent_process", "--exact", "--nocapture"])
            .env(AGENT_DIR, self.dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let waits = self.dir.path().join("waits");
        let pid = wait_for("a standby to wait", || fs::read_to_string(&waits).ok());
        (agent, pid.parse().unwrap())
    }

    fn standby(&self) -> KvmStandby {
        KvmStandby::prepare(&self.spec, self.options()).unwrap()
    }

    fn committed(&self) -> Committed<'_> {
        Committed {
            ram: &self.ram,
            device_state: &self.state,
            memory: None,
        }
    }

    fn memory(&self) -> Vec<u8> {
        self.ram.iter().flat_map(|path| fs::read(path).unwrap()).collect()
    }

    /// The first page of the image holds the guest's step.
    fn step(&self) -> u64 {
        u64::from_le_bytes(self.memory()[..8].try_into().unwrap())
    }

    fn went_on(&self, from: u64) {
        let deadline = Instant::now() + LONG;
        while self.step() <= from {
            assert!(Instant::now() < deadline, "the guest does not go on");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn is_gone(pid: u32) -> bool {
    PidFd::open(pid).map_or(true, |process| process.wait_ended(LONG).unwrap())
}

#[test]
fn a_trial_touches_nothing_and_a_warm_standby_goes_on_where_the_guest_was() {
    let saved = Saved::new();
    let before = saved.memory();
    let mut standby = saved.standby();
    let report = standby.trial_load(&saved.committed()).unwrap();
    assert_eq!(report.stream_bytes, saved.state.len() as u64);
    assert!(before == saved.memory(), "a trial writes nothing");
    assert!(standby.pid().is_none());
    standby.start_waiting(&saved.ram).unwrap();
    let pid = standby.pid().unwrap();
    standby.start_waiting(&saved.ram).unwrap();
    assert_eq!(standby.pid(), Some(pid), "one waits already");
    assert!(standby.is_waiting() && !standby.is_active());
    let mut consumed = 0;
    let mut consume = || {
        consumed += 1;
        assert!(before == saved.memory(), "consumed before the guest may write");
        Ok(())
    };
    let report = standby.activate(&saved.committed(), &mut consume).unwrap();
    assert!(report.warm && consumed == 1);
    assert!(standby.is_active() && standby.pid() == Some(pid));
    let step = u64::from_le_bytes(before[..8].try_into().unwrap());
    saved.went_on(step);
    standby.kill();
    assert!(is_gone(pid));
    assert!(!standby.is_active());
}

#[test]
fn a_guest_that_was_taken_over_outlives_its_agent_is_adopted_and_protected_again() {
    let saved = Saved::new();
    let mut first = saved.standby();
    first.start_waiting(&saved.ram).unwrap();
    let waiting = first.pid().unwrap();
    first.abandon();
    // The next agent ends what waits, and activates cold.
    let mut second = saved.standby();
    assert!(is_gone(waiting) && !second.is_waiting() && !second.is_active());
    let report = second.activate(&saved.committed(), &mut || Ok(())).unwrap();
    assert!(!report.warm);
    let pid = second.pid().unwrap();
    drop(second);
    let mut third = saved.standby();
    assert!(third.is_active() && third.pid() == Some(pid));
    assert!(third.start_waiting(&saved.ram).is_err());
    // A replicator protects it to the next backup; an agent that starts meanwhile finds it all the same.
    let socket = third.control_path().unwrap();
    let mut source = KvmSource::attach(AttachOptions::new(&socket)).unwrap();
    drop(third);
    let mut fourth = saved.standby();
    assert!(fourth.is_active() && fourth.pid() == Some(pid));
    source.arm().unwrap();
    let mut checkpoint = Checkpoint::default();
    source.capture(&mut || Ok(()), false, &mut checkpoint).unwrap();
    saved.went_on(saved.step());
    fourth.kill();
    let deadline = Instant::now() + LONG;
    let mut events = Vec::new();
    while events.is_empty() && Instant::now() < deadline {
        events = source.poll_events();
    }
    assert_eq!(events, [GuestEvent::Gone], "its process is gone");
    assert!(source.capture(&mut || Ok(()), false, &mut checkpoint).is_err());
}

#[test]
fn a_standby_whose_agent_is_killed_bears_it_and_is_ended_by_the_next_agent() {
    let saved = Saved::new();
    let (mut agent, waiting) = saved.agent();
    agent.kill().unwrap();
    agent.wait().unwrap();
    let said = saved.dir.path().join("run/machine/stderr");
    let length = || fs::metadata(&said).unwrap().len();
    let before = length();
    wait_for("a word that nobody reads", || {
        (length() > before + 100).then_some(())
    });
    let process = PidFd::open(waiting).unwrap();
    assert!(
        !process.wait_ended(Duration::ZERO).unwrap(),
        "it died with its agent"
    );
    let mut standby = saved.standby();
    assert!(
        process.wait_ended(LONG).unwrap(),
        "it still holds what the next one needs"
    );
    standby.start_waiting(&saved.ram).unwrap();
    standby.activate(&saved.committed(), &mut || Ok(())).unwrap();
    standby.kill();
}

#[test]
fn an_activation_that_fails_leaves_the_image_as_it_was() {
    let saved = Saved::new();
    let before = saved.memory();
    let mut torn = saved.state.clone();
    torn[8] ^= 1;
    let committed = Committed {
        device_state: &torn,
        ..saved.committed()
    };
    let mut standby = saved.standby();
    assert!(standby.trial_load(&committed).is_err());
    let error = standby.activate(&committed, &mut || Ok(())).unwrap_err();
    assert!(error.untouched, "{error}");
    assert!(error.to_string().contains("not of one moment"), "{error}");
    let mut refuse = || Err(StandbyError::plain("no mark can be made"));
    let error = standby.activate(&saved.committed(), &mut refuse).unwrap_err();
    assert!(error.untouched);
    // The fake's memory is no mapping of the image's files: exactly what is looked for.
    let committed = Committed {
        memory: Some(Digest(1)),
        ..saved.committed()
    };
    let mut never = || panic!("nothing was verified, so nothing is consumed");
    let error = standby.activate(&committed, &mut never).unwrap_err();
    assert!(
        error.to_string().contains("is not the file") && !error.untouched,
        "{error}"
    );
    assert!(standby.pid().is_none() && before == saved.memory());
    standby.activate(&saved.committed(), &mut || Ok(())).unwrap();
    standby.kill();
}

#[test]
fn what_is_missing_or_different_here_is_named_before_a_session_needs_it() {
    let saved = Saved::new();
    let refused = |spec: &MachineSpec, options: StandbyOptions| {
        let standby = KvmStandby::prepare(spec, options);
        let refused = standby.and_then(|mut standby| standby.start_waiting(&saved.ram));
        refused.unwrap_err().to_string()
    };
    let with = |change: &dyn Fn(&mut MachineSpec)| {
        let mut spec = saved.spec.clone();
        change(&mut spec);
        refused(&spec, saved.options())
    };
    let said = with(&|spec| spec.version = "2".into());
    assert!(said.contains("same version"), "{said}");
    let said = with(&|spec| spec.host_cpu = "another".into());
    assert!(said.contains("processor"), "{said}");
    let said = with(&|spec| {
        if let Hypervisor::Kvm(own) = &mut spec.hypervisor {
            own.vmm = "another".into();
        }
    });
    assert!(said.contains("another"), "{said}");
    let mut options = saved.options();
    options.command = vec!["/nowhere/vmm".into()];
    let said = refused(&saved.spec, options);
    assert!(said.contains("/nowhere/vmm"), "{said}");
    let mut options = saved.options();
    options.command = vec!["vmm".into()];
    assert!(refused(&saved.spec, options).contains("absolute path"));
    let mut options = saved.options();
    options.command = ["/bin/sh", "-c", "echo no such thing >&2"]
        .map(str::to_owned)
        .to_vec();
    let said = refused(&saved.spec, options);
    assert!(said.contains("ended at once: no such thing"), "{said}");
    assert!(!saved.vmm.machine.is_running());
    let mut source = saved.source;
    source.resume().unwrap();
}
