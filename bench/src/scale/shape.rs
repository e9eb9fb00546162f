//! What is simulated: costs of each step, and the shape of the fleet.

use crate::stats::float;

/// Time that a step takes: for each checkpoint, for each of its pages, for each of its bytes on the wire. In nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cost {
    pub(super) epoch_ns: f64,
    pub(super) page_ns: f64,
    pub(super) byte_ns: f64,
}

impl Cost {
    /// Of a part of a checkpoint; what each checkpoint costs is paid with one of its parts.
    pub(super) fn of(self, with_epoch: bool, pages: u64, bytes: u64) -> u64 {
        let epoch_ns = if with_epoch { self.epoch_ns } else { 0.0 };
        whole(epoch_ns + self.page_ns * float(pages) + self.byte_ns * float(bytes))
    }
}

/// Nanoseconds or bytes from an estimate; never less than nothing.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an estimate that is no number of nanoseconds or bytes is cut to one"
)]
pub(super) fn whole(estimate: f64) -> u64 {
    estimate.max(0.0).round() as u64
}

/// What every step of a checkpoint costs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Costs {
    /// The guest's pause.
    pub(super) capture: Cost,
    /// Digest, last version, encoding, frames.
    pub(super) encode: Cost,
    /// The replicator's end of the connection.
    pub(super) send: Cost,
    /// The agent's end of it, on the thread that all VMs share.
    pub(super) receive: Cost,
    /// Out of frames, decoding.
    pub(super) decode: Cost,
    /// Digests of the pages that came.
    pub(super) verify: Cost,
    /// Staging, checking, the commit slot. After it comes the acknowledgement.
    pub(super) commit: Cost,
    /// Into the memory image.
    pub(super) apply: Cost,
    /// Encoded bytes of a page.
    pub(super) page_bytes: f64,
}

/// The fleet: so many VMs of several hosts, on one or more backup hosts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shape {
    pub(super) seed: u64,
    pub(super) vms: u64,
    pub(super) vms_a_host: u64,
    pub(super) host_cores: u64,
    pub(super) backups: u64,
    pub(super) agent_cores: u64,
    /// Threads that serve the connections of an agent; ours has one.
    pub(super) connection_threads: u64,
    /// Of every host's link, in each direction.
    pub(super) link_gbit: f64,
    pub(super) round_trip_ns: u64,
    pub(super) epoch_ns: u64,
    pub(super) in_flight_max: u64,
    /// Pages that a guest dirties in an epoch of that length…
    pub(super) dirty_pages: u64,
    /// …of so many that it writes to at all.
    pub(super) working_set_pages: u64,
    /// By how much an epoch's pages are more or fewer, as a part of them.
    pub(super) spread: f64,
    pub(super) state_bytes: u64,
    /// Work of a guest in each epoch, on its host's cores.
    pub(super) guest_ns: u64,
    /// Hosts and backup are one machine with the host's cores: how the lab of the end-to-end tests is.
    pub(super) one_machine: bool,
    pub(super) receive_window_bytes: u64,
    /// Simulated, before anything is counted and while it is.
    pub(super) warm_ns: u64,
    pub(super) watched_ns: u64,
}

impl Shape {
    /// Writes to different places a nanosecond, so that `dirty_pages` of the working set are dirty after an epoch.
    pub(super) fn writes_a_ns(&self) -> f64 {
        let part = float(self.dirty_pages) / float(self.working_set_pages);
        -float(self.working_set_pages) * (-part).ln_1p() / float(self.epoch_ns)
    }

    /// Pages that are dirty after so long, before the spread.
    pub(super) fn dirty_after(&self, run_ns: u64) -> f64 {
        let all = float(self.working_set_pages);
        all * -(-self.writes_a_ns() * float(run_ns) / all).exp_m1()
    }
}

/// The replicator's frames of pages.
pub(super) const FRAME_BYTES: f64 = 131_072.0;
/// What a frame has for each of its pages besides the encoded page.
pub(super) const ENTRY_BYTES: f64 = 16.0;
/// Payload of a packet at the default MTU, and what it takes on Ethernet besides: QUIC, UDP, IPv6, frame, gap.
const PACKET_PAYLOAD: f64 = 1417.0;
const PACKET_OVERHEAD: f64 = 35.0 + 48.0 + 38.0;

impl Shape {
    /// Time of so many bytes on a link, with all headers.
    pub(super) fn wire_ns(&self, bytes: u64) -> u64 {
        let bytes = float(bytes) * (1.0 + PACKET_OVERHEAD / PACKET_PAYLOAD);
        whole(bytes * 8.0 / self.link_gbit)
    }
}

/// A part of a checkpoint: as much as fits into a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) epoch: u64,
    pub(super) pages: u64,
    pub(super) bytes: u64,
    pub(super) first: bool,
    /// With the device state and the commit record.
    pub(super) last: bool,
}

/// The parts of a checkpoint.
pub(super) fn parts(epoch: u64, pages: u64, costs: &Costs, state_bytes: u64) -> Vec<Part> {
    let page_bytes = costs.page_bytes + ENTRY_BYTES;
    let room = whole((FRAME_BYTES / page_bytes).floor()).max(1);
    let count = pages.div_ceil(room).max(1);
    let part = |number: u64| {
        let pages = (pages - number * room).min(room);
        let last = number + 1 == count;
        Part {
            epoch,
            pages,
            bytes: whole(float(pages) * page_bytes) + if last { state_bytes } else { 0 },
            first: number == 0,
            last,
        }
    };
    (0..count).map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_dirties_what_it_was_said_to_in_an_epoch_and_never_more_than_its_working_set() {
        let shape = super::super::tests::shape(1);
        let near = |left: f64, right: f64| (left - right).abs() < right / 1e6;
        assert!(near(shape.dirty_after(shape.epoch_ns), float(shape.dirty_pages)));
        assert!(shape.dirty_after(shape.epoch_ns * 2) < 2.0 * float(shape.dirty_pages));
        assert!(shape.dirty_after(u64::MAX / 2) <= float(shape.working_set_pages));
    }

    #[test]
    fn parts_have_all_pages_and_one_of_them_is_the_last() {
        let costs = Costs {
            page_bytes: 1008.0,
            ..Costs::default()
        };
        for pages in [0, 1, 128, 129, 1000] {
            let parts = parts(7, pages, &costs, 500);
            assert_eq!(parts.iter().map(|part| part.pages).sum::<u64>(), pages);
            assert_eq!(
                parts.iter().map(|part| part.bytes).sum::<u64>(),
                pages * 1024 + 500
            );
            assert!(parts[0].first && parts.last().unwrap().last);
            assert_eq!(parts.iter().filter(|part| part.last).count(), 1);
            assert!(parts.iter().all(|part| part.pages <= 128));
        }
    }
}
