//! A VMM without KVM, for tests of whatever attaches to one: its guest is a thread that writes pages of memory files, and it is tracked, paused,
//! saved and restored like a real one.
//!
//! The guest counts its steps, in its state and in its first page. A state that is restored over the memory of another moment is refused:
//! so a checkpoint that mixes two moments is found.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use romulus_host_sys::{SharedWords, monotonic_ns};

use crate::memfd;
use crate::proto::{MachineInfo, PAGE_BYTES, Region};
use crate::server::{Description, Machine, MachineError, StateWriter, Stopped};

/// The name of this kind of VMM.
pub const FAKE_VMM: &str = "fake";
/// Pages written a step, besides the first one.
const PAGES_A_STEP: usize = 4;
const STATE_MAGIC: &[u8; 8] = b"FAKEVMM1";

/// Something that the machine is asked, which a test can make fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `arm`.
    Arm,
    /// `harvest`.
    Harvest,
    /// `pause`.
    Pause,
    /// `save`.
    Save,
    /// `activate`.
    Activate,
}

/// The VMM, and a test's hand on it.
#[derive(Debug)]
pub struct FakeMachine {
    shared: Arc<Shared>,
    pace: Duration,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    machine: Option<Built>,
    random: u64,
    step: u64,
    running: bool,
    restored: bool,
    ended: bool,
    fail: Option<Call>,
    pauses: u64,
}

/// A machine on its memory.
#[derive(Debug)]
struct Built {
    info: MachineInfo,
    memory: Vec<File>,
    bitmap_file: OwnedFd,
    bitmap: SharedWords,
    /// What the hypervisor knows and the bitmap does not yet; `None` without tracking.
    log: Option<Vec<u64>>,
}

impl FakeMachine {
    /// A machine whose guest runs, on regions of so many pages each, with a step every `pace`.
    ///
    /// # Panics
    /// Without a region, with an empty one, or when there is no memory.
    pub fn running(region_pages: &[u64], pace: Duration) -> Arc<Self> {
        let machine = Self::empty(pace);
        let info = fake_info(region_pages);
        let memory = region_pages
            .iter()
            .map(|pages| {
                memfd::sealed("fake-guest", pages * PAGE_BYTES).expect("there is memory for a fake guest")
            })
            .collect();
        machine
            .build(info, memory, false)
            .expect("it can be built on its own memory");
        machine.lock().running = true;
        machine.start();
        machine
    }

    /// A VMM that waits for a machine.
    pub fn empty(pace: Duration) -> Arc<Self> {
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner::default()),
            changed: Condvar::new(),
        });
        Arc::new(Self {
            shared,
            pace,
            thread: Mutex::new(None),
        })
    }

    /// Steps of the guest so far.
    pub fn steps(&self) -> u64 {
        self.lock().step
    }

    /// Whether the guest runs.
    pub fn is_running(&self) -> bool {
        self.lock().running
    }

    /// Whether writes are tracked.
    pub fn is_armed(&self) -> bool {
        self.lock()
            .machine
            .as_ref()
            .is_some_and(|machine| machine.log.is_some())
    }

    /// How often it was paused.
    pub fn pauses(&self) -> u64 {
        self.lock().pauses
    }

    /// Makes the next such call fail.
    pub fn fail_next(&self, call: Call) {
        self.lock().fail = Some(call);
    }

    /// All guest memory, the regions one after the other. Torn while the guest runs.
    ///
    /// # Panics
    /// Without a machine.
    pub fn contents(&self) -> Vec<u8> {
        let inner = self.lock();
        let machine = inner.machine.as_ref().expect("there is a machine");
        let mut all = Vec::new();
        for (region, file) in machine.info.regions.iter().zip(&machine.memory) {
            let mut part = vec![0; usize::try_from(region.bytes).expect("it is small")];
            file.read_exact_at(&mut part, region.fd_offset)
                .expect("the file is that long");
            all.append(&mut part);
        }
        all
    }

    /// A device of the VMM's writes a page, which the hypervisor does not see.
    ///
    /// # Panics
    /// Without such a page.
    pub fn device_write(&self, page: u64) {
        let inner = self.lock();
        let machine = inner.machine.as_ref().expect("there is a machine");
        machine.write(page, 8, 0x00de_71ce);
        let word = usize::try_from(page / 64).expect("it is small");
        machine.bitmap[word].fetch_or(1 << (page % 64), std::sync::atomic::Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.shared.lock()
    }

    fn build(&self, info: MachineInfo, files: Vec<OwnedFd>, private: bool) -> Result<(), MachineError> {
        let failed = |what| move |error| MachineError::because(what, error);
        let mut memory: Vec<File> = files.into_iter().map(File::from).collect();
        let mut info = info;
        if private {
            for (region, file) in info.regions.iter_mut().zip(&mut memory) {
                *file = copy(region, file).map_err(failed("the memory can't be copied"))?;
                region.fd_offset = 0;
            }
        }
        let bytes = info.bitmap_bytes();
        let bitmap_file = memfd::sealed("fake-bitmap", bytes).map_err(failed("there is no bitmap"))?;
        let words = usize::try_from(bytes / 8).expect("a fake is small");
        let bitmap = SharedWords::map(&bitmap_file, words)
            .map_err(|error| MachineError::because("the bitmap can't be mapped", error))?;
        self.lock().machine = Some(Built {
            info,
            memory,
            bitmap_file,
            bitmap,
            log: None,
        });
        Ok(())
    }

    /// Starts the guest's thread.
    fn start(&self) {
        let (shared, pace) = (Arc::clone(&self.shared), self.pace);
        let guest = move || {
            let mut inner = shared.lock();
            while !inner.ended {
                if inner.running {
                    inner.run_step();
                    drop(inner);
                    thread::sleep(pace);
                    inner = shared.lock();
                } else {
                    inner = shared.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        let thread = thread::Builder::new().name("fake-guest".into()).spawn(guest);
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(thread.expect("there is a thread for a fake guest"));
    }

    /// Fails if a test wants it to.
    fn may_fail(&self, call: Call) -> Result<MutexGuard<'_, Inner>, MachineError> {
        let mut inner = self.lock();
        if inner.fail == Some(call) {
            inner.fail = None;
            return Err(MachineError::new(format!("a test made {call:?} fail")));
        }
        Ok(inner)
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.lock().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            assert!(
                thread.join().is_ok() || thread::panicking(),
                "the fake guest panicked"
            );
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// SplitMix64.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn run_step(&mut self) {
        self.step += 1;
        let draws: [u64; PAGES_A_STEP] = std::array::from_fn(|_| self.draw());
        let step = self.step;
        let machine = self.machine.as_mut().expect("a guest that runs has a machine");
        let pages = machine.info.memory_bytes() / PAGE_BYTES;
        machine.guest_write(0, 0, step);
        for draw in draws {
            machine.guest_write(draw % pages, 8 + draw % 500 * 8, draw);
        }
    }
}

impl Built {
    /// A write that the hypervisor sees.
    fn guest_write(&mut self, page: u64, offset: u64, value: u64) {
        self.write(page, offset, value);
        if let Some(log) = &mut self.log {
            log[usize::try_from(page / 64).expect("it is small")] |= 1 << (page % 64);
        }
    }

    fn write(&self, page: u64, offset: u64, value: u64) {
        let mut at = page * PAGE_BYTES + offset;
        for (region, file) in self.info.regions.iter().zip(&self.memory) {
            if at < region.bytes {
                let written = file.write_all_at(&value.to_le_bytes(), region.fd_offset + at);
                return written.expect("there is memory for a fake guest");
            }
            at -= region.bytes;
        }
        panic!("the machine has no page {page}");
    }

    fn first_word(&self) -> u64 {
        let mut word = [0; 8];
        let read = self.memory[0].read_exact_at(&mut word, self.info.regions[0].fd_offset);
        read.expect("its length was checked");
        u64::from_le_bytes(word)
    }
}

impl Machine for FakeMachine {
    fn describe(&self) -> Result<Description, MachineError> {
        let inner = self.lock();
        let machine = inner.machine.as_ref().ok_or_else(no_machine)?;
        let failed = |error| MachineError::because("no descriptor is left", error);
        let regions: Result<_, _> = machine
            .memory
            .iter()
            .map(|file| file.try_clone().map(OwnedFd::from))
            .collect();
        Ok(Description {
            info: machine.info.clone(),
            regions: regions.map_err(failed)?,
            bitmap: Some(machine.bitmap_file.try_clone().map_err(failed)?),
        })
    }

    fn arm(&self) -> Result<(), MachineError> {
        let mut inner = self.may_fail(Call::Arm)?;
        let machine = inner.machine.as_mut().ok_or_else(no_machine)?;
        for word in machine.bitmap.iter() {
            word.store(0, std::sync::atomic::Ordering::SeqCst);
        }
        machine.log = Some(vec![0; machine.bitmap.len()]);
        Ok(())
    }

    fn disarm(&self) {
        if let Some(machine) = &mut self.lock().machine {
            machine.log = None;
        }
    }

    fn harvest(&self) -> Result<u64, MachineError> {
        let mut inner = self.may_fail(Call::Harvest)?;
        let machine = inner.machine.as_mut().ok_or_else(no_machine)?;
        let log = machine
            .log
            .as_mut()
            .ok_or_else(|| MachineError::new("nothing is tracked"))?;
        let mut pages = 0;
        for (found, word) in log.iter_mut().zip(machine.bitmap.iter()) {
            let bits = std::mem::take(found);
            pages += u64::from(bits.count_ones());
            word.fetch_or(bits, std::sync::atomic::Ordering::SeqCst);
        }
        Ok(pages)
    }

    fn pause(&self) -> Result<Stopped, MachineError> {
        let began_ns = monotonic_ns();
        // A step is made by whoever holds the lock: having it is enough.
        let mut inner = self.may_fail(Call::Pause)?;
        assert!(inner.running, "the server pauses a guest that runs");
        inner.running = false;
        inner.pauses += 1;
        let stopped_at_ns = monotonic_ns();
        Ok(Stopped {
            stopped_at_ns,
            kick_ns: stopped_at_ns - began_ns,
        })
    }

    fn save(&self, into: &mut StateWriter<'_>) -> Result<(), MachineError> {
        let inner = self.may_fail(Call::Save)?;
        into.put(
            &[
                STATE_MAGIC.as_slice(),
                &inner.step.to_le_bytes(),
                &inner.random.to_le_bytes(),
            ]
            .concat(),
        )
    }

    fn resume(&self) -> u64 {
        let was_running = std::mem::replace(&mut self.lock().running, true);
        assert!(!was_running, "the server resumes a guest that it has paused");
        self.shared.changed.notify_all();
        monotonic_ns()
    }

    fn prepare(&self, info: &MachineInfo, regions: Vec<OwnedFd>, private: bool) -> Result<(), MachineError> {
        if info.vmm != FAKE_VMM {
            return Err(MachineError::new(format!(
                "this is a fake VMM, and the machine is of {:?}",
                info.vmm
            )));
        }
        self.build(info.clone(), regions, private)
    }

    fn restore(&self, state: &[u8]) -> Result<(), MachineError> {
        let mut inner = self.lock();
        inner.restored = false;
        let (words, rest) = state.as_chunks::<8>();
        let ([magic, step, random], []) = (words, rest) else {
            return Err(MachineError::new(
                "the state is not as long as that of a fake guest",
            ));
        };
        let step = u64::from_le_bytes(*step);
        let found = inner.machine.as_ref().ok_or_else(no_machine)?.first_word();
        if magic != STATE_MAGIC || found != step {
            return Err(MachineError::new(format!(
                "the state is of step {step}, and the memory of step {found}: they are not of one moment"
            )));
        }
        inner.step = step;
        inner.random = u64::from_le_bytes(*random);
        inner.restored = true;
        Ok(())
    }

    fn activate(&self) -> Result<u64, MachineError> {
        let mut inner = self.may_fail(Call::Activate)?;
        if !std::mem::take(&mut inner.restored) {
            return Err(MachineError::new("nothing was restored"));
        }
        inner.running = true;
        drop(inner);
        self.start();
        Ok(monotonic_ns())
    }
}

fn no_machine() -> MachineError {
    MachineError::new("there is no machine")
}

/// The description of a fake machine with regions of so many pages each.
pub fn fake_info(region_pages: &[u64]) -> MachineInfo {
    let mut gpa = 0;
    let regions = region_pages.iter().enumerate().map(|(index, pages)| {
        let region = Region {
            name: format!("ram{index}"),
            gpa,
            bytes: pages * PAGE_BYTES,
            fd_offset: 0,
        };
        // With a hole after each.
        gpa += (pages + 16) * PAGE_BYTES;
        region
    });
    MachineInfo {
        vmm: FAKE_VMM.into(),
        vmm_version: "1".into(),
        vcpus: 1,
        regions: regions.collect(),
        ..MachineInfo::default()
    }
}

/// A private copy of a region.
fn copy(region: &Region, file: &File) -> std::io::Result<File> {
    let mut bytes = vec![0; usize::try_from(region.bytes).map_err(std::io::Error::other)?];
    file.read_exact_at(&mut bytes, region.fd_offset)?;
    let copied = File::from(memfd::sealed("fake-trial", region.bytes)?);
    copied.write_all_at(&bytes, 0)?;
    Ok(copied)
}
