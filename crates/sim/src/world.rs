//! A run: everything that happens to one VM, in the order of the one clock.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use romulus_protocol::{GuestEvent, Mode, Record, WitnessRequest};
use romulus_types::{Session, Time, VmId};
use romulus_wire::{FrameDecoder, FrameType, decode_message, encode_message};

use crate::backup_host::BackupHost;
use crate::checks::{Outlook, Reached, Violation};
use crate::context::{BackupWork, Context, Event, PrimaryWork};
use crate::mistake::Mistake;
use crate::plan::{END_MS, Fault, Line, MS, Node, ROUGH_MS};
use crate::primary_host::{ANY_LIFE, PrimaryHost};
use crate::random::Random;
use crate::witness_host::WitnessHost;

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// The first broken invariant.
    pub violation: Option<Violation>,
    /// What happened, when it was asked for.
    pub trace: Vec<String>,
    /// What was reached.
    pub reached: Reached,
}

/// Runs the schedule of `seed`, with a mistake planted or not.
#[must_use]
pub fn run(seed: u64, mistake: Option<Mistake>, tracing: bool) -> Outcome {
    let vm = VmId::new("vm").expect("a name");
    let mut world = World::new(vm, seed, |_, _| true, Rc::default(), mistake, tracing);
    world.run();
    Outcome {
        violation: world.violation(),
        trace: world.context.take_trace(),
        reached: world.reached(),
    }
}

/// One VM, with its primary's host and its part of the backup's host. The witness may be that of other VMs as well.
pub(crate) struct World {
    context: Context,
    primary: PrimaryHost,
    backup: BackupHost,
    witness: Rc<RefCell<WitnessHost>>,
    /// The record named a pair at some time after everything was healed.
    paired_since_heal: bool,
    stalled_until: [Time; 3],
}

/// What happened in one step that concerns more than this VM.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// A fault that was planned.
    pub(crate) fault: Option<Fault>,
    /// Whether the agent was up before the step.
    pub(crate) agent_was_up: bool,
}

impl World {
    /// Of the faults that the seed plans only those happen which `keep` keeps.
    pub(crate) fn new(
        vm: VmId,
        seed: u64,
        keep: impl Fn(&Fault, &mut Random) -> bool,
        witness: Rc<RefCell<WitnessHost>>,
        mistake: Option<Mistake>,
        tracing: bool,
    ) -> Self {
        let mut context = Context::new(vm.clone(), seed, keep, mistake, tracing);
        let plan = format!("{:?}", context.plan);
        context.tell("plan", || plan);
        let primary = PrimaryHost::new(&mut context);
        let stalled_until = [Time::default(); 3];
        Self {
            context,
            primary,
            backup: BackupHost::new(vm),
            witness,
            paired_since_heal: false,
            stalled_until,
        }
    }

    fn run(&mut self) {
        self.start();
        while self.next_at().is_some() {
            self.step();
        }
        self.look_back();
    }

    /// Everything starts.
    pub(crate) fn start(&mut self) {
        self.backup.start(&mut self.context);
        self.primary.start(&mut self.context);
        self.context.after(MS, Event::GuestRuns);
        self.context.at(Time::from_ns(ROUGH_MS * MS), Event::Heal);
    }

    /// When the next thing happens; none when the run is over.
    pub(crate) fn next_at(&self) -> Option<Time> {
        let over = self.context.checks.violation.is_some();
        let next = self.context.next_at().filter(|_| !over)?;
        (next < Time::from_ns(END_MS * MS)).then_some(next)
    }

    /// The next thing happens.
    pub(crate) fn step(&mut self) -> Step {
        let mut step = Step {
            fault: None,
            agent_was_up: self.backup.is_up(),
        };
        let Some(event) = self.context.next() else {
            return step;
        };
        if let Some(node) = event.node()
            && self.context.now < self.stalled_until[node as usize]
        {
            // In the order in which it came.
            self.context.postpone(self.stalled_until[node as usize], event);
            return step;
        }
        if let Event::Fault(fault) = &event {
            step.fault = Some(*fault);
        }
        self.happen(event);
        step
    }

    /// The first broken invariant.
    pub(crate) fn violation(&self) -> Option<Violation> {
        self.context.checks.violation.clone()
    }

    /// What was reached.
    pub(crate) fn reached(&self) -> Reached {
        self.context.checks.reached
    }

    /// The agent's process is up.
    pub(crate) fn agent_is_up(&self) -> bool {
        self.backup.is_up()
    }

    /// The agent that this VM shares with others died, or was started.
    pub(crate) fn agent_is(&mut self, up: bool, now: Time) {
        self.come_to(now);
        if up {
            self.backup.start(&mut self.context);
        } else {
            self.backup.crash(&mut self.context);
        }
    }

    /// The backup's host, which this VM shares with others, died.
    pub(crate) fn lose_backup_host(&mut self, now: Time) {
        self.come_to(now);
        self.backup.lose_host(&mut self.context);
    }

    /// A fault that another VM's plan has, of something that both share.
    pub(crate) fn share(&mut self, fault: Fault, now: Time) {
        self.come_to(now);
        self.context.tell("fault", || format!("{fault:?}, with others"));
        self.fail(fault);
    }

    /// Other VMs' clocks are here already; nothing of this one's comes before.
    fn come_to(&mut self, now: Time) {
        assert!(self.context.next_at().is_none_or(|next| next >= now), "one clock");
        self.context.now = self.context.now.max(now);
    }

    fn record(&self) -> Option<Record> {
        self.witness.borrow().record(&self.context.vm)
    }

    /// Judges how it is in the end.
    pub(crate) fn look_back(&mut self) {
        if self.context.checks.violation.is_some() {
            return;
        }
        let record = self.record();
        let outlook = Outlook {
            now: Time::from_ns(END_MS * MS),
            record: record.as_ref(),
            guest_there: self.primary.guest.there && !self.primary.guest.paused,
            protecting: self.primary.is_protecting(),
            paired_since_heal: self.paired_since_heal,
            survivor_runs: self.backup.survivor_runs(),
            image: self.backup.store.status(),
            backup_host_lost: self.backup.host_lost,
        };
        self.context.checks.look_back(&outlook);
    }

    fn happen(&mut self, event: Event) {
        let context = &mut self.context;
        match event {
            Event::Primary(life, work) => self.primary.work(context, life, work),
            Event::Backup(life, work) => self.backup.work(context, life, work),
            Event::Witness(bytes) => self.ask_witness(&bytes),
            Event::GuestRuns => self.primary.guest_runs(context),
            Event::SurvivorRuns => self.backup.survivor_step(context),
            Event::GuestResumes => self.primary.guest_event(context, GuestEvent::Resumed),
            Event::BackupCrashesAtLast(life, down_ns) => {
                if self.backup.life() == life && self.backup.is_up() {
                    self.backup.crash(context);
                    context.after(down_ns, Event::Restart(Node::Backup));
                }
            }
            Event::Restart(Node::Primary) => self.primary.start(context),
            Event::Restart(Node::Backup) => self.backup.start(context),
            Event::Restart(Node::Witness) => self.start_witness(),
            Event::Heal => self.heal(),
            Event::Fault(fault) => {
                context.tell("fault", || format!("{fault:?}"));
                self.fail(fault);
            }
        }
    }

    fn fail(&mut self, fault: Fault) {
        let context = &mut self.context;
        let now = context.now;
        match fault {
            Fault::CrashPrimary { down_ns } => {
                self.primary.crash(context);
                context.after(down_ns, Event::Restart(Node::Primary));
            }
            Fault::CrashPrimaryHost => self.primary.crash_host(context),
            Fault::CrashBackup {
                disk_steps,
                cut_permille,
                down_ns,
            } => {
                if self.backup.is_up() {
                    self.backup.store.set_fuse(disk_steps, cut_permille);
                    context.after(20 * MS, Event::BackupCrashesAtLast(self.backup.life(), down_ns));
                }
            }
            Fault::LoseBackupHost { down_ns } => {
                self.backup.lose_host(context);
                context.after(down_ns, Event::Restart(Node::Backup));
            }
            Fault::CrashWitness { down_ns } => {
                self.witness.borrow_mut().crash();
                context.after(down_ns, Event::Restart(Node::Witness));
            }
            Fault::Cut { line, for_ns } => context.network.cut(line, now.after_ns(for_ns)),
            Fault::CutLink { for_ns } => {
                context.network.cut(Line::ToBackup, now.after_ns(for_ns));
                context.network.cut(Line::ToPrimary, now.after_ns(for_ns));
            }
            Fault::Break => self.break_connection(),
            Fault::Stall { node, for_ns } => {
                let until = &mut self.stalled_until[node as usize];
                *until = (*until).max(now.after_ns(for_ns));
            }
            Fault::SlowLink { for_ns } => context.network.slow_link(now.after_ns(for_ns)),
            Fault::SlowWitness { for_ns } => context.network.slow_witness(now.after_ns(for_ns)),
            Fault::Lie { ahead } => self.backup.get_lie(context, ahead),
            Fault::FlipBit => context.flip_next = true,
            Fault::AbortCapture => context.plan.abort_capture_permille = 300,
            Fault::Guest(event) => self.primary.guest_event(context, event),
            Fault::Pause { for_ns } => {
                self.primary.guest_event(context, GuestEvent::Paused);
                context.after(for_ns, Event::GuestResumes);
            }
            Fault::Order(order) => context.after(0, Event::Primary(ANY_LIFE, PrimaryWork::Order(order))),
            Fault::Failover => context.after(0, Event::Backup(ANY_LIFE, BackupWork::Failover)),
        }
    }

    fn break_connection(&mut self) {
        let Some(session) = self.primary.session() else {
            return;
        };
        let context = &mut self.context;
        context.network.break_off(context.now, session);
        let at_backup = context.network.end_noticed(context.now, Line::ToBackup, true);
        let at_primary = context.network.end_noticed(context.now, Line::ToPrimary, true);
        context.at(at_backup, Event::Backup(ANY_LIFE, BackupWork::End(session)));
        context.at(at_primary, Event::Primary(ANY_LIFE, PrimaryWork::End(session)));
    }

    /// Nothing goes wrong any more, and whatever is down comes up.
    fn heal(&mut self) {
        self.context.tell("heal", String::new);
        self.paired_since_heal = self.is_paired();
        self.context.disarm();
        self.context.network.heal();
        self.context.flip_next = false;
        self.context.plan.abort_capture_permille = 0;
        self.context.plan.standby_fails_permille = 0;
        self.start_witness();
        self.backup.start(&mut self.context);
        self.primary.start(&mut self.context);
        if self.primary.guest.paused {
            self.primary.guest_event(&mut self.context, GuestEvent::Resumed);
        }
    }

    fn is_paired(&self) -> bool {
        matches!(
            self.record(),
            Some(Record {
                mode: Mode::Paired { .. },
                ..
            })
        )
    }

    fn start_witness(&mut self) {
        self.witness.borrow_mut().start();
    }

    fn ask_witness(&mut self, bytes: &Bytes) {
        let mut decoder = FrameDecoder::first_frame(FrameType::WitnessRequest);
        let taken = decoder.push(bytes);
        assert_eq!(taken, bytes.len(), "a small message");
        let Ok(Some(frame)) = decoder.next_frame() else {
            return;
        };
        let Ok(request) = decode_message::<WitnessRequest>(FrameType::WitnessRequest, &frame) else {
            return;
        };
        let answered = self.witness.borrow_mut().handle(&request);
        let Some((reply, changed)) = answered else { return };
        if let Some(record) = changed {
            self.context
                .tell("witness", || format!("term {}: {:?}", record.term, record.mode));
            self.paired_since_heal |= self.is_paired();
            self.context.record = Some(record);
        }
        let reply = encode_message(FrameType::WitnessReply, Session(0), &reply).expect("a small message");
        let from_primary = request.host.as_str() == "p";
        let line = if from_primary {
            Line::PrimaryWitness
        } else {
            Line::BackupWitness
        };
        for at in self.context.network.datagram(self.context.now, line) {
            let event = if from_primary {
                Event::Primary(ANY_LIFE, PrimaryWork::Reply(reply.clone()))
            } else {
                Event::Backup(ANY_LIFE, BackupWork::Reply(reply.clone()))
            };
            self.context.at(at, event);
        }
    }
}
