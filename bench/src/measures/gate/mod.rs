//! `gate.*`: what it costs to hold frames and let them go, against a loop that reads from a tap and writes to another; and how long a frame takes
//! beyond its hold, against one that nobody holds. Needs root.
//!
//! ```text
//!   network.rs   taps and bridges, in a network namespace of their own
//!   frames.rs    frames with numbers: every byte of each that arrives is compared
//! ```

mod frames;
mod network;

use std::time::Duration;

use romulus_host_sys::{process_cpu_ns, thread_cpu_ns};
use serde::Deserialize;

use super::{Measure, outside};
use crate::parameters::Parameter;
use crate::run::{Finding, Run, Unable, timed};
use crate::stats::{Figure, Timings, Unit, float};
use frames::{ETHERNET_BYTES, Frames};
use network::{Bare, Ends, Held};

/// A tap's queue in the kernel takes 1,000.
const BURST_MAX: u64 = 900;

/// `gate.frames`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Throughput {
    /// Bytes of a frame; each a row.
    #[serde(default = "frame_bytes")]
    frame_bytes: Vec<u32>,
    /// Data in a TCP packet that nobody has cut; each a row.
    #[serde(default = "unsegmented_bytes")]
    unsegmented_bytes: Vec<u32>,
    /// Frames in an epoch.
    #[serde(default = "burst")]
    burst: u32,
    /// Epochs in a sample.
    #[serde(default = "epochs")]
    epochs: u32,
    #[serde(default = "rounds")]
    rounds: u32,
}

fn frame_bytes() -> Vec<u32> {
    vec![60, 1514]
}

fn unsegmented_bytes() -> Vec<u32> {
    vec![64_000]
}

const fn burst() -> u32 {
    256
}

const fn epochs() -> u32 {
    8
}

const fn rounds() -> u32 {
    20
}

/// `gate.latency`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Latency {
    /// Frames that are released together; each a row, which is about the last of them.
    #[serde(default = "together")]
    frames: Vec<u32>,
    #[serde(default = "latency_frame_bytes")]
    frame_bytes: u32,
    /// How long they are held.
    #[serde(default = "hold_ms")]
    hold_ms: u32,
    #[serde(default = "latency_rounds")]
    rounds: u32,
}

fn together() -> Vec<u32> {
    vec![1, 32]
}

const fn latency_frame_bytes() -> u32 {
    1514
}

const fn hold_ms() -> u32 {
    5
}

const fn latency_rounds() -> u32 {
    100
}

/// Does everything on a thread of its own, which is in a network of its own.
fn in_a_network(
    run: &mut Run,
    work: impl FnOnce(&mut Run) -> Result<(), Unable> + Send,
) -> Result<(), Unable> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            network::enter()?;
            work(run)
        });
        let joined = thread.join();
        joined.unwrap_or_else(|_| Err(Unable::Wrong("the measure's thread panicked".to_owned())))
    })
}

/// Processor time of this process for `work`, without what it says that was for others: the guest's sending, the client's receiving.
fn cpu_ns(work: impl FnOnce(&mut u64) -> Result<(), Unable>) -> Result<u64, Unable> {
    let mut others_ns = 0;
    let begun_ns = process_cpu_ns();
    work(&mut others_ns)?;
    Ok((process_cpu_ns() - begun_ns).saturating_sub(others_ns).max(1))
}

/// Adds the calling thread's processor time for `work` to a sum.
fn counted(sum_ns: &mut u64, work: impl FnOnce() -> Result<(), Unable>) -> Result<(), Unable> {
    let begun_ns = thread_cpu_ns();
    let done = work();
    *sum_ns += thread_cpu_ns() - begun_ns;
    done
}

/// Page faults of this process so far that needed no disk.
fn page_faults() -> Result<u64, Unable> {
    let stat = std::fs::read_to_string("/proc/self/stat");
    let stat = stat.map_err(Unable::failed("reading what the kernel says"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    // The eighth field after the name; proc_pid_stat(5).
    let faults = after_name
        .split_whitespace()
        .nth(7)
        .and_then(|field| field.parse().ok());
    faults.ok_or_else(|| Unable::Wrong("the kernel does not tell page faults".to_owned()))
}

fn ensure_all(frames: &Frames) -> Result<(), Unable> {
    match frames.under_way() {
        0 => Ok(()),
        left => Err(Unable::Wrong(format!("{left} frames did not arrive"))),
    }
}

/// Processor time of the calls of a gate; what is missing to all of it was the gate's own thread's.
#[derive(Default)]
struct Calls {
    barrier_ns: u64,
    release_ns: u64,
}

impl Throughput {
    fn held(&self, held: &mut Held, frames: &mut Frames, calls: &mut Calls) -> Result<u64, Unable> {
        cpu_ns(|others_ns| {
            for _ in 0..self.epochs {
                counted(others_ns, || frames.send(self.burst, &held.ends.guest))?;
                counted(&mut calls.barrier_ns, || held.barrier())?;
                counted(others_ns, || {
                    held.ensure_holds(self.burst.into())?;
                    match frames.take(&held.ends.client)? {
                        0 => Ok(()),
                        _ => Err(Unable::Wrong("frames left before their release".to_owned())),
                    }
                })?;
                counted(&mut calls.release_ns, || held.release())?;
                counted(others_ns, || frames.take(&held.ends.client).map(drop))?;
                ensure_all(frames)?;
            }
            Ok(())
        })
    }

    fn bare(&self, bare: &mut Bare, frames: &mut Frames) -> Result<u64, Unable> {
        cpu_ns(|others_ns| {
            for _ in 0..self.epochs {
                counted(others_ns, || frames.send(self.burst, &bare.ends.guest))?;
                bare.pass_on()?;
                counted(others_ns, || frames.take(&bare.ends.client).map(drop))?;
                ensure_all(frames)?;
            }
            Ok(())
        })
    }

    fn row(
        &self,
        run: &mut Run,
        (held, bare): (&mut Held, &mut Bare),
        case: &str,
        make: impl Fn() -> Frames,
    ) -> Result<(), Unable> {
        let mut frames = [make(), make()];
        let (mut faults, mut samples) = ([0; 2], 0);
        let (mut calls, mut held_ns) = (Calls::default(), 0);
        let [reference, value] = run.in_turn(case, self.rounds, |one| {
            let before = page_faults()?;
            let time_ns = match one {
                0 => self.bare(bare, &mut frames[0]),
                _ => self.held(held, &mut frames[1], &mut calls),
            };
            if let (1, Ok(time_ns)) = (one, &time_ns) {
                held_ns += time_ns;
            }
            faults[one] += page_faults()? - before;
            samples += one as u64;
            time_ns
        })?;
        let bytes = frames[1].bytes();
        let unit = Unit {
            name: "ns/frame",
            size: float(u64::from(self.burst) * u64::from(self.epochs)),
        };
        if let Some((value, reference)) = value.figure(unit).zip(reference.figure(unit)) {
            let told = |figure: &Figure, faults: u64| {
                let frames_a_second = 1e9 / figure.p50;
                let gbit = frames_a_second * float(bytes as u64) * 8.0 / 1e9;
                let faults_a_frame = float(faults) / (float(samples) * unit.size);
                format!(
                    "{frames_a_second:.0} frames/s, {gbit:.2} Gbit/s, {faults_a_frame:.2} page faults a frame"
                )
            };
            let a_frame = |sum_ns: u64| float(sum_ns) / (float(samples) * unit.size);
            let note = format!(
                "of a core: {}; bare {}. Of the mean {:.0} ns: {:.0} reading at the barrier, {:.0} releasing, the gate's thread the rest",
                told(&value, faults[1]),
                told(&reference, faults[0]),
                a_frame(held_ns),
                a_frame(calls.barrier_ns),
                a_frame(calls.release_ns),
            );
            let at: [(&str, Parameter); 3] = [
                ("case", case.into()),
                ("frame_bytes", bytes.into()),
                ("burst", self.burst.into()),
            ];
            let finding = Finding {
                case: case.to_owned(),
                unit: unit.name,
                value,
                reference: Some(("reading and writing on taps".to_owned(), reference)),
                note: Some(note),
            };
            run.found_at(at, finding);
        }
        Ok(())
    }
}

impl Measure for Throughput {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        in_a_network(run, |run| {
            let (mut held, mut bare) = (Held::make()?, Bare::make()?);
            for bytes in &self.frame_bytes {
                self.row(run, (&mut held, &mut bare), &format!("{bytes}"), || {
                    Frames::plain(*bytes as usize)
                })?;
            }
            for bytes in &self.unsegmented_bytes {
                self.row(run, (&mut held, &mut bare), &format!("gso-{bytes}"), || {
                    Frames::unsegmented(*bytes as usize)
                })?;
            }
            Ok(())
        })
    }

    fn problem(&self) -> Option<String> {
        let (mut plain, mut unsegmented) = (self.frame_bytes.iter(), self.unsegmented_bytes.iter());
        outside("burst", self.burst.into(), 1, BURST_MAX)
            .or_else(|| outside("epochs", self.epochs.into(), 1, 1000))
            .or_else(|| outside("rounds", self.rounds.into(), 1, 1_000_000))
            .or_else(|| plain.find_map(|bytes| frame_problem(*bytes)))
            .or_else(|| {
                unsegmented.find_map(|bytes| outside("unsegmented_bytes", (*bytes).into(), 1449, 65_000))
            })
    }
}

fn frame_problem(bytes: u32) -> Option<String> {
    // At the MTU of a new tap.
    outside("frame_bytes", bytes.into(), 60, 1500 + ETHERNET_BYTES as u64)
}

impl Latency {
    /// From the release until the client has the last frame.
    fn held(&self, held: &mut Held, frames: &mut Frames, count: u32) -> Result<u64, Unable> {
        frames.send(count, &held.ends.guest)?;
        std::thread::sleep(Duration::from_millis(self.hold_ms.into()));
        held.barrier()?;
        held.ensure_holds(count.into())?;
        if frames.take(&held.ends.client)? > 0 {
            return Err(Unable::Wrong("a frame left before its release".to_owned()));
        }
        let mut done = Ok(());
        let time_ns = timed(|| {
            done = held
                .release()
                .and_then(|()| frames.take(&held.ends.client).map(drop));
        });
        done.and_then(|()| ensure_all(frames))?;
        Ok(time_ns)
    }

    fn row(&self, run: &mut Run, (held, open): (&mut Held, &Ends), count: u32) -> Result<(), Unable> {
        let mut frames = [(); 2].map(|()| Frames::plain(self.frame_bytes as usize));
        let timings: [Timings; 2] = run.in_turn(&format!("{count} frames"), self.rounds, |one| {
            if one > 0 {
                return self.held(held, &mut frames[1], count);
            }
            let frames = &mut frames[0];
            // As long without anything to do as the other one.
            std::thread::sleep(Duration::from_millis(self.hold_ms.into()));
            let mut done = Ok(());
            let time_ns = timed(|| {
                done = frames
                    .send(count, &open.guest)
                    .and_then(|()| frames.take(&open.client).map(drop));
            });
            done.and_then(|()| ensure_all(frames))?;
            Ok(time_ns)
        })?;
        let [reference, value] = timings;
        if let Some((value, reference)) = value.figure(Unit::US).zip(reference.figure(Unit::US)) {
            let at: [(&str, Parameter); 3] = [
                ("frames", count.into()),
                ("frame_bytes", self.frame_bytes.into()),
                ("hold_ms", self.hold_ms.into()),
            ];
            let finding = Finding {
                case: count.to_string(),
                unit: Unit::US.name,
                note: Some(format!(
                    "from the release to the client's last frame, p99 {:.0} us",
                    value.p99
                )),
                value,
                reference: Some(("sending without a gate".to_owned(), reference)),
            };
            run.found_at(at, finding);
        }
        Ok(())
    }
}

impl Measure for Latency {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        in_a_network(run, |run| {
            let (mut held, open) = (Held::make()?, network::open()?);
            let mut counts = self.frames.iter();
            counts.try_for_each(|count| self.row(run, (&mut held, &open), *count))
        })
    }

    fn problem(&self) -> Option<String> {
        let mut counts = self.frames.iter();
        frame_problem(self.frame_bytes)
            .or_else(|| outside("hold_ms", self.hold_ms.into(), 0, 1000))
            .or_else(|| outside("rounds", self.rounds.into(), 1, 1_000_000))
            .or_else(|| counts.find_map(|count| outside("frames", (*count).into(), 1, BURST_MAX)))
    }
}
