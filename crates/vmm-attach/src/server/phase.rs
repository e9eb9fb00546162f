//! Where the machine stands, as far as clients have a say in it, and which requests belong there.
//!
//! ```text
//!   Empty ──Prepare──► Prepared ◄──(client gone)── Restored ──Activate──► Running
//!                          └─────────Restore─────────▲
//!
//!             Pause                      Halt
//!   Running ─────────► Paused ─────────────────────► Halted ───Halt for good (from any of these)──► HaltedForGood
//!    ▲  ▲  ◄──Resume─────┘ │                          │  │  ◄─ Go
//!    │  └───── Expired ◄───┴──(limit passed: it runs)─┘  │
//!    └────────────────(client gone, Detach)──────────────┘
//! ```

use crate::proto::{ErrorCode, Halt, Refusal, Request, Role};

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Empty,
    Prepared {
        trial: bool,
    },
    Restored {
        trial: bool,
    },
    Running,
    Paused {
        until_ns: u64,
    },
    /// It runs, and the client that stopped it does not know it yet.
    Expired,
    Halted {
        until_ns: u64,
        /// Within a `Pause` that came during the halt.
        capturing: bool,
    },
    HaltedForGood,
}

impl Phase {
    /// When the guest is let go whatever the client does.
    pub(crate) fn deadline_ns(self) -> Option<u64> {
        match self {
            Self::Paused { until_ns } | Self::Halted { until_ns, .. } => Some(until_ns),
            _ => None,
        }
    }

    /// What a new client finds.
    pub(crate) fn role(self) -> Role {
        match self {
            Self::Empty => Role::Empty,
            Self::Prepared { .. } | Self::Restored { .. } => Role::Prepared,
            Self::HaltedForGood => Role::Halted,
            Self::Running | Self::Paused { .. } | Self::Expired | Self::Halted { .. } => Role::Running,
        }
    }

    /// Whether a request belongs here.
    pub(crate) fn admit(self, request: &Request) -> Result<(), Refusal> {
        if matches!(request, Request::Alive | Request::Detach) {
            return Ok(());
        }
        let allowed = match self {
            Self::Empty => matches!(request, Request::Prepare(_)),
            Self::Prepared { .. } => matches!(request, Request::Restore(_)),
            Self::Restored { trial: true } if matches!(request, Request::Activate) => {
                return Err(Refusal::new(
                    ErrorCode::TrialOnly,
                    "this machine is a trial on private memory: end its VMM, and prepare another one to activate",
                ));
            }
            Self::Restored { .. } => matches!(request, Request::Restore(_) | Request::Activate),
            Self::Running => matches!(
                request,
                Request::Arm | Request::Harvest | Request::Pause(_) | Request::Halt(_)
            ),
            Self::Paused { .. } => matches!(request, Request::Resume | Request::Halt(_)),
            Self::Expired if matches!(request, Request::Halt(Halt { for_good: true })) => true,
            Self::Expired => return Err(expired()),
            Self::Halted { capturing, .. } => match request {
                Request::Resume => capturing,
                Request::Pause(_) | Request::Go => !capturing,
                other => matches!(other, Request::Halt(_)),
            },
            Self::HaltedForGood if matches!(request, Request::Halt(_)) => true,
            Self::HaltedForGood => {
                return Err(Refusal::new(
                    ErrorCode::HaltedForGood,
                    "the guest was stopped for good, because another host speaks for it: end this VMM",
                ));
            }
        };
        if allowed {
            return Ok(());
        }
        let text = format!("{} does not belong here: {}", request.name(), self.place());
        Err(Refusal::new(ErrorCode::WrongOrder, text))
    }

    fn place(self) -> &'static str {
        match self {
            Self::Empty => "the VMM has no machine yet, and waits for Prepare",
            Self::Prepared { .. } => "the machine was prepared, and waits for Restore",
            Self::Restored { .. } => "the machine was restored, and waits for Activate",
            Self::Running => "the guest runs",
            Self::Paused { .. } => "the guest is paused, and waits for Resume or Halt",
            Self::Expired => "the guest was let go",
            Self::Halted { capturing: false, .. } => "the guest is halted, and waits for Go or Pause",
            Self::Halted { capturing: true, .. } => "a checkpoint of the halted guest waits for Resume",
            Self::HaltedForGood => "the guest was stopped for good",
        }
    }
}

/// The guest ran since it was stopped.
pub(crate) fn expired() -> Refusal {
    Refusal::new(
        ErrorCode::PauseExpired,
        "the guest was let go before, because its stop had lasted to its limit: what was copied since is void",
    )
}
