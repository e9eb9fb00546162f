//! What a guest writes, and what its checkpoints cost: taken at some epoch lengths, encoded as the replicator does, sent nowhere.

use std::time::{Duration, Instant};

use romulus_hypervisor::source::{CaptureReport, Checkpoint, GuestSource, SourceError};
use romulus_page_codec::{HeldPages, Kind, SessionEncoder};
use romulus_types::{Epoch, PAGE_BYTES, Session};
use romulus_wire::{
    CommitRecord, PagesSection, PagesWriter, WireError, device_state_frames, device_state_section,
    pack_guest_state,
};
use serde::Serialize;

use super::interrupt;
use crate::stats::float;

/// Of what nobody receives.
const SESSION: Session = Session(1);
/// As the replicator makes them.
const FRAME_BYTES: usize = 128 << 10;
/// What no epoch of a length is counted in at first: hot pages become hot, and the encoder gets to know the working set.
const WARM_UP: Duration = Duration::from_millis(500);
/// So many epochs of a length are counted at least, however long it takes.
const EPOCHS_MIN: usize = 3;
/// Live rounds before the first checkpoint, at most, and with how many pages they are enough: as in the replicator.
const PRECOPY_ROUNDS_MAX: u32 = 32;
const PRECOPY_GOAL_PAGES: usize = 2048;
/// A page is hot that is written in this part of the epochs.
const HOT: f64 = 0.5;

/// Why a guest could not be looked at to the end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ObserveError {
    #[error("{doing} failed")]
    Source {
        doing: &'static str,
        #[source]
        source: SourceError,
    },
    #[error("the guest did not just run ({0}): look again when it does")]
    Disturbed(String),
    #[error("a checkpoint could not be encoded")]
    Encode(#[from] WireError),
    #[error("interrupted")]
    Interrupted,
}

/// What is to be looked at.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    /// Lengths of epochs, one after the other.
    pub(crate) lengths: Vec<Duration>,
    /// For how long each.
    pub(crate) time: Duration,
    /// Previous versions of pages that the encoder may keep, in bytes.
    pub(crate) delta_bytes: u64,
}

/// The median and the 99th percentile.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Quantiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// What epochs of one length were like.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Observed {
    /// As it was asked for, and as it was at the median, in milliseconds.
    pub(crate) asked_ms: f64,
    pub(crate) epoch_ms: f64,
    /// Epochs that were counted.
    pub(crate) epochs: usize,
    pub(crate) pause_us: Quantiles,
    pub(crate) dirty_pages: Quantiles,
    pub(crate) dirty_pages_a_second: f64,
    /// Encoding of an epoch, on one core.
    pub(crate) encode_us: Quantiles,
    /// Sent for an epoch, with device state and frames, on average.
    pub(crate) wire_bytes: f64,
    /// Device state of an epoch, on average.
    pub(crate) state_bytes: f64,
    /// Pages in, bytes of encoded pages out: how many times smaller.
    pub(crate) times_smaller: f64,
    /// Different pages that were written in all these epochs.
    pub(crate) working_set_pages: u64,
    /// Pages that were written in at least half of the epochs.
    pub(crate) hot_pages: u64,
    /// Pages by their encoding.
    pub(crate) kinds: Vec<(&'static str, u64)>,
}

/// Takes checkpoints of a guest; `say` hears what is under way, and how much of all of it is done.
///
/// # Errors
/// [`ObserveError`]; the guest runs, and whoever attached lets it go.
pub(crate) fn observe(
    source: &mut dyn GuestSource,
    watch: &Watch,
    say: &mut dyn FnMut(&str, f64),
) -> Result<Vec<Observed>, ObserveError> {
    let failed = |doing| move |source| ObserveError::Source { doing, source };
    say("reading the machine", 0.0);
    source.bootstrap().map_err(failed("reading the machine"))?;
    source.arm().map_err(failed("starting to track its writes"))?;
    let pages = source.layout().page_count();
    let mut observer = Observer {
        source,
        checkpoint: Checkpoint::default(),
        encoder: SessionEncoder::new(HeldPages::new(SESSION, pages), watch.delta_bytes),
        written: vec![0; usize::try_from(pages).expect("a guest's pages fit in memory")],
        number: 0,
    };
    observer.precopy()?;
    let mut all = Vec::new();
    let parts = float(watch.lengths.len() as u64);
    for (number, length) in watch.lengths.iter().enumerate() {
        let before = float(number as u64);
        let words = format!("epochs of {}", humantime::format_duration(*length));
        all.push(observer.at(*length, watch.time, &mut |part| {
            say(&words, (before + part) / parts);
        })?);
    }
    Ok(all)
}

struct Observer<'s> {
    source: &'s mut dyn GuestSource,
    checkpoint: Checkpoint,
    encoder: SessionEncoder,
    /// In how many epochs of this length each page was written.
    written: Vec<u32>,
    number: u64,
}

/// One epoch.
struct Taken {
    interval_ns: u64,
    report: CaptureReport,
    encode_ns: u64,
    encoded: Encoded,
}

/// What an epoch became.
#[derive(Default)]
struct Encoded {
    wire_bytes: u64,
    state_bytes: u64,
    /// Encoded pages alone.
    page_bytes: u64,
    kinds: [u64; Kind::ALL.len()],
}

impl Observer<'_> {
    /// What was written while tracking began is no epoch's.
    fn precopy(&mut self) -> Result<(), ObserveError> {
        for _ in 0..PRECOPY_ROUNDS_MAX {
            going_on()?;
            self.source
                .precopy(&mut self.checkpoint)
                .map_err(|source| ObserveError::Source {
                    doing: "copying live",
                    source,
                })?;
            self.encode()?;
            if self.checkpoint.pages.len() <= PRECOPY_GOAL_PAGES {
                break;
            }
        }
        Ok(())
    }

    fn at(
        &mut self,
        length: Duration,
        time: Duration,
        say: &mut dyn FnMut(f64),
    ) -> Result<Observed, ObserveError> {
        self.written.fill(0);
        let mut taken: Vec<Taken> = Vec::new();
        let begun = Instant::now();
        let (counted_from, end) = (begun + WARM_UP, begun + WARM_UP + time);
        let mut next = begun;
        let mut last = None;
        while Instant::now() < end || taken.len() < EPOCHS_MIN {
            going_on()?;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            let start = Instant::now();
            let report = self.capture()?;
            let encoding = Instant::now();
            let encoded = self.encode()?;
            let encode_ns = nanoseconds(encoding.elapsed());
            if let Some(last) = last
                && start >= counted_from
            {
                for page in &self.checkpoint.pages {
                    let place = usize::try_from(page.0).expect("a guest's pages fit in memory");
                    self.written[place] += 1;
                }
                taken.push(Taken {
                    interval_ns: nanoseconds(start.duration_since(last)),
                    report,
                    encode_ns,
                    encoded,
                });
            }
            last = Some(start);
            say((begun.elapsed().as_secs_f64() / (WARM_UP + time).as_secs_f64()).min(1.0));
            // One that came late is not made up for: the epoch was longer.
            next = (next + length).max(Instant::now());
        }
        Ok(self.observed(length, &taken))
    }

    fn capture(&mut self) -> Result<CaptureReport, ObserveError> {
        romulus_host_sys::priority::raise();
        let report = self.source.capture(&mut || Ok(()), false, &mut self.checkpoint);
        romulus_host_sys::priority::lower();
        let events = self.source.poll_events();
        match (report, events.as_slice()) {
            (Ok(report), []) => Ok(report),
            (Err(source), []) => Err(ObserveError::Source {
                doing: "taking a checkpoint",
                source,
            }),
            (_, events) => Err(ObserveError::Disturbed(format!("{events:?}"))),
        }
    }

    /// What the replicator makes of a checkpoint; see its `encode.rs`.
    fn encode(&mut self) -> Result<Encoded, WireError> {
        self.number += 1;
        let epoch = Epoch(self.number);
        let mut encoded = Encoded::default();
        let mut section = PagesSection::default();
        let mut writer = PagesWriter::new(SESSION, epoch, FRAME_BYTES);
        let mut finish = |writer: PagesWriter, encoded: &mut Encoded| {
            if let Some(frame) = writer.finish() {
                section.add(frame.section);
                encoded.wire_bytes += frame.frame.len() as u64;
            }
        };
        for (index, page) in self.checkpoint.page_contents() {
            let Some((kind, payload)) = self.encoder.encode(index, page) else {
                encoded.kinds[place_of(Kind::Same)] += 1;
                continue;
            };
            encoded.kinds[place_of(kind)] += 1;
            encoded.page_bytes += payload.len() as u64;
            if !writer.push(index, kind.number(), payload) {
                let full = std::mem::replace(&mut writer, PagesWriter::new(SESSION, epoch, FRAME_BYTES));
                finish(full, &mut encoded);
                assert!(
                    writer.push(index, kind.number(), payload),
                    "an empty frame takes any page"
                );
            }
        }
        finish(writer, &mut encoded);
        let state = pack_guest_state(&[], &self.checkpoint.device_state);
        encoded.state_bytes = state.len() as u64;
        for frame in device_state_frames(SESSION, epoch, &state)? {
            encoded.wire_bytes += frame.len() as u64;
        }
        let record = CommitRecord {
            session: SESSION,
            epoch,
            captured_ns: 0,
            image_digest: self.encoder.image_digest(),
            pages: section,
            device_state: device_state_section(&state),
        };
        encoded.wire_bytes += record.frame().len() as u64;
        Ok(encoded)
    }

    fn observed(&self, length: Duration, taken: &[Taken]) -> Observed {
        let count = float(taken.len() as u64);
        let sum = |of: fn(&Taken) -> u64| float(taken.iter().map(of).sum());
        let seconds = sum(|one| one.interval_ns) / 1e9;
        let dirty = sum(|one| one.report.dirty_pages);
        let page_bytes = sum(|one| one.encoded.page_bytes);
        let mut kinds = [0; Kind::ALL.len()];
        for one in taken {
            for (sum, count) in kinds.iter_mut().zip(one.encoded.kinds) {
                *sum += count;
            }
        }
        let hot = count * HOT;
        let pages = |least: f64| {
            let often = self.written.iter().filter(|epochs| f64::from(**epochs) >= least);
            often.count() as u64
        };
        Observed {
            asked_ms: length.as_secs_f64() * 1e3,
            epoch_ms: quantiles(taken, |one| one.interval_ns, 1e6).p50,
            epochs: taken.len(),
            pause_us: quantiles(taken, |one| one.report.pause_ns, 1e3),
            dirty_pages: quantiles(taken, |one| one.report.dirty_pages, 1.0),
            dirty_pages_a_second: dirty / seconds,
            encode_us: quantiles(taken, |one| one.encode_ns, 1e3),
            wire_bytes: sum(|one| one.encoded.wire_bytes) / count,
            state_bytes: sum(|one| one.encoded.state_bytes) / count,
            times_smaller: dirty * float(PAGE_BYTES as u64) / page_bytes.max(1.0),
            working_set_pages: pages(1.0),
            hot_pages: pages(hot.max(1.0)),
            kinds: Kind::ALL.iter().map(|kind| kind.name()).zip(kinds).collect(),
        }
    }
}

fn place_of(kind: Kind) -> usize {
    Kind::ALL
        .iter()
        .position(|one| *one == kind)
        .expect("all are there")
}

fn going_on() -> Result<(), ObserveError> {
    if interrupt::came() {
        return Err(ObserveError::Interrupted);
    }
    Ok(())
}

/// By the nearest rank, in units of `unit`; 0 of nothing.
fn quantiles(taken: &[Taken], of: fn(&Taken) -> u64, unit: f64) -> Quantiles {
    let mut values: Vec<u64> = taken.iter().map(of).collect();
    values.sort_unstable();
    let at = |percent: usize| {
        let rank = (values.len() * percent).div_ceil(100).saturating_sub(1);
        values.get(rank).map_or(0.0, |value| float(*value) / unit)
    };
    Quantiles {
        p50: at(50),
        p99: at(99),
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use romulus_hypervisor::fake::FakeSource;
    use romulus_hypervisor::source::GuestEvent;

    use super::*;

    fn watch() -> Watch {
        Watch {
            lengths: vec![Duration::from_millis(2), Duration::from_millis(4)],
            time: Duration::from_millis(20),
            delta_bytes: 1 << 20,
        }
    }

    #[test]
    fn what_a_guest_writes_is_seen_and_it_runs_on() {
        let mut source = FakeSource::new(60, 1);
        let guest = source.guest();
        // Each epoch the guest writes 8 pages of 64, or the same one twice.
        let seen = observe(&mut source, &watch(), &mut |_, _| guest.run(2)).unwrap();
        assert_eq!(seen.len(), 2);
        for seen in &seen {
            assert!(seen.epochs >= EPOCHS_MIN, "{seen:?}");
            assert!((1.0..=8.0).contains(&seen.dirty_pages.p50), "{seen:?}");
            assert!((1..=64).contains(&seen.working_set_pages), "{seen:?}");
            assert!(seen.hot_pages <= seen.working_set_pages);
            assert!(seen.wire_bytes > seen.state_bytes && seen.state_bytes > 0.0);
            assert!(
                seen.times_smaller > 1.0,
                "a word of a page is less than the page: {seen:?}"
            );
            let pages: u64 = seen.kinds.iter().map(|(_, pages)| pages).sum();
            assert!(pages > 0);
        }
        let steps = guest.step();
        guest.run(1);
        assert_eq!(guest.step(), steps + 1);
    }

    #[test]
    fn a_guest_that_fails_or_is_disturbed_ends_the_look_by_name_and_runs_on() {
        let mut source = FakeSource::new(60, 1);
        let guest = source.guest();
        let failed = observe(&mut source, &watch(), &mut |_, part| {
            if part > 0.2 {
                guest.fail_next();
            }
        });
        assert!(matches!(failed, Err(ObserveError::Source { .. })), "{failed:?}");
        assert!(guest.is_running());
        let disturbed = observe(&mut source, &watch(), &mut |_, part| {
            if part > 0.2 {
                guest.raise(GuestEvent::Reset);
            }
        });
        assert!(
            matches!(disturbed, Err(ObserveError::Disturbed(_))),
            "{disturbed:?}"
        );
        assert!(guest.is_running());
    }
}
