//! What the hypervisor does on the primary's host: running the guest, copying its memory, capturing it.

use romulus_protocol::{GuestEvent, PrimaryEvent};
use romulus_types::{Epoch, Session};

use super::lines::{leave, send_data};
use super::{Outstanding, PrimaryHost};
use crate::context::{Context, Event, PrimaryWork};
use crate::guest::{Memory, PAGES};
use crate::mistake::Mistake;
use crate::plan::{MS, Moment};
use crate::random::Random;
use crate::sender::Harvest;

const COPY_PAGES: u64 = 10;

/// The guest, as its hypervisor has it.
pub(crate) struct Guest {
    pub(crate) memory: Memory,
    random: Random,
    /// Its process is there.
    pub(crate) there: bool,
    /// Paused by an operator.
    pub(crate) paused: bool,
    pub(super) captured: bool,
    pub(super) held: bool,
    pub(super) suspended: bool,
    pub(crate) stopped: bool,
}

impl Guest {
    pub(super) fn new(memory: Memory, random: Random) -> Self {
        let (paused, captured, held, suspended, stopped) = (false, false, false, false, false);
        Self {
            memory,
            random,
            there: true,
            paused,
            captured,
            held,
            suspended,
            stopped,
        }
    }

    fn runs(&self) -> bool {
        self.there && !(self.paused || self.captured || self.held || self.suspended || self.stopped)
    }
}

impl PrimaryHost {
    /// The guest runs a little.
    pub(crate) fn guest_runs(&mut self, context: &mut Context) {
        if self.guest.runs() {
            let dirty = &mut self.dirty;
            let output = self.guest.memory.run(&mut self.guest.random, |page| {
                dirty.insert(page);
            });
            if let Some(output) = self.gate.take(output) {
                leave(context, output);
            }
        }
        if self.guest.there {
            let pause_ns = context.random.within(MS, 3 * MS);
            context.after(pause_ns, Event::GuestRuns);
        }
    }

    /// The hypervisor reports something.
    pub(crate) fn guest_event(&mut self, context: &mut Context, event: GuestEvent) {
        if !self.guest.there {
            return;
        }
        match event {
            GuestEvent::Lost | GuestEvent::PoweredOff => self.guest.there = false,
            GuestEvent::Paused => self.guest.paused = true,
            GuestEvent::Resumed => self.guest.paused = false,
            GuestEvent::Changed => {}
        }
        let notice_ns = context.random.within(1, 3 * MS);
        context.after(notice_ns, Event::Primary(self.life, PrimaryWork::Guest(event)));
    }

    /// Sends the next part of the first copy while the guest runs.
    pub(super) fn copy(
        &mut self,
        context: &mut Context,
        session: Session,
        part: u64,
    ) -> Option<PrimaryEvent> {
        let link = self.link.as_mut().filter(|link| link.session == session)?;
        let first = part * COPY_PAGES;
        if first >= PAGES {
            return Some(PrimaryEvent::FirstCopyDone(session));
        }
        let frames = link
            .sender
            .as_mut()?
            .first_copy(&self.guest.memory, first..(first + COPY_PAGES).min(PAGES));
        send_data(context, session, frames);
        let pause_ns = context.random.within(1, 2 * MS);
        context.after(
            pause_ns,
            Event::Primary(self.life, PrimaryWork::Copy(session, part + 1)),
        );
        None
    }

    pub(super) fn capture_begins(&mut self, context: &mut Context, session: Session, epoch: Epoch) {
        let expected = |of: &&Outstanding| of.session == session && of.epoch == epoch;
        let Some(outstanding) = self.outstanding.as_ref().filter(expected) else {
            return;
        };
        let again = |host: &Self, context: &mut Context| {
            context.after(
                2 * MS,
                Event::Primary(host.life, PrimaryWork::CaptureBegins(session, epoch)),
            );
        };
        if !self.guest.runs() {
            return again(self, context);
        }
        let (close_gate, last, aborted) = (
            outstanding.close_gate,
            outstanding.stay_stopped,
            context.random.chance(context.plan.abort_capture_permille),
        );
        if aborted {
            context.tell("primary", || {
                format!("capture {epoch} is given up and made again")
            });
            if context.is_planted(Mistake::DirtyForgotten) {
                self.dirty.clear();
            }
            return again(self, context);
        }
        self.guest.captured = true;
        let mut pages = std::mem::take(&mut self.dirty);
        if context.is_planted(Mistake::PageLeftOut) && context.random.chance(30) {
            pages.pop_last();
        }
        self.harvest = Some(Harvest {
            epoch,
            pages,
            memory: self.guest.memory.clone(),
        });
        self.gate.barrier(epoch, close_gate);
        context.checks.captured(session, epoch, self.guest.memory.clone());
        context.moment(Moment::CaptureBegins);
        if last {
            context.moment(Moment::FinalCapture);
        }
        if close_gate {
            context.moment(Moment::GateCloses);
        }
        // A guest that is to stay stopped may have to flush its disks first.
        let flushes = last && context.random.chance(500);
        let pause_ns = if flushes {
            context.random.within(10 * MS, 100 * MS)
        } else {
            context.random.within(MS / 5, 2 * MS)
        };
        context.after(
            pause_ns,
            Event::Primary(self.life, PrimaryWork::CaptureEnds(session, epoch)),
        );
    }

    pub(super) fn capture_ends(
        &mut self,
        context: &mut Context,
        session: Session,
        epoch: Epoch,
    ) -> Option<PrimaryEvent> {
        let link = self.link.as_mut().filter(|link| link.session == session)?;
        let harvest = self.harvest.take()?;
        let outstanding = self.outstanding.take()?;
        assert!(
            harvest.epoch == epoch && outstanding.epoch == epoch,
            "one capture at a time"
        );
        self.guest.captured = false;
        self.guest.held = outstanding.stay_stopped;
        let frames = link.sender.as_mut()?.checkpoint(&harvest, context.now.ns);
        send_data(context, session, frames);
        context.moment(Moment::CaptureEnds);
        Some(PrimaryEvent::Captured(session, epoch, outstanding.due_at))
    }
}
