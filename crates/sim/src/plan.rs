//! What a seed stands for: how the network is, and what goes wrong when.

use romulus_protocol::{GuestEvent, PrimaryOrder};

use crate::random::Random;

pub(crate) const MS: u64 = 1_000_000;
/// Until then things go wrong; then everything is healed and restarted.
pub(crate) const ROUGH_MS: u64 = 700;
/// Then the VM must be well again.
pub(crate) const END_MS: u64 = 2_000;

/// A part that can stall or crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    Primary,
    Backup,
    Witness,
}

/// A line between two parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Line {
    ToBackup,
    ToPrimary,
    PrimaryWitness,
    BackupWitness,
}

impl Line {
    pub(crate) const ALL: [Self; 4] = [
        Self::ToBackup,
        Self::ToPrimary,
        Self::PrimaryWitness,
        Self::BackupWitness,
    ];
}

/// A step of the pair's life at which a fault can be aimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    Connect,
    Accept,
    FirstCopy,
    CaptureBegins,
    CaptureEnds,
    Commit,
    StandbyTrial,
    GateCloses,
    FinalCapture,
    AskPaired,
    Paired,
    Release,
    Suspicion,
    AskAlone,
    AskTakeover,
    OpenGate,
    ActivationFails,
}

const MOMENTS: [Moment; 17] = [
    Moment::Connect,
    Moment::Accept,
    Moment::FirstCopy,
    Moment::CaptureBegins,
    Moment::CaptureEnds,
    Moment::Commit,
    Moment::StandbyTrial,
    Moment::GateCloses,
    Moment::FinalCapture,
    Moment::AskPaired,
    Moment::Paired,
    Moment::Release,
    Moment::Suspicion,
    Moment::AskAlone,
    Moment::AskTakeover,
    Moment::OpenGate,
    Moment::ActivationFails,
];

/// When something goes wrong.
#[derive(Clone, Copy, Debug)]
pub(crate) enum When {
    /// At this time, in nanoseconds.
    At(u64),
    /// So long after the nth time that this happens.
    After { moment: Moment, nth: u64, delay_ns: u64 },
}

/// Something that goes wrong, or is ordered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    CrashPrimary {
        down_ns: u64,
    },
    CrashPrimaryHost,
    /// In the middle of a write, if one comes soon.
    CrashBackup {
        disk_steps: u64,
        cut_permille: u16,
        down_ns: u64,
    },
    LoseBackupHost {
        down_ns: u64,
    },
    CrashWitness {
        down_ns: u64,
    },
    Cut {
        line: Line,
        for_ns: u64,
    },
    CutLink {
        for_ns: u64,
    },
    Break,
    Stall {
        node: Node,
        for_ns: u64,
    },
    SlowLink {
        for_ns: u64,
    },
    SlowWitness {
        for_ns: u64,
    },
    FlipBit,
    AbortCapture,
    Guest(GuestEvent),
    Pause {
        for_ns: u64,
    },
    Order(PrimaryOrder),
    Failover,
    /// A host that the record does not name says hello, perhaps in a term that there never was.
    Lie {
        ahead: bool,
    },
}

impl Fault {
    /// What it is called where faults are counted.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::CrashPrimary { .. } => "crash of a replicator",
            Self::CrashPrimaryHost => "crash of a primary host",
            Self::CrashBackup { .. } => "crash of the agent",
            Self::LoseBackupHost { .. } => "loss of the backup host",
            Self::CrashWitness { .. } => "crash of the witness",
            Self::Cut { .. } => "a line cut one way",
            Self::CutLink { .. } => "a link cut",
            Self::Break => "a connection broken",
            Self::Stall { .. } => "a stall",
            Self::SlowLink { .. } => "a slow link",
            Self::SlowWitness { .. } => "a slow witness",
            Self::FlipBit => "a flipped bit",
            Self::AbortCapture => "aborted captures",
            Self::Guest(_) => "an event of a guest",
            Self::Pause { .. } => "a paused guest",
            Self::Order(_) | Self::Failover => "an order",
            Self::Lie { .. } => "a lie",
        }
    }
}

/// A run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) link_delay_ns: (u64, u64),
    pub(crate) witness_delay_ns: (u64, u64),
    pub(crate) witness_loss_permille: u64,
    pub(crate) witness_repeat_permille: u64,
    pub(crate) ns_per_byte: u64,
    /// How long the backup takes to read what its image holds; the guest may have any size.
    pub(crate) survey_ns: (u64, u64),
    pub(crate) epochs_in_flight_max: u64,
    pub(crate) standby_fails_permille: u64,
    pub(crate) activation_fails_permille: u64,
    pub(crate) abort_capture_permille: u64,
    pub(crate) faults: Vec<(When, Fault)>,
}

impl Plan {
    pub(crate) fn from_seed(random: &mut Random) -> Self {
        let link = random.pick(&[(MS / 20, MS / 5), (MS / 5, 2 * MS), (MS, 8 * MS)]);
        let witness = random.pick(&[(MS / 10, MS), (MS / 2, 5 * MS), (MS, 25 * MS)]);
        let count = random.within(0, 6);
        let mut faults: Vec<_> = (0..count).map(|_| (when(random), fault(random))).collect();
        if random.chance(250) {
            faults.extend(second_session(random));
        }
        if random.chance(150) {
            faults.extend(slow_decision(random));
        }
        if random.chance(100) {
            faults.extend(broken_hand_over(random));
        }
        Self {
            link_delay_ns: link,
            witness_delay_ns: witness,
            witness_loss_permille: random.pick(&[0, 50, 300]),
            witness_repeat_permille: random.pick(&[0, 100, 300]),
            ns_per_byte: random.pick(&[1, 10, 100, 400]),
            epochs_in_flight_max: random.within(1, 5),
            standby_fails_permille: random.pick(&[0, 0, 300]),
            activation_fails_permille: random.pick(&[0, 0, 400]),
            abort_capture_permille: random.pick(&[0, 20, 100]),
            survey_ns: random.pick(&[(0, MS), (5 * MS, 30 * MS), (60 * MS, 150 * MS)]),
            faults,
        }
    }
}

fn when(random: &mut Random) -> When {
    if random.chance(400) {
        return When::At(random.within(0, ROUGH_MS * MS));
    }
    let moment = random.pick(&MOMENTS);
    let often = matches!(
        moment,
        Moment::CaptureBegins | Moment::CaptureEnds | Moment::Commit | Moment::Release
    );
    let nth = if often {
        random.within(1, 30)
    } else {
        random.within(1, 3)
    };
    let delay_ns = random.pick(&[0, MS / 10, MS, 5 * MS, 30 * MS]);
    When::After {
        moment,
        nth,
        delay_ns: if delay_ns == 0 {
            0
        } else {
            random.within(0, delay_ns)
        },
    }
}

/// A planned move whose session ends while the guest stands still for it.
fn broken_hand_over(random: &mut Random) -> [(When, Fault); 2] {
    let ordered = When::At(random.within(200, 500) * MS);
    let broken = When::After {
        moment: Moment::FinalCapture,
        nth: 1,
        delay_ns: random.within(0, 2 * MS),
    };
    let for_ns = random.within(MS, 200 * MS);
    let fault = random.pick(&[Fault::Break, Fault::CutLink { for_ns }]);
    [(ordered, Fault::Order(PrimaryOrder::HandOver)), (broken, fault)]
}

/// A primary that falls silent for about as long as its backup waits, while the witness is slow.
fn slow_decision(random: &mut Random) -> [(When, Fault); 2] {
    let delay_ns = random.within(0, 200 * MS);
    let at = When::After {
        moment: Moment::Paired,
        nth: 1,
        delay_ns,
    };
    let for_ns = random.within(50 * MS, 110 * MS);
    let silent = random.pick(&[
        Fault::Stall {
            node: Node::Primary,
            for_ns,
        },
        Fault::Stall {
            node: Node::Backup,
            for_ns,
        },
        Fault::Cut {
            line: Line::ToBackup,
            for_ns,
        },
        Fault::CutLink { for_ns },
    ]);
    [(at, silent), (at, Fault::SlowWitness { for_ns: 400 * MS })]
}

/// A pair that is lost once, and whose primary dies while the next one is being made.
fn second_session(random: &mut Random) -> [(When, Fault); 2] {
    let lost = random.pick(&[
        Fault::Break,
        Fault::CutLink { for_ns: 80 * MS },
        Fault::CrashPrimary { down_ns: MS },
    ]);
    let moment = random.pick(&[
        Moment::Accept,
        Moment::FirstCopy,
        Moment::GateCloses,
        Moment::AskPaired,
        Moment::Paired,
        Moment::Paired,
    ]);
    let delay_ns = random.within(0, 3 * MS);
    let lost_at = When::After {
        moment: Moment::Paired,
        nth: 1,
        delay_ns: random.within(0, 100 * MS),
    };
    [
        (lost_at, lost),
        (
            When::After {
                moment,
                nth: 2,
                delay_ns,
            },
            Fault::CrashPrimaryHost,
        ),
    ]
}

fn fault(random: &mut Random) -> Fault {
    let short = random.within(MS, 60 * MS);
    let long = random.within(20 * MS, 300 * MS);
    match random.within(0, 42) {
        0..4 => Fault::CrashPrimary { down_ns: short },
        4..8 => Fault::CrashPrimaryHost,
        8..11 => {
            let cut_permille = u16::try_from(random.within(0, 1001)).expect("a small number");
            Fault::CrashBackup {
                disk_steps: random.within(0, 60),
                cut_permille,
                down_ns: short,
            }
        }
        11 => Fault::LoseBackupHost { down_ns: long },
        12 => Fault::CrashWitness { down_ns: long },
        13..17 => Fault::CutLink {
            for_ns: if random.chance(500) { short } else { long },
        },
        17..20 => Fault::Cut {
            line: random.pick(&Line::ALL),
            for_ns: long,
        },
        20..23 => Fault::Break,
        23..28 => {
            let node = random.pick(&[Node::Primary, Node::Backup, Node::Witness]);
            Fault::Stall {
                node,
                for_ns: if random.chance(500) { short } else { long },
            }
        }
        28..30 => Fault::SlowLink { for_ns: long },
        30 | 31 => Fault::SlowWitness { for_ns: long },
        32 => Fault::FlipBit,
        33 => Fault::AbortCapture,
        34 => Fault::Guest(random.pick(&[GuestEvent::Changed, GuestEvent::Lost, GuestEvent::PoweredOff])),
        35 => Fault::Pause { for_ns: long },
        36 => Fault::Order(PrimaryOrder::Unprotect),
        37 | 38 => Fault::Order(PrimaryOrder::HandOver),
        39 => Fault::Failover,
        _ => Fault::Lie {
            ahead: random.chance(500),
        },
    }
}
