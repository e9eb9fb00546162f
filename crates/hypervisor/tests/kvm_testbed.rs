//! The whole way with the real test VMM over KVM: checkpoints of a guest that checks itself, a standby that loads them, and the guest going on
//! there. Needs /dev/kvm. The VMMs are processes of their own: this test's own executable, which is the test VMM when it is started
//! with `--attach`.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use romulus_hypervisor::kvm::source::{AttachOptions, KvmSource};
use romulus_hypervisor::kvm::standby::{KvmStandby, StandbyOptions};
use romulus_hypervisor::source::{Checkpoint, GuestEvent, GuestSource};
use romulus_hypervisor::standby::{Committed, Standby};
use romulus_page_codec::{ImageDigest, page_digest};
use romulus_types::{BlockId, Digest, PAGE_BYTES, PageIndex};

/// Long enough for anything on a busy machine.
const LONG: Duration = Duration::from_secs(60);
/// Pages written by the guest's checks, and 300 pages at random every 3 ms; its progress is in its memory.
const WORDS: &str = "check=on progress=on log=off dirty=random:300:3:16";
/// Where the guest writes its progress.
const PROGRESS: u64 = 0xcb00;

/// Not a test of anything: what the other tests start as a VMM.
#[test]
fn testbed_process() {
    let words: Vec<OsString> = std::env::args_os().collect();
    let Some(at) = words.iter().position(|word| word == "--") else {
        return;
    };
    let run = [OsString::from("testbed")]
        .into_iter()
        .chain(words[at + 1..].to_vec());
    // The harness would go on with a report; the VMM's exit code says how the guest ended.
    let code = romulus_testbed::main(run);
    std::process::exit(if code == std::process::ExitCode::SUCCESS {
        0
    } else {
        70
    });
}

fn testbed(words: &[&str]) -> Vec<String> {
    let exe = std::env::current_exe().unwrap().display().to_string();
    let first = [exe.as_str(), "testbed_process", "--exact", "--nocapture", "--"];
    first.iter().chain(words).map(|word| (*word).to_owned()).collect()
}

/// A guest that runs, and what a backup has of it.
struct Pair {
    vmm: Child,
    dir: tempfile::TempDir,
    source: Box<KvmSource>,
    ram: Vec<PathBuf>,
    state: Vec<u8>,
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

impl Pair {
    fn start(vcpus: &str) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let socket = dir.path().join("attach");
        let socket_text = socket.display().to_string();
        let mut words = vec!["run", "--name", "hv", "--memory", "64", "--vcpus", vcpus];
        words.extend(["--serial", "none", "--cmdline", WORDS, "--attach", &socket_text]);
        let argv = testbed(&words);
        let vmm = Command::new(&argv[0])
            .args(&argv[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + LONG;
        let source = loop {
            match KvmSource::attach(AttachOptions::new(&socket)) {
                Ok(source) => break Box::new(source),
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let blocks = source.layout().blocks().len();
        let ram = (0..blocks).map(|n| dir.path().join(format!("ram-{n}"))).collect();
        let mut pair = Self {
            vmm,
            dir,
            source,
            ram,
            state: Vec::new(),
        };
        pair.wait_for_progress();
        pair
    }

    /// A word of the guest's progress, straight from its memory.
    fn progress_word(&mut self) -> u64 {
        let mut page = vec![0; PAGE_BYTES];
        self.source
            .read_pages(PageIndex(PROGRESS / 4096), &mut page)
            .unwrap();
        let at = usize::try_from(PROGRESS % 4096).unwrap() + 8;
        u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    }

    fn wait_for_progress(&mut self) {
        let deadline = Instant::now() + LONG;
        let before = self.progress_word();
        while self.progress_word() == before {
            assert!(Instant::now() < deadline, "the guest makes no progress");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// All memory as it is now, block by block.
    fn memory(&mut self) -> Vec<u8> {
        let bytes = usize::try_from(self.source.layout().bytes()).unwrap();
        let mut memory = vec![0; bytes];
        self.source.read_pages(PageIndex(0), &mut memory).unwrap();
        memory
    }

    fn first_copy(&mut self) {
        self.source.bootstrap().unwrap();
        self.source.arm().unwrap();
        let memory = self.memory();
        let layout = self.source.layout().clone();
        let mut from = 0;
        for (path, block) in self.ram.iter().zip(layout.blocks()) {
            let bytes = usize::try_from(block.bytes).unwrap();
            fs::write(path, &memory[from..from + bytes]).unwrap();
            from += bytes;
        }
    }

    fn apply(&mut self, checkpoint: &Checkpoint) {
        let layout = self.source.layout().clone();
        let files: Vec<fs::File> = self
            .ram
            .iter()
            .map(|path| fs::OpenOptions::new().write(true).open(path).unwrap())
            .collect();
        for (page, content) in checkpoint.page_contents() {
            let blocks = (0..u16::try_from(files.len()).unwrap()).map(BlockId);
            let block = blocks
                .rev()
                .find(|block| layout.first_page(*block).0 <= page.0)
                .unwrap();
            let at = (page.0 - layout.first_page(block).0) * PAGE_BYTES as u64;
            files[usize::from(block.0)].write_all_at(content, at).unwrap();
        }
        self.state.clone_from(&checkpoint.device_state);
    }

    /// Takes a few checkpoints; the guest stands still after the last one, and every page of the copy is compared with its memory.
    fn checkpoint_and_compare(&mut self, count: u32) {
        let mut checkpoint = Checkpoint::default();
        self.source.precopy(&mut checkpoint).unwrap();
        self.apply(&checkpoint);
        for left in (0..count).rev() {
            std::thread::sleep(Duration::from_millis(10));
            let report = self
                .source
                .capture(&mut || Ok(()), left == 0, &mut checkpoint)
                .unwrap();
            assert!(report.dirty_pages > 0 && !checkpoint.device_state.is_empty());
            if left == 0 {
                println!("{report:?}");
            }
            self.apply(&checkpoint);
        }
        let copied: Vec<u8> = self.ram.iter().flat_map(|path| fs::read(path).unwrap()).collect();
        let memory = self.memory();
        let differ = |n: &usize| copied[n * 4096..(n + 1) * 4096] != memory[n * 4096..(n + 1) * 4096];
        let different: Vec<usize> = (0..memory.len() / 4096).filter(differ).collect();
        assert!(different.is_empty(), "pages that differ: {different:?}");
    }

    fn digest(&self) -> Digest {
        let memory: Vec<u8> = self.ram.iter().flat_map(|path| fs::read(path).unwrap()).collect();
        let mut image = ImageDigest::ZERO;
        for (index, page) in (0..).map(PageIndex).zip(memory.as_chunks::<PAGE_BYTES>().0) {
            image.replace(Digest(0), page_digest(index, page));
        }
        image.digest()
    }

    fn standby(&self, folder: &str) -> KvmStandby {
        let run_dir = self.dir.path().join(folder);
        let options = StandbyOptions::new(run_dir, "hvtb", testbed(&["standby"]));
        KvmStandby::prepare(self.source.machine(), options).unwrap()
    }
}

/// The record that the guest writes as it goes on, in the memory file of the machine that it runs in.
fn sequence(ram: &Path) -> u64 {
    let mut word = [0; 8];
    fs::File::open(ram)
        .unwrap()
        .read_exact_at(&mut word, PROGRESS + 8)
        .unwrap();
    u64::from_le_bytes(word)
}

fn goes_on_elsewhere_and_is_protected_again(vcpus: &str) {
    let mut pair = Pair::start(vcpus);
    pair.first_copy();
    pair.checkpoint_and_compare(8);
    let mut standby = pair.standby("run");
    let committed = Committed {
        ram: &pair.ram,
        device_state: &pair.state,
        memory: Some(pair.digest()),
    };
    println!("{:?}", standby.trial_load(&committed).unwrap());
    let wrong = Committed {
        memory: Some(Digest(1)),
        ..committed.clone()
    };
    let error = standby.activate(&wrong, &mut || Ok(())).unwrap_err();
    assert!(error.to_string().contains("not what was committed"), "{error}");
    standby.start_waiting(&pair.ram).unwrap();
    println!("{:?}", standby.activate(&committed, &mut || Ok(())).unwrap());
    let before = sequence(&pair.ram[0]);
    let deadline = Instant::now() + LONG;
    while sequence(&pair.ram[0]) < before + 200 {
        assert!(
            Instant::now() < deadline,
            "the guest does not go on: {:?}",
            standby.guest_end()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(
        standby.is_active(),
        "its self-check found something: {:?}",
        standby.guest_end()
    );
    // The old one is stopped for good, and the new one is protected to a third place, out of files that are no memory fds.
    pair.source.stop_guest().unwrap();
    let socket = standby.control_path().unwrap();
    *pair.source = KvmSource::attach(AttachOptions::new(&socket)).unwrap();
    pair.ram = (0..pair.ram.len())
        .map(|n| pair.dir.path().join(format!("next-{n}")))
        .collect();
    pair.first_copy();
    pair.checkpoint_and_compare(4);
    pair.source.resume().unwrap();
    pair.wait_for_progress();
    standby.kill();
    let deadline = Instant::now() + LONG;
    let mut events = Vec::new();
    while events.is_empty() && Instant::now() < deadline {
        events = pair.source.poll_events();
    }
    assert_eq!(events, [GuestEvent::Gone]);
}

#[test]
fn a_guest_goes_on_in_a_standby_and_is_protected_again_from_there() {
    goes_on_elsewhere_and_is_protected_again("1");
}

#[test]
fn a_guest_of_two_vcpus_goes_on_in_a_standby_and_is_protected_again_from_there() {
    goes_on_elsewhere_and_is_protected_again("2");
}
