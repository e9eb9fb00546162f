//! Mistakes that can be planted, **for the simulator and the model only**: they show that the checkers would find them.
//! No daemon can set one; there is no setting and no message that does.

/// One mistake. Each breaks an invariant of the design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Weakness {
    /// The primary lets an epoch's frames leave as soon as it is captured.
    ReleaseBeforeAck,
    /// The primary believes answers however old they are.
    ReleaseByStaleAnswer,
    /// The primary pairs at a commit that predates the barrier at which the gate was closed.
    PairBeforeGateCommit,
    /// The primary opens the gate when its backup is lost while its request to pair is unresolved.
    AbandonPairing,
    /// The primary opens the gate on an order or a lost peer without asking for the record.
    OpenWithoutAsking,
    /// A new life of the primary trusts a record `Alone(self)` as it reads it: requests of its earlier life may follow.
    TrustReadRecord,
    /// Neither side compares the witness's instance and term with what it remembers, and the witness does not either.
    TrustAnyWitness,
    /// The backup acknowledges while its request for the record is unresolved.
    AckWhileUnresolved,
    /// The backup acknowledges what is verified after it has taken over.
    AckAfterTakeover,
    /// The backup takes over as soon as it suspects, without a grant.
    TakeOverWithoutGrant,
    /// The record names no session: the backup neither marks an image before overwriting it nor compares its session with
    /// the record's, and the primary pairs without waiting for a commit of the session.
    TakeOverFromOldSession,
    /// The backup draws a new nonce for each try, so that a grant whose reply was lost looks like a refusal.
    NewNonceForEachTry,
    /// A restarted backup that finds a grant of an earlier life unconsumed takes it for somebody else's.
    ForgetGrant,
    /// The backup does not mark its image as consumed.
    ActivateTwice,
    /// The backup takes a hello's word for what the record says.
    BelieveHello,
}
