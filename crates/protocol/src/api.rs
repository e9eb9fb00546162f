//! What goes in and comes out of the two state machines.
//!
//! Both are driven alike: `handle(now, event)` and `handle_timeout(now)` go in; then `poll_command()` is called until it
//! gives `None`, and `poll_timeout()` says when to call `handle_timeout` at the latest. **Commands are carried out in
//! order, and a command marked *durable* has reached the disk before the next one is begun.**

use romulus_types::{Epoch, HostId, Session, Term, Time, VmId, WitnessInstance};
use serde::{Deserialize, Serialize};

use crate::message::{BackupMessage, PrimaryMessage};
use crate::record::{Mode, WitnessReply, WitnessRequest};

/// What a host remembers of the record across its own crashes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Remembered {
    /// The witness's instance.
    pub instance: WitnessInstance,
    /// The highest term seen.
    pub term: Term,
}

/// Settings of a [`crate::Primary`]. Durations in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PrimaryConfig {
    /// The VM.
    pub vm: VmId,
    /// This host.
    pub host: HostId,
    /// The host that is to hold the backup.
    pub backup: HostId,
    /// An operator said that a VM which the witness does not know, or whose record is `Ended`, is to be registered as
    /// running alone here. An unknown VM of a host that remembers a record is not: there the witness lost its store,
    /// and the operator first removes what both hosts remember.
    pub register: bool,
    /// Length of an epoch.
    pub epoch_ns: u64,
    /// Between two heartbeats.
    pub heartbeat_interval_ns: u64,
    /// Silence of the backup after which the primary asks for `Alone`; shorter than the backup's.
    pub suspicion_ns: u64,
    /// An answer older than this releases nothing. The backup's suspicion timeout.
    pub release_age_ns_max: u64,
    /// Between two tries to reach the backup or the witness.
    pub retry_ns: u64,
    /// Checkpoints that may be captured and not yet acknowledged.
    pub epochs_in_flight_max: u64,
    /// Longest hold of output before the primary gives the backup up.
    pub hold_ns_max: u64,
    /// Mute for longer than this: the guest is suspended until the record is known.
    pub mute_ns_max: u64,
}

/// What the hypervisor reported about the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestEvent {
    /// Somebody else paused it. A capture that is outstanding waits until it runs again, or fails.
    Paused,
    /// It runs again.
    Resumed,
    /// It was reset, or a device was plugged or unplugged: what was bootstrapped no longer holds.
    Changed,
    /// It was powered off by the guest or the operator.
    PoweredOff,
    /// Its hypervisor died without a power-off.
    Lost,
}

/// What an operator wants of the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrimaryOrder {
    /// Leave the guest running here, unprotected, with no trace of us.
    Unprotect,
    /// Move the guest to the backup on purpose.
    HandOver,
}

/// Something happened at the primary.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PrimaryEvent {
    /// The backup accepted the session that [`PrimaryCommand::Connect`] named.
    Connected(Session),
    /// It could not be reached, refused, or the connection ended.
    Disconnected(Session),
    /// A message of this session.
    Peer(Session, BackupMessage),
    /// The witness answered.
    Witness(WitnessReply),
    /// The live copy asked for by [`PrimaryCommand::StartFirstCopy`] is sent.
    FirstCopyDone(Session),
    /// The guest was captured, runs again (unless it was to stay stopped), and the checkpoint is on its way. The time is when it was
    /// due: as it was asked for, or later, when the driver left an idle guest alone for longer. The next is due an epoch after it.
    Captured(Session, Epoch, Time),
    /// The capture failed; the guest runs, nothing dirty was forgotten; the session can't go on.
    CaptureFailed(Session, Epoch),
    /// All that had arrived before [`PrimaryCommand::DrainSockets`] has been handed in.
    Drained,
    /// The hypervisor reported something.
    Guest(GuestEvent),
    /// An operator's order.
    Order(PrimaryOrder),
    /// Epochs are to be so long from now on, in nanoseconds. A capture that was asked for stays due when it was.
    EpochLength(u64),
}

/// Something is to be done at the primary. Carried out in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PrimaryCommand {
    /// *Durable.* Write this over what was remembered.
    Remember(Remembered),
    /// Send to the witness; the reply comes as an event. Losing it is allowed: it is repeated.
    AskWitness(WitnessRequest),
    /// Connect to the backup with this new session.
    Connect {
        /// The session.
        session: Session,
        /// The record's term, for the backup's `Hello`.
        term: Term,
        /// The witness's instance.
        instance: WitnessInstance,
    },
    /// End the session's connection and drop everything of it that is under way.
    Disconnect(Session),
    /// Send on the session's control stream.
    Send(Session, PrimaryMessage),
    /// Start dirty tracking and send all memory while the guest runs.
    StartFirstCopy(Session),
    /// Take the checkpoint of `epoch`, not before `at`.
    Capture {
        /// The session.
        session: Session,
        /// The epoch that it ends.
        epoch: Epoch,
        /// When.
        at: Time,
        /// Close the gate at this barrier.
        close_gate: bool,
        /// Leave the guest stopped afterwards.
        stay_stopped: bool,
    },
    /// The frames of all epochs up to this one leave.
    Release(Epoch),
    /// Everything held leaves, in order, and the gate is removed. Also removes an earlier life's gate.
    OpenGate,
    /// What is held is dropped and the guest is stopped for good: another host speaks for it.
    StopGuest,
    /// The guest is stopped until [`PrimaryCommand::ResumeGuest`]; the gate stays as it is.
    SuspendGuest,
    /// The guest runs again.
    ResumeGuest,
    /// Hand in everything that has arrived on the sockets, then [`PrimaryEvent::Drained`].
    DrainSockets,
    /// Something that operators see happened.
    Report(Notice),
    /// Nothing further will happen: send what is queued for the backup, detach, leave no trace, end. The guest runs here
    /// unless it was stopped.
    Finish,
}

/// Settings of a [`crate::Backup`] for one VM. Durations in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BackupConfig {
    /// The VM.
    pub vm: VmId,
    /// This host.
    pub host: HostId,
    /// Silence of the primary after which the backup asks for the record.
    pub suspicion_ns: u64,
    /// Between two tries to reach the witness.
    pub retry_ns: u64,
    /// A forced failover waits this long, so that the other side is mute and suspended.
    pub mute_ns_max: u64,
    /// A host that said hello waits this long for the witness's word; then it is refused, and may try again.
    pub hello_wait_ns: u64,
}

/// What the image store held when the agent started, or after a command changed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageStatus {
    /// No usable image.
    Unusable,
    /// The last commit.
    Committed {
        /// Its session.
        session: Session,
        /// Its epoch.
        epoch: Epoch,
    },
    /// It was given to a guest that was activated from it: never again.
    Consumed,
}

/// What an operator wants of the backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BackupOrder {
    /// Ask the primary to hand over, or take over when it is lost.
    Failover,
    /// Take over though the witness can't be reached. Waits out `mute_ns_max` unless the other side was fenced.
    ForceFailover {
        /// A fencing command has succeeded.
        fenced: bool,
    },
}

/// Something happened at the backup.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BackupEvent {
    /// A primary wants a session; admission (memory, certificate, machine) is already checked. What it says of the record
    /// is its own word: the witness is asked before anything follows from it. Answered by [`BackupCommand::Accept`] or
    /// [`BackupCommand::Refuse`], unless the connection ends before.
    Hello {
        /// The session.
        session: Session,
        /// The primary's host, as its certificate says.
        primary: HostId,
        /// The term it knows.
        term: Term,
        /// The witness instance it knows.
        instance: WitnessInstance,
    },
    /// The connection ended, accepted or not.
    Disconnected(Session),
    /// A message of this session.
    Peer(Session, PrimaryMessage),
    /// The checkpoint is complete, verified and durable: it survives the primary. Handed in once for each epoch, in
    /// order, and never for a checkpoint that became durable after [`BackupCommand::MarkUnusable`] was carried out.
    /// With the time, by the primary's clock, that its commit record names.
    Verified(Session, Epoch, Time),
    /// A checkpoint was not what its commit record said; it was discarded.
    Invalid(Session, Epoch),
    /// A standby has loaded this epoch.
    StandbyLoaded(Session, Epoch),
    /// No standby could load it.
    StandbyFailed(Session),
    /// The witness answered.
    Witness(WitnessReply),
    /// All that had arrived before [`BackupCommand::DrainSockets`] has been handed in.
    Drained,
    /// The guest runs here.
    Activated,
    /// It could not be started.
    ActivationFailed,
    /// An operator's order.
    Order(BackupOrder),
}

/// Something is to be done at the backup. Carried out in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BackupCommand {
    /// *Durable.* Write this over what was remembered.
    Remember(Remembered),
    /// Send to the witness; the reply comes as an event. Losing it is allowed: it is repeated.
    AskWitness(WitnessRequest),
    /// *Durable.* Mark the image unusable; it will be overwritten, or another host has spoken since.
    MarkUnusable,
    /// Tell the primary that the session is accepted and receive its checkpoints.
    Accept(Session),
    /// Tell it why not.
    Refuse(Session, RefuseReason),
    /// End the session's connection; drop what is staged but not committed.
    Disconnect(Session),
    /// Send on the session's control stream.
    Send(Session, BackupMessage),
    /// Let a trial standby load the commit of this epoch, then have one waiting.
    TryStandby(Session, Epoch),
    /// *Durable* mark of the image as consumed, then: finish applying, let the guest run, announce its addresses.
    /// The last commit of the session is meant, should the driver already have a newer one than `epoch`.
    Activate {
        /// Session of the commit.
        session: Session,
        /// Its epoch.
        epoch: Epoch,
        /// The term in which this host speaks.
        term: Term,
    },
    /// Hand in everything that has arrived on the sockets, then [`BackupEvent::Drained`].
    DrainSockets,
    /// The guest that was activated here is stopped for good: the witness, reached after a forced takeover or a restart, named
    /// another host. Without a guest there is nothing to do.
    StopGuest,
    /// Something that operators see happened.
    Report(Notice),
}

/// Why the protocol refuses a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RefuseReason {
    /// The guest runs here, or may be about to.
    ActiveHere,
    /// Another session of this VM is connected.
    Busy,
    /// The primary knows an older term than this host.
    OldTerm,
    /// The primary uses another witness, or one restored from an old copy.
    OtherWitness,
    /// A request of this host to the witness is not resolved.
    Unresolved,
    /// The witness's record does not name that host as alone in the term that it claims.
    NotNamed,
    /// The witness did not say in time whether the record names that host.
    WitnessSilent,
}

/// What operators see, as events and in the log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Notice {
    /// The state shown by `status` changed.
    Protection(Protection),
    /// Primary and backup are paired from this term and epoch.
    Paired(Term, Epoch),
    /// The peer is suspected: silent for this long, or disconnected.
    Suspicion {
        /// Silence in nanoseconds.
        silent_ns: u64,
    },
    /// The witness granted a record.
    Grant(Term, Mode),
    /// The witness refused; this is its record.
    Refusal(Term, Mode),
    /// The witness could not be reached for this many tries.
    WitnessSilent(u32),
    /// An answer was too old to release by; frames stay held.
    StaleAnswer {
        /// Its age in nanoseconds.
        age_ns: u64,
    },
    /// Output was held for too long; the backup is given up.
    HeldTooLong {
        /// Since when, in nanoseconds.
        held_ns: u64,
    },
    /// An operator's order can't be carried out in this state.
    OrderRefused(Protection),
    /// The move to the backup did not finish in time; the guest stays here.
    HandOverFailed,
    /// The peer said what it can't have meant; the session was ended.
    BadPeer(&'static str),
    /// The backup could not start the guest that it had taken over.
    ActivationFailed,
}

/// How many suspicion timeouts a peer may be silent while there can be no pair yet.
pub(crate) const UNPAIRED_PATIENCE: u64 = 10;

/// The operator's words for the state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protection {
    /// A failure of this host loses nothing.
    Protected,
    /// It does, because of this.
    NotProtected(NotProtected),
}

/// Why a VM is not protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NotProtected {
    /// Attaching, asking the witness.
    Starting,
    /// The witness does not know the VM, is another instance, or lost terms: an operator must say what is true.
    WitnessRefuses,
    /// The witness can't be reached.
    WitnessUnreachable,
    /// No backup is connected.
    NoBackup,
    /// Memory is being copied.
    Resynchronising,
    /// The standby is loading a checkpoint, or could not.
    StandbyNotProven,
    /// The gate is closing, the record changes.
    Pairing,
    /// The backup is lost; who speaks is being decided.
    Resolving,
    /// The guest does not run.
    GuestNotRunning,
    /// An operator turned protection off.
    Disabled,
    /// Another host speaks for the VM.
    Fenced,
    /// It runs here after a takeover.
    TookOver,
}
