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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{MachineInfo, Pause, Prepare, Restore};

    /// Each request, and a letter for it.
    fn requests() -> [(char, Request); 12] {
        let prepare = Prepare {
            machine: MachineInfo::default(),
            private: false,
        };
        [
            ('a', Request::Arm),
            ('h', Request::Harvest),
            ('p', Request::Pause(Pause { limit_ns: 1 })),
            ('r', Request::Resume),
            ('t', Request::Halt(Halt { for_good: false })),
            ('T', Request::Halt(Halt { for_good: true })),
            ('g', Request::Go),
            ('l', Request::Alive),
            ('b', Request::Prepare(prepare)),
            ('R', Request::Restore(Restore { state_bytes: 1 })),
            ('A', Request::Activate),
            ('d', Request::Detach),
        ]
    }

    #[test]
    fn each_phase_admits_exactly_these_requests() {
        let until_ns = 1;
        let halted = |capturing| Phase::Halted { until_ns, capturing };
        let table = [
            (Phase::Empty, "lbd"),
            (Phase::Prepared { trial: false }, "lRd"),
            (Phase::Prepared { trial: true }, "lRd"),
            (Phase::Restored { trial: false }, "lRAd"),
            (Phase::Restored { trial: true }, "lRd"),
            (Phase::Running, "ahptTld"),
            (Phase::Paused { until_ns }, "rtTld"),
            (Phase::Expired, "Tld"),
            (halted(false), "ptTgld"),
            (halted(true), "rtTld"),
            (Phase::HaltedForGood, "tTld"),
        ];
        for (phase, expected) in table {
            let admitted = requests()
                .into_iter()
                .filter(|(_, request)| phase.admit(request).is_ok());
            let admitted: String = admitted.map(|(letter, _)| letter).collect();
            assert_eq!(admitted, expected, "{phase:?}");
        }
    }

    #[test]
    fn a_refusal_says_why_and_what_to_do() {
        let code = |phase: Phase, request| phase.admit(&request).unwrap_err().code;
        assert_eq!(
            code(Phase::Restored { trial: true }, Request::Activate),
            ErrorCode::TrialOnly
        );
        assert_eq!(code(Phase::Expired, Request::Resume), ErrorCode::PauseExpired);
        assert_eq!(code(Phase::HaltedForGood, Request::Go), ErrorCode::HaltedForGood);
        let refusal = Phase::Paused { until_ns: 1 }.admit(&Request::Arm).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::WrongOrder);
        assert_eq!(
            refusal.text,
            "Arm does not belong here: the guest is paused, and waits for Resume or Halt"
        );
    }

    #[test]
    fn only_a_stop_has_a_deadline_and_a_stop_for_good_has_none() {
        assert_eq!(Phase::Paused { until_ns: 5 }.deadline_ns(), Some(5));
        let halted = Phase::Halted {
            until_ns: 6,
            capturing: true,
        };
        assert_eq!(halted.deadline_ns(), Some(6));
        for phase in [Phase::Running, Phase::Expired, Phase::HaltedForGood, Phase::Empty] {
            assert_eq!(phase.deadline_ns(), None);
        }
    }
}
