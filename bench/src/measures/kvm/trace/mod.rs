//! `codec.trace`, `codec.shrink` and `memory.deltas`: the session's encoder on pages that real guests wrote, epoch after epoch.
//!
//! ```text
//!   record.rs   a guest of the test VMM or a Linux, captured every few milliseconds ─► a trace
//!   redis.rs    the clients of one that serves
//!   file.rs     traces as files
//! ```
//!
//! A trace is recorded at the start, once for all measures of a run that want the same one, or comes from a file. It is written to a file and
//! read back in any case. What the encoder makes of it is decoded and compared, outside of what is timed.

mod file;
mod record;
mod redis;

use std::fs::File;
use std::hint::black_box;
use std::io::{BufReader, BufWriter, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use romulus_page_codec::{HeldPages, Page, SessionEncoder, decode};
use romulus_types::{Digest, PAGE_BYTES, Session as SessionNumber};
use serde::Deserialize;

use super::{dirty_problem, machine_problem};
use crate::measures::{Measure, outside};
use crate::parameters::Parameter;
use crate::run::{Finding, Run, Unable, timed};
use crate::stats::{Figure, Unit, float};
use file::Trace;
use record::{Wish, Worker};

const SESSION: SessionNumber = SessionNumber(9);
/// Of a page in a frame, besides its payload: the distance to the one before, kind and length. Most take 4 bytes.
const ENTRY_BYTES: u64 = 4;
/// In the shortest form.
const EPOCHS_MIN: u32 = 3;

/// Where traces come from.
struct Source {
    workloads: Vec<String>,
    files: Vec<PathBuf>,
    memory_mib: u32,
    epoch_ms: u32,
    epochs: u32,
}

fn workloads() -> Vec<String> {
    vec!["redis".to_owned()]
}

const fn memory_mib() -> u32 {
    64
}

const fn epoch_ms() -> u32 {
    25
}

const fn epochs() -> u32 {
    200
}

/// What was recorded so far: measures that ask for the same share it.
static RECORDED: Mutex<Vec<(Wish, Arc<Trace>)>> = Mutex::new(Vec::new());

impl Source {
    fn traces(&self, run: &Run) -> Result<Vec<Arc<Trace>>, Unable> {
        let recorded = self.workloads.iter().map(|workload| {
            let wish = Wish {
                workload: workload.clone(),
                memory_mib: self.memory_mib,
                epoch_ms: self.epoch_ms,
                epochs: run.rounds(self.epochs).max(EPOCHS_MIN),
            };
            recorded(run, &wish)
        });
        let read = self.files.iter().map(|path| read(path).map(Arc::new));
        recorded.chain(read).collect()
    }

    fn problem(&self) -> Option<String> {
        let unknown = |workload: &String| match Worker::of(workload) {
            Worker::Dirtier(dirty) => dirty_problem(dirty),
            _ => None,
        };
        machine_problem(self.memory_mib, 1)
            .or_else(|| self.workloads.iter().find_map(unknown))
            .or_else(|| outside("epoch_ms", self.epoch_ms.into(), 5, 10_000))
            .or_else(|| outside("epochs", self.epochs.into(), 1, 100_000))
            .or_else(|| {
                let nothing = self.workloads.is_empty() && self.files.is_empty();
                nothing.then(|| "workloads or files must name something".to_owned())
            })
    }
}

fn recorded(run: &Run, wish: &Wish) -> Result<Arc<Trace>, Unable> {
    let mut all = RECORDED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, trace)) = all.iter().find(|(done, _)| done == wish) {
        return Ok(Arc::clone(trace));
    }
    run.say(format!("recording {}", wish.workload));
    let trace = wish.record()?;
    let mut file = tempfile::tempfile().map_err(Unable::failed("making a file"))?;
    trace
        .write(BufWriter::new(&mut file))
        .map_err(Unable::failed("writing a trace"))?;
    file.seek(SeekFrom::Start(0))
        .map_err(Unable::failed("reading a trace"))?;
    let back = Trace::read(BufReader::new(file)).map_err(Unable::failed("reading a trace"))?;
    if back != trace {
        return Err(Unable::Wrong(
            "a trace does not come back from its file".to_owned(),
        ));
    }
    let trace = Arc::new(back);
    all.push((wish.clone(), Arc::clone(&trace)));
    Ok(trace)
}

fn read(path: &Path) -> Result<Trace, Unable> {
    let file = File::open(path).map_err(Unable::failed("opening a trace"))?;
    Trace::read(BufReader::new(file)).map_err(Unable::failed("reading a trace"))
}

/// What became of a trace.
struct Replayed {
    /// Sent for the epochs, in bytes of frames.
    sent_bytes: u64,
    /// Most memory that previous versions took at any time.
    memory_bytes: u64,
    image: Digest,
}

impl Replayed {
    fn bytes_a_page(&self, trace: &Trace) -> f64 {
        float(self.sent_bytes) / float(trace.page_count())
    }
}

/// A session whose backup has what was before the first epoch.
fn begun(trace: &Trace, previous_bytes_max: u64) -> SessionEncoder {
    let held = HeldPages::new(SESSION, trace.guest_pages);
    let mut encoder = SessionEncoder::new(held, previous_bytes_max);
    for (place, page) in trace.before.iter() {
        black_box(encoder.encode(place, page));
    }
    encoder
}

/// Encodes all epochs, and decodes each page as the backup does.
fn replay(trace: &Trace, previous_bytes_max: u64) -> Result<Replayed, Unable> {
    let count = usize::try_from(trace.guest_pages).map_err(Unable::failed("counting pages"))?;
    let mut backup: Vec<Page> = vec![[0; PAGE_BYTES]; count];
    let at = |place: romulus_types::PageIndex| usize::try_from(place.0).unwrap_or(usize::MAX);
    for (place, page) in trace.before.iter() {
        backup[at(place)] = *page;
    }
    let mut encoder = begun(trace, previous_bytes_max);
    let digests_bytes = count * size_of::<Digest>();
    let (mut sent_bytes, mut memory_bytes) = (0, 0);
    for (place, page) in trace.epochs.iter().flat_map(file::Written::iter) {
        if let Some((kind, payload)) = encoder.encode(place, page) {
            sent_bytes += payload.len() as u64 + ENTRY_BYTES;
            let base = backup[at(place)];
            decode(kind.number(), payload, Some(&base), &mut backup[at(place)])
                .map_err(Unable::failed("decoding what was encoded"))?;
        }
        if backup[at(place)] != *page {
            return Err(Unable::Wrong(
                "a decoded page is not the one that was encoded".to_owned(),
            ));
        }
        memory_bytes = memory_bytes.max((encoder.memory_bytes() - digests_bytes) as u64);
    }
    if memory_bytes > previous_bytes_max {
        return Err(Unable::Wrong(format!(
            "previous versions took {memory_bytes} bytes, and {previous_bytes_max} are allowed"
        )));
    }
    Ok(Replayed {
        sent_bytes,
        memory_bytes,
        image: encoder.image_digest(),
    })
}

/// What tells a trace's row from others.
fn parameters(trace: &Trace, previous_bytes_max: u64) -> [(&'static str, Parameter); 4] {
    [
        ("workload", (&trace.name).into()),
        ("epoch_ms", trace.epoch_ms.into()),
        ("guest_mib", (trace.guest_pages / 256).into()),
        ("previous_mib", (previous_bytes_max >> 20).into()),
    ]
}

/// A figure that is the same however often it is taken.
fn exactly(value: f64) -> Result<Figure, Unable> {
    Figure::of(&[value]).ok_or_else(|| Unable::Wrong("it is no number".to_owned()))
}

/// Settings of `codec.trace` and `codec.shrink`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Replay {
    /// `redis`, `linux-redis`, `linux-` and a program at work, or what the guest's dirtier is to do; each a row.
    #[serde(default = "workloads")]
    workloads: Vec<String>,
    /// Traces that were recorded before; each a row.
    #[serde(default)]
    files: Vec<PathBuf>,
    /// Memory of the guest that is recorded.
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    #[serde(default = "epoch_ms")]
    epoch_ms: u32,
    #[serde(default = "epochs")]
    epochs: u32,
    /// Memory for previous versions; as the replicator has it by default.
    #[serde(default = "previous_mib")]
    previous_mib: u32,
    #[serde(default = "rounds")]
    rounds: u32,
}

const fn previous_mib() -> u32 {
    64
}

const fn rounds() -> u32 {
    3
}

impl Replay {
    fn source(&self) -> Source {
        Source {
            workloads: self.workloads.clone(),
            files: self.files.clone(),
            memory_mib: self.memory_mib,
            epoch_ms: self.epoch_ms,
            epochs: self.epochs,
        }
    }

    fn previous_bytes_max(&self) -> u64 {
        u64::from(self.previous_mib) << 20
    }

    fn problem(&self) -> Option<String> {
        self.source()
            .problem()
            .or_else(|| outside("previous_mib", self.previous_mib.into(), 0, 65_536))
            .or_else(|| outside("rounds", self.rounds.into(), 1, 100_000))
    }
}

/// `codec.trace`: how fast.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Speed(Replay);

impl Measure for Speed {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        for trace in self.0.source().traces(run)? {
            let previous_bytes_max = self.0.previous_bytes_max();
            let replayed = replay(&trace, previous_bytes_max)?;
            let most = trace.epochs.iter().map(|written| written.pages.len()).max();
            let mut into: Vec<Page> = vec![[0; PAGE_BYTES]; most.unwrap_or(0)];
            let mut other = false;
            let [reference, value] = run.in_turn(&trace.name, self.0.rounds, |one| {
                if one == 0 {
                    return Ok(timed(|| {
                        for written in &trace.epochs {
                            into.iter_mut()
                                .zip(&written.pages)
                                .for_each(|(into, page)| *into = *page);
                            black_box(&mut into);
                        }
                    }));
                }
                let mut encoder = begun(&trace, previous_bytes_max);
                let time_ns = timed(|| {
                    for (place, page) in trace.epochs.iter().flat_map(file::Written::iter) {
                        black_box(encoder.encode(place, page));
                    }
                });
                other |= encoder.image_digest() != replayed.image;
                Ok(time_ns)
            })?;
            if other {
                return Err(Unable::Wrong(
                    "two sessions made different images of one trace".to_owned(),
                ));
            }
            let pages = usize::try_from(trace.page_count()).map_err(Unable::failed("counting pages"))?;
            let unit = Unit::ns_a_page(pages);
            if let Some((value, reference)) = value.figure(unit).zip(reference.figure(unit)) {
                let note = format!(
                    "{:.2} GB/s in, {:.0} pages an epoch, {:.0} bytes a page",
                    float(PAGE_BYTES as u64) / value.p50,
                    float(trace.page_count()) / float(trace.epochs.len() as u64),
                    replayed.bytes_a_page(&trace)
                );
                let finding = Finding {
                    case: trace.name.clone(),
                    unit: unit.name,
                    value,
                    reference: Some(("memcpy of the pages".to_owned(), reference)),
                    note: Some(note),
                };
                run.found_at(parameters(&trace, previous_bytes_max), finding);
            }
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `codec.shrink`: how small.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Shrink(Replay);

impl Measure for Shrink {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        for trace in self.0.source().traces(run)? {
            let previous_bytes_max = self.0.previous_bytes_max();
            let bytes = replay(&trace, previous_bytes_max)?.bytes_a_page(&trace);
            let whole = float(PAGE_BYTES as u64);
            let finding = Finding {
                case: trace.name.clone(),
                unit: "bytes/page",
                value: exactly(bytes)?,
                reference: Some(("whole pages".to_owned(), exactly(whole)?)),
                note: Some(format!(
                    "{:.1} times smaller, {} pages in {} epochs",
                    whole / bytes,
                    trace.page_count(),
                    trace.epochs.len()
                )),
            };
            run.found_at(parameters(&trace, previous_bytes_max), finding);
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.0.problem()
    }
}

/// `memory.deltas`: what it costs in bytes to keep only some previous versions.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Deltas {
    /// `redis`, `linux-redis`, `linux-` and a program at work, or what the guest's dirtier is to do; each a row.
    #[serde(default = "workloads")]
    workloads: Vec<String>,
    /// Traces that were recorded before; each a row.
    #[serde(default)]
    files: Vec<PathBuf>,
    /// Memory of the guest that is recorded.
    #[serde(default = "memory_mib")]
    memory_mib: u32,
    #[serde(default = "epoch_ms")]
    epoch_ms: u32,
    #[serde(default = "epochs")]
    epochs: u32,
    /// Of the guest's memory.
    #[serde(default = "percent")]
    percent: u32,
}

const fn percent() -> u32 {
    25
}

impl Deltas {
    fn source(&self) -> Source {
        Source {
            workloads: self.workloads.clone(),
            files: self.files.clone(),
            memory_mib: self.memory_mib,
            epoch_ms: self.epoch_ms,
            epochs: self.epochs,
        }
    }
}

impl Measure for Deltas {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        for trace in self.source().traces(run)? {
            let guest_bytes = trace.guest_pages * PAGE_BYTES as u64;
            let limit_bytes = guest_bytes * u64::from(self.percent) / 100;
            // Room for every page, with what each takes besides.
            let (limited, full) = (replay(&trace, limit_bytes)?, replay(&trace, 2 * guest_bytes)?);
            if limited.image != full.image {
                return Err(Unable::Wrong("the two images are not the same".to_owned()));
            }
            let finding = Finding {
                case: trace.name.clone(),
                unit: "bytes/page",
                value: exactly(limited.bytes_a_page(&trace))?,
                reference: Some((
                    "with the last version of every page".to_owned(),
                    exactly(full.bytes_a_page(&trace))?,
                )),
                note: Some(format!(
                    "{:.1} of {:.1} MiB allowed, full {:.1} MiB; guest {} MiB",
                    mib(limited.memory_bytes),
                    mib(limit_bytes),
                    mib(full.memory_bytes),
                    guest_bytes >> 20
                )),
            };
            run.found_at(parameters(&trace, limit_bytes), finding);
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        self.source()
            .problem()
            .or_else(|| outside("percent", self.percent.into(), 1, 100))
    }
}

fn mib(bytes: u64) -> f64 {
    float(bytes) / 1_048_576.0
}
