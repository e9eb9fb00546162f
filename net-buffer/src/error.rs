//! What can go wrong with a gate, and what the operator can do about it.

use std::io;

use romulus_host_sys::bpf::LoadError;

/// An error of the packet gate.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// There is no such interface.
    #[error(
        "there is no network interface {tap:?} in this network namespace: give the guest's tap with --tap"
    )]
    NoSuchTap {
        /// The name asked for.
        tap: String,
    },
    /// The interface is of another kind, for instance a macvtap, whose output cannot be held this way.
    #[error("{tap:?} is a {kind} interface, not a tap: only a guest on a tap can be gated")]
    NotATap {
        /// The name asked for.
        tap: String,
        /// Its kind, as the kernel names it.
        kind: String,
    },
    /// Something sees the guest's frames before our filter would, and could pass them on unheld.
    #[error(
        "{what} on {tap:?} runs before the gate and could let output pass it: remove it, or move it behind priority 1"
    )]
    RunsBefore {
        /// The guest's tap.
        tap: String,
        /// What was found.
        what: String,
    },
    /// A filter of a gate whose process is gone: the guest is mute.
    #[error(
        "{tap:?} carries the gate of a process that is gone, so the guest is mute: once the witness's record \
         lets this host speak, remove it with `romulus unprotect` and try again"
    )]
    Stale {
        /// The guest's tap.
        tap: String,
    },
    /// Another process gates this tap now.
    #[error("{tap:?} is gated by another process through {relay:?}: the VM is protected by someone else")]
    InUse {
        /// The guest's tap.
        tap: String,
        /// The other's relay.
        relay: String,
    },
    /// A tap of ours could not be made.
    #[error(
        "cannot make the tap {name:?} (it needs /dev/net/tun and CAP_NET_ADMIN, and the name must be free)"
    )]
    MakeTap {
        /// The name, or the pattern for it.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A program was refused by the kernel.
    #[error("cannot load the gate's program")]
    Program(#[from] LoadError),
    /// The kernel refused a change or a question.
    #[error("cannot {what} (is CAP_NET_ADMIN there, and cls_bpf, act_mirred and sch_ingress in the kernel?)")]
    Netlink {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The relay does not work any more, so nothing of the guest leaves.
    #[error(
        "the relay tap {relay:?} failed, so the guest is mute: was it deleted or set down by another program?"
    )]
    RelayLost {
        /// The relay's name.
        relay: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Our filter is not on the guest's tap any more: output may have left unheld.
    #[error("the gate's filter on {tap:?} was removed by another program: output is not held any more")]
    FilterLost {
        /// The guest's tap.
        tap: String,
    },
    /// The gate was told to drop everything, and that is final.
    #[error("the gate on {tap:?} was discarded: the guest must be stopped, not heard")]
    Discarded {
        /// The guest's tap.
        tap: String,
    },
    /// The relay thread could not be started or woken.
    #[error("cannot start or wake the gate's thread")]
    Thread(#[source] io::Error),
}
