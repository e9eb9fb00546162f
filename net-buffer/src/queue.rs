//! The frames that are held, in the order of their arrival, each with its epoch.
//!
//! ```text
//!   front                                          back
//!   [chunk: epoch 7][chunk: epoch 7][chunk: epoch 8]   ◄── push (current epoch: 8)
//!        │
//!        └── take(up to 7): whole chunks leave, nothing is copied
//! ```
//!
//! Invariants: a chunk holds frames of one epoch; epochs never fall from front to back; bytes and frames stay within the
//! limits. Time is passed in.

use std::collections::VecDeque;

use romulus_types::{Epoch, Time};

use crate::stats::GateStats;

/// A chunk is closed when it has grown to this many bytes, so that memory is given back as it is released.
const CHUNK_BYTES: usize = 256 * 1024;

/// Frames of one epoch, one after the other.
#[derive(Debug)]
pub(crate) struct Chunk {
    epoch: Epoch,
    bytes: Vec<u8>,
    frames: Vec<Held>,
}

#[derive(Debug)]
struct Held {
    bytes: usize,
    arrived: Time,
}

impl Chunk {
    /// The frames in order of arrival.
    pub(crate) fn frames(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.bytes.as_slice();
        self.frames.iter().map(move |frame| {
            let (first, others) = rest.split_at(frame.bytes);
            rest = others;
            first
        })
    }
}

#[derive(Debug)]
pub(crate) struct HeldQueue {
    chunks: VecDeque<Chunk>,
    current: Epoch,
    bytes_max: usize,
    frames_max: usize,
    stats: GateStats,
}

impl HeldQueue {
    /// An empty queue whose frames belong to epoch 1.
    pub(crate) fn new(bytes_max: usize, frames_max: usize) -> Self {
        let first = Epoch::NONE.next();
        Self {
            chunks: VecDeque::new(),
            current: first,
            bytes_max,
            frames_max,
            stats: GateStats::default(),
        }
    }

    /// The epoch of the next frame.
    pub(crate) fn current(&self) -> Epoch {
        self.current
    }

    pub(crate) fn stats(&self) -> &GateStats {
        &self.stats
    }

    /// Holds a frame, or counts it as dropped when the queue is full.
    pub(crate) fn push(&mut self, frame: &[u8], now: Time) {
        let stats = &mut self.stats;
        let full = stats.held_frames >= self.frames_max
            || frame.len() > self.bytes_max.saturating_sub(stats.held_bytes);
        if full {
            stats.dropped_by_limit_frames += 1;
            stats.dropped_by_limit_bytes += frame.len() as u64;
            return;
        }
        stats.held_frames += 1;
        stats.held_bytes += frame.len();
        stats.held_frames_peak = stats.held_frames_peak.max(stats.held_frames);
        stats.held_bytes_peak = stats.held_bytes_peak.max(stats.held_bytes);
        let held = Held {
            bytes: frame.len(),
            arrived: now,
        };
        match self.chunks.back_mut() {
            Some(chunk) if chunk.epoch == self.current && chunk.bytes.len() < CHUNK_BYTES => {
                chunk.bytes.extend_from_slice(frame);
                chunk.frames.push(held);
            }
            _ => self.chunks.push_back(Chunk {
                epoch: self.current,
                bytes: frame.to_vec(),
                frames: vec![held],
            }),
        }
    }

    /// Ends `epoch`: frames from now on belong to the one after it.
    ///
    /// # Panics
    /// When a later epoch has begun already: barriers come in order.
    pub(crate) fn barrier(&mut self, epoch: Epoch) {
        assert!(
            epoch.next() >= self.current,
            "barrier {epoch} after epoch {} began",
            self.current
        );
        self.current = epoch.next();
    }

    /// The oldest chunk, when its epoch is `up_to` or earlier.
    pub(crate) fn take(&mut self, up_to: Epoch, now: Time) -> Option<Chunk> {
        if self.chunks.front()?.epoch > up_to {
            return None;
        }
        let chunk = self.chunks.pop_front().expect("there is a front");
        self.forget(&chunk);
        self.stats.released_frames += chunk.frames.len() as u64;
        self.stats.released_bytes += chunk.bytes.len() as u64;
        for frame in &chunk.frames {
            self.stats.hold.record(now.since_ns(frame.arrived));
        }
        Some(chunk)
    }

    /// Drops everything.
    pub(crate) fn discard(&mut self) {
        while let Some(chunk) = self.chunks.pop_front() {
            self.forget(&chunk);
            self.stats.discarded_frames += chunk.frames.len() as u64;
        }
        assert_eq!(self.stats.held_bytes, 0, "an empty queue holds nothing");
    }

    /// Counts a frame that came after [`HeldQueue::discard`].
    pub(crate) fn discard_one(&mut self) {
        self.stats.discarded_frames += 1;
    }

    pub(crate) fn count_write_failures(&mut self, frames: u64) {
        self.stats.write_failed_frames += frames;
    }

    fn forget(&mut self, chunk: &Chunk) {
        self.stats.held_frames -= chunk.frames.len();
        self.stats.held_bytes -= chunk.bytes.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(ns: u64) -> Time {
        Time::from_ns(ns)
    }

    fn taken(queue: &mut HeldQueue, up_to: u64) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while let Some(chunk) = queue.take(Epoch(up_to), at(0)) {
            frames.extend(chunk.frames().map(<[u8]>::to_vec));
        }
        frames
    }

    #[test]
    fn frames_leave_with_their_epoch_and_not_before() {
        let mut queue = HeldQueue::new(1000, 1000);
        queue.push(b"one", at(0));
        queue.barrier(Epoch(1));
        queue.push(b"two", at(0));
        assert_eq!(taken(&mut queue, 0), Vec::<Vec<u8>>::new());
        assert_eq!(taken(&mut queue, 1), [b"one".to_vec()]);
        queue.barrier(Epoch(2));
        queue.push(b"three", at(0));
        assert_eq!(taken(&mut queue, 2), [b"two".to_vec()]);
        assert_eq!(queue.stats().held_frames, 1);
    }

    #[test]
    fn what_is_over_the_limits_is_dropped_and_counted() {
        let mut queue = HeldQueue::new(10, 3);
        queue.push(&[1; 6], at(0));
        queue.push(&[2; 6], at(0)); // over the bytes
        queue.push(&[3; 2], at(0));
        queue.push(&[4; 1], at(0));
        queue.push(&[5; 1], at(0)); // over the frames
        assert_eq!(queue.stats().dropped_by_limit_frames, 2);
        assert_eq!(queue.stats().dropped_by_limit_bytes, 7);
        assert_eq!(taken(&mut queue, 1), [vec![1; 6], vec![3; 2], vec![4; 1]]);
        queue.push(&[6; 10], at(0));
        assert_eq!(taken(&mut queue, 1), [vec![6; 10]]);
    }

    #[test]
    fn the_hold_time_is_that_from_arrival_to_release() {
        let mut queue = HeldQueue::new(1000, 1000);
        queue.push(b"x", at(1_000));
        queue.push(b"y", at(4_000));
        queue.take(Epoch(1), at(10_000)).unwrap();
        assert_eq!(queue.stats().hold.sum_ns, 15_000);
        assert_eq!(queue.stats().hold.max_ns, 9_000);
    }

    #[test]
    #[should_panic(expected = "barrier 3 after epoch 6 began")]
    fn a_barrier_that_goes_back_is_a_broken_invariant() {
        let mut queue = HeldQueue::new(10, 10);
        queue.barrier(Epoch(5));
        queue.barrier(Epoch(3));
    }

    proptest! {
        /// Whatever the pattern of pushes, barriers and releases: every frame leaves once, in order, after its barrier.
        #[test]
        fn every_frame_leaves_once_in_order_and_never_early(steps in prop::collection::vec(0u8..10, 1..400)) {
            let mut queue = HeldQueue::new(64 << 20, 1 << 20);
            let (mut sent, mut got, mut sealed) = (0u32, 0u32, 0u32);
            for step in steps {
                match step {
                    0..6 => {
                        let mut frame = sent.to_le_bytes().to_vec();
                        frame.resize(4 + usize::from(step) * 20_000, 0);
                        queue.push(&frame, at(0));
                        sent += 1;
                    }
                    6..8 => {
                        queue.barrier(queue.current());
                        sealed = sent;
                    }
                    _ => {
                        let up_to = Epoch(queue.current().0 - 1);
                        while let Some(chunk) = queue.take(up_to, at(0)) {
                            for frame in chunk.frames() {
                                prop_assert_eq!(&frame[..4], &got.to_le_bytes()[..]);
                                got += 1;
                            }
                        }
                        prop_assert_eq!(got, sealed);
                    }
                }
                prop_assert_eq!(queue.stats().held_frames, usize::try_from(sent - got).unwrap());
            }
        }
    }
}
