//! A run: everything that happens, in the order of the one clock.

use bytes::Bytes;
use romulus_protocol::{GuestEvent, Mode, Record, Witness, WitnessRequest};
use romulus_types::{Session, Time, WitnessInstance};
use romulus_wire::{FrameDecoder, FrameType, decode_message, encode_message};

use crate::backup_host::BackupHost;
use crate::checks::{Outlook, Reached, Violation};
use crate::context::{BackupWork, Context, Event, PrimaryWork};
use crate::mistake::Mistake;
use crate::plan::{END_MS, Fault, Line, MS, Node, ROUGH_MS};
use crate::primary_host::{ANY_LIFE, PrimaryHost};
use crate::store::vm;

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
    let mut world = World::new(seed, mistake, tracing);
    world.run();
    let violation = world.context.checks.violation.clone();
    Outcome {
        violation,
        trace: world.context.take_trace(),
        reached: world.context.checks.reached,
    }
}

struct World {
    context: Context,
    primary: PrimaryHost,
    backup: BackupHost,
    witness: Option<Witness>,
    /// The witness's durable store.
    record: Option<Record>,
    /// The record named a pair at some time after everything was healed.
    paired_since_heal: bool,
    stalled_until: [Time; 3],
}

impl World {
    fn new(seed: u64, mistake: Option<Mistake>, tracing: bool) -> Self {
        let mut context = Context::new(seed, mistake, tracing);
        let plan = format!("{:?}", context.plan);
        context.tell("plan", || plan);
        let primary = PrimaryHost::new(&mut context);
        let witness = Some(Witness::new(WitnessInstance(1)));
        let stalled_until = [Time::default(); 3];
        Self {
            context,
            primary,
            backup: BackupHost::new(),
            witness,
            record: None,
            paired_since_heal: false,
            stalled_until,
        }
    }

    fn run(&mut self) {
        self.backup.start(&mut self.context);
        self.primary.start(&mut self.context);
        self.context.after(MS, Event::GuestRuns);
        self.context.at(Time::from_ns(ROUGH_MS * MS), Event::Heal);
        while let Some(event) = self.context.next() {
            if self.context.now >= Time::from_ns(END_MS * MS) {
                break;
            }
            if let Some(node) = event.node()
                && self.context.now < self.stalled_until[node as usize]
            {
                // In the order in which it came.
                self.context.postpone(self.stalled_until[node as usize], event);
                continue;
            }
            self.happen(event);
            if self.context.checks.violation.is_some() {
                return;
            }
        }
        let outlook = Outlook {
            now: self.context.now,
            record: self.record.as_ref(),
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
                self.witness = None;
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
            self.record,
            Some(Record {
                mode: Mode::Paired { .. },
                ..
            })
        )
    }

    fn start_witness(&mut self) {
        if self.witness.is_none() {
            let mut witness = Witness::new(WitnessInstance(1));
            if let Some(record) = &self.record {
                witness.load(vm(), record.clone());
            }
            self.witness = Some(witness);
        }
    }

    fn ask_witness(&mut self, bytes: &Bytes) {
        let Some(witness) = &mut self.witness else { return };
        let mut decoder = FrameDecoder::first_frame(FrameType::WitnessRequest);
        let taken = decoder.push(bytes);
        assert_eq!(taken, bytes.len(), "a small message");
        let Ok(Some(frame)) = decoder.next_frame() else {
            return;
        };
        let Ok(request) = decode_message::<WitnessRequest>(FrameType::WitnessRequest, &frame) else {
            return;
        };
        let (reply, changed) = witness.handle(&request);
        if let Some(record) = changed {
            self.context
                .tell("witness", || format!("term {}: {:?}", record.term, record.mode));
            self.record = Some(record.clone());
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
