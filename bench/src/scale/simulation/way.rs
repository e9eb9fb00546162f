//! The way of a checkpoint: what follows from each piece of work.

use super::{Happens, SINK_MAX, STORE_MAX, Simulation, Then, Vm};
use crate::scale::shape::{Part, parts, whole};
use crate::stats::float;

impl Simulation<'_> {
    /// The guest stands still for as long as its dirty pages take.
    pub(super) fn on_capture_due(&mut self, vm: Vm, epoch: u64) {
        let member = &mut self.members[vm];
        let dirty = self.shape.dirty_after(self.now_ns.saturating_sub(member.runs_ns));
        let part = float(member.random.below(2001)) / 1000.0 - 1.0;
        let pages = whole(dirty * (1.0 + self.shape.spread * part)).min(self.shape.working_set_pages);
        let cost_ns = self.costs.capture.of(true, pages, 0);
        let thread = member.capture;
        self.work(thread, cost_ns, Then::Captured(vm, epoch, pages));
    }

    pub(super) fn follow(&mut self, duration_ns: u64, then: Then) {
        match then {
            Then::Captured(vm, epoch, pages) => self.on_captured(vm, duration_ns, epoch, pages),
            Then::Encoded(vm, part) => {
                self.members[vm].sink.push_back(part);
                self.encode(vm);
                self.send(vm);
            }
            Then::Sent(vm, part) => {
                self.tally.sent(vm, part.pages);
                let wire_ns = self.shape.wire_ns(part.bytes);
                let begins_ns = self.out[self.members[vm].host].take(self.now_ns, wire_ns);
                self.at(begins_ns, Happens::OnTheLink(vm, part, begins_ns + wire_ns));
                self.send(vm);
            }
            Then::Received(vm, part) => {
                self.tally.arrived(vm, self.now_ns, part);
                self.members[vm].unread.push_back(part);
                self.read(vm);
            }
            Then::Stored(vm, part) => self.on_stored(vm, part),
            Then::Committed(vm, epoch) => self.on_committed(vm, epoch),
            Then::Acknowledged(vm, epoch) => {
                let member = &mut self.members[vm];
                assert!(
                    epoch <= member.committed && epoch > member.acknowledged,
                    "what is acknowledged was committed, once, in order"
                );
                member.acknowledged = epoch;
                self.tally.acknowledged(vm, self.now_ns, epoch);
                self.answer(vm);
            }
            Then::Applied(vm, pages) => {
                self.tally.applied(pages);
                self.members[vm].at_store -= 1;
                self.read(vm);
            }
            Then::Nothing => {}
        }
    }

    fn on_captured(&mut self, vm: Vm, duration_ns: u64, epoch: u64, pages: u64) {
        let now_ns = self.now_ns;
        let member = &mut self.members[vm];
        member.runs_ns = now_ns;
        member
            .to_encode
            .extend(parts(epoch, pages, self.costs, self.shape.state_bytes));
        let began_ns = now_ns - duration_ns;
        self.tally.captured(vm, (began_ns, now_ns), epoch, pages);
        self.with(vm, |pair, wishes| pair.captured(now_ns, epoch, wishes));
        self.encode(vm);
    }

    /// The encoder takes the next part, if there is room for it.
    fn encode(&mut self, vm: Vm) {
        let member = &mut self.members[vm];
        if !self.cores.is_idle(member.encoder) || member.sink.len() >= SINK_MAX {
            return;
        }
        let Some(part) = member.to_encode.pop_front() else {
            return;
        };
        let cost_ns = self.costs.encode.of(part.first, part.pages, part.bytes);
        let thread = member.encoder;
        self.work(thread, cost_ns, Then::Encoded(vm, part));
    }

    /// The replicator's main thread sends the next part, if the window has room.
    fn send(&mut self, vm: Vm) {
        let member = &mut self.members[vm];
        let Some(part) = member.sink.front().copied() else {
            return;
        };
        // A part that is larger than the window goes alone.
        let room =
            member.window_bytes == 0 || member.window_bytes + part.bytes <= self.shape.receive_window_bytes;
        if !room || !self.cores.is_idle(member.sender) {
            return;
        }
        member.sink.pop_front();
        member.window_bytes += part.bytes;
        let cost_ns = self.costs.send.of(part.last, part.pages, part.bytes);
        let thread = member.sender;
        self.work(thread, cost_ns, Then::Sent(vm, part));
        self.encode(vm);
    }

    /// The store's side reads what has room.
    fn read(&mut self, vm: Vm) {
        let member = &mut self.members[vm];
        if member.at_store >= STORE_MAX {
            return;
        }
        let Some(part) = member.unread.pop_front() else {
            return;
        };
        member.window_bytes -= part.bytes;
        member.at_store += 1;
        let cost_ns = self.costs.decode.of(part.first, part.pages, part.bytes)
            + self.costs.verify.of(part.first, part.pages, part.bytes);
        let thread = member.store;
        self.work(thread, cost_ns, Then::Stored(vm, part));
        self.send(vm);
        self.read(vm);
    }

    fn on_stored(&mut self, vm: Vm, part: Part) {
        self.tally.staged(part.pages);
        let member = &mut self.members[vm];
        member.incoming_pages += part.pages;
        if !part.last {
            member.at_store -= 1;
            self.read(vm);
            return;
        }
        // Before the frames of the next checkpoint, which wait already.
        let cost_ns = self.costs.commit.of(true, member.incoming_pages, 0);
        let started = self
            .cores
            .push_first(member.store, cost_ns, Then::Committed(vm, part.epoch));
        self.started(started);
    }

    fn on_committed(&mut self, vm: Vm, epoch: u64) {
        let member = &mut self.members[vm];
        let pages = std::mem::take(&mut member.incoming_pages);
        assert_eq!(epoch, member.committed + 1, "checkpoints are committed in order");
        member.committed = epoch;
        self.tally.committed(vm, self.now_ns, epoch, pages);
        let (store, connection) = (member.store, member.connection);
        let apply_ns = self.costs.apply.of(true, pages, 0);
        let started = self.cores.push_first(store, apply_ns, Then::Applied(vm, pages));
        self.started(started);
        // The answer is a packet of its own.
        let cost_ns = self.costs.receive.of(true, 0, 0);
        self.work(connection, cost_ns, Then::Acknowledged(vm, epoch));
    }

    /// The backup says how far it is.
    pub(super) fn answer(&mut self, vm: Vm) {
        let member = &self.members[vm];
        let says = Happens::Answered(vm, member.acknowledged, member.answers_ns);
        self.at(self.now_ns + self.shape.round_trip_ns / 2, says);
    }
}
