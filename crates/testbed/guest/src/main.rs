//! A guest of the test VMM: it serves keys and values over the network, dirties memory, and checks itself.
//!
//! It is a program without an operating system that runs in ring 3, where it is at native speed on any KVM. vCPU 0 has
//! the devices, the network and the service; every vCPU checks itself; the last one has the dirtier. What it does is
//! said on the command line (`guest-core/src/settings.rs`), where it lies in memory in `guest-core/src/abi.rs`.
//!
//! ```text
//!   every vCPU:  look at clocks and timer ──► what is due ──► sleep until the timer or a device interrupts
//!   vCPU 0 also: network in ──► requests ──► network out;  block log;  progress record;  are the others alive?
//! ```
//!
//! Whatever a self-check finds wrong is written to the console and ends the machine.
#![no_std]
#![no_main]

mod arch;
mod block_log;
mod connection;
mod console;
mod memory;
mod service;
mod shared;
mod sync;
mod virtio;
mod worker;

use core::panic::PanicInfo;
use core::slice;
use core::sync::atomic::{Ordering, fence};

use romulus_guest_core::abi::{BootInfo, End, PROGRESS, Progress, VCPUS_MAX};
use romulus_guest_core::random::mix;
use romulus_guest_core::settings::Settings;
use romulus_guest_core::timer::Overdue;

use crate::arch::boot;
use crate::arch::clock::Clock;
use crate::block_log::BlockLog;
use crate::memory::{Memory, Pages};
use crate::service::Service;
use crate::shared::{DIRTYING, FIGURES, PARTS, STARTED};
use crate::virtio::blk::{self, Blk};
use crate::virtio::net::{self, Nic};
use crate::worker::{Parts, Worker};

/// Pages that each vCPU's self-check fills and checks again and again.
const BLOCKS: usize = 64;
/// How often the progress record is written, in nanoseconds.
const PROGRESS_NS: u64 = 500_000;

/// Where every vCPU enters, on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn guest_entry(vcpu: u32, info: *const u8) -> ! {
    if vcpu == 0 {
        // SAFETY: the VMM has put boot information there; this is called once.
        unsafe { start(slice::from_raw_parts(info, BootInfo::BYTES)) }
    }
    while !STARTED.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
    let Some(parts) = PARTS[vcpu as usize].with(Option::take) else {
        panic!("vCPU {vcpu} has nothing to do")
    };
    let mut worker = Worker::new(vcpu, parts);
    loop {
        let seen = boot::interrupts();
        let (now_ns, wake_ns) = worker.turn();
        if wake_ns > now_ns {
            worker.rest(wake_ns, seen);
        }
    }
}

/// vCPU 0: divides the memory, starts devices and the other vCPUs.
///
/// # Safety
/// To be called once, with what the VMM wrote as boot information.
unsafe fn start(info: &[u8]) -> ! {
    let info = match BootInfo::from_bytes(info) {
        Ok(info) => info,
        Err(error) => console::end(End::Panic, format_args!("boot information: {error}")),
    };
    // SAFETY: the VMM says that so many bytes of command line lie there; it was checked against its limit.
    let cmdline = unsafe { slice::from_raw_parts(info.cmdline as *const u8, info.cmdline_bytes as usize) };
    let settings = match core::str::from_utf8(cmdline).map(Settings::parse) {
        Ok(Ok(settings)) => settings,
        Ok(Err(error)) => console::end(End::Panic, format_args!("{error}")),
        Err(error) => console::end(End::Panic, format_args!("command line: {error}")),
    };
    // SAFETY: called once, as this function is.
    let mut memory = unsafe { Memory::new(&info) };
    let clock = Clock::new(info.kvmclock, 0);
    let (service, log) = devices(&info, &settings, clock, &mut memory);
    DIRTYING.with(|dirtying| *dirtying = settings.dirty);
    let own = divide(&info, &settings, &mut memory);
    STARTED.store(true, Ordering::Release);
    console::line(format_args!(
        "guest: {} vCPUs, {} MiB, {}/{} port {}{}",
        info.vcpus,
        (info.ram_low_bytes + info.ram_high_bytes) >> 20,
        settings.ip.0,
        settings.ip.1,
        settings.port,
        if service.is_some() { "" } else { ", no network" },
    ));
    let overdue = [Overdue::default(); VCPUS_MAX as usize];
    let progress = settings.progress.then_some(0);
    Boss {
        worker: Worker::new(0, own),
        service,
        log,
        overdue,
        progress,
        vcpus: info.vcpus,
    }
    .run()
}

/// Starts the devices that the VMM has named, and what is behind them.
fn devices(
    info: &BootInfo,
    settings: &Settings,
    clock: Clock,
    memory: &mut Memory,
) -> (Option<Service>, Option<BlockLog>) {
    let (mut service, mut log) = (None, None);
    for device in info.devices() {
        let started = match device.virtio_id {
            net::VIRTIO_ID if service.is_none() => Nic::start(device, memory).map(|nic| {
                service = Some(Service::new(nic, clock, info, settings, memory));
            }),
            blk::VIRTIO_ID if log.is_none() && settings.log => Blk::start(device, memory).map(|disk| {
                log = BlockLog::new(disk, mix(clock.moment().tsc));
            }),
            _ => Ok(()),
        };
        if let Err(error) = started {
            console::end(End::Panic, format_args!("{error}"));
        }
    }
    (service, log)
}

/// Gives every vCPU its part of what memory is left; the last one gets the dirty set. Gives vCPU 0's.
fn divide(info: &BootInfo, settings: &Settings, memory: &mut Memory) -> Parts {
    let mut parts = [const { None }; VCPUS_MAX as usize];
    for part in &mut parts[..info.vcpus as usize] {
        let high = (BLOCKS / 2).min(memory.pages_left().1);
        let blocks = Pages::new(memory.take_pages(BLOCKS - high), memory.take_high_pages(high));
        *part = Some(Parts {
            kvmclock: info.kvmclock,
            check: settings.check,
            work: settings.work,
            blocks,
            dirty_set: None,
        });
    }
    let (low, high) = memory.pages_left();
    let set = Pages::new(memory.take_pages(low), memory.take_high_pages(high));
    if let Some(last) = parts[info.vcpus as usize - 1].as_mut() {
        last.dirty_set = Some(set);
    }
    for (slot, part) in PARTS.iter().zip(&mut parts).skip(1) {
        slot.with(|slot| *slot = part.take());
    }
    parts[0].take().expect("there is a vCPU 0")
}

/// What vCPU 0 does.
struct Boss {
    worker: Worker,
    service: Option<Service>,
    log: Option<BlockLog>,
    overdue: [Overdue; VCPUS_MAX as usize],
    /// When the progress record is to be written next, if it is.
    progress: Option<u64>,
    vcpus: u32,
}

impl Boss {
    fn run(mut self) -> ! {
        loop {
            let seen = boot::interrupts();
            let (now_ns, mut wake_ns) = self.worker.turn();
            let late = self.watch(now_ns);
            if let Some(log) = &mut self.log {
                wake_ns = wake_ns.min(log.turn(now_ns));
            }
            if let Some(service) = &mut self.service {
                service.interrupts(false);
                service.host.late = late;
                service.host.records = self
                    .log
                    .as_ref()
                    .map_or((0, 0), |log| (log.written, log.verified));
                wake_ns = wake_ns.min(service.turn(now_ns));
                if let Some(damage) = service.host.damage.take() {
                    self.worker.damage(damage);
                }
            }
            if let Some(next_ns) = self.progress {
                if now_ns >= next_ns {
                    self.write_progress();
                    self.progress = Some(now_ns + PROGRESS_NS);
                }
                wake_ns = wake_ns.min(now_ns.max(next_ns) + PROGRESS_NS);
            }
            // What comes in from here on interrupts; what has come in before is seen now.
            let more = self
                .service
                .as_ref()
                .is_some_and(|service| service.interrupts(true));
            if wake_ns > now_ns && !more {
                self.worker.rest(wake_ns, seen);
            }
        }
    }

    /// Looks whether the other vCPUs are there; names one that is late, ends the machine for one that is lost.
    fn watch(&mut self, now_ns: u64) -> Option<u32> {
        let mut late = None;
        for vcpu in 1..self.vcpus {
            let overdue = &mut self.overdue[vcpu as usize];
            let due_ns = FIGURES[vcpu as usize].due_ns.load(Ordering::Relaxed);
            if now_ns <= due_ns {
                *overdue = Overdue::default();
            } else if overdue.look(now_ns) {
                console::failed(
                    0,
                    format_args!(
                        "vCPU {vcpu} stands still: its timer is {} ns overdue",
                        now_ns - due_ns
                    ),
                );
            } else if now_ns - due_ns > 1_000_000_000 {
                late = Some(vcpu);
            }
        }
        late
    }

    fn write_progress(&self) {
        let sum = |figure: fn(&shared::Figures) -> u64| FIGURES.iter().map(figure).sum();
        let moment = self.worker.clock.moment();
        let progress = Progress {
            work_units: sum(|figures| figures.work_units.load(Ordering::Relaxed)),
            pages_written: sum(|figures| figures.pages_written.load(Ordering::Relaxed)),
            dirty_rounds: sum(|figures| figures.dirty_rounds.load(Ordering::Relaxed)),
            kvmclock_ns: moment.ns,
            tsc: moment.tsc,
        };
        let record = PROGRESS as *mut u64;
        // SAFETY: the contract keeps these words for the record, and only vCPU 0 writes them.
        unsafe {
            let sequence = record.add(1).read_volatile() & !1;
            record.write_volatile(Progress::MAGIC);
            record.add(1).write_volatile(sequence + 1);
            fence(Ordering::Release);
            for (index, field) in progress.fields().into_iter().enumerate() {
                record.add(2 + index).write_volatile(field);
            }
            fence(Ordering::Release);
            record.add(1).write_volatile(sequence + 2);
        }
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    console::end(End::Panic, format_args!("{info}"))
}
